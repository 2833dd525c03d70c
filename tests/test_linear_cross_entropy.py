"""linear_cross_entropy: both strategies on every backend against a float64 truth, as exact as eager PyTorch."""

import pytest
import torch
import torch.nn.functional as torch_functional

import pykernels
import pykernels.functional as F
from pykernels import nn
from pykernels.bench.memory import peak_bytes, saved_bytes
from pykernels.ops import _chunks
from tests.matrix import BACKENDS, EPS, FLOATS, use

OPTIONS = {
    "plain": {},
    "bias and smoothing": {"bias": True, "label_smoothing": 0.1},
    "softcap and z_loss": {"softcap": 3.0, "z_loss": 0.01},
    "everything": {"bias": True, "label_smoothing": 0.2, "softcap": 3.0, "z_loss": 0.01},
}


def eager(x, weight, target, bias=None, *, softcap=None, z_loss=0.0, label_smoothing=0.0, reduction="mean", wide=None):
    """Logits in full, in the dtype of x, and the loss of their float32 (or float64) copy."""
    z = torch_functional.linear(x, weight, bias)
    z = z.to(wide or torch.promote_types(z.dtype, torch.float32)).flatten(0, -2)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    keep, flat = target.flatten() != -100, target.flatten()
    loss = torch_functional.cross_entropy(z, flat, label_smoothing=label_smoothing, reduction="none")
    loss = loss + torch.where(keep, z_loss * z.logsumexp(1) ** 2, 0.0)
    if reduction == "none":
        return loss.view(target.shape)
    return loss.sum() / (keep.sum() if reduction == "mean" else 1)


def problem(shape: tuple[int, ...], classes: int, dtype: torch.dtype, options: dict) -> tuple[list, torch.Tensor, dict]:
    x, weight = torch.randn(shape).to(dtype), (torch.randn(classes, shape[-1]) / shape[-1] ** 0.5).to(dtype)
    target = torch.randint(classes, shape[:-1])
    target.view(-1)[1::3] = -100
    options = dict(options)
    bias = [torch.randn(classes).to(dtype)] if options.pop("bias", False) else []
    return [x, weight, *bias], target, options


def run(function, tensors, target, grad, dtype=None, **options):
    """The loss and the gradient of each tensor."""
    leaves = [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]
    loss = function(*leaves[:2], target, *leaves[2:], **options)
    return loss.detach(), *torch.autograd.grad(loss, leaves, grad.to(loss.dtype).expand(loss.shape))


def assert_as_good_as_eager(ours, theirs, truth) -> None:
    """The root mean square error is at most 1.5 times eager's, the largest twice, and roundings.

    These are half one of the result, and one of float32 logits and logsumexp, which here are below 8: an absolute error
    of theirs is a relative one of every probability.
    """
    for a, b, t in zip(ours, theirs, truth, strict=True):
        assert a.shape == t.shape and a.dtype == b.dtype
        error, other = (a.double() - t), (b.double() - t)
        rounding = (0.5 * EPS[a.dtype] + 8 * 2.0**-23) * t.abs().max().item()
        assert error.norm().item() <= 1.5 * other.norm().item() + rounding * t.numel() ** 0.5
        assert error.abs().max().item() <= 2 * other.abs().max().item() + rounding


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and chunks so small that a small problem has several of each, the last ones ragged."""
    monkeypatch.setattr(_chunks, "TILE_BYTES", 4 * 300 * 8)
    monkeypatch.setattr(_chunks, "CHUNK_BYTES", 4 * 300 * 8)
    monkeypatch.setattr(_chunks, "WIDE_BYTES", 4 * 40 * 16)
    monkeypatch.setattr(_chunks, "LEAST_ROWS", 8)
    monkeypatch.setattr(_chunks, "CACHED_COLUMNS", 70)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_exact_as_eager(backend: str, dtype: torch.dtype, options: dict, small_tiles: None) -> None:
    problems = [
        (((5, 4, 40), 301), "recompute", "mean"),
        (((19, 17), 130), "forward", "sum"),
        (((19, 17), 130), None, "none"),
        (((33, 1), 3), "recompute", "sum"),
        (((5, 4, 40), 301), "forward", "mean"),
    ]
    for (shape, classes), strategy, reduction in problems[: 2 if backend == "triton" else None]:
        tensors, target, rest = problem(shape, classes, dtype, options)
        grad = torch.randn(target.shape) if reduction == "none" else torch.tensor(0.7)
        rest["reduction"] = reduction
        with use(backend):
            ours = run(F.linear_cross_entropy, tensors, target, grad, strategy=strategy, **rest)
        truth = run(eager, tensors, target, grad, torch.float64, **rest)
        assert_as_good_as_eager(ours, run(eager, tensors, target, grad, **rest), truth)


@pytest.mark.parametrize("classes", [50257, 128256])
@pytest.mark.parametrize("strategy", ["forward", "recompute"])
def test_real_vocabularies(classes: int, strategy: str) -> None:
    """At the tiles that are really used, of which these have several."""
    tensors, target, _ = problem((70, 8), classes, torch.bfloat16, {})
    ours = run(F.linear_cross_entropy, tensors, target, torch.ones(()), strategy=strategy)
    truth = run(eager, tensors, target, torch.ones(()), torch.float64)
    assert_as_good_as_eager(ours, run(eager, tensors, target, torch.ones(())), truth)


@pytest.mark.parametrize("strategy", ["forward", "recompute"])
def test_gradcheck(strategy: str, small_tiles: None) -> None:
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((9, 3), (11, 3), (11,)))
    target = torch.tensor([0, 10, -100, 3, 4, 5, -100, 1, 2])
    with pykernels.backend("reference"):
        assert torch.autograd.gradcheck(
            lambda *t: F.linear_cross_entropy(
                t[0], t[1], target, t[2], label_smoothing=0.1, z_loss=0.1, softcap=2.0, strategy=strategy
            ),
            (x, weight, bias),
        )


@pytest.mark.parametrize("strategy", ["forward", "recompute"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shift_is_a_slice(strategy: str, reduction: str) -> None:
    if reduction == "none":
        strategy = "recompute"
    for length in (1, 7):
        tensors, target, _ = problem((3, length, 16), 50, torch.float32, {})
        grad = torch.randn(3, length - 1) if reduction == "none" else torch.tensor(1.3)
        options = {"reduction": reduction, "strategy": strategy}
        shifted = run(F.linear_cross_entropy, tensors, target, grad, shift=True, **options)

        def sliced(x, weight, target, **options):
            return F.linear_cross_entropy(x[:, :-1], weight, target[:, 1:], **options)

        torch.testing.assert_close(shifted, run(sliced, tensors, target, grad, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", ["forward", "recompute"])
def test_lse_and_accuracy(backend: str, strategy: str) -> None:
    (x, weight), target, _ = problem((3, 6, 16), 50, torch.float32, {})
    logits = torch_functional.linear(x, weight)
    target[0] = logits[0].argmax(-1)  # as often right as wrong
    x.requires_grad_()
    with use(backend):
        for shift in (False, True):
            options = {"return_lse": True, "return_accuracy": True, "strategy": strategy, "shift": shift}
            loss, lse, accuracy = F.linear_cross_entropy(x, weight, target, **options)
            z, t = (logits[:, :-1], target[:, 1:]) if shift else (logits, target)
            keep = t != -100
            torch.testing.assert_close(lse, torch.where(keep, z.logsumexp(-1), 0.0))
            assert not lse.requires_grad and loss.requires_grad
            torch.testing.assert_close(accuracy, (z.argmax(-1) == t)[keep].float().mean())
        only = F.linear_cross_entropy(x, weight, target, return_accuracy=True)
    assert len(only) == 2 and only[1].dim() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", ["forward", "recompute"])
def test_nothing_counted_is_zero(backend: str, strategy: str) -> None:
    for rows, shape in ((3, (3, 8)), (0, (0, 8))):
        x, weight, bias = (torch.randn(s, requires_grad=True) for s in (shape, (40, 8), (40,)))
        with use(backend):
            target = torch.full((rows,), -100)
            loss, accuracy = F.linear_cross_entropy(
                x, weight, target, bias, z_loss=1.0, return_accuracy=True, strategy=strategy
            )
            loss.backward()
        assert loss == 0 and accuracy == 0
        assert all(t.grad.shape == t.shape and not t.grad.any() for t in (x, weight, bias))


@pytest.mark.parametrize("strategy", ["forward", "recompute"])
def test_second_backward(strategy: str) -> None:
    """A retained graph gives the same gradients again, whatever was done to the first; a freed one refuses as usual."""
    tensors, target, _ = problem((9, 16), 50, torch.float32, {"bias": True})
    leaves = [t.requires_grad_() for t in tensors]
    loss = F.linear_cross_entropy(leaves[0], leaves[1], target, leaves[2], strategy=strategy)
    loss.backward(retain_graph=True)
    first = [t.grad for t in leaves]
    copies = [g.clone() for g in first]
    for g in first:
        g.mul_(0)
    again = torch.autograd.grad(loss, leaves, torch.tensor(-2.0), retain_graph=True)
    torch.testing.assert_close(again, [-2 * g for g in copies], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), copies, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_frozen_parts_are_not_computed() -> None:
    """No gradient, and no product for it."""
    (x, weight), target, _ = problem((9, 16), 50, torch.float32, {})
    for strategy in ("forward", "recompute"):
        for wants_x, products in ((True, {"forward": 2, "recompute": 3}), (False, {"forward": 2, "recompute": 3})):
            x.requires_grad_(wants_x)
            weight.requires_grad_(not wants_x)
            with torch.profiler.profile(record_shapes=True) as profile:
                loss = F.linear_cross_entropy(x, weight, target, strategy=strategy)
                grads = torch.autograd.grad(loss, x if wants_x else weight)
            flops = [e.input_shapes for e in profile.events() if e.name in ("aten::mm", "aten::addmm_")]
            assert len(flops) == products[strategy], flops
            assert grads[0].abs().sum() > 0
    with torch.profiler.profile() as profile, torch.no_grad():
        F.linear_cross_entropy(x, weight, target, strategy="forward")
    assert sum(e.name == "aten::mm" for e in profile.events()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes(dtype: torch.dtype) -> None:
    rows, k, classes, b = 12, 32, 200, dtype.itemsize
    tensors, target, _ = problem((rows, k), classes, dtype, {"bias": True})
    x, weight, bias = (t.requires_grad_() for t in tensors)
    for strategy, reduction, expected in (
        ("recompute", "none", 4 * rows),
        ("recompute", "mean", 4 * rows + 4),
        ("forward", "sum", b * (rows * k + classes * k + classes)),
        ("forward", "mean", b * (rows * k + classes * k + classes)),
    ):

        def forward(strategy=strategy, reduction=reduction):
            return F.linear_cross_entropy(x, weight, target, bias, strategy=strategy, reduction=reduction)

        assert saved_bytes(forward, [x, weight, bias, target]) == expected


@pytest.mark.parametrize("strategy", ["forward", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_is_the_gradients_and_64_mib(dtype: torch.dtype, strategy: str) -> None:
    """2048 tokens and 32000 classes, of a hidden size that takes seconds: the tiles are of full size."""
    (x, weight), target, _ = problem((2048, 64), 32000, dtype, {})
    leaves = (x.requires_grad_(), weight.requires_grad_())

    def step() -> tuple[torch.Tensor, ...]:
        loss = F.linear_cross_entropy(x, weight, target, strategy=strategy)
        return torch.autograd.grad(loss, leaves)

    gradients = sum(t.numel() * t.element_size() for t in leaves)
    assert peak_bytes(step, torch.device("cpu")) <= gradients + (64 << 20)


def test_the_default_strategy_is_by_size() -> None:
    from pykernels.ops.linear_cross_entropy import default_strategy

    def chosen(dtype: torch.dtype, classes: int, reduction: str = "mean") -> str:
        x, weight = (torch.empty(s, dtype=dtype, device="meta").requires_grad_() for s in ((8, 1024), (classes, 1024)))
        return default_strategy(x, weight, reduction)

    assert chosen(torch.float32, 32000) == "forward" and chosen(torch.float32, 32000, "none") == "recompute"
    assert chosen(torch.bfloat16, 4096) == "forward" and chosen(torch.bfloat16, 32000) == "recompute"
    assert chosen(torch.float16, 4096) == "recompute"


def test_a_loss_scale_saves_small_float16_gradients() -> None:
    """The default sees the scale before it rounds; gradients made in forward are lost, as its docstring says."""
    x, weight = torch.randn(256, 16).half(), (torch.randn(500, 16) * 1e-3).half()
    target, scale = torch.randint(500, (256,)), 2.0**16
    truth = run(eager, [x, weight], target, torch.ones(()), torch.float64)[1]
    errors = {}
    for strategy in (None, "forward"):
        grad = run(F.linear_cross_entropy, [x, weight], target, torch.tensor(scale), strategy=strategy)[1]
        errors[strategy] = ((grad.double() / scale - truth).norm() / truth.norm()).item()
    assert errors[None] < 2**-11  # one rounding
    assert errors["forward"] > 2**-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_linear_would(dtype: torch.dtype) -> None:
    (x, weight), target, _ = problem((6, 16), 40, torch.float32, {})
    x.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = F.linear_cross_entropy(x, weight, target)
    assert torch.equal(loss, F.linear_cross_entropy(x.to(dtype), weight.to(dtype), target))
    loss.backward()
    assert loss.dtype == x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("strategy", ["forward", "recompute"])
def test_compiles_into_one_graph(strategy: str) -> None:
    tensors, target, _ = problem((6, 16), 40, torch.float32, {"bias": True})
    torch.compiler.reset()

    def step(x, weight, target, bias):
        return F.linear_cross_entropy(x * 2, weight, target, bias, strategy=strategy) * 3

    compiled = torch.compile(step, fullgraph=True)
    ours, theirs = (run(f, tensors, target, torch.tensor(0.5)) for f in (compiled, step))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_modules() -> None:
    tensors, target, _ = problem((3, 5, 16), 40, torch.float32, {"bias": True})
    x, weight, bias = tensors
    loss = nn.LinearCrossEntropyLoss(label_smoothing=0.1, shift=True)
    wanted = F.linear_cross_entropy(x, weight, target, bias, label_smoothing=0.1, shift=True)
    assert torch.equal(loss(x, weight, target, bias), wanted) and not list(loss.parameters())
    weights = torch.rand(40)
    plain = nn.CrossEntropyLoss(weights, softcap=4.0)
    logits = torch_functional.linear(x, weight, bias)
    assert torch.equal(plain(logits, target), F.cross_entropy(logits, target, weights, softcap=4.0))
    assert "weight" in plain.state_dict() and "softcap=4.0" in repr(plain)


X, WEIGHT, TARGET = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
REFUSED = [
    ({"strategy": "both"}, ValueError, "strategy to be None, 'forward' or 'recompute', got 'both'"),
    ({"strategy": "forward", "reduction": "none"}, ValueError, "with reduction 'none', got 'forward'"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing to be within"),
    ({"target": torch.tensor([0, 5, 2])}, ValueError, r"target to be within \[0, 5\) or ignore_index \(-100\), got 5"),
    ({"target": TARGET[:2]}, RuntimeError, r"target to have shape \[3\]"),
    ({"weight": WEIGHT[:, :3]}, RuntimeError, r"weight to have shape \[V, 4\]"),
    ({"weight": WEIGHT.bfloat16()}, RuntimeError, "weight to be float32, got bfloat16"),
    ({"bias": torch.ones(4)}, RuntimeError, r"bias to have shape \[5\], got \[4\]"),
    ({"input": X[0], "target": TARGET[0], "shift": True}, RuntimeError, r"input to have shape \[..., S, H\]"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED)
def test_refuses(arguments: dict, error: type, message: str) -> None:
    call = {"input": X, "weight": WEIGHT, "target": TARGET, **arguments}
    with pytest.raises(error, match=message):
        F.linear_cross_entropy(**call)
