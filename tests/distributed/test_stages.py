"""zero on 2 and 4 gloo ranks, against one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pykernels import optim

from .checks_stages import FEW, OFFLOADS, OURS, STEPS, TORCH, stages_of, steps_of
from .models import MICRO, Exact, Mlp, assert_equal, state_of, train_exact, train_mlp, values


def one_rank(
    cls: Any, dtype: torch.dtype = torch.float32, steps: int = STEPS, **arguments: Any
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters and state of an Exact model trained without any process group."""
    model = Exact(dtype)
    optimizer = cls(model.parameters(), **arguments)
    train_exact(model, optimizer, range(steps))
    return values(model), state_of(model, optimizer)


def test_torchs_optimizer_under_every_stage(ranks: Any) -> None:
    expected, _ = one_rank(torch.optim.AdamW, steps=FEW, **TORCH)
    for trained in ranks("torch_adamw").values():
        assert_equal(trained, expected)


def test_a_network(ranks: Any) -> None:
    """Sums over ranks round elsewhere than sums over a batch; 6 steps at lr 0.01 keep that below 2e-6."""
    model = Mlp()
    optimizer = optim.AdamW(model.parameters(), **TORCH)
    start = values(model)
    train_mlp(model, optimizer, FEW)
    for trained in ranks("network").values():
        for name, value in values(model).items():
            torch.testing.assert_close(trained[name], value, rtol=0, atol=2e-6, msg=name)
            assert (value - start[name]).abs().max() > 0.01


@pytest.mark.parametrize("name", OURS)
def test_our_optimizers_bit_for_bit(ranks: Any, name: str) -> None:
    """Parameters, codes, scales, compensations and lower halves do not depend on the number of ranks or the stage."""
    cls, dtype, arguments = OURS[name]
    expected, state = one_rank(cls, dtype, steps_of(name), lr=0.01, **arguments)
    for stage in stages_of(name):
        trained, kept = ranks("ours")[f"{name}, stage {stage}"]
        if name == "lamb":  # its trust ratio sums squares over ranks
            for key, value in expected.items():
                torch.testing.assert_close(trained[key], value, rtol=1e-6, atol=1e-7, msg=key)
            continue
        assert_equal(trained, expected)
        assert_equal(kept, state)


def test_a_model_its_user_sharded(two_ranks: Any) -> None:
    expected, state = one_rank(optim.AdamW, steps=FEW, lr=0.01, amsgrad=True)
    trained, kept, in_backward = two_ranks("existing_fsdp2_model")
    assert_equal(trained, expected)
    assert_equal(kept, state)
    assert_equal(in_backward, expected)


def test_placements(ranks: Any) -> None:
    ranks("placements")


def test_refusals(two_ranks: Any) -> None:
    two_ranks("refusals")


def test_same_start(two_ranks: Any) -> None:
    for started in two_ranks("same_start").values():
        assert_equal(started, values(Exact()))


def test_clipping(ranks: Any) -> None:
    model = Exact()
    torch.stack([model(0, micro) for micro in range(MICRO)]).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    norms = ranks("clipping")
    offloaded = norms.pop("offloaded")
    for name, value in values(Exact()).items():
        expected = value - model.get_parameter(name).grad
        torch.testing.assert_close(offloaded[name], expected, rtol=1e-6, atol=1e-7, msg=name)
    for which, (seen, gradients) in norms.items():
        torch.testing.assert_close(seen.to(norm.dtype), norm, rtol=1e-6, atol=0, msg=which)
        for name, p in model.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-6, atol=0, msg=f"{which}: {name}")


def test_accumulation(ranks: Any) -> None:
    model = Exact()
    firsts = [rank * MICRO // ranks.world for rank in range(ranks.world)]
    torch.stack([model(step, micro) for step in range(2) for micro in firsts]).sum().div(ranks.world).backward()
    gradients = ranks("accumulation")
    for name in ("each", "once"):
        assert_equal(gradients[name], {k: p.grad for k, p in model.named_parameters()})
    model.zero_grad()
    torch.stack([model(3, micro) for micro in firsts]).mean().backward()
    for name in ("each", "once"):
        assert_equal(gradients[f"{name}, then cleared"], {k: p.grad for k, p in model.named_parameters()})


def test_missing_gradients(ranks: Any) -> None:
    model = Exact()
    optimizer = optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.1)
    (model.scale.sum() + model.blocks[0].bias.sum() / ranks.world).backward()
    optimizer.step()
    assert_equal(ranks("missing_gradients"), values(model))


def test_schedules_and_groups(ranks: Any) -> None:
    model = Exact()
    decay = [p for p in model.blocks.parameters() if p.dim() > 1]
    others = [p for p in model.blocks.parameters() if p.dim() == 1]
    groups = [
        {"params": decay, "weight_decay": 0.3},
        {"params": [model.scale], "lr": 0.5},
        {"params": others, "lr": 0.25},
    ]
    optimizer = optim.AdamW(groups, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        train_exact(model, optimizer, range(step, step + 1))
        scheduler.step()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert_equal(ranks("schedules_and_groups"), values(model))


def test_replicas_by_shards(ranks: Any) -> None:
    expected, state = one_rank(optim.AdamW, steps=FEW, lr=0.01, amsgrad=True)
    for trained, kept in ranks("replicas_by_shards").values():
        assert_equal(trained, expected)
        assert_equal(kept, state)


@pytest.mark.parametrize("index", range(len(OFFLOADS)), ids=[f"{o[0]} stage {o[1]} {o[3]}" for o in OFFLOADS])
def test_offloading(ranks: Any, index: int) -> None:
    """bfloat16 weights have a float32 master under offload="optimizer" with rounding to nearest, and only there."""
    offload, _, cls, dtype, arguments = OFFLOADS[index]
    trained, kept = ranks("offloading")[index]
    masters = {name: value for name, value in kept.items() if name.endswith(".master")}
    if offload == "optimizer" and dtype == torch.bfloat16 and not arguments:
        wide, state = one_rank_with_masters(cls)
        assert_equal(masters, {f"{name}.master": value for name, value in wide.items()})
        expected = {name: value.bfloat16() for name, value in wide.items()}
    else:
        expected, state = one_rank(cls, dtype, FEW, lr=0.01, **arguments)
        assert not masters
    assert_equal(trained, expected)
    assert_equal({name: value for name, value in kept.items() if name not in masters}, state)


def one_rank_with_masters(cls: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Mixed precision as everybody writes it: gradients of a bfloat16 model, a step of its float32 copy."""
    model, master = Exact(torch.bfloat16), Exact(torch.bfloat16).float()
    optimizer = cls(master.parameters(), lr=0.01)
    for step in range(FEW):
        torch.stack([model(step, micro) for micro in range(MICRO)]).mean().backward()
        for p, m in zip(model.parameters(), master.parameters(), strict=True):
            m.grad, p.grad = p.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for p, m in zip(model.parameters(), master.parameters(), strict=True):
                p.copy_(m)
    return values(master), state_of(master, optimizer)
