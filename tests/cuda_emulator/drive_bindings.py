"""Run in a process of its own by test_cuda_bindings.py: the CUDA bindings, serving CPU tensors through the emulator."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable

import torch

warnings.simplefilter("ignore")
import pykernels.functional as F  # noqa: E402
from pykernels.ops import (  # noqa: E402
    int8_block_scaled_matmul,
    int8_grouped_linear,
    int8_grouped_matmul,
    int8_linear,
    int8_matmul,
    int8_weight_only_linear,
    quantize_rowwise,
)

ops = torch.ops.pykernels
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
done = 0


def same(got: torch.Tensor, want: torch.Tensor, exact: bool) -> None:
    global done
    assert got.shape == want.shape and got.dtype == want.dtype, (got.shape, want.shape, got.dtype, want.dtype)
    assert got.is_contiguous()
    steps = 1.01 * torch.finfo(want.dtype).eps if want.is_floating_point() else 0
    if exact:
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    else:
        torch.testing.assert_close(got, want, rtol=steps, atol=2e-5)
    done += 1


def same_error(call: Callable[..., object], reference: Callable[..., object], *args: object, **kwargs: object) -> None:
    global done
    said = []
    for function in (call, reference):
        try:
            function(*args, **kwargs)
        except RuntimeError as error:
            said.append(str(error).split("\n")[0].replace("torch.", "").strip())
    assert len(said) == 2, f"only one of binding and reference refused: {said}"
    assert said[1] in said[0], f"binding: {said[0]!r}, reference: {said[1]!r}"
    done += 1


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def quantize() -> None:
    for dtype, shape in itertools.product(FLOATS, [(3, 40), (2, 2, 33), (7,), (0, 8), (3, 0), (2, 600)]):
        x = torch.randn(shape).to(dtype)
        scales = [None, torch.tensor(0.02), torch.rand(shape[:-1])] if x.numel() else [None]
        for stochastic, scale in itertools.product((False, True), scales):
            for got, want in zip(
                ops.quantize_rowwise(x, stochastic, -5, scale),
                quantize_rowwise.reference(x, stochastic, -5, scale),
                strict=True,
            ):
                same(got, want, exact=True)
    x = torch.randn(9, 64)
    for view in (x[:, 1:30], x[::2, 8:24], x.t(), x[:1].expand(4, 64), x.view(3, 3, 64)[:, 1]):
        for got, want in zip(ops.quantize_rowwise(view), quantize_rowwise.reference(view), strict=True):
            same(got, want, exact=True)
    same_error(ops.quantize_rowwise, quantize_rowwise.reference, codes(3, 4))
    same_error(ops.quantize_rowwise, quantize_rowwise.reference, torch.tensor(1.0))
    same_error(ops.quantize_rowwise, quantize_rowwise.reference, x, scale=torch.rand(5))
    same_error(ops.quantize_rowwise, quantize_rowwise.reference, x, scale=torch.rand(9).double())


def matmul() -> None:
    for m, n, k in [(1, 3, 5), (3, 20, 64), (20, 9, 33), (17, 65, 80), (0, 4, 8), (4, 0, 8), (4, 3, 0)]:
        a, b = codes(m, k), codes(n, k)
        call = lambda **kw: ops.int8_matmul(a, b, **kw)  # noqa: B023, E731
        reference = lambda **kw: int8_matmul.reference(a, b, **kw)  # noqa: B023, E731
        same(call(out_dtype=torch.int32), reference(out_dtype=torch.int32), exact=True)
        same(call(), reference(), exact=True)
        asymmetric = {"a_zero_point": torch.randint(-128, 128, (m,), dtype=torch.int32)}
        vectors = {"a_scale": torch.rand(m), "b_scale": torch.rand(n) * 1e-3}
        for out_dtype, activation in itertools.product(FLOATS, range(5)):
            rest = {"bias": torch.randn(n).half(), "residual": torch.randn(m, n).bfloat16(), "activation": activation}
            for zero in ({}, asymmetric, {**asymmetric, "b_sum": b.sum(1, dtype=torch.int32)}):
                both = {**vectors, **rest, **zero, "out_dtype": out_dtype}
                same(call(**both), reference(**both), exact=False)
        one = {"a_scale": torch.tensor(0.5), "b_scale": torch.tensor([0.25])}
        same(call(**one), reference(**one), exact=True)
    a, b = codes(9, 100), codes(7, 100)
    for low, high in ((0, 64), (3, 90), (16, 48)):
        got = ops.int8_matmul(a[::2, low:high], b[:, low:high], out_dtype=torch.int32)
        same(got, int8_matmul.reference(a[::2, low:high], b[:, low:high], out_dtype=torch.int32), exact=True)
    square = codes(24, 24)
    same(ops.int8_matmul(square.t(), square.t()), int8_matmul.reference(square.t(), square.t()), exact=True)
    bad: list[dict[str, object]] = [
        {"a": codes(2, 3, 4)}, {"b": codes(7, 99)}, {"a": a.float()}, {"a_scale": torch.rand(4)},
        {"b_scale": torch.rand(7, 1)},
        {"a_scale": torch.rand(9).half()}, {"bias": torch.rand(8)}, {"bias": torch.rand(7).double()}, {"activation": 5},
        {"residual": torch.rand(7, 9)}, {"b_sum": torch.zeros(7, dtype=torch.int32)},
        {"a_zero_point": torch.zeros(9)}, {"out_dtype": torch.float64},
        {"a_zero_point": torch.zeros(9, dtype=torch.int32), "b_sum": torch.zeros(6, dtype=torch.int32)},
        {"a": codes(1, 131072), "b": codes(1, 131072)},
    ]  # fmt: skip
    for change in bad:
        same_error(ops.int8_matmul, int8_matmul.reference, **{"a": a, "b": b, **change})
    for refused in ({"bias": torch.rand(7)}, {"activation": 1}, {"a_scale": torch.rand(1)}):
        try:
            ops.int8_matmul(a, b, out_dtype=torch.int32, **refused)
        except RuntimeError as error:
            assert "with out_dtype int32, the raw accumulator" in str(error)
        else:
            raise AssertionError(f"int32 output accepted {list(refused)}")


def linear() -> None:
    for dtype, shape in itertools.product(FLOATS, [(1, 64), (2, 3, 50), (20, 32), (40,), (0, 16), (3, 0)]):
        x, n = torch.randn(shape).to(dtype), 12
        weight, scale = codes(n, shape[-1]), torch.rand(n) * 0.01
        for out_dtype, x_scale in itertools.product(
            (None, torch.float32, torch.bfloat16), (None, torch.tensor([0.03]))
        ):
            rest = (torch.randn(n).to(dtype), torch.randn(*shape[:-1], n), 4, x_scale, out_dtype)
            got = ops.int8_linear(x, weight, scale, *rest)
            same(got, int8_linear.reference(x, weight, scale, *rest), exact=False)
    x, weight, scale = torch.randn(2, 3, 16), codes(5, 16), torch.rand(5)
    same(F.int8_linear(x, (weight.t().contiguous().t(), scale)), int8_linear.reference(x, weight, scale), exact=False)
    bad: list[dict[str, object]] = [
        {"x": codes(2, 16)}, {"weight": codes(5, 15)}, {"weight": codes(80)}, {"weight_scale": torch.rand(4)},
        {"weight_scale": torch.rand(5).half()}, {"residual": torch.rand(6, 5)}, {"x_scale": torch.rand(2)},
        {"out_dtype": torch.int32}, {"activation": -1}, {"bias": torch.rand(5, 1)},
    ]  # fmt: skip
    for change in bad:
        same_error(
            ops.int8_linear, int8_linear.reference, **{"x": x, "weight": weight, "weight_scale": scale, **change}
        )


def grouped() -> None:
    for counts, beyond, n, k in [([3, 0, 4], 2, 9, 33), ([0], 1, 5, 64), ([], 2, 3, 4), ([20, 17], 0, 8, 0)]:
        rows, experts = sum(counts) + beyond, len(counts)
        a, b, held = codes(rows, k), codes(experts, n, k), torch.tensor(counts, dtype=torch.int64)
        bare = {"out_dtype": torch.int32}
        same(ops.int8_grouped_matmul(a, b, held, **bare), int8_grouped_matmul.reference(a, b, held, **bare), exact=True)
        for out_dtype, activation in itertools.product(FLOATS, range(5)):
            rest = (torch.rand(rows), torch.rand(experts, n) * 1e-3, torch.randn(experts, n).half(), activation)
            got = ops.int8_grouped_matmul(a, b, held.int(), *rest, out_dtype)
            same(got, int8_grouped_matmul.reference(a, b, held, *rest, out_dtype), exact=False)
            x, scale = torch.randn(rows, k).to(out_dtype), torch.rand(experts, n) * 0.01
            got = ops.int8_grouped_linear(x, b, scale, held, rest[2], activation)
            same(got, int8_grouped_linear.reference(x, b, scale, held, rest[2], activation), exact=False)
    a, b, counts = codes(7, 16), codes(2, 16, 5).transpose(1, 2), torch.tensor([3, 3])
    same(ops.int8_grouped_matmul(a, b, counts), int8_grouped_matmul.reference(a, b, counts), exact=True)
    bad: list[dict[str, object]] = [
        {"a": codes(7)}, {"a": a.float()}, {"b": codes(5, 16)}, {"b": codes(2, 5, 17)}, {"b": b.float()},
        {"counts": torch.ones(3).long()}, {"counts": torch.ones(2)}, {"a_scale": torch.rand(6)},
        {"b_scale": torch.rand(5)}, {"b_scale": torch.rand(2, 5).half()}, {"bias": torch.rand(5)},
        {"bias": torch.rand(2, 5).double()}, {"activation": 5}, {"out_dtype": torch.float64},
        {"bias": torch.rand(2, 5), "out_dtype": torch.int32},
    ]  # fmt: skip
    for change in bad:
        same_error(
            ops.int8_grouped_matmul, int8_grouped_matmul.reference, **{"a": a, "b": b, "counts": counts, **change}
        )
    x, scale = torch.randn(7, 16), torch.rand(2, 5)
    for change in (
        {"x": a}, {"x": torch.randn(16)}, {"weight": codes(5, 16)}, {"weight_scale": torch.rand(5)},
        {"counts": torch.ones(3).int()}, {"bias": torch.rand(5)}, {"activation": -1}, {"out_dtype": torch.int32},
    ):  # fmt: skip
        arguments = {"x": x, "weight": b, "weight_scale": scale, "counts": counts, **change}
        same_error(ops.int8_grouped_linear, int8_grouped_linear.reference, **arguments)


def block_scaled() -> None:
    for m, n, k in [(1, 3, 5), (3, 130, 64), (20, 9, 300), (17, 65, 128), (0, 4, 8), (4, 0, 8), (4, 3, 0)]:
        blocks = -(-k // 128)
        a, b = codes(m, k), codes(n, k)
        scales = torch.rand(m, blocks) * 0.01, torch.rand(-(-n // 128), blocks) * 0.01
        for out_dtype in (None, *FLOATS):
            rest = (a, b, *scales, torch.randn(n).half(), out_dtype)
            got = ops.int8_block_scaled_matmul(*rest)
            same(got, int8_block_scaled_matmul.reference(*rest), exact=False)
        got = ops.int8_block_scaled_matmul(a, b, *scales)
        same(got, int8_block_scaled_matmul.reference(a, b, *scales), exact=False)
    a, b, scales = codes(9, 300), codes(140, 300), (torch.rand(3, 9).t() * 0.01, torch.rand(2, 6)[:, ::2] * 0.01)
    for left, right in ((a[:, 5:], b[:, 5:]), (a.t().contiguous().t()[:, :290], b[:, :290])):
        same(
            ops.int8_block_scaled_matmul(left, right, *scales),
            int8_block_scaled_matmul.reference(left, right, *scales),
            exact=False,
        )
    bad: list[dict[str, object]] = [
        {"a": codes(9, 3, 4)}, {"a": a.float()}, {"b": b.short()}, {"b": codes(140, 299)}, {"b": codes(140)},
        {"a_scale": torch.rand(9, 2)}, {"a_scale": torch.rand(9, 3).half()}, {"a_scale": torch.rand(9)},
        {"b_scale": torch.rand(1, 3)}, {"b_scale": torch.rand(2, 3).double()}, {"bias": torch.rand(139)},
        {"bias": torch.rand(140).double()}, {"out_dtype": torch.int32}, {"out_dtype": torch.float64},
    ]  # fmt: skip
    for change in bad:
        arguments = {"a": a, "b": b, "a_scale": scales[0], "b_scale": scales[1], **change}
        same_error(ops.int8_block_scaled_matmul, int8_block_scaled_matmul.reference, **arguments)


def weight_only() -> None:
    for dtype, (k, groups) in itertools.product(FLOATS, [(64, 1), (128, 2), (48, 3), (35, 7), (33, 1), (0, 1)]):
        for rows in ((1,), (2, 10), (0,)):
            x, n = torch.randn(*rows, k).to(dtype), 11
            weight, scale, bias = codes(n, k), torch.rand(n, groups) * 0.01, torch.randn(n)
            for given in (scale, scale[:, 0].contiguous()) if groups == 1 else (scale,):
                got = ops.int8_weight_only_linear(x, weight, given, bias, 3)
                same(got, int8_weight_only_linear.reference(x, weight, given, bias, 3), exact=False)
    x, weight, scale = torch.randn(4, 16), codes(5, 16), torch.rand(5)
    bad: list[dict[str, object]] = [
        {"weight_scale": torch.rand(5, 3)}, {"weight_scale": torch.rand(4, 2)}, {"weight_scale": torch.rand(6)},
        {"x": torch.randn(4, 17)}, {"weight": weight.short()}, {"bias": torch.rand(4)}, {"activation": 9},
    ]  # fmt: skip
    for change in bad:
        arguments = {"x": x, "weight": weight, "weight_scale": scale, **change}
        same_error(ops.int8_weight_only_linear, int8_weight_only_linear.reference, **arguments)


if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    torch.manual_seed(0)
    for part in (quantize, matmul, linear, grouped, block_scaled, weight_only):
        part()
    print(f"compared {done}")
