"""Quantisers, dequantisation and the INT8 products."""


def calls():
    import torch

    from pykernels.kernels import int8_linear, int8_matmul, int8_weight_only_linear
    from pykernels.kernels.dequantize import dequantize
    from pykernels.kernels.quantize_asymmetric import quantize_asymmetric
    from pykernels.kernels.quantize_blockwise import quantize_blockwise
    from pykernels.kernels.quantize_both import quantize_both, quantize_transposed
    from pykernels.kernels.quantize_colwise import quantize_colwise
    from pykernels.kernels.quantize_rowwise import quantize_rowwise

    every, hopper = (80, 90, 100), (90,)
    bf16, f32, f16 = torch.bfloat16, torch.float32, torch.float16

    def x(M, K, dtype=bf16):
        return torch.empty(M, K, dtype=dtype)

    def codes(M, K):
        return torch.empty(M, K, dtype=torch.int8)

    def scale(*shape):
        return torch.empty(shape)

    # The longest row in registers, the row in a loop, a short row; stochastic with whole Philox blocks and without.
    yield "rowwise 4096", every, None, lambda: quantize_rowwise(x(64, 4096))
    yield "rowwise loop", hopper, None, lambda: quantize_rowwise(x(8, 20000), scale=scale(1))
    yield "rowwise short", hopper, None, lambda: quantize_rowwise(x(100, 37, f16), scale=scale(100))
    yield "rowwise stochastic 16384", every, None, lambda: quantize_rowwise(x(64, 16384, f32), True, 2**40)
    yield "rowwise stochastic odd", hopper, None, lambda: quantize_rowwise(x(64, 4095), True, 3)
    yield "rowwise stochastic loop", hopper, None, lambda: quantize_rowwise(x(64, 20000), True, 3)
    yield "colwise", every, None, lambda: quantize_colwise(x(512, 1024))
    yield "colwise stochastic odd", hopper, None, lambda: quantize_colwise(x(512, 1023, f32), True)
    yield "both stochastic", every, None, lambda: quantize_both(x(512, 1024), True)
    yield "both odd", hopper, None, lambda: quantize_both(x(511, 1023))
    yield "transposed", every, None, lambda: quantize_transposed(x(512, 1024))
    yield "transposed stochastic odd", hopper, None, lambda: quantize_transposed(x(511, 1023, f32), True)
    yield "blockwise 128", every, None, lambda: quantize_blockwise(x(64, 4096), [128])
    yield "blockwise 48", hopper, None, lambda: quantize_blockwise(x(64, 1000, f32), [48])
    yield "asymmetric", every, None, lambda: quantize_asymmetric(x(64, 4096))
    yield "asymmetric 16384", hopper, None, lambda: quantize_asymmetric(x(64, 16384, f32))
    yield "asymmetric loop", hopper, None, lambda: quantize_asymmetric(x(64, 20000))
    yield "dequantize", every, None, lambda: dequantize(codes(64, 4096), scale(64, 1), [4096], None, bf16)
    yield (
        "dequantize zero point",
        hopper,
        None,
        lambda: dequantize(codes(512, 512), scale(4, 4), [128, 128], torch.empty(4, 4, dtype=torch.int32)),
    )

    b, s = codes(4096, 4096), scale(4096)

    def matmul(M, K, **epilogue):
        return int8_matmul.int8_matmul(codes(M, K), codes(4096, K), scale(M), s, s.to(bf16), out_dtype=bf16, **epilogue)

    def ragged(M, K, out_dtype, residual_dtype, N=4097):
        return int8_matmul.int8_matmul(
            codes(M, K),
            codes(N, K),
            scale(M + 1)[1:],  # whose addresses are off their alignment as well
            scale(N),
            scale(N),
            x(M, N, residual_dtype),
            2,
            torch.empty(M, dtype=torch.int32),
            torch.empty(N, dtype=torch.int32),
            out_dtype,
        )

    for M, configs in int8_matmul.CONFIGS.items():
        for config in configs:  # each with the fullest epilogue
            yield (
                f"matmul M <= {M}",
                every,
                config,
                lambda M=M: matmul(
                    M,
                    4096,
                    residual=x(M, 4096),
                    activation=2,
                    a_zero_point=torch.empty(M, dtype=torch.int32),
                    b_sum=torch.empty(4096, dtype=torch.int32),
                ),
            )
    (_, large), (_, wide) = int8_matmul.LARGE
    yield "matmul large", every, large, lambda: matmul(8192, 4096, residual=x(8192, 4096), activation=2)
    yield "matmul wide", every, wide, lambda: matmul(8192, 4096, activation=1)
    yield "matmul wide, last K masked", hopper, wide, lambda: matmul(8192, 4112)
    # What no vector divides, with the fullest epilogue: each element of a tile has an address of its own.
    for out_dtype, residual_dtype in ((bf16, f32), (f32, f32)):
        yield (
            f"matmul ragged, {out_dtype}",
            every,
            int8_matmul.RAGGED[0],
            lambda o=out_dtype, r=residual_dtype: ragged(8191, 4096, o, r),
        )
    yield "matmul unaligned", every, int8_matmul.UNALIGNED, lambda: ragged(65, 1001, bf16, f32)
    for config in int8_linear.ROW_CONFIGS:
        yield "linear row", every, config, lambda: int8_linear.int8_linear(x(1, 4096), b, s, s, activation=4)
    yield (
        "linear row odd",
        hopper,
        int8_linear.ROW_CONFIGS[0],
        lambda: int8_linear.int8_linear(x(1, 1001, f32), codes(999, 1001), scale(999), x_scale=scale(1)),
    )

    weight_only = int8_weight_only_linear.int8_weight_only_linear
    for config in int8_weight_only_linear.ROW_CONFIGS:
        yield "weight only row", every, config, lambda: weight_only(x(1, 4096), b, s)
    yield (
        "weight only row groups",
        hopper,
        int8_weight_only_linear.ROW_CONFIGS[0],
        lambda: weight_only(x(1, 4096, f32), b, scale(4096, 32)),
    )
    for M, configs in int8_weight_only_linear.CONFIGS.items():
        for config in configs:
            yield (
                f"weight only groups M <= {M}",
                every,
                config,
                lambda M=M: weight_only(x(M, 4096), b, scale(4096, 32), s, 2),
            )
        yield f"weight only M <= {M}", hopper, configs[0], lambda M=M: weight_only(x(M, 4096, f16), b, s)
    for config in int8_weight_only_linear.FLOAT32_CONFIGS:
        yield "weight only float32", every, config, lambda: weight_only(x(64, 4096, f32), b, scale(4096, 32), s, 2)
    for config in int8_weight_only_linear.CONFIGS[64]:
        yield (
            "weight only ragged",
            every,
            config,
            lambda: weight_only(x(8191, 4096), codes(4097, 4096), scale(4097, 32), scale(4097), 2),
        )
    yield (
        "weight only unaligned",
        every,
        int8_weight_only_linear.UNALIGNED,
        lambda: weight_only(x(17, 1000, f32), codes(99, 1000), scale(99, 40), scale(99), 2),
    )
