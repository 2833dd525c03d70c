"""int8_matmul on Hopper and newer: TMA brings the operands, and a program takes tile after tile.

The loop over tiles and the one over K are flattened into one, so that the first loads of a tile are under way while the
epilogue of the tile before it runs (after Triton's tutorial on persistent matmul).
"""

from __future__ import annotations

import os
from functools import cache

import torch
import triton
import triton.language as tl

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4
    TensorDescriptor = None

from ._common import int8_epilogue
from ._tile_order import tile_at
from ._tuning import Config


def _config(m: int, n: int, stored: int, warps: int, stages: int, per_sm: int) -> Config:
    shape = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 128, "STORED": stored, "PER_SM": per_sm}
    return {**shape, "num_warps": warps, "num_stages": stages}


# PER_SM, which no plain configuration has, is how many programs an SM has room for. Triton waits for integer tensor
# cores at the end of every step along K, so something has to fill that gap: a second program, or a step so large that
# the gap hardly counts. BLOCK_K is a row of a TMA box, 128 bytes: the widest swizzle. STORED is how many columns are
# finished at a time, for what the epilogue needs must fit beside the accumulators.
WIDE = _config(128, 256, 32, 8, 4, 1)  # the most operations a byte; its accumulators are half of all registers
# Two programs share an SM: one multiplies while the other waits or stores. Four warps, so that the registers of each
# thread hold its 128 sums and the epilogue's needs.
PAIR = _config(128, 128, 16, 4, 3, 2)
SHORT = _config(64, 128, 16, 4, 4, 2)  # as PAIR with half the rows: enough tiles for the SMs where M is some hundreds
CONFIGS: dict[int, list[Config]] = {64: [SHORT], 8192: [WIDE, PAIR, SHORT]}


@cache
def device_properties(device: torch.device) -> tuple[int, int]:
    """Major compute capability and multiprocessors; (0, 1) without a GPU."""
    if device.type != "cuda":
        return 0, 1
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.multi_processor_count


def usable(a: torch.Tensor, b: torch.Tensor, residual: torch.Tensor | None) -> bool:
    """Whether a and b, whose rows are 16-byte aligned, may be read by TMA here. PYKERNELS_TMA=0 says no."""
    return (
        TensorDescriptor is not None
        and device_properties(a.device)[0] >= 9
        and a.shape[1] > 0
        # Element by element the epilogue takes registers that are not there.
        and b.shape[0] % 16 == 0
        and (residual is None or (residual.stride(0) % 16 == 0 and residual.data_ptr() % 16 == 0))
        # What TMA makes of rows that overlap is not documented; its coordinates are int32.
        and all(t.stride(0) >= t.shape[1] and t.shape[0] < 2**31 - 256 for t in (a, b))
        and os.environ.get("PYKERNELS_TMA") != "0"
    )


@triton.jit
def _finish(acc, rows, first_col, terms, ACTIVATION: tl.constexpr, STORED: tl.constexpr):
    if acc.shape[1] > STORED:
        halves = tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2))
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        _finish(left, rows, first_col, terms, ACTIVATION, STORED)
        _finish(right, rows, first_col + acc.shape[1] // 2, terms, ACTIVATION, STORED)
    else:
        int8_epilogue(acc, rows, first_col + tl.arange(0, acc.shape[1]), *terms, ACTIVATION)


@triton.jit
def _int8_matmul_persistent(
    a_rows,
    b_rows,
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
    out_stride,
    residual_stride,
    a_scale_stride,
    b_scale_stride,
    zero_point_stride,
    ACTIVATION: tl.constexpr,
    STORED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    terms = (
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
    )
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_at(tile, tiles_m, tiles_n)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for k0 in range(0, K, BLOCK_K):
            # What lies past the edges is read as 0.
            a = a_rows.load([tile_m * BLOCK_M, k0])
            b = b_rows.load([tile_n * BLOCK_N, k0])
            acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
        rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        _finish(acc, rows, tile_n * BLOCK_N, terms, ACTIVATION, STORED)


def launch(
    config: Config,
    a: torch.Tensor,
    b: torch.Tensor,
    tensors: tuple[torch.Tensor | None, ...],
    strides: tuple[int, ...],
    activation: int,
) -> None:
    """a [M, K] by b [N, K] transposed, both of usable(); tensors and strides as the kernel names them."""
    blocks = {name: size for name, size in config.items() if name != "PER_SM"}
    (M, K), N = a.shape, b.shape[0]
    tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    _int8_matmul_persistent[(min(tiles, config["PER_SM"] * device_properties(a.device)[1]),)](
        TensorDescriptor.from_tensor(a, [config["BLOCK_M"], config["BLOCK_K"]]),
        TensorDescriptor.from_tensor(b, [config["BLOCK_N"], config["BLOCK_K"]]),
        *tensors,
        M,
        N,
        K,
        *strides,
        ACTIVATION=activation,
        **blocks,
    )
