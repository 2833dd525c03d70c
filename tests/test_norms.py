"""rms_norm and layer_norm: values and gradients on every backend, from one row to rows past any block."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as torch_functional
from torch import Tensor

import pykernels.functional as F
from tests.matrix import BACKENDS, DEVICE, EPS, FLOATS, use

NORMS = {"rms_norm": F.rms_norm, "layer_norm": F.layer_norm}
# Backward takes four rows at a time, sixteen to a chunk of its column sums, and vectors of 4, 8 or 16 columns by four:
# each is met from below, exactly and from above; 4097 and 70001 pass the lengths at which sums are cut.
SMALL = [(1, 1), (3, 5), (5, 17), (37, 100), (17, 128)]
SHAPES = [*SMALL, (70, 64), (1030, 40), (6, 4097), (2, 70001)]
GRID = [(b, shape) for b in BACKENDS for shape in (SMALL if b == "triton" else SHAPES)]


def plain(name: str, h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """PyTorch's own norm."""
    if name == "layer_norm":
        return torch_functional.layer_norm(h, h.shape[-1:], weight, bias, eps)
    y = torch_functional.rms_norm(h, h.shape[-1:], weight, eps)
    return y if bias is None else y + bias


def assert_no_worse(ours: Tensor, theirs: Tensor, truth: Tensor, what: str) -> None:
    """In the largest and in the root-mean-square error: twice PyTorch's, and half an ulp for where that has none."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, what
    half = 0.5 * EPS[ours.dtype]
    for norm in (lambda v: v.abs().max(), lambda v: v.square().mean().sqrt()):
        error, base, size = (norm(v.double()).item() for v in (ours - truth, theirs - truth, truth))
        assert error <= 2 * base + half * size, f"{what}: error {error:.3e}, PyTorch's {base:.3e}, values {size:.3e}"


def operands(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """x, residual, weight (with a zero, by which nothing may be divided), bias, and the gradients of y and h."""
    x, residual, grad, grad_h = (torch.randn(shape) * torch.logspace(-1, 1, shape[0])[:, None] for _ in range(4))
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    weight[shape[1] // 2] = 0
    return [v.to(dtype).to(DEVICE) for v in (x, residual, weight, bias, grad, grad_h)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("backend", "shape"), GRID)
@pytest.mark.parametrize("name", NORMS)
def test_values_and_gradients(name: str, backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Everything at once: residual, prenorm, weight and bias, with a gradient into both results."""
    *inputs, grad, grad_h = operands(shape, dtype)
    eps = 1e-3

    def run(to: torch.dtype, norm: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        leaves = [v.to(to).requires_grad_() for v in inputs]
        y, h = norm(*leaves)
        return y.detach(), h.detach(), *torch.autograd.grad((y, h), leaves, (grad.to(to), grad_h.to(to)))

    def theirs(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return plain(name, h, weight, bias, eps), h

    def truth(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        h = h + (h.detach().to(dtype).double() - h.detach())  # rounded, and the gradient passes
        return plain(name, h, weight, bias, eps), h

    with use(backend):
        ours = run(dtype, lambda x, r, w, b: NORMS[name](x, w, b, residual=r, eps=eps, prenorm=True))
    assert torch.equal(ours[1], inputs[0] + inputs[1])
    assert torch.equal(ours[2], ours[3])
    what = ("y", "h", "grad_x", "grad_residual", "grad_weight", "grad_bias")
    for label, mine, base, exact in zip(what, ours, run(dtype, theirs), run(torch.float64, truth), strict=True):
        assert_no_worse(mine, base, exact, label)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NORMS)
def test_every_part_may_be_absent(name: str, backend: str) -> None:
    """Each subset of weight, bias and residual, against the same norm of PyTorch; nothing else gets a gradient."""
    x, residual, weight, bias, grad, _ = operands((5, 24), torch.float32)
    for parts in range(8):
        given = [v.clone().requires_grad_() if parts >> i & 1 else None for i, v in enumerate((weight, bias, residual))]
        w, b, r = given
        leaf = x.clone().requires_grad_()
        with use(backend):
            y = NORMS[name](leaf, w, b, residual=r, eps=1e-5)
            y.backward(grad)
        leaves = [leaf, *(v for v in given if v is not None)]
        copies = [v.detach().clone().requires_grad_() for v in leaves]
        h = copies[0] if r is None else copies[0] + copies[-1]
        wb = iter(copies[1:])
        expected = plain(name, h, next(wb) if w is not None else None, next(wb) if b is not None else None, 1e-5)
        expected.backward(grad)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        for mine, copy in zip(leaves, copies, strict=True):
            torch.testing.assert_close(mine.grad, copy.grad, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("columns", [15, 16, 200, 4097])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NORMS)
def test_rows_whose_sums_cancel(name: str, backend: str, dtype: torch.dtype, columns: int) -> None:
    """Rows far from zero; first values far from the others, by which distances would be measured; the same throughout.

    Row by row: the error of one must not hide behind the size of another.
    """
    x, grad = torch.randn(6, columns), torch.randn(6, columns)
    x[1] += 300
    x[2, :16] += 1000
    x[3, 1:] += 30000
    x[4] = 3.14
    x[5, -1] = -5000
    x, grad, weight = x.to(dtype).to(DEVICE), grad.to(dtype).to(DEVICE), torch.randn(columns, dtype=dtype).to(DEVICE)

    def run(to: torch.dtype, norm: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [v.to(to).requires_grad_() for v in (x, weight)]
        y = norm(*leaves)
        return [y.detach(), torch.autograd.grad(y, leaves, grad.to(to))[0]]

    with use(backend):
        ours = run(dtype, lambda x, w: NORMS[name](x, w, eps=1e-3))
    theirs, truth = (run(to, lambda x, w: plain(name, x, w, None, 1e-3)) for to in (dtype, torch.float64))
    for label, mine, base, exact in zip(("y", "grad_x"), ours, theirs, truth, strict=True):
        for row in range(6):
            assert_no_worse(mine[row], base[row], exact[row], f"{label}, row {row}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NORMS)
def test_only_the_wanted_gradients(name: str, backend: str) -> None:
    x, residual, weight, bias, grad, _ = operands((5, 24), torch.bfloat16)
    for wanted in range(4):
        leaves = [x.clone(), weight.clone(), bias.clone(), residual.clone()]
        leaves[wanted].requires_grad_()
        everything = [v.detach().clone().requires_grad_() for v in leaves]
        with use(backend):
            NORMS[name](leaves[0], leaves[1], leaves[2], residual=leaves[3]).backward(grad)
            NORMS[name](*everything[:3], residual=everything[3]).backward(grad)
        for i, (leaf, full) in enumerate(zip(leaves, everything, strict=True)):
            assert (leaf.grad is not None) == (i == wanted)
            assert leaf.grad is None or torch.equal(leaf.grad, full.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NORMS)
def test_weight_offset_and_mixed_dtypes(name: str, backend: str) -> None:
    """Gemma's 1 + w, added in float32: a bfloat16 w of 2^-9 would vanish from a bfloat16 1 + w."""
    x, residual, _, _, grad, _ = operands((6, 40), torch.bfloat16)
    weight = torch.full((40,), 2.0**-9, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(40, dtype=torch.float32, requires_grad=True)
    leaf = x.clone().requires_grad_()
    with use(backend):
        y = NORMS[name](leaf, weight, bias, residual=residual.float(), weight_offset=1.0)
        y.backward(grad)
        whole = NORMS[name](x, torch.full((40,), 1 + 2.0**-9), bias, residual=residual)
    assert y.dtype == torch.bfloat16 and torch.equal(y, whole)
    assert (leaf.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(bias.grad, grad.float().sum(0))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NORMS)
def test_quantized_output_is_that_of_quantize_rowwise(name: str, backend: str, dtype: torch.dtype) -> None:
    for shape in SMALL:
        x, residual, weight, bias, *_ = operands(shape, dtype)
        if shape[0] > 4:
            x[1], x[2, 0] = 0, math.nan
        for r in (None, residual):
            for prenorm in (False, True):
                options = {"residual": r, "weight_offset": 1.0, "prenorm": prenorm}
                with use(backend):
                    y = NORMS[name](x, weight, bias, **options)
                    got = NORMS[name](x, weight, bias, **options, quantize=True)
                if prenorm:
                    (y, h), (got, got_h) = y, got
                    torch.testing.assert_close(got_h, h, rtol=0, atol=0, equal_nan=True)
                for mine, expected in zip(got, F.quantize_rowwise(y), strict=True):
                    torch.testing.assert_close(mine, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NORMS)
def test_a_large_mean_does_not_cancel(name: str, backend: str) -> None:
    x = torch.randn(4, 300) + 1000
    truth = plain(name, x.double(), None, None, 1e-5)
    with use(backend):
        assert_no_worse(NORMS[name](x, eps=1e-5), plain(name, x, None, None, 1e-5), truth, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NORMS)
def test_nan_stays_in_its_row(name: str, backend: str) -> None:
    x = torch.randn(6, 20)
    x[1, 3], x[4, 0] = math.nan, math.inf
    with use(backend):
        y = NORMS[name](x, torch.ones(20))
        _, scale = NORMS[name](x, quantize=True)
    expected = torch.tensor([False, True, False, False, True, False])
    assert torch.equal(y.isnan().any(-1), expected) and torch.equal(scale.isnan(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NORMS)
def test_strides_and_dimensions(name: str, backend: str) -> None:
    """Slices, transposes, broadcasts and more dimensions equal their contiguous copies, gradients too."""
    base = torch.randn(6, 8, 24)
    views = (base[:, 2:5], base[..., 3:20], base[..., ::2], base.transpose(0, 2), base[:1, :1].expand(3, 2, 24))
    for view in (*views, base[0, 0]):
        weight = torch.randn(view.shape[-1] * 2)[::2]
        grad = torch.randn(view.shape).sum(-1, keepdim=True).expand(view.shape)
        results = []
        for x, r, w, g in ((view, view, weight, grad), [v.contiguous() for v in (view, view, weight, grad)]):
            leaf = x.detach().requires_grad_()
            with use(backend):
                y, h = NORMS[name](leaf, w, residual=r, prenorm=True)
                (grad_x,) = torch.autograd.grad((y, h), leaf, (g, g))
                q, scale = NORMS[name](x.detach(), w, residual=r, quantize=True)
            assert y.is_contiguous() and h.is_contiguous()
            results.append((y, h, grad_x, q, scale))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 5), (7, 0)])
@pytest.mark.parametrize("name", NORMS)
def test_empty(name: str, shape: tuple[int, ...], backend: str) -> None:
    x = torch.empty(shape, requires_grad=True)
    weight, bias = (torch.ones(shape[-1], requires_grad=True) for _ in range(2))
    with use(backend):
        y, h = NORMS[name](x, weight, bias, residual=x.detach(), prenorm=True)
        q, scale = NORMS[name](x.detach(), quantize=True)
        (y.sum() + h.sum()).backward()
    assert y.shape == h.shape == q.shape == x.grad.shape == shape
    assert scale.tolist() == torch.zeros(shape[:-1]).tolist()
    assert weight.grad.tolist() == bias.grad.tolist() == [0.0] * shape[-1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NORMS)
def test_rows_past_two_to_the_thirty_first_element(name: str, backend: str) -> None:
    """Two rows 2^31 elements apart, in memory of which only their pages are ever touched."""
    far = torch.empty(2**31 + 80, dtype=torch.bfloat16).as_strided((2, 40), (2**31 + 40, 1))
    near = torch.randn(2, 40).bfloat16()
    far.copy_(near)
    results = []
    for x in (far, near):
        leaf = x.detach().requires_grad_()
        with use(backend):
            y = NORMS[name](leaf)
            (grad,) = torch.autograd.grad(y, leaf, x.detach())
            results.append((y, grad.contiguous(), *NORMS[name](x, residual=x, quantize=True)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", NORMS)
def test_triton_takes_long_rows_in_a_loop(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows past the registers, at a size the interpreter can walk: three blocks, the last ragged."""
    from pykernels.kernels import _norm, _norm_backward

    for module in (_norm, _norm_backward):
        monkeypatch.setattr(module, "ONE_PASS_K", 32)
        monkeypatch.setattr(module, "LOOP_K", 32)
    test_values_and_gradients(name, "triton", (19, 70), dtype)
    test_quantized_output_is_that_of_quantize_rowwise(name, "triton", dtype)
