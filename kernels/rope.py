"""rope: rotary position embeddings of query and key, one program for a position and all its heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import check_float, narrow


@triton.jit
def _turn(
    x_ptr,
    out_ptr,
    head_stride,
    heads,
    D,
    pairs,
    cos,
    sin,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """All heads of one position; cos and sin are float32 [PAIRS]."""
    pair = tl.arange(0, PAIRS)
    dtype = out_ptr.dtype.element_ty
    for h0 in range(0, heads, HEADS):
        head = h0 + tl.arange(0, HEADS)
        x = x_ptr + head.to(tl.int64)[:, None] * head_stride
        out = out_ptr + head.to(tl.int64)[:, None] * D
        live = (head < heads)[:, None]
        if INTERLEAVED:
            # Neighbours are loaded and stored side by side, and parted in registers.
            column = tl.arange(0, 2 * PAIRS)[None, :]
            mask = live & (column < 2 * pairs)
            both = tl.load(x + column, mask=mask, other=0.0).to(tl.float32)
            first, second = tl.split(tl.reshape(both, (HEADS, PAIRS, 2)))
            turned = tl.join(first * cos[None, :] - second * sin[None, :], second * cos[None, :] + first * sin[None, :])
            tl.store(out + column, narrow(tl.reshape(turned, (HEADS, 2 * PAIRS)), dtype), mask=mask)
        else:
            column = pair[None, :]
            mask = live & (column < pairs)
            first = tl.load(x + column, mask=mask, other=0.0).to(tl.float32)
            second = tl.load(x + pairs + column, mask=mask, other=0.0).to(tl.float32)
            tl.store(out + column, narrow(first * cos[None, :] - second * sin[None, :], dtype), mask=mask)
            tl.store(out + pairs + column, narrow(second * cos[None, :] + first * sin[None, :], dtype), mask=mask)
        if REST > 0:
            column = 2 * pairs + tl.arange(0, REST)[None, :]
            mask = live & (column < D)
            tl.store(out + column, tl.load(x + column, mask=mask), mask=mask)


@triton.jit
def _rope(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    ids_ptr,
    q_out_ptr,
    k_out_ptr,
    q_batch_stride,
    q_seq_stride,
    q_head_stride,
    k_batch_stride,
    k_seq_stride,
    k_head_stride,
    cos_stride,
    sin_stride,
    ids_stride,
    S,
    H,
    H_K,
    D,
    pairs,
    INVERSE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_K: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b, s = row // S, row % S
    position = s
    if ids_ptr is not None:
        position = tl.load(ids_ptr + b * ids_stride + s)
    pair = tl.arange(0, PAIRS)
    cos = tl.load(cos_ptr + position * cos_stride + pair, mask=pair < pairs, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * sin_stride + pair, mask=pair < pairs, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    q = q_ptr + b * q_batch_stride + s * q_seq_stride
    _turn(q, q_out_ptr + row * H * D, q_head_stride, H, D, pairs, cos, sin, HEADS, PAIRS, REST, INTERLEAVED)
    if k_ptr is not None:
        k = k_ptr + b * k_batch_stride + s * k_seq_stride
        _turn(k, k_out_ptr + row * H_K * D, k_head_stride, H_K, D, pairs, cos, sin, HEADS_K, PAIRS, REST, INTERLEAVED)


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x where it lies, or a copy where its last stride is not 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _heads_at_once(heads: int, width: int) -> int:
    """A power of two, so that about 4096 elements are in flight."""
    return max(1, min(triton.next_power_of_2(max(heads, 1)), 4096 // width))


def rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    interleaved: bool = False,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, S, H, D] and k [B, S, Hkv, D], turned; see pykernels.functional.rope."""
    check_float(q, "q", 4)
    check_float(cos, "cos", 2)
    B, S, H, D = q.shape
    pairs = cos.shape[1]
    q, cos, sin = _readable(q), _readable(cos), _readable(sin)
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(0 if k is None else k.shape, dtype=q.dtype, device=q.device)
    k = None if k is None else _readable(k)
    if B * S == 0 or D == 0:
        return q_out, k_out
    ids = None if position_ids is None else position_ids.contiguous()
    width = triton.next_power_of_2(max(pairs, 1))
    rest = D - 2 * pairs
    kv_heads = 0 if k is None else k.shape[2]
    with torch.cuda.device_of(q):
        _rope[(B * S,)](
            q,
            k,
            cos,
            sin,
            ids,
            q_out,
            k_out,
            q.stride(0),
            q.stride(1),
            q.stride(2),
            0 if k is None else k.stride(0),
            0 if k is None else k.stride(1),
            0 if k is None else k.stride(2),
            cos.stride(0),
            sin.stride(0),
            0 if ids is None or ids.dim() == 1 else S,
            S,
            H,
            kv_heads,
            D,
            pairs,
            INVERSE=inverse,
            INTERLEAVED=interleaved,
            HEADS=_heads_at_once(H, 2 * width),
            HEADS_K=_heads_at_once(kv_heads, 2 * width),
            PAIRS=width,
            REST=triton.next_power_of_2(rest) if rest else 0,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return q_out, k_out
