"""The Triton kernels of the optimizers under Triton's interpreter, held to the reference bit for bit."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from pykernels import _library
from tests.optimizer_lists import RULES, Call, assert_equal, reference

pytest.importorskip("triton")
from pykernels.kernels import _tensor_table as tables
from pykernels.kernels import optimizer_update, tensor_norms

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_optimizer_gpu.py runs them there")
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
triton = optimizer_update.optimizer_update_


def check(*, steps: int = 1, ratio=None, grad_scale=None, **how) -> None:
    ours, theirs = Call(**how), Call(**how)
    before = ours.written()
    given = {"ratio": None if ratio is None else torch.linspace(*ratio, len(ours.params)), "grad_scale": grad_scale}
    for _ in range(steps):
        ours.run(triton, **given)
        theirs.run(reference(), **given)
    assert_equal(ours.written(), theirs.written())
    assert not torch.equal(ours.params[0], before[0]) and all(int(s) == ours.step + steps for s in ours.steps)


@pytest.mark.parametrize("state", ["float32", "codes"])
@pytest.mark.parametrize(("rule", "flags", "decay"), RULES)
def test_every_rule(rule: str, flags: str, decay: float, state: str) -> None:
    ratio = (0.1, 2.0) if rule == "lamb" else None
    check(rule=rule, flags=flags, weight_decay=decay, state=state, ratio=ratio)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan", "split_master"])
@pytest.mark.parametrize(("state", "grad"), [("float32", BF16), ("bfloat16", F32), ("codes", BF16)])
def test_bfloat16_parameters(rounding: str, state: str, grad: torch.dtype) -> None:
    check(rule="adam", flags="decoupled", weight_decay=0.1, param=BF16, grad=grad, state=state, rounding=rounding)


@pytest.mark.parametrize(
    ("param", "grad", "state", "rounding"),
    [(F16, F32, "float32", "kahan"), (F32, F16, "bfloat16", "stochastic"), (F32, F32, "float32", "kahan"),
     (BF16, F64, "codes", "stochastic")],
)  # fmt: skip
def test_other_dtypes(param: torch.dtype, grad: torch.dtype, state: str, rounding: str) -> None:
    rule = "rmsprop" if state == "codes" else "adam"
    check(rule=rule, weight_decay=0.1, param=param, grad=grad, state=state, rounding=rounding)


@pytest.mark.parametrize("grad", [F64, F32])
def test_float64(grad: torch.dtype) -> None:
    """PyTorch's own float64 roots are not correctly rounded, so these are a few roundings apart."""
    ours, theirs = (Call(rule="adam", weight_decay=0.1, param=F64, grad=grad, state="float64") for _ in range(2))
    ours.run(triton)
    theirs.run(reference())
    torch.testing.assert_close(ours.written(), theirs.written(), rtol=4 * torch.finfo(F64).eps, atol=0)


# A block longer than a tile, several blocks a tile, one that is no power of two, one that vectors do not divide.
@pytest.mark.parametrize("block_size", [4096, 256, 100, 8, 1])
def test_block_sizes(block_size: int) -> None:
    shapes = [(2, 5000), (3, 256)] if block_size > 100 else [(3, 300), (2, 17)]
    check(rule="adam", state="codes", param=BF16, rounding="stochastic", block_size=block_size, shapes=shapes)


def test_a_program_takes_several_tiles_and_a_tensor_several_programs() -> None:
    check(rule="sgd", flags="momentum", shapes=[(9000,), (3,), (4096,)], param=BF16, rounding="stochastic")
    check(rule="lion", state="codes", block_size=128, shapes=[(9, 1000), (70, 128)])


@pytest.mark.parametrize("step", [0, 1, 999, 123_456])
def test_steps_and_their_bias_corrections(step: int) -> None:
    check(rule="adam", step=step, steps=2)
    check(rule="adagrad", step=step)
    check(rule="sgd", flags="momentum", step=step)


@pytest.mark.parametrize("state", ["float32", "codes"])
def test_scaled_gradients_and_found_inf(state: str) -> None:
    check(rule="adam", state=state, grad_scale=torch.tensor(1024.0))
    call = Call(rule="adam", flags="decoupled", weight_decay=0.1, state=state)
    before = call.written()
    for found in (1.0, math.nan):
        call.run(triton, grad_scale=torch.tensor(2.0), found_inf=torch.tensor(found))
    assert_equal(call.written(), before)  # the steps too
    call.run(triton, found_inf=torch.zeros(()))
    assert int(call.steps[0]) == 1 and not torch.equal(call.params[0], before[0])


@pytest.mark.parametrize("state", ["float32", "bfloat16", "codes"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, 1e-25])
def test_unusual_gradients(bad: float, state: str) -> None:
    """NaN, infinity, a gradient of zeros and one whose square is no float: block scales included."""
    calls = [Call(rule="adam", state=state, param=BF16, rounding="stochastic") for _ in range(2)]
    for call, op in zip(calls, (triton, reference()), strict=True):
        for g in call.grads:
            if bad in (0.0, 1e-25):
                g.fill_(bad)
            elif g.numel():
                g.view(-1)[g.numel() // 2] = bad
        if bad == 0.0:
            for s in (*call.states, *call.scales):
                s.zero_()
        call.run(op)
    assert_equal(calls[0].written(), calls[1].written())


@pytest.mark.parametrize("state", ["float32", "codes", "bfloat16"])
def test_shards_round_as_the_whole(state: str) -> None:
    """Rows of one tensor on one rank and the other; without codes also columns, which cut no block."""
    how = {"rule": "adam", "param": BF16, "rounding": "stochastic", "state": state, "block_size": 16}
    whole = Call(shapes=[(6, 64)], place=[5, 0, 64], **how)
    halves = {"rows": (slice(0, 2), slice(None), 0), "last rows": (slice(2, 6), slice(None), 128)}
    if state != "codes":
        halves |= {"columns": (slice(None), slice(0, 24), 0), "odd columns": (slice(None), slice(24, 63), 24)}
    parts = {}
    for name, (rows, columns, start) in halves.items():
        parts[name] = part = Call(shapes=[(6, 64)], place=[5, start, 64], **how)
        for tensors in (part.params, part.grads, part.states):
            tensors[:] = [t[rows, columns].contiguous() for t in tensors]
        part.scales[:] = [t[rows].contiguous() for t in part.scales]
        part.run(triton)
    whole.run(triton)
    for name, (rows, columns, _) in halves.items():
        for ours, all_of_it in ((parts[name].params, whole.params), (parts[name].states, whole.states)):
            assert_equal(ours, [t[rows, columns] for t in all_of_it])


@pytest.mark.parametrize(
    ("rule", "state", "rounding"),
    [("lamb", "codes", "split_master"), ("adam", "float32", "kahan"), ("adagrad", "bfloat16", "nearest")],
)
def test_optimizer_norms(rule: str, state: str, rounding: str) -> None:
    call = Call(rule=rule, state=state, rounding=rounding, param=BF16, weight_decay=0.1, step=3)
    before, scale = call.written(), torch.tensor(3.0)
    ours = call.norms(optimizer_update.optimizer_norms, scale)
    want = call.norms(reference("optimizer_norms"), scale)
    # Float64 sums in another order, rounded to float32: one rounding may fall the other way.
    torch.testing.assert_close(ours, want, rtol=2.0**-23, atol=0)
    assert_equal(call.written(), before)


def test_squared_norms_and_scaling() -> None:
    sizes = [(9000,), (3, 7), (0, 4), (), (2, 2048)]
    tensors = [torch.randn(s).to(d) for s in sizes for d in (F32, BF16, F16, F64)]
    tensors[0][3] = 1e30  # whose square is no float32
    exact = [float(t.double().square().sum()) for t in tensors]
    norms = tensor_norms.squared_norms(tensors)
    assert norms.dtype == F64
    torch.testing.assert_close(norms, torch.tensor(exact, dtype=F64), rtol=1e-13, atol=0)
    for factor in (torch.tensor(0.3), torch.tensor(0.3, dtype=F64)):
        ours, theirs = [t.clone() for t in tensors], [t.clone() for t in tensors]
        tensor_norms.scale_tensors_(ours, factor)
        _library.OPS["scale_tensors_"].reference(theirs, factor)
        assert_equal(ours, theirs)
    ours[0][0] = math.nan
    assert tensor_norms.squared_norms(ours)[0].isnan()
    with_nan = [t.clone() for t in ours]
    tensor_norms.scale_tensors_(ours, torch.ones(()))
    assert_equal(ours, with_nan)


class Device:
    """What the table asks of a GPU: copies that are copies, and a stream that may be capturing."""

    type = "cuda"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing, self.copies, empty = False, 0, torch.empty
        monkeypatch.setattr(tables, "_tables", type(tables._tables)())
        monkeypatch.setattr(tables, "_arenas", {})
        monkeypatch.setattr(tables, "_captured", [])
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=5))
        monkeypatch.setattr(torch, "empty", lambda *size, dtype, **where: empty(*size, dtype=dtype))
        monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where, **how: self.copy(tensor, *where, **how))

    def copy(self, tensor: torch.Tensor, device: Device, non_blocking: bool) -> torch.Tensor:
        assert device is self and non_blocking
        self.copies += 1
        return tensor.clone()


def test_an_unchanged_table_costs_no_copy_and_a_captured_one_is_never_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    device.capturing = True
    with pytest.raises(RuntimeError, match="make the same call once before"):
        tables._upload((1, 2), device)
    device.capturing = False
    first = tables._upload((1, 2), device)
    assert tables._upload((1, 2), device) is first and device.copies == 1 and first.tolist() == [1, 2]
    for i in range(tables.KEPT):
        tables._upload((i, 3), device)
    assert len(tables._tables) == tables.KEPT
    assert tables._upload((1, 2), device) is not first and device.copies == tables.KEPT + 2
    device.capturing = True
    captured = [tables._upload((1, i), device) for i in range(3)]
    assert device.copies == tables.KEPT + 2  # nothing of what may be given up later
    assert [t.tolist() for t in captured] == [t.tolist() for t in tables._captured] == [[1, 0], [1, 1], [1, 2]]


def test_nothing_to_do_and_what_is_refused() -> None:
    Call(rule="adam", shapes=[]).run(triton)
    with pytest.raises(RuntimeError, match="block_size to be at most 4096"):
        Call(rule="adam", state="codes", block_size=8192).run(triton)


def test_the_backend_is_reached_through_the_operator() -> None:
    import pykernels

    call, want = Call(rule="adam", state="codes"), Call(rule="adam", state="codes")
    with pykernels.backend("triton"):
        assert _library.serving("optimizer_update_", "cpu")[0] == "triton"
        call.run(torch.ops.pykernels.optimizer_update_)
    want.run(reference())
    assert_equal(call.written(), want.written())
