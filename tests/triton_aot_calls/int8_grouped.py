"""int8_grouped_matmul: every configuration with the fullest epilogue; few experts and many; the bare accumulator.

Its layer's backward: every configuration for 16-bit gradients and for float32; the sums that are the bias's gradient.
"""

from collections.abc import Iterator


def calls() -> Iterator[tuple]:
    import torch

    from pykernels.kernels import int8_grouped_linear_backward as backward
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
    yield "grouped ragged", every, module.CONFIGS[64][0], lambda: product(8191, 8, k=4112, n=4097)
    yield "grouped unaligned", every, module.UNALIGNED, lambda: product(511, 8, k=1001, n=4097)

    def gradient(rows, dtype, k=4096, n=4096, experts=8):
        grad, w = torch.empty(rows, n, dtype=dtype), torch.empty(1, n, k, dtype=torch.int8).expand(experts, n, k)
        counts = torch.empty(experts, dtype=torch.int64)
        return backward.int8_grouped_linear_backward(grad, w, torch.empty(experts, n), counts)

    for dtype, by_rows in ((bf16, backward.CONFIGS), (torch.float32, backward.FLOAT32_CONFIGS)):
        for rows, configs in by_rows.items():
            for config in configs:
                name = f"grouped backward, {rows} rows an expert, {dtype}"
                yield name, every, config, lambda r=rows, d=dtype: gradient(8 * r, d)
    config = backward.CONFIGS[8192][0]
    yield "grouped backward, fp16, 256 experts", hopper, config, lambda: gradient(65536, torch.float16, experts=256)
    yield "grouped backward, last N masked", hopper, config, lambda: gradient(8192, bf16, n=1001)
    for dtype in (bf16, torch.float32):
        name = f"grouped backward unaligned, {dtype}"
        yield name, every, backward.UNALIGNED, lambda d=dtype: gradient(512, d, k=1001, n=1001)
        rows = torch.empty(8192, 4096, dtype=dtype)
        counts = torch.empty(8, dtype=torch.int64)
        yield f"grouped sum, {dtype}", every, None, lambda r=rows, c=counts: backward.grouped_sum(r, c)
