"""dropout: a mask that is a function of a 16-byte key, so that backward draws it again instead of keeping it."""

import math
from typing import Any

import torch

from .. import _library
from . import _autograd
from ._checks import FLOATS, check, check_device, check_dtype, names_argument
from ._numerics import philox

NAME = "dropout"
SCHEMA = f"{NAME}(Tensor x, Tensor? residual, float p, Tensor key) -> Tensor"


def check_arguments(x: torch.Tensor, residual: torch.Tensor | None, p: float, key: torch.Tensor) -> None:
    """x float; residual of its shape, in its dtype or float32; p in [0, 1]; key int64 [2] on the CPU."""
    check_dtype(NAME, "x", x, *FLOATS, torch.float64)
    if residual is not None:
        check_dtype(NAME, "residual", residual, *dict.fromkeys((x.dtype, torch.promote_types(x.dtype, torch.float32))))
        check_device(NAME, "residual", residual, "x", x)
        check(
            residual.shape == x.shape,
            NAME,
            f"expected residual to have the shape of x, {list(x.shape)}, got {list(residual.shape)}",
        )
    check(0.0 <= p <= 1.0, NAME, f"expected p to be from 0 to 1, got {p}")
    check_dtype(NAME, "key", key, torch.int64)
    check(
        list(key.shape) == [2] and key.device.type == "cpu",
        NAME,
        f"expected key to have shape [2] (seed, offset) and to be on the CPU, got {list(key.shape)} on {key.device}",
    )


def threshold(p: float) -> int:
    """An element is kept where the top 24 bits of its word reach this: u >= p without a rounding."""
    return math.ceil(p * 2**24)


def keep_mask(p: float, key: torch.Tensor, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """bool: element i (row-major) is kept where word i % 4 of counter offset + i // 4 says u >= p."""
    seed, offset = key.tolist()
    count = shape.numel()
    counters = torch.arange((count + 3) // 4, device=device, dtype=torch.int64) + offset
    words = philox(seed, counters).reshape(-1)[:count]
    return ((words >> 8) >= threshold(p)).reshape(shape)


def reference(x: torch.Tensor, residual: torch.Tensor | None, p: float, key: torch.Tensor) -> torch.Tensor:
    check_arguments(x, residual, p, key)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    factor = torch.full((), 0.0 if p == 1.0 else 1.0 / (1.0 - p), dtype=wide, device=x.device)
    y = torch.where(keep_mask(p, key, x.shape, x.device), x.to(wide) * factor, torch.zeros_like(factor))
    if residual is not None:
        y = residual.to(wide) + y
    return y.to(x.dtype if residual is None else residual.dtype).contiguous()


def fake(x: torch.Tensor, residual: torch.Tensor | None, p: float, key: torch.Tensor) -> torch.Tensor:
    check_arguments(x, residual, p, key)
    return x.new_empty(x.shape, dtype=x.dtype if residual is None else residual.dtype)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, _, p, key = inputs
    ctx.p, ctx.x_dtype = p, x.dtype
    ctx.save_for_backward(key)


def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (key,) = ctx.saved_tensors
    grad_x = torch.ops.pykernels.dropout(grad, None, ctx.p, key).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
    return grad_x, grad if ctx.needs_input_grad[1] else None, None, None


_library.define(SCHEMA, reference, fake)
_autograd.register(NAME, backward, setup_context)


def dropout_key(seed: int | None = None, offset: int = 0) -> torch.Tensor:
    """int64 [2] on the CPU: (seed, offset); drawn from torch's CPU generator when seed is None.

    Two calls under one seed draw different masks when their offsets differ by at least a quarter of the elements of
    the first: element i takes word i % 4 of the Philox counter offset + i // 4.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (2,))
    return torch.tensor([seed, offset], dtype=torch.int64)


@names_argument
def dropout(
    x: torch.Tensor,
    p: float = 0.5,
    *,
    training: bool = True,
    seed: int | torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Zeroes each element with probability p and scales the others by 1 / (1 - p); y = residual + that, where given.

    x: float, any shape and strides -> contiguous, in the dtype of residual where given, else of x. residual: the
    shape of x, in the dtype of x or float32. float32 arithmetic, one rounding.
    The mask is a function of the key and the element's row-major index alone: not of threads, blocks, strides or
    devices. An element is kept where its uniform number, the top 24 bits of a word of Philox4x32-10, is at least p.
    A dropped element is 0 whatever it held, NaN and infinity too.
    seed: an int; or a key (seed, offset), int64 [2] on the CPU, as dropout_key makes; None draws a key from torch's CPU
    generator, so that torch.manual_seed and the RNG state kept by torch.utils.checkpoint govern it.
    In eval mode and with p = 0, x itself (or x + residual). Saved for backward: the key, 16 bytes, whatever the size
    of x; 0 in eval mode and with p = 0. Reading the key never waits for a device; a captured CUDA graph repeats its
    mask.
    Errors: ValueError for p outside [0, 1]; RuntimeError names a wrong dtype, shape or device.
    Source: Srivastava et al., "Dropout", JMLR 2014; Salmon et al., "Parallel random numbers", SC 2011.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout: expected p to be from 0 to 1, got {p}")
    if not training or p == 0.0:
        return x if residual is None else x + residual
    key = seed if isinstance(seed, torch.Tensor) else dropout_key(seed)
    return torch.ops.pykernels.dropout.default(x, residual, p, key)
