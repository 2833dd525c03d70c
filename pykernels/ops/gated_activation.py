"""gated_activation: act(gate) * up for SwiGLU, GEGLU and ReGLU, and relu(x)^2; saves the pre-activations alone."""

import math
from typing import Any

import torch

from .. import _library
from . import _autograd, quantize_rowwise
from ._checks import FLOATS, check, check_device, check_dtype, dtype_name, names_argument
from ._enums import GATED_ACTIVATIONS, gelu_code

NAME = "gated_activation"
BACKWARD = "gated_activation_backward"
QUANTIZED = "gated_activation_quantized"
_RELU, _GELU, _GELU_TANH, _SILU, _RELU2 = (
    GATED_ACTIVATIONS[name] for name in ("relu", "gelu", "gelu_tanh", "silu", "relu2")
)


def result_shape(gate: torch.Tensor, up: torch.Tensor | None, activation: int) -> torch.Size:
    """[..., I] of gate [..., I] with up, of packed [..., 2 * I], and of the one input of relu2."""
    packed = up is None and activation != _RELU2
    return torch.Size([*gate.shape[:-1], gate.shape[-1] // 2]) if packed else gate.shape


def check_arguments(
    op: str, gate: torch.Tensor, up: torch.Tensor | None, activation: int, dtypes: tuple[torch.dtype, ...]
) -> None:
    """gate float with a last dimension, even where it is packed; up like gate; relu2 has no up."""
    codes = list(GATED_ACTIVATIONS.values())
    check(activation in codes, op, f"expected activation to be {codes[0]} to {codes[-1]}, got {activation}")
    check_dtype(op, "gate", gate, *dtypes)
    check(gate.dim() >= 1, op, "expected gate to have at least 1 dimension, got 0")
    if up is None:
        check(
            activation == _RELU2 or gate.shape[-1] % 2 == 0,
            op,
            f"expected a packed gate to have an even last dimension, gate and up, got shape {list(gate.shape)}",
        )
        return
    check(activation != _RELU2, op, "expected no up with relu2, which has one input")
    check_device(op, "up", up, "gate", gate)
    check(
        up.dtype == gate.dtype, op, f"expected up to be {dtype_name(gate.dtype)}, as gate, got {dtype_name(up.dtype)}"
    )
    check(up.shape == gate.shape, op, f"expected up to have shape {list(gate.shape)}, as gate, got {list(up.shape)}")


def check_grad(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: int) -> None:
    """The gradient has the shape, dtype and device of the result."""
    check_arguments(BACKWARD, gate, up, activation, (*FLOATS, torch.float64))
    shape = result_shape(gate, up, activation)
    check_device(BACKWARD, "grad", grad, "gate", gate)
    check_dtype(BACKWARD, "grad", grad, gate.dtype)
    check(
        grad.shape == shape,
        BACKWARD,
        f"expected grad to have shape {list(shape)}, as the result, got {list(grad.shape)}",
    )


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _normal_cdf(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * torch.special.erfc(x * -math.sqrt(0.5))  # 1 + erf would cancel for x < 0


def _twice_u(x: torch.Tensor) -> torch.Tensor:
    """0.5 (1 + tanh(u)) = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return math.sqrt(8 / math.pi) * x * (1 + 0.044715 * x * x)


def activate(x: torch.Tensor, activation: int) -> torch.Tensor:
    """The activation of a number from _enums.GATED_ACTIVATIONS. Limits where it is 0, lest 0 meets infinity."""
    if activation == _RELU:
        return torch.relu(x)
    if activation == _GELU:
        return x.clamp(min=-100) * _normal_cdf(x)
    if activation == _GELU_TANH:
        return x.clamp(min=-30) * torch.sigmoid(_twice_u(x))
    if activation == _SILU:
        return x.clamp(min=-1000) * torch.sigmoid(x)
    return torch.relu(x).square()


def derivative(x: torch.Tensor, activation: int) -> torch.Tensor:
    """d activate / dx; NaN where x is. Limits where it is 0 or 1."""
    if activation == _RELU:
        return torch.where(x.isnan(), x, (x > 0).to(x.dtype))
    if activation == _GELU:
        x = x.clamp(-100, 100)
        return _normal_cdf(x) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if activation == _GELU_TANH:
        x = x.clamp(-30, 30)
        s, rest = torch.sigmoid(_twice_u(x)), torch.sigmoid(-_twice_u(x))  # 1 - s would cancel
        return s + x * s * rest * math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * x * x)
    if activation == _SILU:
        x = x.clamp(-1000, 1000)
        return torch.sigmoid(x) * (1 + x * torch.sigmoid(-x))
    return 2 * torch.relu(x)


def _halves(gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if up is not None:
        return gate, up
    half = gate.shape[-1] // 2
    return gate[..., :half], gate[..., half:]


def _product(gate: torch.Tensor, up: torch.Tensor | None, activation: int) -> torch.Tensor:
    if activation == _RELU2:
        return activate(_wide(gate), activation).to(gate.dtype).contiguous()
    left, right = _halves(gate, up)
    return (activate(_wide(left), activation) * _wide(right)).to(gate.dtype).contiguous()


def reference(gate: torch.Tensor, up: torch.Tensor | None, activation: int) -> torch.Tensor:
    check_arguments(NAME, gate, up, activation, (*FLOATS, torch.float64))
    return _product(gate, up, activation)


def fake(gate: torch.Tensor, up: torch.Tensor | None, activation: int) -> torch.Tensor:
    check_arguments(NAME, gate, up, activation, (*FLOATS, torch.float64))
    return gate.new_empty(result_shape(gate, up, activation))


def _gradients(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """In plain differentiable PyTorch, for the second derivative too."""
    dtype, g = gate.dtype, _wide(grad)
    if activation == _RELU2:
        return (g * derivative(_wide(gate), activation)).to(dtype).contiguous(), gate.new_empty(0)
    left, right = (_wide(t) for t in _halves(gate, up))
    grad_gate = (g * right * derivative(left, activation)).to(dtype)
    grad_up = (g * activate(left, activation)).to(dtype)
    if up is None:
        return torch.cat((grad_gate, grad_up), dim=-1), gate.new_empty(0)
    return grad_gate.contiguous(), grad_up.contiguous()


def reference_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    check_grad(grad, gate, up, activation)
    return _gradients(grad, gate, up, activation)


def fake_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    check_grad(grad, gate, up, activation)
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else up.shape)


def reference_quantized(
    gate: torch.Tensor, up: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    check_arguments(QUANTIZED, gate, up, activation, FLOATS)
    return quantize_rowwise.reference(_product(gate, up, activation))


def fake_quantized(gate: torch.Tensor, up: torch.Tensor | None, activation: int) -> tuple[torch.Tensor, torch.Tensor]:
    check_arguments(QUANTIZED, gate, up, activation, FLOATS)
    shape = result_shape(gate, up, activation)
    return gate.new_empty(shape, dtype=torch.int8), gate.new_empty(shape[:-1], dtype=torch.float32)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    grad_gate, grad_up = torch.ops.pykernels.gated_activation_backward(grad, gate, up, ctx.activation)
    return grad_gate, None if up is None else grad_up, None


def setup_context_twice(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, gate, up, ctx.activation = inputs
    ctx.save_for_backward(grad, gate, up)


def backward_twice(ctx: Any, grad_gate: torch.Tensor, grad_up: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The second derivative, in plain PyTorch: rare enough to have no kernel."""
    saved = [t.detach().requires_grad_() for t in ctx.saved_tensors if t is not None]
    grad, gate, up = saved if len(saved) == 3 else (*saved, None)
    with torch.enable_grad():
        first, second = _gradients(grad, gate, up, ctx.activation)
    outputs, grads = ([first], [grad_gate]) if up is None else ([first, second], [grad_gate, grad_up])
    found = torch.autograd.grad(outputs, saved, grads, allow_unused=True)
    return (*found, *([None] if up is None else []), None)


_library.define(f"{NAME}(Tensor gate, Tensor? up, int activation) -> Tensor", reference, fake)
_library.define(
    f"{BACKWARD}(Tensor grad, Tensor gate, Tensor? up, int activation) -> (Tensor, Tensor)",
    reference_backward,
    fake_backward,
    triton=NAME,
)
_library.define(
    f"{QUANTIZED}(Tensor gate, Tensor? up, int activation) -> (Tensor, Tensor)",
    reference_quantized,
    fake_quantized,
)
_autograd.register(NAME, backward, setup_context)
_autograd.register(BACKWARD, backward_twice, setup_context_twice)


def _call(
    function: str, gate: torch.Tensor, up: torch.Tensor | None, activation: int, quantize: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    wants_gradient = torch.is_grad_enabled() and (gate.requires_grad or (up is not None and up.requires_grad))
    if quantize:
        if wants_gradient:
            raise NotImplementedError(
                f"{function}: quantize=True has no gradient: call it under torch.no_grad(), or with quantize=False "
                "and quantize the result where it is used (int8_linear does so itself)"
            )
        return torch.ops.pykernels.gated_activation_quantized.default(gate, up, activation)
    if wants_gradient or torch.compiler.is_compiling():
        return torch.ops.pykernels.gated_activation.default(gate, up, activation)
    with torch._C._AutoDispatchBelowAutograd():  # autograd's Python entry costs more than a small product
        return torch.ops.pykernels.gated_activation.default(gate, up, activation)


@names_argument
def swiglu(gate: torch.Tensor, up: torch.Tensor | None = None, *, quantize: bool = False) -> Any:
    """silu(gate) * up, silu(x) = x sigmoid(x): the SwiGLU of "GLU Variants Improve Transformer" (Shazeer, 2020).

    gate, up: [..., I] float32, bfloat16 or float16, one dtype -> [..., I] of that dtype, computed in float32 and
    rounded once. Without up, gate is packed [..., 2 * I], gate first, as one matmul of stacked weights returns it; its
    gradient is then one packed tensor. Rows may have any stride: halves of one product are read where they lie.
    quantize: returns (int8 [..., I], float32 scale [...]) instead, equal bit for bit to quantize_rowwise of the result
    and in one pass; without gradient.
    Saves for backward: gate and up by reference, 2 * numel(result) * itemsize bytes; the product is recomputed.
    Errors: RuntimeError names a wrong dtype, shape or device; NotImplementedError for a gradient through quantize=True.
    """
    return _call("swiglu", gate, up, _SILU, quantize)


@names_argument
def geglu(
    gate: torch.Tensor, up: torch.Tensor | None = None, *, approximate: str = "none", quantize: bool = False
) -> Any:
    """gelu(gate) * up (Shazeer, 2020; GELU after Hendrycks and Gimpel, 2016). As swiglu, packed and quantize too.

    approximate: "none", x times the normal distribution function, accurate in its lower tail; or "tanh", as
    torch.nn.functional.gelu spells them. ValueError names anything else.
    """
    return _call("geglu", gate, up, gelu_code("geglu", approximate), quantize)


@names_argument
def reglu(gate: torch.Tensor, up: torch.Tensor | None = None, *, quantize: bool = False) -> Any:
    """relu(gate) * up (Shazeer, 2020). As swiglu, packed and quantize too."""
    return _call("reglu", gate, up, _RELU, quantize)


@names_argument
def relu2(x: torch.Tensor, *, quantize: bool = False) -> Any:
    """relu(x)^2 of x [..., K], in one pass: Primer (So et al., 2021). quantize as in swiglu.

    Saves for backward: x by reference, numel(x) * itemsize bytes.
    """
    return _call("relu2", x, None, _RELU2, quantize)
