"""cross_entropy: every backend against a float64 truth, and what torch's own function says in the same dtype."""

import itertools

import pytest
import torch
import torch.nn.functional as torch_functional

import pykernels
import pykernels.functional as F
from pykernels.bench.memory import saved_bytes
from pykernels.ops.cross_entropy_tiles import finish, new_state
from tests.matrix import BACKENDS, FLOATS, use

OPTIONS = {
    "plain": {},
    "weights": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "weights and smoothing": {"weight": True, "label_smoothing": 0.3},
    "all smooth": {"label_smoothing": 1.0},
    "softcap": {"softcap": 5.0},
    "z_loss": {"z_loss": 0.01},
    "everything": {"weight": True, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0},
}
# One class, below and above every vector width, past one block of the CPU kernels (1024) and of Triton's (4096).
CLASSES = [1, 2, 17, 130, 1025, 4097]


def plain(logits, target, weight=None, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None, reduction):
    """The same in plain PyTorch, in the dtype of logits."""
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    weight = None if weight is None else weight.to(z.dtype)
    keep = target != ignore_index
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    flat = (z.flatten(0, -2), target.flatten(), weight)
    loss = torch_functional.cross_entropy(*flat, **options, reduction="none").view(target.shape)
    loss = loss + torch.where(keep, z_loss * torch.logsumexp(z, -1) ** 2, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (keep.sum() if weight is None else weight[target[keep]].sum())


def problem(shape: tuple[int, ...], dtype: torch.dtype, options: dict) -> tuple:
    logits = (torch.randn(shape) * 3).to(dtype)
    target = torch.randint(shape[-1], shape[:-1])
    if target.numel() > 2:
        target.view(-1)[1] = -100
    options = dict(options)
    weight = torch.rand(shape[-1]) + 0.1 if options.pop("weight", False) else None
    return logits, target, weight, options


def losses_and_gradient(function, logits, target, weight, grad, **options):
    logits = logits.detach().clone().requires_grad_()
    loss = function(logits, target, weight, **options)
    return loss.detach(), torch.autograd.grad(loss, logits, grad.to(loss.dtype).expand(loss.shape))[0]


def worst(value: torch.Tensor, truth: torch.Tensor) -> float:
    return (value.double() - truth).abs().max().item()


def assert_as_good_as_torch(ours, theirs, truth, top: float, rows: int = 1) -> None:
    """At most twice torch's error, plus roundings: half an ulp of the result, and one of float32 logits and logsumexp.

    top: the largest of those, float32 of which is all that is kept for backward: an absolute error of theirs is a
    relative one of every probability. rows: how many rows were added up; 0 for a gradient, whose terms of about 1
    cancel.
    """
    assert ours.shape == truth.shape and bool(torch.isfinite(ours).all())
    largest = truth.abs().max().item()
    terms = top * max(largest, rows) if rows else top * largest + 1.0
    allowed = 0.5 * torch.finfo(ours.dtype).eps * largest + 2.0**-23 * terms
    assert worst(ours, truth) <= 2 * worst(theirs, truth) + allowed


def largest_logit(logits: torch.Tensor) -> float:
    return max(1.0, logits.double().abs().max().item(), logits.double().logsumexp(-1).abs().max().item())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_exact_as_torch(backend: str, dtype: torch.dtype, options: dict) -> None:
    for index, classes in enumerate(CLASSES[: 5 if backend == "triton" else None]):
        logits, target, weight, rest = problem((7, classes), dtype, options)
        rest["reduction"] = reduction = ("mean", "none", "sum")[index % 3]
        grad = torch.randn(7) if reduction == "none" else torch.tensor(0.7)
        with use(backend):
            loss, slope = losses_and_gradient(F.cross_entropy, logits, target, weight, grad, **rest)
        true_loss, true_slope = losses_and_gradient(plain, logits.double(), target, weight, grad, **rest)
        # torch's loss in float32, as ours is, and its gradient rounded to the dtype of logits.
        cast = losses_and_gradient(plain, logits.float(), target, weight, grad, **rest)
        assert loss.dtype == torch.float32 and slope.dtype == dtype and not slope[1].any()
        top = largest_logit(logits)
        assert_as_good_as_torch(loss, cast[0], true_loss, top, 7 if reduction == "sum" else 1)
        assert_as_good_as_torch(slope, cast[1].to(dtype), true_slope, top, 0)


@pytest.mark.parametrize("classes", [50257, 128256])
def test_real_vocabularies(classes: int) -> None:
    """Sums over many terms, in few rows."""
    for isa in ("portable", pykernels._library.current_cpu_isa()):
        logits, target, weight, rest = problem((3, classes), torch.bfloat16, OPTIONS["everything"])
        rest["reduction"], grad = "mean", torch.ones(())
        with pykernels.cpu_isa(isa):
            loss, slope = losses_and_gradient(F.cross_entropy, logits, target, weight, grad, **rest)
        true_loss, true_slope = losses_and_gradient(plain, logits.double(), target, weight, grad, **rest)
        cast = losses_and_gradient(plain, logits.float(), target, weight, grad, **rest)
        assert_as_good_as_torch(loss, cast[0], true_loss, largest_logit(logits))
        assert_as_good_as_torch(slope, cast[1].bfloat16(), true_slope, largest_logit(logits), 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_semantics_are_torchs(reduction: str, weighted: bool, smoothing: float) -> None:
    """Against the function itself, in float64: weights, smoothing, ignored targets and the mean's denominator."""
    logits = torch.randn(4, 5, 13, dtype=torch.float64)
    target = torch.randint(13, (4, 5))
    target[1, 2:] = 7
    weight = torch.rand(13, dtype=torch.float64) if weighted else None
    options = {"ignore_index": 7, "label_smoothing": smoothing, "reduction": reduction}
    grad = torch.randn(4, 5, dtype=torch.float64) if reduction == "none" else torch.randn((), dtype=torch.float64)

    def theirs(logits, target, weight, **options):
        return torch_functional.cross_entropy(logits.movedim(-1, 1), target, weight, **options)

    with pykernels.backend("reference"):
        ours = losses_and_gradient(F.cross_entropy, logits, target, weight, grad, **options)
    torch.testing.assert_close(ours, losses_and_gradient(theirs, logits, target, weight, grad, **options))


def test_gradcheck() -> None:
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    target, weight = torch.tensor([0, 8, -100, 3]), torch.rand(9, dtype=torch.float64)
    op = torch.ops.pykernels.cross_entropy.default
    with pykernels.backend("reference"):
        # Both differentiable outputs, loss and logsumexp.
        assert torch.autograd.gradcheck(lambda x: op(x, target, weight, -100, 0.2, 0.1, 2.0)[:2], logits)
        assert torch.autograd.gradcheck(lambda x: op(x, target, None, -100, 0.0, 0.0, 0.0)[:2], logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logsumexp_and_its_gradient(backend: str) -> None:
    logits, target = torch.randn(5, 37, requires_grad=True), torch.tensor([1, -100, 3, 36, 0])
    with use(backend):
        _, lse, correct = torch.ops.pykernels.cross_entropy(logits, target, None, -100, 0.0, 0.0, 0.0)
        (slope,) = torch.autograd.grad(lse.sum(), logits)
    keep = (target != -100).float()
    torch.testing.assert_close(lse, logits.logsumexp(1) * keep)
    torch.testing.assert_close(slope, logits.softmax(1) * keep[:, None])
    assert torch.equal(correct, logits.argmax(1) == target)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_tiles_make_the_whole(backend: str, softcap: float) -> None:
    """update_ and backward_ over uneven tiles give what cross_entropy gives over all classes."""
    logits, target, weight, _ = problem((6, 300), torch.float32, {"weight": True})
    logits[2] = -torch.inf
    logits[2, target[2]] = 1.0
    cuts = [0, 1, 130, 297, 300]
    op = torch.ops.pykernels
    grad, grad_lse = torch.randn(6), torch.randn(6)
    with use(backend):
        whole = op.cross_entropy(logits, target, weight, -100, 0.1 * (softcap > 0), 0.01, softcap)
        options = (-100, 0.1 * (softcap > 0), 0.01, softcap)
        slope = op.cross_entropy_backward(grad, grad_lse, logits, target, weight, whole[1], *options)
        state, tiles = new_state(6, logits, torch.float32), []
        for begin, end in itertools.pairwise(cuts):
            tile = logits[:, begin:end].clone()
            op.cross_entropy_update_(state, tile, target, weight, -100, softcap, begin)
            op.cross_entropy_backward_(grad, grad_lse, tile, target, weight, whole[1], *options, begin, 300)
            tiles.append(tile)
    together = finish(state, target, weight, *options[:3], 300)
    torch.testing.assert_close(together, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(tiles, 1), slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_and_masked_logits(backend: str) -> None:
    """-inf masks a class; a row with no finite logit, +inf or NaN is NaN as in torch, and stays in its row."""
    logits = torch.randn(6, 40)
    logits[0, 5:30] = -torch.inf
    logits[1] = -torch.inf
    logits[2, 3] = torch.inf
    logits[3, 4] = torch.nan
    logits[4] = 1e4 + torch.arange(40.0)
    target = torch.tensor([1, 2, 0, 0, 7, 9])
    with use(backend):
        loss = F.cross_entropy(logits, target, reduction="none")
    expected = torch_functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_and_empty_batches(backend: str) -> None:
    base = torch.randn(6, 8, 50)
    target = torch.randint(33, (6, 4))
    with use(backend):
        for view in (base[:, ::2, 9:42], base.transpose(0, 1)[:4, :, :33].transpose(0, 1), base[:, :4, :33]):
            wanted = torch_functional.cross_entropy(view.flatten(0, 1), target.flatten())
            torch.testing.assert_close(F.cross_entropy(view, target), wanted)
        one = F.cross_entropy(base[0, 0], torch.tensor(3))
        torch.testing.assert_close(one, torch_functional.cross_entropy(base[0, 0], torch.tensor(3)))
        empty = base[:0, 0].clone().requires_grad_()
        loss = F.cross_entropy(empty, target[:0, 0])
        loss.backward()
        assert loss == 0 and empty.grad.shape == (0, 50)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_counted_is_zero(backend: str, weighted: bool) -> None:
    logits = torch.randn(3, 11, requires_grad=True)
    with use(backend):
        loss = F.cross_entropy(logits, torch.full((3,), -100), torch.rand(11) if weighted else None, z_loss=0.1)
        loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_saved_bytes() -> None:
    rows, classes = 12, 1000
    logits, target = torch.randn(rows, classes, requires_grad=True), torch.randint(classes, (rows,))
    for reduction, more in (("none", 0), ("sum", 0), ("mean", 4)):
        saved = saved_bytes(lambda r=reduction: F.cross_entropy(logits, target, reduction=r), [logits, target])
        assert saved == 4 * rows + more


def test_autocast_and_compile() -> None:
    logits, target = torch.randn(8, 100, requires_grad=True), torch.randint(100, (8,))
    with torch.autocast("cpu", torch.bfloat16):
        assert F.cross_entropy(logits, target).dtype == torch.float32
    torch.compiler.reset()

    def step(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x * 2, target, label_smoothing=0.1, softcap=7.0)

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(logits), step(logits), rtol=1e-6, atol=0)  # the mean's order differs
    ours, theirs = (torch.autograd.grad(f(logits), logits)[0] for f in (compiled, step))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


LOGITS, TARGET = torch.randn(3, 5), torch.tensor([0, 1, 2])
REFUSED = [
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing to be within \[0, 1\], got 1.5"),
    ({"z_loss": -1.0}, ValueError, "z_loss to be finite and at least 0, got -1.0"),
    ({"softcap": 0.0}, ValueError, "softcap to be None or finite and above 0, got 0.0"),
    ({"reduction": "median"}, ValueError, "reduction to be one of none, mean, sum, got 'median'"),
    ({"target": torch.tensor([0, 5, 2])}, ValueError, r"target to be within \[0, 5\) or ignore_index \(-100\), got 5"),
    ({"target": torch.tensor([0, -1, 2])}, ValueError, "got -1"),
    ({"target": TARGET.int()}, RuntimeError, "target to be int64, got int32"),
    ({"target": TARGET[:2]}, RuntimeError, r"target to have shape \[3\]"),
    ({"logits": LOGITS.long()}, RuntimeError, "logits to be float32"),
    ({"logits": LOGITS[:, :0]}, RuntimeError, "V at least 1"),
    ({"weight": torch.ones(4)}, RuntimeError, r"weight to have shape \[5\]"),
    ({"weight": torch.ones(5).bfloat16()}, RuntimeError, "weight to be float32, got bfloat16"),
    ({"target": TARGET.to("meta")}, RuntimeError, "target on the device of logits"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED)
def test_refuses(arguments: dict, error: type, message: str) -> None:
    call = {"logits": LOGITS, "target": TARGET, **arguments}
    with pytest.raises(error, match=message):
        F.cross_entropy(**call)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_the_operators_themselves_never_read_outside(backend: str) -> None:
    """Compiled code steps past the Python function: the kernels check too, before anything is written."""
    bad, lse = torch.tensor([0, 5, 2]), torch.zeros(3)
    tile = LOGITS.clone()
    op = torch.ops.pykernels
    with use(backend), pytest.raises((RuntimeError, ValueError), match="target to be within"):
        op.cross_entropy(LOGITS, bad, None, -100, 0.0, 0.0, 0.0)
    with use("native:portable"), pytest.raises(RuntimeError, match="got 5 at row 1"):
        op.cross_entropy_backward_(lse, None, tile, bad, None, lse, -100, 0.0, 0.0, 0.0, 0, 5)
    assert torch.equal(tile, LOGITS)


def test_no_second_derivative() -> None:
    logits = LOGITS.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(logits, TARGET), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        slope.sum().backward()
