"""offload_activations: its bookkeeping on a device made of paper, where every copy and every wait is written down."""

import warnings

import pytest
import torch
from torch import nn

from pykernels.memory import offload, offload_activations


class Paper:
    """A device whose copies take effect when they are waited for, so that a use without a wait reads garbage."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.finished = 0  # copies up to this ticket have ended by themselves
        self.live = 0  # tensors brought back and not yet freed

    def owns(self, tensor: torch.Tensor) -> bool:
        return True

    def _copy(self, kind: str, source: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        ticket = (len(self.log), torch.full_like(source, float("nan")), source)
        self.log.append((kind, source.numel()))
        return ticket[1], ticket

    def store(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        return self._copy("store", x)

    def load(self, host: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, tuple]:
        return self._copy("load", host)

    def done(self, ticket: tuple) -> bool:
        return ticket[0] < self.finished

    def wait(self, ticket: tuple) -> None:
        number, target, source = ticket
        self.log.append(("wait", number))
        target.copy_(source)

    def copies(self, kind: str) -> list[int]:
        return [size for what, size in self.log if what == kind]


def chain(x: torch.Tensor, n: int) -> torch.Tensor:
    """Each exp saves its own result; their sizes tell them apart."""
    for _ in range(n):
        x = x.exp()[:-1] - 1
    return x.sum()


def gradients(offloader: offload.Offloader | None, call, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if offloader is None:
        return torch.autograd.grad(call(*inputs), inputs)
    with offload.offloading(offloader):
        y = call(*inputs)
    return torch.autograd.grad(y, inputs)


@pytest.mark.parametrize("prefetch", [0, 1, 3, 100])
def test_order_and_prefetch(prefetch: int) -> None:
    device = Paper()
    x = torch.randn(20, requires_grad=True) / 10
    (plain,) = gradients(None, lambda x: chain(x, 8), x)
    (ours,) = gradients(offload.Offloader(device, 0, prefetch), lambda x: chain(x, 8), x)
    assert torch.equal(ours, plain)
    sizes = list(range(20, 12, -1))
    assert device.copies("store") == sizes and device.copies("load") == sizes[::-1]
    # In backward, when a tensor is waited for, the `prefetch` saved before it are under way: not fewer, not more.
    backward = device.log[[kind for kind, _ in device.log].index("load") :]
    begun = used = 0
    for kind, _ in backward:
        if kind == "load":
            begun += 1
            assert begun <= min(8, max(used, 1) + max(prefetch, 1))
        else:
            assert begun >= min(8, used + (prefetch if used else 1))
            used += 1
    assert begun == used == 8


def test_no_more_than_a_few_wait_to_leave() -> None:
    """The device memory of a tensor is free again once IN_FLIGHT more have followed, or its copy is seen to be done."""
    device = Paper()
    offloader = offload.Offloader(device, 0, 1)
    kept = []
    with offload.offloading(offloader):
        for _ in range(12):
            kept.append(torch.randn(3, requires_grad=True).exp())
            assert len(offloader._leaving) <= offload.IN_FLIGHT
        device.finished = 100
        kept.append(torch.randn(3, requires_grad=True).exp())
        assert len(offloader._leaving) == 1
    assert not offloader._leaving  # leaving the block waits on the device for the rest
    assert all(entry().source is None for entry in offloader._order)


def test_a_tensor_saved_twice_is_copied_once() -> None:
    """By two nodes, reshaped, and transposed; after an in-place change it is another tensor."""
    device = Paper()
    x, w = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)

    def call(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h = x.detach() + 1
        return (h * w).sum() + (h.view(3, 8) * w.view(3, 8)).sum() + (h.t() @ w).sum() + (x.exp() * 2).sum()

    plain = gradients(None, call, x, w)
    ours = gradients(offload.Offloader(device, 0, 2), call, x, w)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)
    stored = device.copies("store")
    # h once, w once (a leaf that is no Parameter), x.exp() once, and the ones of nobody: nothing else is of this size.
    assert stored.count(24) == len(stored) <= 4 and device.copies("load") == stored[: len(device.copies("load"))]
    device, h = Paper(), torch.randn(5)
    with offload.offloading(offload.Offloader(device, 0, 2)):
        a = w[0, 0] * h
        device.finished = 100
        (w[0, 0] * torch.ones(2)).sum()  # lets h go
        h.add_(1)
        b = w[0, 0] * h
    assert device.copies("store").count(5) == 2
    (grad,) = torch.autograd.grad(a.sum() - b.sum(), w)
    torch.testing.assert_close(grad[0, 0], torch.tensor(-5.0))  # each node got the values it had saved


def test_never_parameters_or_views_of_them() -> None:
    device = Paper()
    layer = nn.Linear(8, 8)
    frozen = nn.Parameter(torch.randn(8, 8), requires_grad=False)
    x = torch.randn(3, 8, requires_grad=True)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.layer.weight
            return x @ weight.t() @ weight[:, 2:6] @ weight.detach()[:4] @ frozen @ weight.data.t()

    with offload.offloading(offload.Offloader(device, 0, 2)):
        Tied()(x).sum().backward()
    assert 3 * 8 in device.copies("store") and not {64, 32} & set(device.copies("store"))


def test_a_second_backward_and_a_graph_that_is_dropped() -> None:
    device = Paper()
    offloader = offload.Offloader(device, 0, 2)
    x = torch.randn(6, requires_grad=True)
    with offload.offloading(offloader):
        y = chain(x, 4)
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, x)[0])
    assert len(device.copies("load")) == 8
    del y
    assert all(entry() is None for entry in offloader._order)  # host memory goes with the graph


def test_backward_inside_the_block_uses_what_has_not_left() -> None:
    device = Paper()
    x = torch.randn(6, requires_grad=True)
    with offload.offloading(offload.Offloader(device, 0, 2)):
        (grad,) = torch.autograd.grad(chain(x, 2), x)
    assert torch.equal(grad, torch.autograd.grad(chain(x, 2), x)[0]) and not device.copies("load")


def test_small_tensors_stay() -> None:
    device = Paper()
    x = torch.randn(20, requires_grad=True)
    with offload.offloading(offload.Offloader(device, 18 * 4, 2)):
        chain(x, 6).backward()
    assert device.copies("store") == [20, 19, 18]


def test_a_change_in_place_during_the_copy_is_an_error() -> None:
    x = torch.randn(6, requires_grad=True)
    with (
        pytest.raises(RuntimeError, match="modified in place while it was copied"),
        offload.offloading(offload.Offloader(Paper(), 0, 2)),
    ):
        x.exp().add_(1)
    with offload.offloading(offload.Offloader(Paper(), 0, 2)):  # the hooks of the block that failed are gone
        x.exp().sum().backward()


def test_without_cuda_it_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(offload, "_said", False)
    x = torch.randn(300, 1000, requires_grad=True)
    with pytest.warns(UserWarning, match="no CUDA device, so saved tensors stay where they are") as said:
        for _ in range(2):
            with offload_activations():
                y = x.exp()
    assert len(said) == 1 and said[0].filename == __file__
    assert y.grad_fn._saved_result.data_ptr() == y.data_ptr()


@pytest.mark.parametrize("how", [{"min_bytes": -1}, {"prefetch": -1}])
def test_bad_values_are_named(how: dict) -> None:
    with (
        warnings.catch_warnings(action="error"),
        pytest.raises(ValueError, match=f"expected {next(iter(how))} to be 0 or more, got -1"),
        offload_activations(**how),
    ):
        pass
