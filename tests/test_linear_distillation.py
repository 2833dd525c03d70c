"""linear_kl_div and linear_jsd: against plain PyTorch's logits, in many chunks, and the bytes they hold."""

import pytest
import torch
import torch.nn.functional as tf

import pykernels.functional as F
from pykernels import backend, nn
from pykernels.bench.memory import peak_bytes, saved_bytes
from pykernels.ops import _vocabulary
from tests.matrix import EPS
from tests.test_distillation import plain

V, H, HT = 515, 24, 40
CHUNK = 7 * V * 4  # seven rows of float32 logits
STRATEGIES = ("forward", "recompute")


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    """Three chunks of rows, and weights of another dtype in five blocks."""
    monkeypatch.setattr(_vocabulary, "LOGITS_BYTES", CHUNK)
    monkeypatch.setattr(_vocabulary, "BLOCK_BYTES", 128 * HT * 4)


def problem(dtype=torch.float32, weight_dtype=None, rows=(2, 9)):
    """input, weight, bias, teacher's input, weight, bias, target."""
    tensors = (
        torch.randn(*rows, H),
        torch.randn(V, H) * 0.4,
        torch.randn(V),
        torch.randn(*rows, HT),
        torch.randn(V, HT) * 0.4,
        torch.randn(V),
    )
    target = torch.randint(0, V, rows)
    target[0, 3] = target[1, 8] = -100
    wanted = [dtype, weight_dtype or dtype, weight_dtype or dtype] * 2
    return *(t.to(d) for t, d in zip(tensors, wanted, strict=True)), target


def eager(x, w, b, t, tw, tb, target, divergence, beta, temperature, hard_weight, reduction="batchmean"):
    """Plain PyTorch, whole logits in the dtype of the arguments (the wider, where they differ)."""
    dtype = torch.promote_types(x.dtype, w.dtype)
    student, teacher = (tf.linear(*(v.to(dtype) for v in three)) for three in ((x, w, b), (t, tw, tb)))
    flat = (student.flatten(0, -2), teacher.flatten(0, -2), target.flatten())
    loss = plain(*flat, divergence, beta, temperature, hard_weight)
    if reduction == "none":
        return loss.view(target.shape)
    return loss.sum() / ((target != -100).sum() if reduction == "batchmean" else 1)


def ours(x, w, b, t, tw, tb, target, divergence, beta, temperature, hard_weight, reduction="batchmean", **options):
    options |= {"bias": b, "teacher_bias": tb, "target": target, "temperature": temperature}
    options |= {"hard_weight": hard_weight, "reduction": reduction}
    if divergence == "jsd":
        return F.linear_jsd(x, w, t, tw, beta=beta, **options)
    return F.linear_kl_div(x, w, t, tw, reverse=divergence == "reverse_kl", **options)


def measured(call, tensors, *rest, **options):
    """The loss and the three gradients, with an upstream gradient that is not 1."""
    leaves = [t.detach().requires_grad_() for t in tensors[:3]]
    loss = call(*leaves, *tensors[3:], *rest, **options)
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=torch.float64).view(loss.shape).to(loss.dtype)
    loss.backward(upstream)
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", [("kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.1)], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_numbers(dtypes, strategy, kind) -> None:
    """Twice eager's error in the same dtype at most, RMS, and half a rounding of the result where eager has
    none: a whole one of the loss, a single number."""
    tensors = problem(*dtypes)
    truth = measured(eager, [t.double() if t.is_floating_point() else t for t in tensors], *kind, 2.0, 0.25)
    usual = measured(eager, tensors, *kind, 2.0, 0.25)
    found = measured(ours, tensors, *kind, 2.0, 0.25, strategy=strategy)
    for got, right, other, like in zip(found, truth, usual, (None, *tensors[:3]), strict=True):
        assert got.dtype == (torch.float32 if like is None else like.dtype)
        error, theirs = ((v.double() - right).square().mean().sqrt() for v in (got, other))
        roundings = 1.0 if like is None else 0.5
        assert error <= 2 * theirs + roundings * EPS[got.dtype] * right.square().mean().sqrt()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
def test_reductions_strategies_and_given_logits_agree(reduction) -> None:
    tensors = problem()
    arguments = ("jsd", 0.3, 1.5, 0.4, reduction)
    truth = measured(eager, [t.double() if t.is_floating_point() else t for t in tensors], *arguments)
    t, tw, tb, target = tensors[3:]
    logits = tf.linear(t, tw, tb)

    def given(x, w, b, *_):
        return F.linear_jsd(
            x,
            w,
            bias=b,
            teacher_logits=logits,
            target=target,
            beta=0.3,
            temperature=1.5,
            hard_weight=0.4,
            reduction=reduction,
        )

    found = [measured(ours, tensors, *arguments), measured(ours, tensors, *arguments, strategy="recompute")]
    for results in (*found, measured(given, tensors)):
        for got, right in zip(results, truth, strict=True):
            torch.testing.assert_close(got.double(), right, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_are_those_of_the_loss(strategy) -> None:
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 3), (5, 3), (5,)))
    t, tw = torch.randn(2, 3, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    target = torch.tensor([[0, 1, -100], [3, 4, 0]])
    with backend("reference"):
        for beta in (0.0, 0.3):
            options = {"target": target, "beta": beta, "hard_weight": 0.2, "temperature": 2.0, "strategy": strategy}

            def loss(x, w, b, options=options):
                return F.linear_jsd(x, w, t, tw, bias=b, **options)

            assert torch.autograd.gradcheck(loss, (x, w, b))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equal_models_and_ignored_rows(strategy) -> None:
    x, w, b, *_, target = problem()
    for beta in (0.0, 0.5, 1.0):
        options = {"teacher_bias": b, "beta": beta, "strategy": strategy}
        zeros = measured(lambda x, w, b, o=options: F.linear_jsd(x, w, x, w, bias=b, **o), (x, w, b))
        assert not any(v.any() for v in zeros)
    ignored = torch.full_like(target, -100)
    for values in (x, torch.full_like(x, torch.nan)):
        results = measured(ours, (values, *problem()[1:6], ignored), "kl", 0.0, 1.0, 0.5, strategy=strategy)
        assert results[0] == 0
        # NaN in an ignored row of input reaches weight's gradient as 0 * NaN, in a plain matmul too.
        assert not any(v.any() for v in (results[1:] if values is x else results[1:2]))
    none = F.linear_kl_div(x[:, :0], w, x[:, :0], w, strategy=strategy)
    assert none == 0


def test_saved_bytes() -> None:
    """The formulas of the docstring, to the byte; parameters and the teacher, held by reference, are excluded."""
    x, w, b, *teacher, target = problem(torch.bfloat16)
    x, w, b = (v.requires_grad_() for v in (x, w, b))
    held = (x, w, b, *teacher, target)
    n, itemsize = x.numel() // H, 2

    def saved(**options):
        return saved_bytes(lambda: ours(x, w, b, *teacher, target, "kl", 0.0, 2.0, 0.5, **options), held)

    assert saved(strategy="recompute") == 0
    assert saved(strategy="forward") == n * H * itemsize + 4 * V * H + 4 * V == saved()
    assert saved(reduction="none") == 0
    w.requires_grad_(False)
    assert saved(strategy="forward") == n * H * itemsize + 4 * V
    assert saved(reduction="sum", strategy=None) == n * H * itemsize + 4 * V


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_vocabulary_of_128k_fits_in_one_tile_of_each_model(strategy, given) -> None:
    """130 tokens have 64 MiB of float32 logits a model. Held: 32 MiB of each, the gradients, and little else."""
    vocabulary, hidden, tokens = 128256, 16, 130
    x, w = torch.randn(tokens, hidden, requires_grad=True), torch.randn(vocabulary, hidden, requires_grad=True)
    t, tw = torch.randn(tokens, hidden), torch.randn(vocabulary, hidden)
    teacher = {"teacher_logits": t @ tw.t()} if given else {"teacher_input": t, "teacher_weight": tw}

    def step() -> None:
        F.linear_jsd(x, w, **teacher, strategy=strategy, temperature=2.0).backward()
        x.grad = w.grad = None

    gradients = (tokens + vocabulary) * hidden * 4
    tiles = (1 if given else 2) * (32 << 20)
    assert peak_bytes(step, torch.device("cpu")) <= gradients + tiles + (1 << 20)


@pytest.mark.usefixtures("small_chunks")
def test_sixteen_bit_products(monkeypatch) -> None:
    """The route of a machine that has them, taken here at its own slow speed: float32 sums of 16-bit products."""
    tensors = problem(torch.bfloat16)
    truth = measured(eager, [t.double() if t.is_floating_point() else t for t in tensors], "kl", 0.0, 2.0, 0.0)
    usual = measured(eager, tensors, "kl", 0.0, 2.0, 0.0)
    monkeypatch.setattr("pykernels.ops.linear_distillation.compute_dtype", lambda x, weight: x.dtype)
    for strategy in STRATEGIES:
        found = measured(ours, tensors, "kl", 0.0, 2.0, 0.0, strategy=strategy)
        for got, right, other in zip(found, truth, usual, strict=True):
            error, theirs = ((v.double() - right).square().mean().sqrt() for v in (got, other))
            assert error <= 2 * theirs + 0.5 * EPS[got.dtype] * right.square().mean().sqrt()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_second_backward(strategy) -> None:
    x, w, _, t, tw, *_ = problem()
    x.requires_grad_(), w.requires_grad_()
    loss = F.linear_kl_div(x, w, t, tw, strategy=strategy)
    first = torch.autograd.grad(loss, (x, w), torch.tensor(3.0), retain_graph=True)
    again = torch.autograd.grad(loss, (x, w), torch.tensor(3.0))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    loss = F.linear_kl_div(x, w, t, tw, strategy=strategy)
    with pytest.raises(NotImplementedError, match="second derivative"):
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        grad.sum().backward()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiles_into_one_graph(strategy) -> None:
    torch.compiler.reset()
    tensors = problem()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    arguments = ("jsd", 0.3, 2.0, 0.25)
    for got, same in zip(
        measured(compiled, tensors, *arguments, strategy=strategy),
        measured(ours, tensors, *arguments, strategy=strategy),
        strict=True,
    ):
        torch.testing.assert_close(got, same, rtol=1e-6, atol=0)


def test_autocast_casts_the_inputs() -> None:
    tensors = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = measured(ours, tensors, "kl", 0.0, 2.0, 0.25)
    x, w, b, t, *rest = tensors
    same = measured(ours, (x.bfloat16(), w, b, t.bfloat16(), *rest), "kl", 0.0, 2.0, 0.25)
    assert found[1].dtype == torch.float32 and torch.equal(found[1], same[1].float())
    assert all(torch.equal(a, b) for a, b in zip(found[2:], same[2:], strict=True)) and torch.equal(found[0], same[0])


def test_partial_gradients_and_the_frozen_teacher() -> None:
    tensors = problem()
    whole = measured(ours, tensors, "kl", 0.0, 2.0, 0.25)
    for strategy in STRATEGIES:
        for wanted in range(3):
            leaves = [t.detach().requires_grad_(i in (wanted, 3, 4)) for i, t in enumerate(tensors[:6])]
            loss = ours(*leaves, tensors[6], "kl", 0.0, 2.0, 0.25, strategy=strategy)
            loss.backward(torch.tensor(0.5))
            torch.testing.assert_close(leaves[wanted].grad, whole[1 + wanted], rtol=1e-5, atol=1e-8)
            assert sum(leaf.grad is not None for leaf in leaves) == 1


def bad(**change):
    x, w, b, t, tw, _, target = problem()
    arguments = {"input": x, "weight": w, "teacher_input": t, "teacher_weight": tw, "bias": b, "target": target}
    return F.linear_jsd(**arguments | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, "temperature to be positive and finite, got -1.0"),
        ({"beta": -0.1}, ValueError, r"beta to be in \[0, 1\], got -0.1"),
        ({"hard_weight": 1.1}, ValueError, r"hard_weight to be in \[0, 1\], got 1.1"),
        ({"hard_weight": 0.5, "target": None}, ValueError, "target for hard_weight 0.5, got None"),
        ({"reduction": "mean"}, ValueError, "reduction to be one of"),
        ({"strategy": "tiles"}, ValueError, "strategy to be None, 'forward' or 'recompute', got 'tiles'"),
        ({"strategy": "forward", "reduction": "none"}, ValueError, "strategy 'recompute'"),
        (
            {"teacher_logits": torch.ones(2, 9, V)},
            ValueError,
            "either .* got teacher_input and teacher_weight and teacher_logits",
        ),
        ({"teacher_input": None, "teacher_weight": None}, ValueError, "either .* got none of them"),
        ({"teacher_weight": None}, ValueError, "either .* got teacher_input"),
        (
            {
                "teacher_input": None,
                "teacher_weight": None,
                "teacher_bias": torch.ones(V),
                "teacher_logits": torch.ones(2, 9, V),
            },
            ValueError,
            "teacher_bias only with teacher_weight",
        ),
        ({"teacher_weight": torch.ones(V + 1, HT)}, RuntimeError, "teacher_weight to have the 515 rows .* got 516"),
        ({"teacher_input": torch.ones(2, 8, HT)}, RuntimeError, r"teacher_input to have shape \[2, 9, 'Ht'\]"),
        ({"weight": torch.ones(V, H + 1)}, RuntimeError, r"weight to have shape \[V, 24\]"),
        ({"bias": torch.ones(V + 1)}, RuntimeError, r"bias to have shape \[515\]"),
        ({"target": torch.zeros(18, dtype=torch.int64)}, RuntimeError, r"target to have shape \[2, 9\]"),
        ({"target": torch.full((2, 9), V)}, ValueError, r"target to be in \[0, 515\)"),
        ({"input": torch.ones(2, 9, H, dtype=torch.int64)}, RuntimeError, "input to be float32"),
    ],
)
def test_bad_arguments(change, error, message) -> None:
    with pytest.raises(error, match=f"linear_jsd: expected {message}"):
        bad(**change)


def test_module() -> None:
    x, w, b, t, tw, tb, target = problem()
    loss = nn.LinearDistillationLoss(0.3, temperature=2.0, hard_weight=0.25, strategy="recompute")
    found = loss(x, w, t, tw, bias=b, teacher_bias=tb, target=target)
    assert torch.equal(found, ours(x, w, b, t, tw, tb, target, "jsd", 0.3, 2.0, 0.25))
    assert "beta=0.3, temperature=2.0" in repr(loss) and "strategy='recompute'" in repr(loss)
    with pytest.raises(ValueError, match="LinearDistillationLoss: expected strategy"):
        nn.LinearDistillationLoss(strategy="tiles")
