"""distillation_rows through distillation_loss: numbers against a float64 truth, edges, gradients, errors."""

import math

import pytest
import torch
import torch.nn.functional as tf

import pykernels
import pykernels.functional as F
from pykernels import nn
from tests.matrix import BACKENDS, DEVICE, EPS, FLOATS, use

KINDS = [("kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9), ("mse", 0.0)]


def plain(student, teacher, target, divergence, beta, temperature, hard_weight):
    """The same in the words of others: torch's kl_div and mse, and the mixture by logsumexp as TRL's GKD trainer."""
    s, t = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    if divergence == "kl":
        soft = tf.kl_div(s, t, reduction="none", log_target=True)
    elif divergence == "reverse_kl":
        soft = tf.kl_div(t, s, reduction="none", log_target=True)
    elif divergence == "mse":
        soft = (s.exp() - t.exp()).square()
    else:
        mixture = torch.logaddexp(s + math.log(1 - beta), t + math.log(beta))
        soft = beta * tf.kl_div(mixture, t, reduction="none", log_target=True)
        soft = soft + (1 - beta) * tf.kl_div(mixture, s, reduction="none", log_target=True)
    loss = (1 - hard_weight) * temperature**2 * soft.sum(-1)
    if hard_weight:
        loss = loss + hard_weight * tf.cross_entropy(student, target, reduction="none")
    return loss if target is None else torch.where(target == -100, 0.0, loss)


def measured(loss_of, student):
    """Loss of each row and the gradient of their sum."""
    student = student.detach().requires_grad_()
    loss = loss_of(student)
    loss.sum().backward()
    return loss.detach(), student.grad


def ours(student, teacher, target, divergence, beta, temperature, hard_weight, backend):
    options = {"divergence": divergence, "beta": beta, "temperature": temperature, "hard_weight": hard_weight}
    with use(backend):
        return measured(lambda s: F.distillation_loss(s, teacher, target, reduction="none", **options), student)


def assert_as_good_as_plain(student, teacher, target, kind, temperature, hard_weight, backend):
    """At most twice the error of plain float32, and a few float32 roundings of terms as large as the divergence; for a
    16-bit gradient also its own rounding."""
    arguments = (target, *kind, temperature, hard_weight)
    truth = measured(lambda s: plain(s, teacher.double(), *arguments), student.double())
    usual = measured(lambda s: plain(s, teacher.float(), *arguments), student.float())
    found = ours(student, teacher, *arguments, backend)
    assert found[0].dtype == torch.float32 and found[1].dtype == student.dtype
    unit = 1 + truth[0].abs().max() / temperature**2
    for got, right, other, scale in zip(found, truth, usual, (temperature**2, temperature), strict=True):
        error, theirs = (got.double() - right).abs(), (other.double() - right).abs().max()
        bound = 2 * theirs + 4 * EPS[torch.float32] * scale * unit
        if got.dtype != torch.float32:
            bound = bound + 0.5 * EPS[got.dtype] * right.abs().clamp(min=torch.finfo(got.dtype).tiny)
        assert bool((error <= bound).all()), (kind, temperature, (error / bound).max().item())


def rows(count, vocabulary, dtype=torch.float32, spread=3.0):
    return (torch.randn(count, vocabulary, device=DEVICE) * spread).to(dtype)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers(backend, kind) -> None:
    """Vocabularies: one token, part of a vector, whole vectors, one over a flush of the sums or over a Triton block."""
    for vocabulary in (17, 4097) if backend == "triton" else (1, 17, 64, 2049, 50257):
        for temperature, hard_weight in ((1.0, 0.0), (0.5, 0.3), (10.0, 0.3)):
            student, teacher = rows(4, vocabulary), rows(4, vocabulary)
            target = torch.randint(0, vocabulary, (4,), device=DEVICE)
            target[1] = -100
            assert_as_good_as_plain(student, teacher, target, kind, temperature, hard_weight, backend)


@pytest.mark.parametrize("teacher_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pair_of_dtypes(backend, dtype, teacher_dtype) -> None:
    target = torch.tensor([3, 130, 0], device=DEVICE)
    for kind in KINDS[1:3]:
        assert_as_good_as_plain(rows(3, 131, dtype), rows(3, 131, teacher_dtype), target, kind, 2.0, 0.3, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_distributions_are_exactly_at_zero(backend) -> None:
    for spread in (3.0, 1e4):
        x = rows(3, 77, spread=spread)
        for kind in KINDS:
            loss, grad = ours(x, x.clone(), None, *kind, 2.0, 0.0, backend)
            assert not loss.any() and not grad.any(), kind


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits(backend) -> None:
    """+-1e4, and between them values whose differences a log-sum-exp in float32 would round away."""
    torch.manual_seed(3)
    student, teacher = rows(4, 33), rows(4, 33)
    for x in (student, teacher):
        x[0], x[1, ::2], x[2] = 1e4 + x[0].round(), -1e4, x[2] * 1e4 / 3
    student[1, 0] = teacher[1, 2] = 1e4
    for kind in KINDS:
        assert_as_good_as_plain(student, teacher, None, kind, 1.0, 0.0, backend)
        assert_as_good_as_plain(student, teacher, torch.tensor([0, 1, 2, 3], device=DEVICE), kind, 0.5, 0.5, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_the_teacher_forbids(backend) -> None:
    """Probability 0 contributes 0: masked in both models, the vocabulary is just smaller."""
    keep = torch.arange(40, device=DEVICE) % 3 != 0
    student, teacher = rows(3, 40), rows(3, 40)
    teacher[:, ~keep] = -torch.inf
    both = student.masked_fill(~keep, -torch.inf)
    for kind in KINDS:
        small, small_grad = ours(student[:, keep], teacher[:, keep], None, *kind, 2.0, 0.0, backend)
        loss, grad = ours(both, teacher, None, *kind, 2.0, 0.0, backend)
        torch.testing.assert_close(loss, small, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(grad[:, keep], small_grad, rtol=1e-5, atol=1e-6)
        assert not grad[:, ~keep].any()
        loss, grad = ours(student, teacher, None, *kind, 2.0, 0.0, backend)
        if kind[0] == "reverse_kl":  # infinite as it stands: the student is renormalised over what is allowed
            torch.testing.assert_close(loss, small, rtol=2e-6, atol=1e-6)
            torch.testing.assert_close(grad[:, keep], small_grad, rtol=1e-5, atol=1e-6)
            assert not grad[:, ~keep].any()
        else:  # finite, with no trick: torch's own formula, its 0 * inf taken as 0
            q, p = ((x.double() / 2).softmax(-1) for x in (student, teacher))
            m = kind[1] * p + (1 - kind[1]) * q
            terms = {
                "kl": torch.xlogy(p, p / q),
                "mse": (q - p) ** 2,
                "jsd": kind[1] * torch.xlogy(p, p / m) + (1 - kind[1]) * q * (q / m).log(),
            }[kind[0]]
            torch.testing.assert_close(loss.double(), 4 * terms.sum(-1), rtol=2e-6, atol=1e-6)
            assert bool(torch.isfinite(grad).all())
            assert bool((grad[:, ~keep] > 0).all()) == (kind[0] != "mse")  # descending moves the student off them


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_divergence_and_nan_stay_visible(backend) -> None:
    student, teacher = rows(3, 20), rows(3, 20)
    student[0, 3] = -torch.inf
    student[1, 4] = torch.nan
    loss, _ = ours(student, teacher, None, "kl", 0.0, 1.0, 0.0, backend)
    assert loss[0] == torch.inf and loss[1].isnan() and loss[2].isfinite()
    teacher[2, 19] = torch.nan
    for kind in KINDS:
        loss, grad = ours(student, teacher, None, *kind, 1.0, 0.0, backend)
        assert loss[1:].isnan().all() and grad[1:].isnan().all(), kind


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows(backend) -> None:
    student, teacher = rows(4, 9), rows(4, 9)
    target = torch.tensor([7, 2, 7, 8], device=DEVICE)
    student[0] = torch.nan
    keep = [1, 3]
    with use(backend):
        for hard_weight in (0.0, 0.5):
            options = {"hard_weight": hard_weight, "ignore_index": 7}
            loss, grad = measured(lambda s, o=options: F.distillation_loss(s, teacher, target, **o), student)
            alone = measured(
                lambda s, o=options: F.distillation_loss(s, teacher[keep], target[keep], **o), student[keep]
            )
            torch.testing.assert_close(loss, alone[0], rtol=1e-6, atol=0)
            torch.testing.assert_close(grad[keep], alone[1], rtol=1e-6, atol=0)
            assert not grad[[0, 2]].any()
            loss, grad = measured(
                lambda s, o=options: F.distillation_loss(s, teacher, torch.full_like(target, 7), **o), student
            )
            assert loss == 0 and not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend) -> None:
    """Leading dimensions, strided rows, a transposed teacher, no rows."""
    big = rows(6, 30)
    student, teacher = big.view(2, 3, 30)[..., :24], rows(24, 6).t().unflatten(0, (2, 3))
    assert not student.is_contiguous() and teacher.stride(-1) != 1
    for kind in KINDS[:3]:
        loss, grad = ours(student, teacher, None, *kind, 1.0, 0.0, backend)
        same = ours(student.contiguous(), teacher.contiguous(), None, *kind, 1.0, 0.0, backend)
        assert loss.shape == (2, 3) and torch.equal(loss, same[0]) and torch.equal(grad, same[1])
    loss, grad = ours(big[:0], big[:0], None, "kl", 0.0, 1.0, 0.0, backend)
    assert loss.shape == (0,) and grad.shape == (0, 30)
    with use(backend):
        assert F.distillation_loss(big[:0], big[:0]) == 0
        spread = big.t().contiguous().t()  # written in place although its rows are not contiguous
        scale = torch.ones(6, device=DEVICE)
        spec = (0, 0.0, 1.0, 0.0, -100)
        if backend != BACKENDS[1]:
            return
        with pytest.raises(RuntimeError, match="student to be written in place"):
            torch.ops.pykernels.distillation_rows_grad_(spread, big, None, scale, *spec)


def test_gradients_are_those_of_the_loss() -> None:
    student = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    teacher, target = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, -100, 3])
    teacher[0, 2] = -torch.inf
    with pykernels.backend("reference"):
        for divergence, beta in KINDS:
            for reduction in ("none", "batchmean"):
                options = {"divergence": divergence, "beta": beta, "temperature": 1.7, "hard_weight": 0.3}

                def loss(s, options=options, reduction=reduction):
                    return F.distillation_loss(s, teacher, target, reduction=reduction, **options)

                assert torch.autograd.gradcheck(loss, student)


def test_reductions_and_the_ends_of_beta() -> None:
    student, teacher = rows(5, 12), rows(5, 12)
    target = torch.tensor([1, -100, 3, 4, -100], device=DEVICE)
    each = F.distillation_loss(student, teacher, target, temperature=2.0, reduction="none")
    assert F.distillation_loss(student, teacher, target, temperature=2.0, reduction="sum") == each.sum()
    torch.testing.assert_close(F.distillation_loss(student, teacher, target, temperature=2.0), each.sum() / 3)
    for beta, name in ((0, "kl"), (1, "reverse_kl")):
        assert torch.equal(
            F.distillation_loss(student, teacher, divergence="jsd", beta=beta),
            F.distillation_loss(student, teacher, divergence=name),
        )


def test_no_gradient_reaches_the_teacher_and_there_is_no_second() -> None:
    student, teacher = rows(2, 5).requires_grad_(), rows(2, 5).requires_grad_()
    loss = F.distillation_loss(student, teacher)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    assert torch.autograd.grad(loss, teacher, allow_unused=True, retain_graph=True) == (None,)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(grad.sum(), student)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature to be positive and finite, got 0.0"),
        ({"temperature": math.nan}, ValueError, "temperature to be positive and finite, got nan"),
        ({"divergence": "jsd", "beta": 1.5}, ValueError, r"beta to be in \[0, 1\], got 1.5"),
        ({"divergence": "js"}, ValueError, "divergence to be one of 'kl', 'reverse_kl', 'jsd', 'mse', got 'js'"),
        ({"hard_weight": -0.1}, ValueError, r"hard_weight to be in \[0, 1\], got -0.1"),
        ({"hard_weight": 0.1}, ValueError, "target for hard_weight 0.1, got None"),
        ({"reduction": "mean"}, ValueError, "reduction to be one of 'none', 'batchmean', 'sum', got 'mean'"),
        ({"target": torch.tensor([0, 5])}, ValueError, r"target to be in \[0, 5\) or ignore_index \(-100\), got 5"),
        ({"target": torch.tensor([0])}, RuntimeError, r"target to have shape \[2\]"),
        ({"target": torch.tensor([0.0, 1.0])}, RuntimeError, "target to be int64, got float32"),
        ({"teacher_logits": torch.ones(2, 6)}, RuntimeError, r"teacher to have the shape of student, \[2, 5\]"),
        ({"teacher_logits": torch.ones(2, 5, dtype=torch.int32)}, RuntimeError, "teacher to be float32"),
    ],
)
def test_bad_arguments(change, error, message) -> None:
    arguments = {"student_logits": torch.randn(2, 5), "teacher_logits": torch.randn(2, 5)} | change
    with pytest.raises(error, match=f"distillation_loss: expected {message}"):
        F.distillation_loss(**arguments)


def test_operators_check_for_themselves() -> None:
    x, spec = torch.randn(2, 5), (0, 0.0, 1.0, 0.0, -100)
    op = torch.ops.pykernels.distillation_rows
    for call, message in (
        (lambda: op(x.double(), x, None, *spec), "student to be float32, bfloat16 or float16, got float64"),
        (lambda: op(x, x[:, :4], None, *spec), "teacher to have the shape of student"),
        (lambda: op(x, x, torch.tensor([0, 9]), *spec), r"target to be in \[0, 5\)"),
        (lambda: op(x, x, None, 7, *spec[1:]), "divergence to be 0, 1, 2 or 3, got 7"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_module() -> None:
    loss = nn.DistillationLoss("jsd", beta=0.3, temperature=2.0, hard_weight=0.25, ignore_index=1)
    student, teacher, target = rows(4, 6), rows(4, 6), torch.tensor([0, 1, 2, 3], device=DEVICE)
    options = {"divergence": "jsd", "beta": 0.3, "temperature": 2.0, "hard_weight": 0.25, "ignore_index": 1}
    assert torch.equal(loss(student, teacher, target), F.distillation_loss(student, teacher, target, **options))
    assert "divergence='jsd', beta=0.3, temperature=2.0" in repr(loss)
    for change in ({"temperature": -1.0}, {"beta": 2.0}, {"hard_weight": 2.0}, {"reduction": "mean"}):
        with pytest.raises(ValueError, match=f"DistillationLoss: expected {next(iter(change))}"):
            nn.DistillationLoss(**change)
    with pytest.raises(ValueError, match="DistillationLoss: expected divergence"):
        nn.DistillationLoss("euclid")
