"""pykernels.distributed on 2 and 4 gloo ranks, against one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pykernels import optim

from .distributed import ranks
from .distributed.checks_stages import OURS, STEPS, TORCH
from .distributed.models import MICRO, Exact, Mlp, state_of, train_exact, train_mlp, values

STAGES = [
    "torch_adamw",
    "network",
    "ours",
    "existing_fsdp2_model",
    "placements",
    "same_start",
    "accumulation",
    "missing_gradients",
    "schedules_and_groups",
    "replicas_by_shards",
    "offloading",
    "refusals",
]


@pytest.fixture(scope="module", params=[2, 4], ids=["2ranks", "4ranks"])
def stages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """result(check): what a check returned, run with all others on so many ranks."""
    folder: Path = tmp_path_factory.mktemp(f"stages{request.param}")
    ranks.run(request.param, "tests.distributed.checks_stages", STAGES, folder)
    return lambda check: ranks.result(request.param, check, folder)


def assert_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name


def one_rank(
    cls: Any, dtype: torch.dtype = torch.float32, steps: int = STEPS, **arguments: Any
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters and state of an Exact model trained without any process group."""
    model = Exact(dtype)
    optimizer = cls(model.parameters(), **arguments)
    train_exact(model, optimizer, range(steps))
    return values(model), state_of(model, optimizer)


def test_torchs_optimizer_under_every_stage(stages: Any) -> None:
    expected, _ = one_rank(torch.optim.AdamW, **TORCH)
    for trained in stages("torch_adamw").values():
        assert_equal(trained, expected)


def test_a_network(stages: Any) -> None:
    """Sums over ranks round elsewhere than sums over a batch; 20 steps at lr 0.01 keep that below 5e-6."""
    model = Mlp()
    optimizer = optim.AdamW(model.parameters(), **TORCH)
    start = values(model)
    train_mlp(model, optimizer, STEPS)
    for trained in stages("network").values():
        for name, value in values(model).items():
            torch.testing.assert_close(trained[name], value, rtol=0, atol=5e-6, msg=name)
            assert (value - start[name]).abs().max() > 0.01


@pytest.mark.parametrize("name", OURS)
def test_our_optimizers_bit_for_bit(stages: Any, name: str) -> None:
    """Parameters, codes, scales, compensations and lower halves do not depend on the number of ranks or the stage."""
    cls, dtype, arguments = OURS[name]
    expected, state = one_rank(cls, dtype, lr=0.01, **arguments)
    for stage in (1, 3):
        trained, kept = stages("ours")[f"{name}, stage {stage}"]
        assert_equal(trained, expected)
        assert_equal(kept, state)


def test_a_model_its_user_sharded(stages: Any) -> None:
    expected, state = one_rank(optim.AdamW, lr=0.01, amsgrad=True)
    trained, kept = stages("existing_fsdp2_model")
    assert_equal(trained, expected)
    assert_equal(kept, state)


@pytest.mark.parametrize("check", ["placements", "refusals"])
def test_in_the_ranks(stages: Any, check: str) -> None:
    stages(check)


def test_same_start(stages: Any) -> None:
    for started in stages("same_start").values():
        assert_equal(started, values(Exact()))


def test_clipping(stages: Any) -> None:
    model = Exact()
    torch.stack([model(0, micro) for micro in range(MICRO)]).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for which, (seen, gradients) in stages("clipping").items():
        torch.testing.assert_close(seen.to(norm.dtype), norm, rtol=1e-6, atol=0, msg=which)
        for name, p in model.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-6, atol=0, msg=f"{which}: {name}")


def test_accumulation(stages: Any, request: pytest.FixtureRequest) -> None:
    world = 2 if "2ranks" in request.node.name else 4
    model = Exact()
    firsts = [rank * MICRO // world for rank in range(world)]
    torch.stack([model(step, micro) for step in range(2) for micro in firsts]).sum().div(world).backward()
    gradients = stages("accumulation")
    for name in ("each", "once"):
        assert_equal(gradients[name], {k: p.grad for k, p in model.named_parameters()})
    model.zero_grad()
    torch.stack([model(3, micro) for micro in firsts]).mean().backward()
    for name in ("each", "once"):
        assert_equal(gradients[f"{name}, then cleared"], {k: p.grad for k, p in model.named_parameters()})


def test_missing_gradients(stages: Any, request: pytest.FixtureRequest) -> None:
    model = Exact()
    optimizer = optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.1)
    (model.scale.sum() + model.blocks[0].bias.sum() / (2 if "2ranks" in request.node.name else 4)).backward()
    optimizer.step()
    assert_equal(stages("missing_gradients"), values(model))


def test_schedules_and_groups(stages: Any) -> None:
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
    assert_equal(stages("schedules_and_groups"), values(model))


def test_replicas_by_shards(stages: Any) -> None:
    expected, state = one_rank(optim.AdamW, lr=0.01, amsgrad=True)
    for trained, kept in stages("replicas_by_shards").values():
        assert_equal(trained, expected)
        assert_equal(kept, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offload", ["optimizer", "optimizer_zero_copy", "parameters"])
def test_offloading(stages: Any, offload: str, dtype: torch.dtype) -> None:
    """bfloat16 weights have a float32 master under offload="optimizer", and only there."""
    for stage in (2, 3) if offload == "parameters" else (1, 2):
        trained, kept = stages("offloading")[f"{offload}, stage {stage}, {dtype}"]
        cls: Any = torch.optim.AdamW if stage == 2 else optim.AdamW
        if offload == "optimizer" and dtype == torch.bfloat16:
            masters, state = one_rank_with_masters(cls)
            assert_equal(
                {k: v for k, v in kept.items() if k.endswith(".master")}, {f"{k}.master": v for k, v in masters.items()}
            )
            assert_equal(trained, {name: value.bfloat16() for name, value in masters.items()})
            assert_equal({k: v for k, v in kept.items() if not k.endswith(".master")}, state)
        else:
            expected, state = one_rank(cls, dtype, lr=0.01)
            assert_equal(trained, expected)
            assert_equal(kept, state)


def one_rank_with_masters(cls: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Mixed precision as everybody writes it: gradients of a bfloat16 model, a step of its float32 copy."""
    model, master = Exact(torch.bfloat16), Exact(torch.bfloat16).float()
    optimizer = cls(master.parameters(), lr=0.01)
    for step in range(STEPS):
        torch.stack([model(step, micro) for micro in range(MICRO)]).mean().backward()
        for p, m in zip(model.parameters(), master.parameters(), strict=True):
            m.grad, p.grad = p.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for p, m in zip(model.parameters(), master.parameters(), strict=True):
                p.copy_(m)
    return values(master), state_of(master, optimizer)
