"""attention: softmax(q k^T * scale) v by PyTorch's own kernels, with grouped key and value heads kept unexpanded."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _library
from . import _autograd
from ._checks import check, check_device, check_dim, check_dtype, names_argument
from ._planned import device_type
from ._segment_call import FLOATS64, refuse_second_backward

NAME = "attention"
BACKWARD = f"{NAME}_backward"
SCHEMA = f"{NAME}(Tensor q, Tensor k, Tensor v, bool causal, float scale) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = (
    f"{BACKWARD}(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal, float scale) "
    "-> (Tensor, Tensor, Tensor)"
)
QUERIES = 256  # rows of scores that the kernel in plain PyTorch holds at once
_aten = torch.ops.aten
_ops = torch.ops.pykernels


def check_arguments(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    """q [B, S, H, D], k and v [B, S', G, D] with H a multiple of G, one float dtype, one device; S = S' if causal."""
    check_dtype(NAME, "q", q, *FLOATS64)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_dim(NAME, name, tensor, 4)
        check_dtype(NAME, name, tensor, q.dtype)
        check_device(NAME, name, tensor, "q", q)
    batch, queries, heads, width = q.shape
    check(k.shape == v.shape, NAME, f"expected v to have the shape of k, {list(k.shape)}, got {list(v.shape)}")
    check(
        k.shape[0] == batch and k.shape[3] == width,
        NAME,
        f"expected k to have shape [{batch}, keys, heads, {width}], as q, got {list(k.shape)}",
    )
    check(
        k.shape[2] > 0 and heads % k.shape[2] == 0,
        NAME,
        f"expected the {heads} heads of q to be a multiple of the heads of k, got {k.shape[2]}",
    )
    check(
        not causal or k.shape[1] == queries,
        NAME,
        f"expected k to have the {queries} positions of q where causal, got {k.shape[1]}",
    )


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, G, D] -> [B, S, heads, D], each head repeated for its group: a copy unless G is heads."""
    batch, length, kv_heads, width = x.shape
    if kv_heads == heads:
        return x
    groups = x.unsqueeze(3).expand(batch, length, kv_heads, heads // kv_heads, width)
    return groups.reshape(batch, length, heads, width)


def sum_heads(grad: Tensor, kv_heads: int) -> Tensor:
    """The reverse of expand_heads: the gradients of a group's heads, summed in float32 and rounded once."""
    batch, length, heads, width = grad.shape
    return grad if heads == kv_heads else grad.view(batch, length, kv_heads, heads // kv_heads, width).sum(3)


def _kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str:
    """Which of PyTorch's kernels takes these tensors, transposed to [B, H, S, D]; its own rules decide on a GPU."""
    device = device_type(q)
    if device == "cpu":
        return "cpu"
    if device != "cuda":
        return "plain"
    if q.is_meta:
        return "efficient" if q.dtype == torch.float32 else "flash"
    cuda = torch.backends.cuda
    grouped = q.shape[1] != k.shape[1]
    if q.shape[3] % 8 == 0 and cuda.can_use_flash_attention(cuda.SDPAParams(q, k, v, None, 0.0, causal, grouped)):
        return "flash"
    # Seen without grouping: this one gets k and v expanded.
    if cuda.can_use_efficient_attention(cuda.SDPAParams(q, q, q, None, 0.0, causal, False)):
        return "efficient"
    return "plain"


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    check_arguments(q, k, v, causal)
    batch, queries, heads, _ = q.shape
    if q.numel() == 0 or k.shape[1] == 0:  # PyTorch's kernel divides by the number of positions
        empty_lse = torch.full((batch, heads, queries), -math.inf, dtype=lse_dtype(q), device=q.device)
        return torch.zeros_like(q, memory_format=torch.contiguous_format), empty_lse
    kernel = _kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal)
    if kernel != "flash":
        k, v = expand_heads(k, heads), expand_heads(v, heads)
    q, k, v = _heads_first(q, k, v)
    if kernel == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    elif kernel == "flash":
        out, lse = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    elif kernel == "efficient":
        out, lse = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    else:
        out, lse = _plain(q, k, v, causal, scale)
    return out.transpose(1, 2).contiguous(), lse[..., :queries].contiguous()


def fake(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    check_arguments(q, k, v, causal)
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, queries, dtype=lse_dtype(q))


def lse_dtype(q: Tensor) -> torch.dtype:
    """The logarithm of the softmax's sum is float32, or float64 for float64."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def backward_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads, queries = q.shape[2], k.shape[2], q.shape[1]
    if q.numel() == 0 or k.shape[1] == 0:
        return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))  # type: ignore[return-value]
    kernel = _kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal)
    if kernel != "flash":
        k, v = expand_heads(k, heads), expand_heads(v, heads)
    grad, q, k, v, out = _heads_first(grad.contiguous(), q, k, v, out)
    # Without dropout no kernel reads the random state, and None stands for an undefined tensor.
    if kernel == "cpu":
        gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    elif kernel == "flash":
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        gradients = _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, queries, k.shape[2], 0.0, causal, state, state[:0], scale=scale
        )
    elif kernel == "efficient":
        state = torch.zeros((), dtype=torch.int64, device=q.device)
        padded = torch.nn.functional.pad(lse, (0, -queries % 32), value=math.inf)
        gradients = _aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, out, padded, state, state, 0.0, [True, True, True, False], causal, scale=scale
        )[:3]
    else:
        gradients = _plain_backward(grad, q, k, v, out, lse, causal, scale)
    grad_q, grad_k, grad_v = (gradient.transpose(1, 2) for gradient in gradients)
    return grad_q.contiguous(), sum_heads(grad_k, kv_heads).contiguous(), sum_heads(grad_v, kv_heads).contiguous()


def backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _scores(q: Tensor, k: Tensor, first: int, causal: bool, scale: float) -> Tensor:
    """Scaled scores of the queries from `first` on, in lse's dtype, -inf where a key lies ahead."""
    wide = lse_dtype(q)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    if not causal:
        return scores
    rows = torch.arange(first, first + q.shape[-2], device=q.device)
    ahead = torch.arange(k.shape[-2], device=q.device) > rows[:, None]
    return scores.masked_fill(ahead, -math.inf)


def _plain(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """For devices and dtypes that no kernel of PyTorch takes: a block of queries at a time."""
    outs, sums = [], []
    for first in range(0, q.shape[2], QUERIES):
        scores = _scores(q[:, :, first : first + QUERIES], k, first, causal, scale)
        sums.append(scores.logsumexp(-1))
        outs.append((scores.sub_(sums[-1].unsqueeze(-1)).exp_() @ v.to(scores.dtype)).to(q.dtype))
    return torch.cat(outs, 2), torch.cat(sums, 2)


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The probabilities are computed again from lse; dS = P * (dP - rowsum(dO * O)) (Dao et al., FlashAttention)."""
    wide = lse.dtype
    grad_q = []
    grad_k, grad_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    for first in range(0, q.shape[2], QUERIES):
        rows = slice(first, first + QUERIES)
        part, g = q[:, :, rows], grad[:, :, rows].to(wide)
        probabilities = (_scores(part, k, first, causal, scale) - lse[:, :, rows, None]).exp()
        grad_v += probabilities.transpose(-1, -2) @ g
        inner = (g * out[:, :, rows].to(wide)).sum(-1, keepdim=True)
        to_scores = (g @ v.to(wide).transpose(-1, -2) - inner) * probabilities * scale
        grad_q.append((to_scores @ k.to(wide)).to(q.dtype))
        grad_k += to_scores.transpose(-1, -2) @ part.to(wide)
    return torch.cat(grad_q, 2), grad_k.to(k.dtype), grad_v.to(v.dtype)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.causal, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse)


def backward(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Tensor | None, ...]:
    return *_ops.attention_backward.default(grad, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None


_library.define(SCHEMA, reference, fake, composite=True)
_library.define(BACKWARD_SCHEMA, backward_reference, backward_fake, composite=True)
_autograd.register(NAME, backward, setup_context)
_autograd.register(BACKWARD, refuse_second_backward(NAME))


@names_argument
def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v, each query head with the key and value head of its group.

    Shapes: q [B, S, H, D], k and v [B, S', G, D] with H a multiple of G -> [B, S, H, D], contiguous. float32, bfloat16,
    float16 or float64, all three of one dtype. causal: position i sees keys up to i (S = S'). scale: None for D^-0.5.

    The kernels are those of torch.nn.functional.scaled_dot_product_attention. Where one does not take grouped heads,
    k and v are expanded for the length of the call only.

    Saved for backward: q, k, v and the result by reference, and 4 bytes a query and head of lse: B*S*(2*H + 2*G)*D
    elements and 4*B*S*H bytes where S = S'. scaled_dot_product_attention with expanded k and v keeps 4*H*D elements.

    Errors: RuntimeError names a wrong dtype, shape or device before anything runs; NotImplementedError for a second
    derivative. On a GPU the gradient of q may differ from run to run, as PyTorch's does, unless
    torch.use_deterministic_algorithms(True).
    """
    width = q.shape[-1] if q.dim() else 0
    return _ops.attention.default(q, k, v, causal, max(width, 1) ** -0.5 if scale is None else scale)[0]
