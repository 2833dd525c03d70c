"""rms_norm and layer_norm: a short row, the longest in registers, one in a loop; everything asked for, and nothing."""

from collections.abc import Iterator


def calls() -> Iterator[tuple]:
    import torch

    from pykernels.kernels.layer_norm import layer_norm, layer_norm_backward, layer_norm_quantized
    from pykernels.kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_quantized

    every, hopper = (80, 90, 100), (90,)
    bf16, f32, f16 = torch.bfloat16, torch.float32, torch.float16

    def forward(op, M, K, dtype, residual=True):
        x, parameter = torch.empty(M, K, dtype=dtype), torch.empty(K, dtype=f32)
        return lambda: op(x, parameter, parameter, x if residual else None, 1e-6, 1.0)

    def backward(op, M, K, dtype, weight_dtype=bf16):
        x, row, weight = torch.empty(M, K, dtype=dtype), torch.empty(M), torch.empty(K, dtype=weight_dtype)
        statistics = (row, row) if op is layer_norm_backward else (row,)
        return lambda: op(x, x, x, weight, *statistics, 1.0, True, bf16)

    for K, dtype, archs in (
        (128, bf16, hopper),
        (1000, f16, hopper),
        (4096, bf16, every),
        (8191, f32, every),
        (16383, bf16, every),
        (16384, f32, every),
        (16384, bf16, hopper),
        (20000, bf16, hopper),
    ):
        for op in (rms_norm, layer_norm, rms_norm_quantized, layer_norm_quantized):
            yield f"{op.__name__} {K} {dtype}", archs, None, forward(op, 512, K, dtype)
    yield "rms_norm plain", every, None, forward(rms_norm, 512, 4096, bf16, residual=False)
    yield "rms_norm bare", hopper, None, lambda: rms_norm(torch.empty(512, 4096, dtype=bf16))

    for K, dtype, archs in (
        (128, bf16, hopper),
        (1000, f16, hopper),
        (2048, f32, hopper),
        (4096, bf16, every),
        (4096, f32, every),
        (4095, f32, every),
        (8191, f32, hopper),
        (8192, f32, every),
        (8192, bf16, every),
        (20000, bf16, every),
        (20000, f32, hopper),
    ):
        for op in (rms_norm_backward, layer_norm_backward):
            yield f"{op.__name__} {K} {dtype}", archs, None, backward(op, 512, K, dtype)
    x = torch.empty(512, 4096, dtype=bf16)
    yield "rms_norm_backward bare", hopper, None, lambda: rms_norm_backward(x, None, x, None, torch.empty(512))
