"""int8_matmul: int8 [M, K] times int8 [N, K] transposed on the tensor cores, with everything after it fused in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _int8_matmul_persistent, _int8_matmul_split
from ._common import FLOATS, MAX_K, int8_epilogue, refuse
from ._tile_order import tile_at
from ._tuning import Config, bucket, tuned


def _config(m: int, n: int, k: int, split: int, warps: int, stages: int) -> Config:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "SPLIT_K": split, "num_warps": warps, "num_stages": stages}


# By the largest M they serve, the default first. All fit the 163 KB of shared memory of sm_80. Decoding reads weights
# and little else, so its tiles are narrow in N and long in K, and K is split until the grid fills the device.
CONFIGS: dict[int, list[Config]] = {
    16: [_config(16, 32, 256, 4, 4, 4), _config(16, 32, 256, 1, 4, 5), _config(16, 64, 128, 8, 4, 5)],
    64: [_config(64, 64, 128, 4, 4, 4), _config(64, 64, 128, 1, 4, 4)],
    8192: [_config(64, 128, 128, 1, 4, 4)],
}
# Tiles whose accumulators leave few registers, by how much the epilogue may need: 0 is scales, bias and ReLU,
# 1 is any activation and a residual, 2 is a zero point as well. Past that they spill.
LARGE: list[tuple[int, Config]] = [(1, _config(128, 128, 128, 1, 8, 4)), (0, _config(128, 256, 128, 1, 8, 3))]
# Where rows of the output or the residual are not 16-byte aligned, each element of a tile has an address of its own in
# the epilogue: a larger tile has no registers for those.
RAGGED: list[Config] = CONFIGS[64][1:]
# Rows that are not 16-byte aligned are read byte by byte, and a pipeline of those would live in registers.
UNALIGNED = _config(32, 64, 64, 1, 8, 1)


def configs_for(M: int, aligned: bool, ragged: bool, epilogue: int, tma: bool) -> list[Config]:
    """The configurations to choose among. The default is a plain one: it needs nothing of the device or of Triton."""
    if not aligned:
        return [UNALIGNED]
    limit, configs = next((limit, configs) for limit, configs in CONFIGS.items() if bucket(M) <= limit)
    if ragged and limit == 8192:
        return RAGGED
    large = [config for most, config in LARGE if limit == 8192 and epilogue <= most]
    return large + configs + (_int8_matmul_persistent.CONFIGS.get(limit, []) if tma else [])


@triton.jit
def _int8_matmul(
    a_ptr,
    b_ptr,
    partial_ptr,
    out_ptr,
    a_scale_ptr,
    b_scale_ptr,
    zero_point_ptr,
    b_sum_ptr,
    bias_ptr,
    residual_ptr,
    M,
    N,
    K,
    a_stride,
    b_stride,
    out_stride,
    residual_stride,
    a_scale_stride,
    b_scale_stride,
    zero_point_stride,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_m, tile_n = tile_at(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)

    # Rows past the edge read row 0 again; only K needs a mask.
    k = tl.arange(0, BLOCK_K)
    a_rows = a_ptr + tl.where(rows < M, rows, 0)[:, None] * a_stride
    b_rows = b_ptr + tl.where(cols < N, cols, 0).to(tl.int64)[:, None] * b_stride
    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    k_begin = tl.program_id(1) * share
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k0 in range(k_begin, tl.minimum(k_begin + share, K), BLOCK_K):
        if EVEN_K:
            a = tl.load(a_rows + (k0 + k)[None, :])
            b = tl.load(b_rows + (k0 + k)[None, :])
        else:
            a = tl.load(a_rows + (k0 + k)[None, :], mask=(k0 + k < K)[None, :], other=0)
            b = tl.load(b_rows + (k0 + k)[None, :], mask=(k0 + k < K)[None, :], other=0)
        acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)

    if SPLIT_K == 1:
        int8_epilogue(
            acc,
            rows,
            cols,
            M,
            N,
            a_scale_ptr,
            a_scale_stride,
            b_scale_ptr,
            b_scale_stride,
            zero_point_ptr,
            zero_point_stride,
            b_sum_ptr,
            bias_ptr,
            residual_ptr,
            residual_stride,
            out_ptr,
            out_stride,
            ACTIVATION,
        )
    else:
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        tl.store(partial_ptr + (tl.program_id(1) * M + rows)[:, None] * N + cols[None, :], acc, mask=mask)


def _vector(t: torch.Tensor | None, name: str, length: int, dtypes: tuple[torch.dtype, ...]) -> torch.Tensor | None:
    if t is None:
        return None
    if t.numel() not in (1, length) or t.dim() > 1 or t.dtype not in dtypes:
        refuse(name, f"{t.dtype} {tuple(t.shape)}", f"{' or '.join(map(str, dtypes))} of one value or [{length}]")
    return t.reshape(-1).contiguous()


def int8_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor | None = None,
    b_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: int = 0,
    a_zero_point: torch.Tensor | None = None,
    b_sum: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """a int8 [M, K] by b int8 [N, K] transposed, to [M, N]; see pykernels.functional for the epilogue."""
    for name, t in (("a", a), ("b", b)):
        if t.dtype != torch.int8 or t.dim() != 2:
            refuse(name, f"{t.dtype} with {t.dim()} dimensions", "an int8 matrix")
    (M, K), (N, K_b) = a.shape, b.shape
    if K_b != K or K > MAX_K:
        refuse("b", f"K = {K_b}", f"the K of a, {K}, and at most {MAX_K} (int32 sums)")
    out_dtype = out_dtype or torch.float32
    if out_dtype not in (*FLOATS, torch.int32):
        refuse("out_dtype", out_dtype, "float32, bfloat16, float16 or int32")
    if out_dtype == torch.int32 and not (
        a_scale is b_scale is bias is residual is a_zero_point is None and not activation
    ):
        refuse("out_dtype", out_dtype, "int32 only without scale, bias, residual, activation and zero point")
    if residual is not None and (residual.shape != (M, N) or residual.dtype not in FLOATS):
        refuse("residual", f"{residual.dtype} {tuple(residual.shape)}", f"a float tensor [{M}, {N}]")
    if bias is not None and (bias.shape != (N,) or bias.dtype not in FLOATS):
        refuse("bias", f"{bias.dtype} {tuple(bias.shape)}", f"a float tensor [{N}]")
    a_scale = _vector(a_scale, "a_scale", M, (torch.float32,))
    b_scale = _vector(b_scale, "b_scale", N, (torch.float32,))
    a_zero_point = _vector(a_zero_point, "a_zero_point", M, (torch.int32,))
    out = torch.empty((M, N), dtype=out_dtype, device=a.device)
    if out.numel() == 0:
        return out
    if a_zero_point is not None and b_sum is None:
        b_sum = b.sum(1, dtype=torch.int32)
    a, b = (t if t.stride(1) == 1 else t.contiguous() for t in (a, b))
    bias = None if bias is None else bias.contiguous()
    residual = residual if residual is None or residual.stride(1) == 1 else residual.contiguous()
    step = [0 if t is None or t.numel() == 1 else 1 for t in (a_scale, b_scale, a_zero_point)]
    tensors = (out, a_scale, b_scale, a_zero_point, b_sum, bias, residual)
    strides = (out.stride(0), 0 if residual is None else residual.stride(0), *step)

    def launch(config: Config) -> None:
        if "PER_SM" in config:
            _int8_matmul_persistent.launch(config, a, b, tensors, strides, activation)
            return
        split = config["SPLIT_K"]
        partial = torch.empty((split, M, N), dtype=torch.int32, device=a.device) if split > 1 else None
        tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
        _int8_matmul[(tiles, split)](
            a,
            b,
            partial,
            *tensors,
            M,
            N,
            K,
            a.stride(0),
            b.stride(0),
            *strides,
            ACTIVATION=activation,
            EVEN_K=K % config["BLOCK_K"] == 0,
            **config,
        )
        if partial is not None:
            _int8_matmul_split.reduce(partial, tensors, strides, activation)

    aligned = all(size % 16 == 0 for size in (K, a.stride(0), b.stride(0), a.data_ptr(), b.data_ptr()))
    ragged = N % 16 != 0 or (residual is not None and (residual.stride(0) % 16 or residual.data_ptr() % 16) != 0)
    epilogue = 2 if a_zero_point is not None else int(residual is not None or activation > 1)
    tma = aligned and _int8_matmul_persistent.usable(a, b, residual)
    configs = configs_for(M, aligned, ragged, epilogue, tma)
    key = (bucket(M), N, K, out_dtype, aligned, ragged, epilogue, tma)
    with torch.cuda.device_of(a):
        launch(tuned("int8_matmul", key, configs, a.device, launch))
    return out
