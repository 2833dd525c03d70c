"""int8_block_scaled_matmul: every configuration with a bias; a ragged last block; rows off their alignment.

Off it are the operands' rows, or the output's alone.
"""

from collections.abc import Iterator


def calls() -> Iterator[tuple]:
    import torch

    from pykernels.kernels import int8_block_scaled_matmul as module

    every, hopper = (80, 90, 100), (90,)

    def product(m, k=4096, n=4096):
        blocks = -(-k // 128)
        a, b = torch.empty(m, k, dtype=torch.int8), torch.empty(n, k, dtype=torch.int8)
        scales = torch.empty(m, blocks), torch.empty(-(-n // 128), blocks)
        return module.int8_block_scaled_matmul(a, b, *scales, torch.empty(n), torch.bfloat16)

    for m, configs in module.CONFIGS.items():
        for config in configs:
            yield f"block-scaled M <= {m}", every, config, lambda m=m: product(m)
    yield "block-scaled, last K masked", hopper, module.CONFIGS[8192][0], lambda: product(8192, 4112)
    yield "block-scaled ragged", every, module.CONFIGS[64][0], lambda: product(8191, 4112, 4097)
    yield "block-scaled unaligned", every, module.UNALIGNED, lambda: product(65, 1001, 4097)
