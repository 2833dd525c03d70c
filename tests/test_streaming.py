"""Results of 8 MiB and more are written past the caches, in code of their own: each is held to the same operation on
parts that are too small for it, bit for bit. Rows of 64-byte lines take that path; the odd one beside them may not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pykernels.functional as F
from tests.matrix import FLOATS, ISAS, use

MIB = 1 << 20
PART = 96  # rows; the last part is shorter
Operation = Callable[..., Tensor | tuple[Tensor, ...]]


def rows_for(dtype: torch.dtype, columns: int) -> int:
    return 9 * MIB // (columns * dtype.itemsize)


def with_gradients(function: Operation, inputs: list[Tensor], shared: list[Tensor]) -> list[Tensor]:
    """The results and the gradients of `inputs`, whose rows do not meet; the gradient of a result is its own mirror."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = function(*leaves, *shared)
    results = (results,) if isinstance(results, Tensor) else results
    grads = torch.autograd.grad(results, leaves, [y.detach().flip(-1).contiguous() for y in results])
    return [*results, *grads]


def assert_parts_agree(function: Operation, inputs: list[Tensor], shared: list[Tensor]) -> None:
    whole = with_gradients(function, inputs, shared)
    assert all(y.numel() * y.element_size() >= 8 * MIB for y in whole)
    parts = [
        with_gradients(function, list(part), shared) for part in zip(*(x.split(PART) for x in inputs), strict=True)
    ]
    for one, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(pieces))


@pytest.mark.parametrize("backend", ISAS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [1120, 1111])  # the former is no whole number of the kernels' steps of 4 vectors
@pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "layer_norm with a residual", "swiglu", "packed geglu"])
def test_rows(backend: str, dtype: torch.dtype, columns: int, op: str) -> None:
    rows = rows_for(dtype, columns)
    x, y = torch.randn(rows, columns).to(dtype), torch.randn(rows, columns).to(dtype)
    weight, bias = torch.randn(columns), torch.randn(columns)
    with use(backend):
        if op == "rms_norm":
            assert_parts_agree(lambda x, w: F.rms_norm(x, w, weight_offset=1.0), [x], [weight])
        elif op == "layer_norm":
            assert_parts_agree(lambda x, w, b: F.layer_norm(x, w, b), [x], [weight, bias])
        elif op == "layer_norm with a residual":
            assert_parts_agree(lambda x, r, w: F.layer_norm(x, w, residual=r, prenorm=True), [x, y], [weight])
        elif op == "swiglu":
            assert_parts_agree(F.swiglu, [x, y], [])
        else:
            assert_parts_agree(F.geglu, [torch.cat((x, y), -1)], [])


@pytest.mark.parametrize("backend", ISAS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(backend: str, dtype: torch.dtype, interleaved: bool) -> None:
    """12 heads of 96, of which 80 turn: pairs that end inside every vector."""
    seq = rows_for(dtype, 12 * 96)
    q = torch.randn(1, seq, 12, 96).to(dtype)
    cos, sin = F.rope_tables(80, seq)
    with use(backend):
        whole, _ = F.rope(q, None, cos, sin, interleaved=interleaved)
        parts = [
            F.rope(q[:, i : i + PART], None, cos[i : i + PART], sin[i : i + PART], interleaved=interleaved)[0]
            for i in range(0, seq, PART)
        ]
    assert torch.equal(whole, torch.cat(parts, 1))


@pytest.mark.parametrize("backend", ISAS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["contiguous", "rows apart", "residual"])
def test_dropout(backend: str, dtype: torch.dtype, layout: str) -> None:
    """Element 4 n on is counter n on; the parts are no whole number of the kernels' blocks."""
    n = 9 * MIB // dtype.itemsize // 1120 * 1120
    x = torch.randn(n // 1120, 1124).to(dtype)[:, 2:1122]
    x = x if layout == "rows apart" else x.contiguous()
    residual = torch.randn(n // 1120, 1120) if layout == "residual" else None
    rows = 37
    with use(backend):
        whole = F.dropout(x, 0.3, seed=torch.tensor([5, 2**32 - 1000]), residual=residual)
        parts = [
            F.dropout(
                x[i : i + rows],
                0.3,
                seed=torch.tensor([5, 2**32 - 1000 + i * 1120 // 4]),
                residual=None if residual is None else residual[i : i + rows],
            )
            for i in range(0, len(x), rows)
        ]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("backend", ISAS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("block", [None, 32, 100])
def test_dequantize(backend: str, dtype: torch.dtype, block: int | None) -> None:
    rows = rows_for(dtype, 1120)
    x = torch.randn(rows, 1120)
    q, scale = F.quantize_rowwise(x) if block is None else F.quantize_blockwise(x, block)
    with use(backend):

        def back(q: Tensor, scale: Tensor) -> Tensor:
            if block is None:
                return F.dequantize_rowwise(q, scale, out_dtype=dtype)
            return F.dequantize_blockwise(q, scale, block, out_dtype=dtype)

        whole = back(q, scale)
        parts = [back(a, b) for a, b in zip(q.split(PART), scale.split(PART), strict=True)]
    assert torch.equal(whole, torch.cat(parts))
