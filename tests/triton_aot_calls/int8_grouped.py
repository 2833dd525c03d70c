"""int8_grouped_matmul: every configuration with the fullest epilogue; few experts and many; the bare accumulator."""

from collections.abc import Iterator


def calls() -> Iterator[tuple]:
    import torch

    from pykernels.kernels import int8_grouped_matmul as module

    every, hopper = (80, 90, 100), (90,)
    bf16 = torch.bfloat16

    def product(rows, experts, k=4096, n=4096, counts=torch.int64, **how):
        a, b = torch.empty(rows, k, dtype=torch.int8), torch.empty(1, n, k, dtype=torch.int8).expand(experts, n, k)
        scale, bias = torch.empty(experts, n), torch.empty(experts, n, dtype=bf16)
        how = how or {"a_scale": torch.empty(rows), "b_scale": scale, "bias": bias, "activation": 2, "out_dtype": bf16}
        return module.int8_grouped_matmul(a, b, torch.empty(experts, dtype=counts), **how)

    for rows, configs in module.CONFIGS.items():
        for config in configs:
            yield f"grouped, {rows} rows an expert", every, config, lambda r=rows: product(8 * r, 8)
    config = module.CONFIGS[8192][0]
    yield "grouped, 256 experts", hopper, config, lambda: product(65536, 256, counts=torch.int32)
    yield "grouped, last K masked", hopper, config, lambda: product(8192, 8, k=4112)
    yield "grouped, int32", hopper, config, lambda: product(8192, 8, out_dtype=torch.int32)
    yield "grouped unaligned", every, module.UNALIGNED, lambda: product(512, 8, k=1001)
