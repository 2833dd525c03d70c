"""OffloadedOptimizer without ranks: copies on a device made of paper, masters, changes from outside, scales."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from pykernels import optim
from pykernels.distributed import OffloadedOptimizer, _zero_copy
from pykernels.distributed.offload import Direct

from .models import Mlp, assert_equal, state_of, train_mlp, values


class Paper(Direct):
    """A device whose copies take effect when they are waited for, so that a use without a wait reads NaN."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.sent: list[tuple[torch.Tensor, torch.Tensor]] = []

    def fetch(self, source: torch.Tensor, host: torch.Tensor) -> Any:
        self.log.append(("fetch", host.numel()))
        host.fill_(float("nan"))
        return host, source.clone()

    def wait(self, ticket: Any) -> None:
        self.log.append(("wait", ticket[0].numel()))
        ticket[0].copy_(ticket[1])

    def begin(self, device: torch.device) -> None:
        self.log.append(("begin", 0))

    def send(self, host: torch.Tensor, target: torch.Tensor) -> None:
        self.log.append(("send", host.numel()))
        self.sent.append((host, target))
        target.add_(0)  # the copy counts as a change when it is begun

    def finish(self, device: torch.device) -> None:
        self.log.append(("finish", 0))
        for host, target in self.sent:
            target.data.copy_(host)
        self.sent.clear()


def test_lamb_clips_by_the_norm_of_all_buckets() -> None:
    plain, ours = Mlp(), Mlp()
    options = {"lr": 0.01, "max_grad_norm": 1e-3}
    expected = optim.LAMB(plain.parameters(), **options)
    offloaded = OffloadedOptimizer(ours.parameters(), optim.LAMB, bucket_bytes=1, transfers=Paper(), **options)
    assert train_mlp(plain, expected, 3) == train_mlp(ours, offloaded, 3)
    assert_equal(values(ours), values(plain))


def test_buckets_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step makes state, which the plans of the second know; from then on none is made."""
    made: list[int] = []
    make = optim.AdamW._make_plan
    monkeypatch.setattr(optim.AdamW, "_make_plan", lambda self: (made.append(0), make(self))[1])
    model = Mlp()
    optimizer = OffloadedOptimizer(model.parameters(), optim.AdamW, bucket_bytes=1, transfers=Paper())
    train_mlp(model, optimizer, 1)
    buckets = len(made)
    assert buckets > 1
    train_mlp(model, optimizer, 1)
    assert len(made) == 2 * buckets
    train_mlp(model, optimizer, 3)
    assert len(made) == 2 * buckets


class Chain(nn.Module):
    """Weights of 1 to 4 elements, used one after another."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.ones(n + 1, dtype=dtype) for n in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = (x * weight).sum()
        return x


@pytest.mark.parametrize("cls", [optim.AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("bucket_bytes", [1, 6000, 1 << 30])
def test_every_use_waits_for_its_copy(cls: Any, bucket_bytes: int) -> None:
    plain, ours = Mlp(), Mlp()
    expected = cls(plain.parameters(), lr=0.01)
    offloaded = OffloadedOptimizer(ours.parameters(), cls, lr=0.01, bucket_bytes=bucket_bytes, transfers=Paper())
    assert train_mlp(plain, expected, 5) == train_mlp(ours, offloaded, 5)
    assert_equal(values(ours), values(plain))
    assert_equal(state_of(ours, offloaded), state_of(plain, expected))


def test_a_bucket_waits_for_its_own_gradients_only() -> None:
    """Fetched as backward makes them, last layer first; each bucket is under way back before the next is waited for."""
    model, device = Chain(), Paper()
    optimizer = OffloadedOptimizer(model.parameters(), optim.AdamW, bucket_bytes=1, transfers=device)
    model(torch.ones(1)).backward()
    assert device.log == [("fetch", n) for n in (4, 3, 2, 1)]
    device.log.clear()
    optimizer.step()
    each = [(what, n) for n in (4, 3, 2, 1) for what in ("wait", "send")]
    assert device.log == [("begin", 0), *each, ("finish", 0)]


def test_a_gradient_changed_after_backward_is_fetched_again() -> None:
    plain, ours = Chain(), Chain()
    device = Paper()
    expected = torch.optim.SGD(plain.parameters(), lr=0.1)
    optimizer = OffloadedOptimizer(ours.parameters(), torch.optim.SGD, lr=0.1, transfers=device)
    for model in (plain, ours):
        model(torch.ones(1)).backward()
        model(torch.ones(1)).backward()  # adds to the gradients, and fetches them again
        model.weights[0].grad.mul_(0.5)
        model.weights[1].grad = torch.full((2,), 3.0)
    assert len(device.log) == 8
    expected.step()
    optimizer.step()
    assert [entry for entry in device.log[8:] if entry[0] == "fetch"] == [("fetch", 2), ("fetch", 1)]
    assert_equal(values(ours), values(plain))
    optimizer.zero_grad()
    assert all(p.grad is None for p in ours.parameters())


def test_masters_see_changes_from_outside() -> None:
    """Elements that somebody wrote are taken over; the master of the others keeps the bits that bfloat16 lacks."""
    model = Chain(torch.bfloat16)
    optimizer = OffloadedOptimizer(model.parameters(), torch.optim.SGD, lr=2.0**-10)
    weight = model.weights[3]

    def step() -> None:
        weight.grad = torch.ones_like(weight)
        optimizer.step()

    step()
    master = optimizer.state[weight]["master"] if optimizer.state else None
    assert master is None, "SGD without momentum has no state; the master is kept all the same"
    assert torch.equal(weight, torch.ones(4, dtype=torch.bfloat16))  # 1 - 2^-10 rounds to 1
    with torch.no_grad():
        weight[1] = 5.0
    step()
    step()
    step()  # 1 - 4 / 1024 is a bfloat16 (8 bits below 1); 5 - 3 / 1024 rounds to 5
    assert weight.tolist() == [1 - 2**-8, 5.0, 1 - 2**-8, 1 - 2**-8]


def test_state_dict_brings_the_masters() -> None:
    def make() -> tuple[Mlp, OffloadedOptimizer]:
        model = Mlp().bfloat16()
        return model, OffloadedOptimizer(model.parameters(), optim.AdamW, lr=0.01)

    model, optimizer = make()
    train_mlp(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, loaded = make()
    loaded.load_state_dict(saved["optimizer"])
    other.load_state_dict(saved["model"])
    assert_equal(state_of(other, loaded), state_of(model, optimizer))
    assert any(name.endswith(".master") for name in state_of(model, optimizer))
    assert train_mlp(other, loaded, 3) == train_mlp(model, optimizer, 3)
    assert_equal(values(other), values(model))
    broken = dict(saved["optimizer"], param_groups=[{**saved["optimizer"]["param_groups"][0], "state_bits": 8}])
    before = state_of(other, loaded)
    with pytest.raises(ValueError, match="state_bits"):
        loaded.load_state_dict(broken)
    assert_equal(state_of(other, loaded), before)


def test_gradient_scale_and_closure() -> None:
    """torch.amp.GradScaler's fused protocol reaches the optimizer inside, for one step."""
    plain, ours = Chain(), Chain()
    expected = optim.AdamW(plain.parameters(), lr=0.1)
    optimizer = OffloadedOptimizer(ours.parameters(), optim.AdamW, lr=0.1)
    assert optimizer._step_supports_amp_scaling
    for model, which in ((plain, expected), (ours, optimizer)):

        def closure(model: nn.Module = model) -> torch.Tensor:
            model.zero_grad()
            loss = model(torch.ones(1))
            (loss * 8).backward()
            return loss

        which.grad_scale, which.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        assert which.step(closure) == 24.0
        which.found_inf = torch.tensor(1.0)
        which.step(closure)
        del which.grad_scale, which.found_inf
    assert_equal(values(ours), values(plain))
    assert not hasattr(optimizer.inner, "grad_scale") and not hasattr(optimizer.inner, "found_inf")
    assert not OffloadedOptimizer(Chain().parameters(), torch.optim.Adagrad)._step_supports_amp_scaling


def test_zero_copy_moves_state_that_is_made_late_or_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every state tensor but the scalars goes to the host once, whenever it appears."""
    moved: list[int] = []

    def to_host(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tensor.numel())
        return tensor.clone()

    monkeypatch.setattr(_zero_copy, "to_host", to_host)
    for cls in (optim.AdamW, torch.optim.AdamW):
        plain, ours = Chain(), Chain()
        expected = cls(plain.parameters(), lr=0.1)
        optimizer = _zero_copy.zero_copy(ours.parameters(), cls, lr=0.1)
        assert moved == ([1, 1, 2, 2, 3, 3, 4, 4] if cls is optim.AdamW else [])
        for _ in range(3):
            for model, which in ((plain, expected), (ours, optimizer)):
                model(torch.ones(1)).backward()
                which.step()
                which.zero_grad()
        assert moved == [1, 1, 2, 2, 3, 3, 4, 4]
        assert_equal(values(ours), values(plain))
        optimizer.load_state_dict({**expected.state_dict()})
        assert len(moved) == 16
        moved.clear()


def test_groups_and_refusals() -> None:
    model = Chain()
    first, *rest = model.parameters()
    optimizer = OffloadedOptimizer([{"params": [first], "lr": 0.5}], optim.SGD, lr=0.1)
    optimizer.add_param_group({"params": rest})
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    model(torch.ones(1)).backward()
    optimizer.param_groups[1]["lr"] = 0.0
    optimizer.step()
    assert first.item() == 1 - 0.5 * 24 and all(torch.equal(p, torch.ones_like(p)) for p in rest)
    with pytest.raises(ValueError, match="OffloadedOptimizer: expected params to have at least 1 parameter"):
        OffloadedOptimizer([], optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="lr"):
        OffloadedOptimizer(model.parameters(), optim.SGD, lr=-1.0)
