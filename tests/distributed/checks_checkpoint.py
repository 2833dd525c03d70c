"""Checks that run in ranks: checkpoints written by 2 ranks, read by 3 and 4, broken ones, and a rank that dies."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from pykernels import optim
from pykernels.distributed import CheckpointError, _manifest, load_checkpoint, save_checkpoint, zero

from .models import Exact, assert_equal, state_of, train_exact, values
from .ranks import Rank

BEFORE, AFTER = range(5), range(5, 9)
BF16, FP32 = torch.bfloat16, torch.float32
EIGHT: dict[str, Any] = {"state_bits": 8, "block_size": 8, "min_8bit_size": 100, "seed": 5, "lr": 0.01}
# name: (stage, class, parameters' dtype, arguments)
KINDS: dict[str, tuple[int, Any, torch.dtype, dict[str, Any]]] = {
    "adamw8bit": (3, optim.AdamW, FP32, EIGHT),
    "adamw8bit stochastic": (3, optim.AdamW, BF16, {**EIGHT, "rounding": "stochastic"}),
    "split_master": (1, optim.AdamW, BF16, {"rounding": "split_master", "lr": 0.01}),
    "offloaded": (1, optim.AdamW, BF16, {"offload": "optimizer", "lr": 0.01}),
    "torch": (2, torch.optim.AdamW, FP32, {"lr": 0.01}),
}


def plain_dcp(model: torch.nn.Module, optimizer: Any, folder: Path, group: Any, *, save: bool) -> None:
    """torch's own way, without this package's functions."""
    kept, state = get_state_dict(model, optimizer)
    everything = {"model": kept, "optim": state}
    if save:
        dcp.save(everything, checkpoint_id=folder, process_group=group)
        return
    dcp.load(everything, checkpoint_id=folder, process_group=group, no_dist=not dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=everything["model"], optim_state_dict=everything["optim"])


def save(rank: Rank) -> dict[str, Any]:
    """Trains, writes both kinds of checkpoint, trains on: what the others must see."""
    seen = {}
    for name, (stage, cls, dtype, arguments) in KINDS.items():
        model, optimizer = zero(Exact(dtype), cls, stage, **arguments)
        train_exact(model, optimizer, BEFORE, rank.rank, rank.world)
        save_checkpoint(rank.folder.parent / name, model, optimizer, extra={"step": 5, "kind": name})
        plain_dcp(model, optimizer, rank.folder.parent / f"{name}.dcp", None, save=True)
        then = values(model), state_of(model, optimizer)
        train_exact(model, optimizer, AFTER, rank.rank, rank.world)
        seen[name] = *then, values(model), state_of(model, optimizer)
    return seen


def full_state(rank: Rank) -> None:
    """torch's full_state_dict of split_master: gathered whole, as on every rank, loaded, and trained on from there."""
    options = StateDictOptions(full_state_dict=True)
    arguments = {"rounding": "split_master", "lr": 0.01}
    model, optimizer = zero(Exact(BF16), optim.AdamW, 3, **arguments)
    train_exact(model, optimizer, BEFORE, rank.rank, rank.world)
    kept, state = get_state_dict(model, optimizer, options=options)
    expected = state_of(model, optimizer)
    for name, each in state["state"].items():
        for key, value in each.items():
            assert type(value) is torch.Tensor and torch.equal(value, expected[f"{name}.{key}"]), (name, key)
    other, second = zero(Exact(BF16), optim.AdamW, 3, **arguments)
    set_state_dict(other, second, model_state_dict=kept, optim_state_dict=state, options=options)
    for m, o in ((model, optimizer), (other, second)):
        train_exact(m, o, AFTER, rank.rank, rank.world)
    assert_equal(_everything(other, second), _everything(model, optimizer))
    # As it was kept before: one int16 for each element.
    old = optimizer.state_dict()
    old["state"] = {key: dict(each) for key, each in old["state"].items()}
    for each in old["state"].values():
        low = each["master_low"]
        words = low.to_local().view(torch.int16).squeeze(-1)
        each["master_low"] = DTensor.from_local(
            words, low.device_mesh, low.placements, run_check=False, shape=low.shape[:-1], stride=low.stride()[:-1]
        )
    third, loaded = zero(Exact(BF16), optim.AdamW, 3, **arguments)
    loaded.load_state_dict(old)
    now, wanted = state_of(third, loaded), state_of(model, optimizer)
    assert_equal(now, wanted)


def _load(rank: Rank, world: int) -> dict[str, Any]:
    group = dist.new_group(list(range(world)))
    seen: dict[str, Any] = {}
    if rank.rank >= world:
        return seen
    mesh = DeviceMesh("cpu", list(range(world)))
    for name, (stage, cls, dtype, arguments) in KINDS.items():
        # Under another stage than the one it was saved under, but for a float32 master, which only offloading has.
        for folder, stage_now in ((name, stage % 3 + 1), (f"{name}.dcp", stage)):
            model, optimizer = zero(Exact(dtype), cls, stage_now, mesh, **arguments)
            for p in model.parameters():
                p.detach().fill_(9.0)
            if folder == name:
                place = rank.folder.parent / name
                extra = load_checkpoint(place, model, optimizer, process_group=group)
                assert extra == {"step": 5, "kind": name}
            else:
                plain_dcp(model, optimizer, rank.folder.parent / folder, group, save=False)
            then = values(model), state_of(model, optimizer)
            if world != 3:
                train_exact(model, optimizer, AFTER, rank.rank, world)
            seen[folder] = *then, values(model), state_of(model, optimizer)
    return seen


def load_on_all(rank: Rank) -> dict[str, Any]:
    """Every rank loads, and trains on."""
    return _load(rank, rank.world)


def load_on_three(rank: Rank) -> dict[str, Any]:
    """Three of four load. Exact gradients come in fours, so they do not train on."""
    return _load(rank, 3)


def _everything(model: torch.nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    return {**values(model), **state_of(model, optimizer)}


def _damage(folder: Path, how: str) -> None:
    data = sorted(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)[-1]
    if how == "missing":
        data.unlink()
    elif how == "truncated":
        os.truncate(data, data.stat().st_size // 2)
    elif how == "altered":
        raw = bytearray(data.read_bytes())
        raw[len(raw) // 2] ^= 1
        data.write_bytes(raw)
    elif how == "no metadata":
        (folder / ".metadata").unlink()
    elif how == "no manifest":
        (folder / _manifest.NAME).unlink()
    elif how == "half a manifest":
        os.truncate(folder / _manifest.NAME, 40)
    else:
        shutil.rmtree(folder)


DAMAGE = {
    "missing": r"damaged: __\d_0.distcp is missing",
    "truncated": r"__\d_0.distcp has \d+ bytes, not \d+",
    "altered": r"__\d_0.distcp is not what was written: its SHA-256 differs",
    "no metadata": ".metadata is missing",
    "no manifest": "manifest.json is missing: this is not a whole checkpoint",
    "half a manifest": "manifest.json is damaged",
    "nothing": "there is no checkpoint at",
}


def damaged(rank: Rank) -> None:
    """One damaged file: the same error on every rank, and neither model nor optimizer changed, running or fresh."""
    model, optimizer = zero(Exact(), optim.AdamW, 3, **EIGHT)
    train_exact(model, optimizer, BEFORE, rank.rank, rank.world)
    good = rank.folder / "good"
    save_checkpoint(good, model, optimizer)
    train_exact(model, optimizer, AFTER, rank.rank, rank.world)
    before = _everything(model, optimizer)
    fresh, unused = zero(Exact(), optim.AdamW, 1, **EIGHT)
    start = values(fresh)
    for how, match in DAMAGE.items():
        folder = rank.folder / how
        if rank.rank == 0:
            shutil.copytree(good, folder)
            _damage(folder, how)
        dist.barrier()
        with pytest.raises(CheckpointError, match=match):
            load_checkpoint(folder, model, optimizer)
        with pytest.raises(CheckpointError, match=match):
            load_checkpoint(folder, fresh, unused)
        now = _everything(model, optimizer)
        assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before), how
        assert not unused.state and all(torch.equal(v, start[name]) for name, v in values(fresh).items()), how
    load_checkpoint(good, fresh, unused)


def other_optimizer(rank: Rank) -> None:
    """A whole checkpoint of another model or of other state: refused by name, nothing changed."""
    model, optimizer = zero(Exact(), optim.AdamW, 3, **EIGHT)
    train_exact(model, optimizer, BEFORE, rank.rank, rank.world)
    save_checkpoint(rank.folder / "eight", model, optimizer)
    wider = Exact()
    wider.blocks[0].bias = torch.nn.Parameter(torch.zeros(4))
    narrow = Exact()
    narrow.scale.requires_grad_(False)
    for other, arguments, match in [
        (Exact(), {"lr": 0.01}, "blocks.0.weight.exp_avg is torch.int8 there and torch.float32 here"),
        (Exact(), {**EIGHT, "block_size": 4}, r"exp_avg_scale has shape \[257, 3\] there and \[257, 5\] here"),
        (Exact(), {**EIGHT, "amsgrad": True}, "it has no optimizer.state.blocks.0.weight.max_exp_avg_sq"),
        (Exact(BF16), EIGHT, "model.blocks.0.weight is torch.float32 there and torch.bfloat16 here"),
        (wider, EIGHT, r"model.blocks.0.bias has shape \[3\] there and \[4\] here"),
        (torch.nn.Sequential(Exact()), EIGHT, "it has no model.0.scale"),
        (Exact(), {**EIGHT, "block_size": 7}, "block_size=7, got 8"),  # scales of the same shapes
    ]:
        model, optimizer = zero(other, optim.AdamW, 1, **arguments)
        before = values(model)
        with pytest.raises(CheckpointError, match=match):
            load_checkpoint(rank.folder / "eight", model, optimizer)
        assert not optimizer.state
        assert all(torch.equal(value, before[name]) for name, value in values(model).items())


def replaced(rank: Rank) -> dict[str, Any]:
    """A second checkpoint takes the first one's place; a writer that dies between its renames leaves the first."""
    model, optimizer = zero(Exact(), optim.AdamW, 2, lr=0.01)
    place = rank.folder / "twice"
    for steps in (BEFORE, AFTER):
        train_exact(model, optimizer, steps, rank.rank, rank.world)
        save_checkpoint(place, model, optimizer, extra=steps.stop)
    assert load_checkpoint(place, model, optimizer) == AFTER.stop
    if rank.rank == 0:
        os.replace(place, _manifest.previous(place))
    dist.barrier()
    assert load_checkpoint(place, model, optimizer) == AFTER.stop
    save_checkpoint(place, model, optimizer, extra="again")
    assert load_checkpoint(place, model, optimizer) == "again"
    assert sorted(file.name for file in place.parent.glob(".*")) == []
    return values(model)


def dying(rank: Rank) -> dict[str, Any]:
    """The second rank ends while it writes the second checkpoint: the first one is still whole."""
    model, optimizer = zero(Exact(), optim.AdamW, 3, **EIGHT)
    train_exact(model, optimizer, BEFORE, rank.rank, rank.world)
    save_checkpoint(rank.folder / "last", model, optimizer, extra="the first")
    then = _everything(model, optimizer)
    train_exact(model, optimizer, AFTER, rank.rank, rank.world)
    if rank.rank == 1:

        def die(*args: Any) -> None:
            (rank.folder / "dying.1.ok").touch()
            os._exit(0)

        dcp.FileSystemWriter.write_data = die  # type: ignore[method-assign,assignment]
    with pytest.raises((RuntimeError, CheckpointError)):
        save_checkpoint(rank.folder / "last", model, optimizer, extra="the second")
    assert _manifest.partial(rank.folder / "last").exists()
    return then
