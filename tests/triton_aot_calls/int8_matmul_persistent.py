"""The persistent int8_matmul: every configuration with the fullest epilogue, its residual float32, and with none.

M and K end inside a tile.
"""

from collections.abc import Iterator


def calls() -> Iterator[tuple]:
    import torch

    from pykernels.kernels._int8_matmul_persistent import CONFIGS
    from pykernels.kernels.int8_matmul import int8_matmul

    def product(out_dtype, **how):
        a, b = (torch.empty(size, 4112, dtype=torch.int8) for size in (8191, 6144))
        return int8_matmul(a, b, out_dtype=out_dtype, **how)

    def full(out_dtype):
        return product(
            out_dtype,
            a_scale=torch.empty(8191),
            b_scale=torch.empty(6144),
            bias=torch.empty(6144),
            residual=torch.empty(8191, 6144),
            activation=2,
            a_zero_point=torch.empty(8191, dtype=torch.int32),
            b_sum=torch.empty(6144, dtype=torch.int32),
        )

    for config in CONFIGS[8192]:
        yield "matmul persistent, bfloat16", (90, 100), config, lambda: full(torch.bfloat16)
        yield "matmul persistent, float32", (90, 100), config, lambda: full(torch.float32)
        yield "matmul persistent, int32", (90,), config, lambda: product(torch.int32)
