"""Checks that run in ranks: every stage of zero trains as one rank does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from pykernels import optim
from pykernels.distributed import ReplicatedOptimizer, zero

from .models import MICRO, Exact, Mlp, state_of, train_exact, train_mlp, values, whole
from .ranks import Rank

STEPS = 20
FEW = 6  # where another check has the 20
TORCH: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
# 8-bit blocks of 8 leave the last one of 17 columns short.
EIGHT: dict[str, Any] = {"state_bits": 8, "block_size": 8, "min_8bit_size": 100, "seed": 5}
BF16, FP32 = torch.bfloat16, torch.float32
# name: (class, parameters' dtype, arguments); all but LAMB update an element from itself and its block alone.
OURS: dict[str, tuple[Any, torch.dtype, dict[str, Any]]] = {
    "adamw": (optim.AdamW, FP32, {"amsgrad": True}),
    "adamw8bit": (optim.AdamW, FP32, EIGHT),
    "adamw8bit stochastic": (optim.AdamW, BF16, {**EIGHT, "rounding": "stochastic"}),
    "adamw16bit kahan": (optim.AdamW, BF16, {"state_bits": 16, "rounding": "kahan"}),
    "lion8bit": (optim.Lion, FP32, EIGHT),
    "sgd kahan": (optim.SGD, BF16, {"momentum": 0.9, "nesterov": True, "rounding": "kahan"}),
    "rmsprop8bit": (optim.RMSprop, FP32, {**EIGHT, "momentum": 0.5, "centered": True}),
    "adagrad16bit": (optim.Adagrad, FP32, {"state_bits": 16}),
    "lamb": (optim.LAMB, FP32, {"weight_decay": 0.1}),
    "adam split_master": (optim.Adam, BF16, {"rounding": "split_master"}),
}


def steps_of(name: str) -> int:
    """20 for the optimizer that all stages are compared with, fewer for those that differ from it in their state."""
    return STEPS if name == "adamw" else FEW


def stages_of(name: str) -> tuple[int, ...]:
    """All of them, or one of the two kinds in turn: 2 and 3 shard alike."""
    if name in ("adamw", "lamb"):
        return 1, 2, 3
    return ((1, 3)[list(OURS).index(name) % 2],)


def torch_adamw(rank: Rank) -> dict[int, Any]:
    """torch's own optimizer under every stage, on exact gradients."""
    trained = {}
    for stage in (1, 3):
        model, optimizer = zero(Exact(), torch.optim.AdamW, stage, **TORCH)
        train_exact(model, optimizer, range(FEW), rank.rank, rank.world)
        trained[stage] = values(model)
    return trained


def network(rank: Rank) -> dict[int, Any]:
    """A real network, each rank with its own part of the batch."""
    trained = {}
    for stage in (1, 2, 3):
        model, optimizer = zero(Mlp(), optim.AdamW, stage, **TORCH)
        train_mlp(model, optimizer, FEW, rank.rank, rank.world)
        trained[stage] = values(model)
    return trained


def ours(rank: Rank) -> dict[str, Any]:
    """Every kind of state and rounding."""
    trained: dict[str, Any] = {}
    for name, (cls, dtype, arguments) in OURS.items():
        for stage in stages_of(name):
            model, optimizer = zero(Exact(dtype), cls, stage, lr=0.01, **arguments)
            train_exact(model, optimizer, range(steps_of(name)), rank.rank, rank.world)
            trained[f"{name}, stage {stage}"] = values(model), state_of(model, optimizer)
    return trained


def existing_fsdp2_model(rank: Rank) -> Any:
    """The optimizer alone, on a model that its user sharded."""
    inside = _sharded()
    hooked = optim.optimizer_in_backward(inside, lambda params: optim.AdamW(params, lr=0.01, amsgrad=True))
    train_exact(inside, hooked, range(FEW), rank.rank, rank.world)  # type: ignore[arg-type]
    assert all(p.grad is None for p in inside.parameters())
    model = _sharded()
    optimizer = optim.AdamW(model.parameters(), lr=0.01, amsgrad=True)
    train_exact(model, optimizer, range(FEW), rank.rank, rank.world)
    with pytest.raises(ValueError, match="the model is sharded already: give its parameters to the optimizer"):
        zero(model, optim.AdamW, 3)
    return values(model), state_of(model, optimizer), values(inside)


def _sharded() -> Exact:
    model = Exact()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def placements(rank: Rank) -> None:
    """What each stage shards, and which modules are gathered one at a time."""
    for stage in (2, 3):
        model, optimizer = zero(Exact(), optim.AdamW, stage)
        assert isinstance(model, FSDPModule) and all(isinstance(block, FSDPModule) for block in model.blocks)
        assert type(optimizer) is optim.AdamW
        model(0, 0)
        gathered = not isinstance(model.blocks[0].weight, DTensor)
        assert gathered == (stage == 2), "stage 2 keeps parameters between forward and backward, stage 3 does not"
    only = Mlp()
    model, _ = zero(only, optim.AdamW, 3, units=[only.layers[1]])
    assert [isinstance(layer, FSDPModule) for layer in model.layers] == [False, True]

    model, optimizer = zero(Exact(), optim.AdamW, 1)
    optimizer.init_states()
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    chunk = -(-257 // rank.world)
    for name in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state[model.blocks[0].weight][name]
        assert moment.shape == (257, 17) and moment.to_local().shape[0] == min(chunk, 257 - chunk * rank.rank)


def same_start(rank: Rank) -> dict[int, Any]:
    """Ranks that begin with other values train with the first rank's."""
    started = {}
    for stage in (1, 2):
        model = Exact()
        model.register_buffer("mask", torch.tensor(rank.rank == 0))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(rank.rank)
        zero(model, optim.AdamW, stage)
        started[stage] = values(model)
        assert model.mask
    return started


def clipping(rank: Rank) -> dict[str, Any]:
    """The norm of all gradients and what is left of them, with torch's function and with ours."""
    norms: dict[str, Any] = {}
    for stage in (1, 2, 3):
        for which, clip in (("torch", nn.utils.clip_grad_norm_), ("ours", optim.clip_grad_norm_)):
            model, optimizer = zero(Exact(), optim.AdamW, stage)
            seen: list[Any] = []

            def before_step(model: nn.Module = model, clip: Any = clip, seen: list[Any] = seen) -> None:
                seen.append(whole(clip(model.parameters(), 1.0)))
                seen.append({name: whole(p.grad) for name, p in model.named_parameters()})

            train_exact(model, optimizer, range(1), rank.rank, rank.world, before_step)
            norms[f"{which}, stage {stage}"] = seen
    # What is offloaded was fetched before it was clipped.
    model, optimizer = zero(Exact(), optim.SGD, 1, offload="optimizer", lr=1.0)
    train_exact(
        model, optimizer, range(1), rank.rank, rank.world, lambda: optim.clip_grad_norm_(model.parameters(), 1.0)
    )
    norms["offloaded"] = values(model)
    return norms


def accumulation(rank: Rank) -> dict[str, Any]:
    """Stage 1: gradients over several backward calls, reduced each time or once, and what becomes of them."""
    mine = range(rank.rank * MICRO // rank.world, (rank.rank + 1) * MICRO // rank.world)
    gradients = {}
    for name in ("each", "once"):
        model, optimizer = zero(Exact(), optim.AdamW, 1)
        assert isinstance(optimizer, ReplicatedOptimizer)
        for step in range(2):
            if step == 0 and name == "once":
                with optimizer.no_sync():
                    model(step, mine[0]).backward()
                    assert not isinstance(model.scale.grad, DTensor)
                    with pytest.raises(RuntimeError, match="gradients of no_sync"):
                        optimizer.step()
            else:
                model(step, mine[0]).backward()
        gradients[name] = {k: whole(p.grad) for k, p in model.named_parameters()}
        with optimizer.no_sync(), pytest.raises(RuntimeError, match="leave the context for the last backward"):
            model(0, 0).backward()
        # Both ways to clear gradients clear what was reduced.
        (model if name == "each" else optimizer).zero_grad()
        assert all(p.grad is None for p in model.parameters())
        model(3, mine[0]).backward()
        gradients[f"{name}, then cleared"] = {k: whole(p.grad) for k, p in model.named_parameters()}
    return gradients


def missing_gradients(rank: Rank) -> Any:
    """Stage 1: a block that only the last rank uses gets the mean over all ranks, one that nobody uses nothing."""
    model, optimizer = zero(Exact(), optim.AdamW, 1, lr=0.5, weight_decay=0.1)
    before = values(model)
    used = [model.blocks[0]] if rank.rank == rank.world - 1 else []
    loss = model.scale.sum() + torch.stack([torch.zeros(()), *(block.bias.sum() for block in used)]).sum()
    loss.backward()
    assert torch.equal(whole(model.blocks[0].bias.grad), torch.full((3,), 1 / rank.world))
    assert model.blocks[0].weight.grad is None and model.blocks[1].bias.grad is None
    optimizer.step()
    after = values(model)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"scale", "blocks.0.bias"}
    return after


def schedules_and_groups(rank: Rank) -> Any:
    """Stage 1: param groups from a function of the model, a scheduler, a group added late, gradients set by hand."""

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        decay = [p for p in model.blocks.parameters() if p.dim() > 1]
        return [{"params": decay, "weight_decay": 0.3}, {"params": [model.scale], "lr": 0.5}]

    model, optimizer = zero(Exact(), optim.AdamW, 1, param_groups=groups, lr=0.1)
    optimizer.add_param_group({"params": [p for p in model.blocks.parameters() if p.dim() == 1], "lr": 0.25})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        train_exact(model, optimizer, range(step, step + 1), rank.rank, rank.world)
        scheduler.step()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 / 8, 0.5 / 8, 0.25 / 8]
    return values(model)


def replicas_by_shards(rank: Rank) -> dict[int, Any]:
    """A mesh of two dimensions: [ranks / 2] replicas of shards over 2 ranks, [1, 2] where there are 2 ranks."""
    mesh = init_device_mesh("cpu", (rank.world // 2, 2), mesh_dim_names=("replica", "shard"))
    trained = {}
    for stage in (1, 3):
        model, optimizer = zero(Exact(), optim.AdamW, stage, mesh, lr=0.01, amsgrad=True)
        train_exact(model, optimizer, range(FEW), rank.rank, rank.world)
        trained[stage] = values(model), state_of(model, optimizer)
    return trained


OFFLOADS: list[tuple[str, int, Any, torch.dtype, dict[str, Any]]] = [
    ("optimizer", 1, optim.AdamW, BF16, {}),
    ("optimizer", 1, optim.AdamW, BF16, {**EIGHT, "rounding": "stochastic"}),
    ("optimizer", 2, torch.optim.AdamW, BF16, {}),
    ("optimizer", 3, optim.AdamW, FP32, EIGHT),
    ("optimizer_zero_copy", 1, torch.optim.AdamW, FP32, {}),
    ("optimizer_zero_copy", 2, optim.AdamW, BF16, {"rounding": "split_master"}),
    ("parameters", 2, torch.optim.AdamW, FP32, {}),
    ("parameters", 3, optim.AdamW, BF16, {**EIGHT, "rounding": "kahan"}),
]


def offloading(rank: Rank) -> list[Any]:
    """Every way to offload, under every stage that has it."""
    trained = []
    for offload, stage, cls, dtype, arguments in OFFLOADS:
        model, optimizer = zero(Exact(dtype), cls, stage, offload=offload, lr=0.01, **arguments)
        train_exact(model, optimizer, range(FEW), rank.rank, rank.world)
        trained.append((values(model), state_of(model, optimizer)))
    return trained


def refusals(rank: Rank) -> None:
    """Bad arguments, with nothing changed."""
    model = Exact()
    for arguments, match in [
        ({"stage": 4}, "stage to be 1, 2 or 3, got 4"),
        ({"offload": "disk"}, "offload to be one of .*, got 'disk'"),
        ({"stage": 1, "offload": "parameters"}, "stage 2 or 3 with offload=.parameters., got stage 1"),
        ({"mesh": "cpu"}, "mesh to be a DeviceMesh of 1 or 2 dimensions or None, got str"),
        ({"mesh": init_device_mesh("cpu", (1, 1, rank.world))}, "got one of 3 dimensions"),
        ({"units": [nn.Linear(2, 2)]}, "units to be modules inside the model, got a Linear"),
    ]:
        with pytest.raises(ValueError, match=match):
            zero(model, optim.AdamW, **arguments)
    for broken, match in [
        (torch.randn(()), "expected p to have 1 dimension or more"),
        (torch.empty(3, device="meta"), "got it on the meta device"),
        (torch.randn(3, 4).t(), r"expected p to be contiguous, got strides \[1, 4\]"),
    ]:
        odd = nn.Module()
        odd.p = nn.Parameter(broken)
        with pytest.raises(ValueError, match=match):
            zero(odd, optim.AdamW, 1)
    with pytest.raises(ValueError, match="lr"):
        zero(model, optim.AdamW, 1, lr=-1.0)
    assert not isinstance(model, FSDPModule) and not any(isinstance(p, DTensor) for p in model.parameters())
    dist.barrier()
