"""FlopCounterMode counts what our operators multiply: what plain PyTorch counts, and what is made again in backward."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as torch_functional
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import pykernels.functional as F
from pykernels import _library
from pykernels.ops import _flops
from pykernels.ops.int8_training import Int8TrainingConfig, int8_training_linear

B, S, K, INNER, HEADS, KV, WIDTH, V = 2, 6, 16, 20, 4, 2, 4, 50


def flops(function: Callable[..., Tensor], *tensors: Tensor) -> tuple[int, int]:
    """Counted in forward and in backward; every tensor wants a gradient that can have one."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            out = function(*leaves)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def weights(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape) for shape in shapes]


def plain_loss(x: Tensor, weight: Tensor) -> Tensor:
    return torch_functional.cross_entropy(x @ weight.t(), torch.arange(B * S))


def plain_kl(x: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    other = (teacher.detach() @ teacher_weight.detach().t()).log_softmax(-1)
    return torch_functional.kl_div((x @ weight.t()).log_softmax(-1), other, log_target=True, reduction="batchmean")


def plain_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (torch_functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(HEADS // KV, 2) for t in (k, v))
    return torch_functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)


def plain_norm_attention(x: Tensor, *projections: Tensor) -> Tensor:
    return plain_attention(*((x @ weight.t()).unflatten(-1, (-1, WIDTH)) for weight in projections))


ROWS = B * S
LOSS, MLP = weights((ROWS, K), (V, K)), weights((B, S, K), (INNER, K), (INNER, K), (K, INNER))
QKV = weights((HEADS * WIDTH, K), (KV * WIDTH, K), (KV * WIDTH, K))
SCORES = 2 * B * HEADS * S * S * WIDTH  # of q k^T, which every kernel that holds no probabilities makes again
# name: ours, plain PyTorch, the tensors, and what is made again in backward
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor], int]] = {
    "norm_linear": (
        lambda x, *w: sum(y.sum() for y in F.norm_linear(x, w)),
        lambda x, *w: sum((x @ weight.t()).sum() for weight in w),
        [MLP[0], *QKV],
        0,
    ),
    "glu_linear": (
        lambda gate, up, w: F.glu_linear(gate, up, w),
        lambda gate, up, w: (torch_functional.silu(gate) * up) @ w.t(),
        weights((B, S, INNER), (B, S, INNER), (K, INNER)),
        0,
    ),
    "norm_mlp": (F.norm_mlp, plain_mlp, MLP, 2 * 2 * ROWS * K * INNER),
    "attention": (
        F.attention,
        plain_attention,
        weights((B, S, HEADS, WIDTH), (B, S, KV, WIDTH), (B, S, KV, WIDTH)),
        SCORES,
    ),
    "norm_attention": (
        lambda x, *w: F.norm_attention(x, *w, head_dim=WIDTH),
        plain_norm_attention,
        [MLP[0], *QKV],
        SCORES + 2 * ROWS * K * (HEADS + 2 * KV) * WIDTH,
    ),
    "linear_cross_entropy recompute": (
        lambda x, w: F.linear_cross_entropy(x, w, torch.arange(ROWS), strategy="recompute"),
        plain_loss,
        LOSS,
        2 * ROWS * K * V,
    ),
    "linear_kl_div recompute": (
        lambda *t: F.linear_kl_div(*t, strategy="recompute"),
        plain_kl,
        [*LOSS, *weights((ROWS, 8), (V, 8))],
        2 * ROWS * (K + 8) * V,
    ),
    "linear_jsd recompute": (
        lambda *t: F.linear_jsd(*t, strategy="recompute"),
        plain_kl,
        [*LOSS, *weights((ROWS, 8), (V, 8))],
        2 * ROWS * (K + 8) * V,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_as_plain_pytorch_and_what_is_made_again(name: str) -> None:
    ours, plain, tensors, again = CASES[name]
    forward, backward = flops(plain, *tensors)
    assert forward > 0 and backward > 0
    assert flops(ours, *tensors) == (forward, backward + again)


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_kl_div", "linear_jsd"])
def test_gradients_made_in_forward_count_there(name: str) -> None:
    if name == "linear_cross_entropy":
        ours, tensors = lambda x, w: F.linear_cross_entropy(x, w, torch.arange(ROWS), strategy="forward"), LOSS
    else:
        ours, tensors = (lambda *t: getattr(F, name)(*t, strategy="forward")), [*LOSS, *weights((ROWS, 8), (V, 8))]
    plain = plain_loss if name == "linear_cross_entropy" else plain_kl
    assert flops(ours, *tensors) == (sum(flops(plain, *tensors)), 0)


def test_what_nobody_asks_for_is_not_counted() -> None:
    x, gate, up, down = MLP
    one = 2 * ROWS * K * INNER
    for wanted, count in (([0], 2 + 3), ([1], 2 + 2), ([3], 2 + 1)):
        leaves = [t.detach().requires_grad_(place in wanted) for place, t in enumerate(MLP)]
        with FlopCounterMode(display=False) as counter:
            F.norm_mlp(*leaves).sum().backward()
        assert counter.get_total_flops() == (3 + count) * one, wanted
    x = x.detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        F.norm_linear(x, [gate, up])[1].sum().backward()
    assert counter.get_total_flops() == (2 + 1) * one
    product = x[..., :1].expand(B, S, INNER)
    with FlopCounterMode(display=False) as counter:
        F.glu_linear(product, product, down).sum().backward()
    assert counter.get_total_flops() == 2 * one


def test_teacher_logits_cost_no_product() -> None:
    x, weight = LOSS
    with FlopCounterMode(display=False) as counter:
        F.linear_kl_div(x, weight, teacher_logits=torch.randn(ROWS, V))
    assert counter.get_total_flops() == 2 * ROWS * K * V


def test_int8_products_count_as_those_of_floats() -> None:
    x, weight = torch.randn(B, S, K), torch.randn(INNER, K)
    one = 2 * ROWS * K * INNER
    codes, scale = F.quantize_rowwise(weight)
    columns = torch.tensor([1, 3, 4])
    for count, call in (
        (one, lambda: F.int8_linear(x, (codes, scale))),
        (one, lambda: F.int8_weight_only_linear(x, (codes, scale))),
        (one, lambda: F.int8_matmul(codes, codes[:ROWS], scale, scale[:ROWS])),
        (2 * one, lambda: F.int8_linear_outliers(x, (codes, scale))),
        (
            one + 2 * ROWS * 3 * INNER,
            lambda: F.int8_linear_outliers(x, (codes, scale), weight[:, columns], columns=columns),
        ),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        assert counter.get_total_flops() == count
    for grad_weight in (True, False):
        config = Int8TrainingConfig(grad_weight=grad_weight)
        assert flops(lambda x, w, c=config: int8_training_linear(x, w, None, c), x, weight) == (one, 2 * one)
    frozen = x.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        F.int8_linear(frozen, (codes, scale)).sum().backward()
    assert counter.get_total_flops() == 2 * one
    rows, experts = torch.randn(7, K, requires_grad=True), F.quantize_rowwise(torch.randn(3, INNER, K))
    with FlopCounterMode(display=False) as counter:
        F.int8_grouped_linear(rows, experts, torch.tensor([4, 0, 2])).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 7 * K * INNER


def test_every_operator_that_multiplies_has_a_formula() -> None:
    """The others are named here, so that a new operator must be put on one side or the other."""
    no_product = {
        *("cross_entropy", "cross_entropy_backward", "cross_entropy_backward_", "cross_entropy_update_"),
        *("distillation_rows", "distillation_rows_backward", "distillation_rows_grad_"),
        *("dequantize", "dropout", "rope", "gated_activation", "gated_activation_backward"),
        *("quantize_asymmetric", "quantize_blockwise", "quantize_colwise", "quantize_rowwise", "quantize_both"),
        "quantize_transposed",
        *(f"{norm}_norm{what}" for norm in ("rms", "layer") for what in ("", "_backward", "_quantized")),
        "gated_activation_quantized",
        "grouped_sum",
        *("optimizer_update_", "optimizer_norms", "squared_norms", "scale_tensors_"),
    }
    assert set(_library.OPS) == no_product | set(_flops.FORMULAS)
    assert all(getattr(torch.ops.pykernels, name) in flop_registry for name in _flops.FORMULAS)


def test_formulas_arrive_with_the_counter() -> None:
    """pykernels does not import it, since it imports triton."""
    script = """
import sys
import torch
import pykernels.functional as F
assert "torch.utils.flop_counter" not in sys.modules and "triton" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    F.norm_linear(torch.ones(2, 3), torch.ones(5, 3))
assert counter.get_total_flops() == 60
"""
    subprocess.run([sys.executable, "-c", script], check=True)
