"""The optimizers' operators on a GPU against their references on the CPU; `make gpu-check` runs it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch

import pykernels
from pykernels import _library
from tests.optimizer_lists import RULES, Call, assert_equal, reference

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
update = torch.ops.pykernels.optimizer_update_
# Rows that vectors serve and rows that they do not, more than a program's worth, a scalar and nothing.
SHAPES = [(64, 1024), (33, 300), (0, 8), (5, 1), (7, 16, 256)]
FLAT = [(70_001,), (4096,), ()]


@pytest.fixture(params=["native", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The compiled kernel where it is built, and Triton's."""
    native = _library.has_native("optimizer_update_", "cuda")
    if request.param == "native":
        assert native, _library._native["cuda"].reason
    with pykernels.backend("triton") if request.param == "triton" else contextlib.nullcontext():
        assert _library.serving("optimizer_update_", "cuda")[0] == request.param
        yield request.param


def check(steps: int = 2, **how) -> None:
    shapes = SHAPES if how.get("state") == "codes" else SHAPES + FLAT
    ours, theirs = (Call(shapes=shapes, device=device, **how) for device in ("cuda", "cpu"))
    for _ in range(steps):
        ours.run(update)
        theirs.run(reference())
    assert_equal(ours.written(), theirs.written())


@pytest.mark.parametrize("state", ["float32", "bfloat16", "codes"])
@pytest.mark.parametrize(("rule", "flags", "decay"), RULES)
def test_every_rule(backend: str, rule: str, flags: str, decay: float, state: str) -> None:
    check(rule=rule, flags=flags, weight_decay=decay, state=state, block_size=256)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan", "split_master"])
@pytest.mark.parametrize(("state", "grad"), [("float32", BF16), ("bfloat16", torch.float32), ("codes", BF16)])
def test_bfloat16_parameters(backend: str, rounding: str, state: str, grad: torch.dtype) -> None:
    check(rule="adam", flags="decoupled", weight_decay=0.1, param=BF16, grad=grad, state=state, rounding=rounding)


@pytest.mark.parametrize("block_size", [64, 100, 256, 4096])
def test_block_sizes(backend: str, block_size: int) -> None:
    check(rule="adam", state="codes", param=BF16, rounding="stochastic", block_size=block_size)


@pytest.mark.parametrize("state", ["float32", "codes"])
def test_scaled_gradients_found_inf_and_ratio(backend: str, state: str) -> None:
    calls = [Call(rule="lamb", state=state, weight_decay=0.1, device=device) for device in ("cuda", "cpu")]
    for call, op in zip(calls, (update, reference()), strict=True):
        ratio = torch.linspace(0.5, 2.0, len(call.params), device=call.device)
        for found in (0.0, 1.0, math.nan, 0.0):
            call.run(op, ratio=ratio, grad_scale=ratio[:1] * 256, found_inf=torch.full((), found, device=call.device))
    assert_equal(calls[0].written(), calls[1].written())
    assert int(calls[0].steps[0]) == 2


@pytest.mark.parametrize("state", ["float32", "codes"])
def test_steps_and_learning_rate_on_the_host(backend: str, state: str) -> None:
    ours, theirs = (Call(rule="adam", state=state, device=device) for device in ("cuda", "cpu"))
    ours.steps = [s.cpu() for s in ours.steps]
    for lr in (1e-2, 3e-3):
        for call, op in ((ours, update), (theirs, reference())):
            call.run(op, lr=torch.tensor(lr))
    assert_equal(ours.written(), theirs.written())
    with pytest.raises(RuntimeError, match="steps"):
        ours.run(update, found_inf=torch.zeros((), device="cuda"))


def scalars() -> dict[str, torch.Tensor]:
    zero, one = torch.zeros((), device="cuda"), torch.ones((), device="cuda")
    return {"lr": one * 1e-2, "grad_scale": one * 2, "found_inf": zero}


@pytest.mark.parametrize("state", ["float32", "codes"])
def test_nothing_waits_for_the_gpu(backend: str, state: str) -> None:
    call, given = Call(rule="adam", state=state, device="cuda"), scalars()
    call.run(update, **given)
    fresh = Call(rule="adam", state=state, device="cuda")  # other addresses: a new table
    tensors = [*call.params, *call.grads]
    norms = call.norms(torch.ops.pykernels.optimizer_norms)
    torch.ops.pykernels.scale_tensors_(tensors, given["found_inf"] + 1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for each in (call, fresh):
            each.run(update, **given)
            norms = each.norms(torch.ops.pykernels.optimizer_norms, given["grad_scale"])
            total = torch.ops.pykernels.squared_norms(each.grads).sum().sqrt()
            torch.ops.pykernels.scale_tensors_(each.grads, (1.0 / total).clamp(max=1.0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(norms.isfinite().all())


@pytest.mark.parametrize("state", ["float32", "codes"])
def test_a_cuda_graph_captures_a_whole_step(backend: str, state: str) -> None:
    """Norm, clipping and update; the warm-up outside capture has other tensors, as PyTorch's recipe has it."""

    def step(call: Call) -> None:
        total = torch.ops.pykernels.squared_norms(call.grads).sum().sqrt()
        torch.ops.pykernels.scale_tensors_(call.grads, (0.5 / total).clamp(max=1.0).float())
        call.run(update, **given)

    given = scalars()
    make = lambda: Call(rule="adam", state=state, param=BF16, rounding="stochastic", device="cuda")  # noqa: E731
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(make())
    torch.cuda.current_stream().wait_stream(stream)
    captured, eager = make(), make()
    before = captured.written()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured)
    assert_equal(captured.written(), before)  # capture runs nothing
    for lr in (1e-2, 2e-3, 5e-3):
        given["lr"].fill_(lr)
        graph.replay()
        step(eager)
    given["found_inf"].fill_(1.0)
    graph.replay()
    step(eager)
    assert_equal(captured.written(), eager.written())
    assert all(int(s) == 3 for s in captured.steps)


def test_a_side_stream_is_used(backend: str) -> None:
    ours, theirs = (Call(rule="adam", device=device) for device in ("cuda", "cpu"))
    grads = [g.clone() for g in ours.grads]
    for g in ours.grads:
        g.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on any other stream would read the zeros
        for g, late in zip(ours.grads, grads, strict=True):
            g.copy_(late)
        ours.run(update)
    stream.synchronize()
    theirs.run(reference())
    assert_equal(ours.written(), theirs.written())


@pytest.mark.parametrize("state", ["float32", "bfloat16", "codes"])
def test_state_in_pinned_host_memory(backend: str, state: str) -> None:
    """Zero-copy offload: the kernel reads and writes the state where it lies."""
    how = {"rule": "adam", "state": state, "param": BF16, "rounding": "split_master"}
    ours, theirs = (Call(shapes=SHAPES, device=device, **how) for device in ("cuda", "cpu"))
    for tensors in (ours.states, ours.scales, ours.extras):
        tensors[:] = [t.cpu().pin_memory() for t in tensors]
    for _ in range(2):
        ours.run(update)
        theirs.run(reference())
    torch.cuda.synchronize()
    assert_equal(ours.written(), theirs.written())
    ours.states[0] = ours.states[0].clone()
    with pytest.raises(RuntimeError, match=r"states\[0\]"):
        ours.run(update)


def test_tables_are_kept_and_given_up() -> None:
    from pykernels.kernels import _tensor_table as tables

    with pykernels.backend("triton"):
        ours, theirs = (Call(rule="sgd", flags="momentum", device=device) for device in ("cuda", "cpu"))
        for call, op in ((ours, update), (theirs, reference())):
            call.run(op)
        held = list(tables._tables)
        for call, op in ((ours, update), (theirs, reference())):
            call.run(op)
        assert list(tables._tables) == held
        for i in range(tables.KEPT + 5):
            Call(rule="sgd", shapes=[(i + 1,)], device="cuda").run(update)
        assert len(tables._tables) == tables.KEPT
        for call, op in ((ours, update), (theirs, reference())):
            call.run(op)
    assert_equal(ours.written(), theirs.written())


@pytest.mark.parametrize("state", ["float32", "codes"])
def test_norms_and_scaling(state: str) -> None:
    ours, theirs = (Call(rule="lamb", state=state, weight_decay=0.1, device=device) for device in ("cuda", "cpu"))
    norms = ours.norms(torch.ops.pykernels.optimizer_norms)
    torch.testing.assert_close(norms.cpu(), theirs.norms(reference("optimizer_norms")), rtol=2.0**-23, atol=0)
    mixed = [torch.randn(100_001).bfloat16(), torch.randn(64, 1024), torch.randn(0), torch.randn(3, 5).half()]
    here = [t.cuda() for t in mixed]
    sums = torch.ops.pykernels.squared_norms(here)
    torch.testing.assert_close(sums.cpu(), reference("squared_norms")(mixed), rtol=1e-12, atol=0)
    torch.ops.pykernels.scale_tensors_(here, torch.tensor(0.3, device="cuda"))
    reference("scale_tensors_")(mixed, torch.tensor(0.3))
    assert_equal([t.cpu() for t in here], mixed)


def test_more_elements_than_int32_counts() -> None:
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    n = 2**31 + 4096
    p, g = (torch.ones(n, dtype=BF16, device="cuda") for _ in range(2))
    update(3, 0, [p], [g], [], [], [], [torch.zeros((), device="cuda")], torch.tensor(0.5), 0.0, 0.0, 0.0, 0.0, 0, 0,
           [], 256, None, None, None)  # fmt: skip
    assert float(p[0]) == float(p[-1]) == 0.5 and bool((p == 0.5).all())
    assert float(torch.ops.pykernels.squared_norms([p])) == n / 4
