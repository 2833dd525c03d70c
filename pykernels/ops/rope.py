"""rope: rotary position embeddings of query and key in one call (Su et al., RoFormer, 2021)."""

from typing import Any

import torch

from .. import _library
from . import _autograd
from ._checks import FLOATS, check, check_device, check_dim, check_dtype, names_argument

NAME = "rope"
SCHEMA = (
    f"{NAME}(Tensor q, Tensor? k, Tensor cos, Tensor sin, Tensor? position_ids=None, bool interleaved=False, "
    "bool inverse=False) -> (Tensor, Tensor)"
)


def check_arguments(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None,
) -> None:
    """q [B, S, H, D], k [B, S, Hkv, D], tables [rows, R / 2] with R <= D, position_ids int64 [S] or [B, S]."""
    check_dtype(NAME, "q", q, *FLOATS, torch.float64)
    check_dim(NAME, "q", q, 4)
    batch, seq, _, dim = q.shape
    if k is not None:
        check_dtype(NAME, "k", k, q.dtype)
        check_device(NAME, "k", k, "q", q)
        got = list(k.shape)
        check(
            k.dim() == 4 and got[:2] == [batch, seq] and got[3] == dim,
            NAME,
            f"expected k to have shape [{batch}, {seq}, heads, {dim}], with the sizes of q, got {got}",
        )
    for name, table in (("cos", cos), ("sin", sin)):
        check_dtype(NAME, name, table, *FLOATS, torch.float64)
        check_device(NAME, name, table, "q", q)
        check_dim(NAME, name, table, 2)
    check(
        2 * cos.shape[1] <= dim,
        NAME,
        f"expected cos to have at most {dim // 2} columns, one for each pair of the head dimension {dim}, "
        f"got shape {list(cos.shape)}",
    )
    check(
        sin.shape == cos.shape and sin.dtype == cos.dtype,
        NAME,
        f"expected sin to have the shape and dtype of cos, {list(cos.shape)} {cos.dtype}, "
        f"got {list(sin.shape)} {sin.dtype}",
    )
    if position_ids is None:
        check(
            cos.shape[0] >= seq,
            NAME,
            f"expected cos to have a row for each of the {seq} positions of q, got {cos.shape[0]}",
        )
        return
    check_dtype(NAME, "position_ids", position_ids, torch.int64)
    check_device(NAME, "position_ids", position_ids, "q", q)
    check(
        list(position_ids.shape) in ([seq], [batch, seq]),
        NAME,
        f"expected position_ids to have shape [{seq}] or [{batch}, {seq}], got {list(position_ids.shape)}",
    )


def check_positions(position_ids: torch.Tensor, rows: int) -> None:
    """Every position names a row of the tables. On the CPU only: elsewhere looking would wait for the device."""
    if position_ids.device.type != "cpu" or position_ids.numel() == 0:
        return
    low, high = (int(end) for end in position_ids.aminmax())
    check(
        low >= 0 and high < rows,
        NAME,
        f"expected position_ids to be from 0 to {rows - 1}, the rows of cos, got {low if low < 0 else high}",
    )


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """cos, sin [B or 1, S, 1, R / 2], in the dtype of the arithmetic."""
    pairs = cos.shape[-1]
    if interleaved:
        first, second = x[..., 0 : 2 * pairs : 2].to(cos.dtype), x[..., 1 : 2 * pairs : 2].to(cos.dtype)
    else:
        first, second = x[..., :pairs].to(cos.dtype), x[..., pairs : 2 * pairs].to(cos.dtype)
    turned = (first * cos - second * sin, second * cos + first * sin)
    both = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((both.to(x.dtype), x[..., 2 * pairs :]), -1).contiguous()


def reference(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    interleaved: bool = False,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_arguments(q, k, cos, sin, position_ids)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if position_ids is None:
        rows = slice(0, q.shape[1])
        cos, sin = cos[rows].to(wide).unsqueeze(0), sin[rows].to(wide).unsqueeze(0)
    else:
        check_positions(position_ids, cos.shape[0])
        positions = position_ids if position_ids.dim() == 2 else position_ids.unsqueeze(0)
        cos, sin = cos[positions].to(wide), sin[positions].to(wide)
    cos, sin = cos.unsqueeze(2), (-sin if inverse else sin).unsqueeze(2)
    turned_k = q.new_empty(0) if k is None else _rotate(k, cos, sin, interleaved)
    return _rotate(q, cos, sin, interleaved), turned_k


def fake(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    interleaved: bool = False,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_arguments(q, k, cos, sin, position_ids)
    return q.new_empty(q.shape), q.new_empty(0 if k is None else k.shape)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, _, cos, sin, position_ids, interleaved, inverse = inputs
    ctx.interleaved, ctx.inverse = interleaved, inverse
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cos, sin, position_ids)


def backward(ctx: Any, grad_q: torch.Tensor | None, grad_k: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The same rotation the other way: the matrix of a rotation is orthogonal."""
    cos, sin, position_ids = ctx.saved_tensors
    grads = [
        grad if ctx.needs_input_grad[place] and grad is not None else None
        for place, grad in enumerate((grad_q, grad_k))
    ]
    rest = (cos, sin, position_ids, ctx.interleaved, not ctx.inverse)
    op = torch.ops.pykernels.rope
    if grads[0] is not None:
        turned = op(grads[0], grads[1], *rest)
        grads = [turned[0], None if grads[1] is None else turned[1]]
    elif grads[1] is not None:
        grads[1] = op(grads[1], None, *rest)[0]
    return grads[0], grads[1], None, None, None, None, None


_library.define(SCHEMA, reference, fake)
_autograd.register(NAME, backward, setup_context)


@names_argument
def rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    position_ids: torch.Tensor | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotates pairs of the head dimension by their position: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

    q: [B, S, H, D] float, k: [B, S, Hkv, D] of its dtype (any Hkv: grouped queries) or None -> contiguous tensors of
    the same shapes; (q, None) without k. Slices of a packed qkv and transposed [B, H, S, D] views are read where they
    lie, as long as the last stride is 1.
    cos, sin: [rows, R / 2] float, R <= D: the first R dimensions turn, the others pass through. See rope_tables.
    position_ids: int64 [S] or [B, S], the rows of cos and sin to use; row s for position s when None. On the CPU a
    position outside the tables is an error; on a GPU it is undefined behaviour, as looking would wait for the device.
    interleaved: pairs are (2 i, 2 i + 1), as in GPT-J; otherwise (i, i + R / 2), as in Llama and GPT-NeoX.
    float32 arithmetic, one rounding. Differentiable in q and k, twice too: the gradient is the inverse rotation. Saved
    for backward: 0 bytes, only references to cos, sin and position_ids.
    Errors: RuntimeError names a wrong dtype, shape, device or position. Source: Su et al., "RoFormer: Enhanced
    Transformer with Rotary Position Embedding", 2021.
    """
    turned_q, turned_k = torch.ops.pykernels.rope.default(q, k, cos, sin, position_ids, interleaved, False)
    return turned_q, None if k is None else turned_k


def rope_tables(
    head_dim: int,
    max_seq: int,
    *,
    theta: float = 10000.0,
    rotary_dim: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), float32 [max_seq, R / 2]: the angle of pair i at position p is p * theta ** (-2 i / R).

    R is rotary_dim, or head_dim. The angles are computed in float64: at position 100,000 a float32 angle is off by
    0.004, the last table entry by as much. Errors: ValueError for an odd or too large rotary_dim, a theta or a max_seq
    that is not positive.
    """
    rotary = head_dim if rotary_dim is None else rotary_dim
    if rotary % 2 or not 0 < rotary <= head_dim:
        raise ValueError(
            f"rope_tables: expected rotary_dim to be even, above 0 and at most the head_dim {head_dim}, got {rotary}"
        )
    if not theta > 0:
        raise ValueError(f"rope_tables: expected theta to be above 0, got {theta}")
    if max_seq < 0:
        raise ValueError(f"rope_tables: expected max_seq to be 0 or more, got {max_seq}")
    exponent = torch.arange(0, rotary, 2, dtype=torch.float64) / rotary
    angle = torch.arange(max_seq, dtype=torch.float64)[:, None] * theta**-exponent
    return angle.cos().to(device, torch.float32), angle.sin().to(device, torch.float32)
