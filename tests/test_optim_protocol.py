"""What torch promises of an optimizer: hooks, schedulers, closures, groups, scaled gradients, any layout of memory."""

import copy

import pytest
import torch
from torch import Tensor

from pykernels import optim

from .optim_matrix import equal, gradients, parameters, snapshot, train

SMALL = {"min_8bit_size": 256, "block_size": 64}


def test_hooks_schedulers_and_the_profiler_see_the_step() -> None:
    params = parameters()
    optimizer = optim.AdamW(params, lr=1.0)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("pre"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("post"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with torch.autograd.profiler.profile() as profile:
        train(optimizer, params, 1)
        scheduler.step()
    assert seen == ["pre", "post"]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert any(event.name == "Optimizer.step#AdamW.step" for event in profile.function_events)
    assert optimizer.step._wrapped_by_lr_sched  # type: ignore[attr-defined]
    assert optimizer._opt_called  # type: ignore[attr-defined]


def test_each_step_reads_the_group_anew() -> None:
    """lr, betas and weight_decay may be set between steps, as schedulers do, and amsgrad turned on."""
    pairs = []
    for cls in (optim.Adam, torch.optim.Adam):
        params = parameters()
        optimizer = cls(params, lr=1e-2)
        train(optimizer, params, 2)
        optimizer.param_groups[0].update(lr=1e-3, betas=(0.5, 0.9), weight_decay=0.3)
        pairs.append(train(optimizer, params, 2, first=2))
    for g, w in zip(*pairs, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lr", [torch.tensor(0.01), torch.tensor([0.01]), torch.tensor(0.01, dtype=torch.float64)])
def test_lr_as_a_tensor(lr: Tensor) -> None:
    params, plain = parameters(), parameters()
    optimizer = optim.AdamW(params, lr=lr, betas=(torch.tensor(0.9), torch.tensor(0.999)))
    rate = float(lr)
    first = train(optim.AdamW(plain, lr=rate, betas=(float(torch.tensor(0.9)), float(torch.tensor(0.999)))), plain, 2)
    assert equal(train(optimizer, params, 2), first)
    lr.zero_()  # the optimizer reads the tensor, not a copy
    optimizer.param_groups[0]["weight_decay"] = 0.0
    assert equal(train(optimizer, params, 1, first=2), first)


def test_groups_and_added_groups() -> None:
    finals = []
    for cls in (optim.AdamW, torch.optim.AdamW):
        params = parameters()
        optimizer = cls([{"params": params[:2], "lr": 1e-2}, {"params": params[2:3], "weight_decay": 0.5}])
        train(optimizer, params[:3], 1)
        optimizer.add_param_group({"params": params[3:], "betas": (0.5, 0.5)})
        finals.append(train(optimizer, params, 2))
    for g, w in zip(*finals, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)


def test_a_group_may_have_its_own_state() -> None:
    params = parameters()
    optimizer = optim.AdamW([{"params": params[1:2]}, {"params": params[2:3], "state_bits": 32}], state_bits=8, **SMALL)
    train(optimizer, params[1:3], 1)
    assert optimizer.state[params[1]]["exp_avg"].dtype == torch.int8
    assert optimizer.state[params[2]]["exp_avg"].dtype == torch.float32


def test_closure() -> None:
    p = torch.ones(3, requires_grad=True)
    optimizer = optim.SGD([p], lr=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0
    assert torch.equal(p.detach(), torch.zeros(3))


def test_the_plan_follows_what_changes() -> None:
    """Gradients come and go, a state is replaced or dropped, a parameter's storage or dtype is: as torch does."""
    finals = []
    for cls in (optim.AdamW, torch.optim.AdamW):
        params = parameters()
        optimizer = cls(params)
        train(optimizer, params, 2)
        params[1].grad = None
        for p, g in zip(params[2:], gradients(5, params)[2:], strict=True):
            p.grad = g
        optimizer.step()
        optimizer.state[params[0]]["exp_avg"] = torch.full_like(params[0], 0.25)
        train(optimizer, params, 1, first=6)
        del optimizer.state[params[3]]
        params[2].data = params[2].data * 2
        train(optimizer, params, 1, first=7)
        optimizer.state = copy.copy(optimizer.state)
        optimizer.state[params[0]] = {k: v + 1 for k, v in optimizer.state[params[0]].items()}
        finals.append(train(optimizer, params, 1, first=8))
    for g, w in zip(*finals, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


def test_autograd_sees_the_update() -> None:
    p = torch.ones(3, requires_grad=True)
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    optim.AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


LAYOUTS = {
    "channels_last": lambda: torch.randn(8, 6, 5, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(40, 30).t(),
    "gaps": lambda: torch.randn(30, 80)[:, ::2],
    "gaps_transposed": lambda: torch.randn(40, 60)[:, ::2].t(),
}


@pytest.mark.parametrize("kwargs", [{}, {"state_bits": 8}, {"state_bits": 8, "max_unorm": 0.01}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient", ["same", "contiguous", "expanded"])
def test_memory_order_does_not_matter(layout: str, gradient: str, kwargs: dict) -> None:
    p = LAYOUTS[layout]().requires_grad_()
    q = p.detach().contiguous().requires_grad_()
    strides, storage = p.stride(), p.data_ptr()
    a, b = optim.AdamW([p], **kwargs, **SMALL), optim.AdamW([q], **kwargs, **SMALL)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        g = torch.randn(p.shape, generator=generator)
        if gradient == "expanded":
            g = torch.randn(p.shape[1:], generator=generator).expand(p.shape)
        q.grad = g.contiguous()
        p.grad = torch.empty_strided(p.shape, p.stride()).copy_(g) if gradient == "same" else g
        a.step()
        b.step()
        if step == 1:
            a.load_state_dict(copy.deepcopy(b.state_dict()))  # contiguous state for a parameter that is not
    assert torch.equal(p.detach(), q.detach())
    assert p.stride() == strides and p.data_ptr() == storage
    assert all(torch.equal(a.state[p][k], v) for k, v in b.state[q].items())


@pytest.mark.parametrize("name", ["AdamW", "SGD", "LAMB"])
def test_grad_scaler(name: str) -> None:
    """The fused protocol: gradients are unscaled in the update, and an infinite one leaves everything as it was."""
    cls = getattr(optim, name)
    options = {"max_grad_norm": 1.0} if name == "LAMB" else {}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    p, q = (torch.linspace(-1, 1, 70).requires_grad_() for _ in range(2))
    a, b = cls([p], **options), cls([q], **options)
    for _ in range(3):
        a.zero_grad()
        scaler.scale(p.square().sum()).backward()
        q.grad = 2 * q.detach()
        scaler.step(a)
        scaler.update()
        b.step()
        assert torch.equal(p.detach(), q.detach())
    before = snapshot(a)
    a.zero_grad()
    scaler.scale(p.square().sum()).backward()
    p.grad[3] = float("inf")  # type: ignore[index]
    scaler.step(a)
    scaler.update()
    assert equal(before, snapshot(a))
    assert a.state[p]["step"] == 3
    assert scaler.get_scale() == 512.0
    assert not hasattr(a, "found_inf")


def test_a_checkpoints_dry_run_only_makes_the_state() -> None:
    """torch.distributed.checkpoint steps a fresh optimizer with lr 0 and gradients 0 to see its state."""
    from torch.distributed.checkpoint.state_dict import _init_optim_state

    params = parameters()
    optimizer = optim.AdamW8bit(params, lr=0.1, **SMALL)
    _init_optim_state(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert equal([p.detach() for p in params], parameters())
    fresh = optim.AdamW8bit(params, **SMALL)
    fresh.init_states()
    for p in params:
        assert optimizer.state[p].keys() == fresh.state[p].keys()
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in fresh.state[p].items())


def test_a_first_step_with_lr_0_counts() -> None:
    """A warm-up that starts from 0 is no dry run: its gradients are not 0."""
    params = parameters()
    optimizer = optim.AdamW(params, lr=0.0)
    train(optimizer, params, 1)
    assert all(optimizer.state[p]["step"] == 1 for p in params)


def test_foreach_and_fused_change_nothing() -> None:
    finals = []
    for kwargs in ({}, {"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}):
        params = parameters()
        finals.append(train(optim.AdamW(params, **kwargs), params, 2))
    assert all(equal(final, finals[0]) for final in finals)
