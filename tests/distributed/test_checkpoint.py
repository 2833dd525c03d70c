"""Checkpoints written by 2 ranks, loaded by 1, 3 and 4: bit for bit the same, and training goes on the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pykernels import optim
from pykernels.distributed import CheckpointError, OffloadedOptimizer, load_checkpoint, save_checkpoint

from .checks_checkpoint import AFTER, EIGHT, KINDS, plain_dcp
from .conftest import Done
from .models import Exact, assert_equal, state_of, train_exact, values


def alone(name: str) -> tuple[Exact, torch.optim.Optimizer]:
    """A model and its optimizer without any process group, with other values than those that were saved."""
    _, cls, dtype, arguments = KINDS[name]
    model = Exact(dtype)
    for p in model.parameters():
        p.detach().fill_(9.0)
    arguments = dict(arguments)
    if arguments.pop("offload", None):
        return model, OffloadedOptimizer(model.parameters(), cls, **arguments)
    return model, cls(model.parameters(), **arguments)


@pytest.mark.parametrize("name", KINDS)
def test_on_one_rank(two_ranks: Done, name: str) -> None:
    then, state, after, state_after = two_ranks("save")[name]
    for folder in (name, f"{name}.dcp"):
        model, optimizer = alone(name)
        place = two_ranks.folder.parent / folder
        if folder == name:
            assert load_checkpoint(place, model, optimizer) == {"step": 5, "kind": name}
        else:
            plain_dcp(model, optimizer, place, None, save=False)
        assert_equal(values(model), then)
        assert_equal(state_of(model, optimizer), state)
        train_exact(model, optimizer, AFTER)
        assert_equal(values(model), after)
        assert_equal(state_of(model, optimizer), state_after)


@pytest.mark.parametrize("check", ["load_on_three", "load_on_all"])
@pytest.mark.parametrize("name", KINDS)
def test_on_three_and_four(two_ranks: Done, four_ranks: Done, name: str, check: str) -> None:
    saved = two_ranks("save")[name]
    for folder in (name, f"{name}.dcp"):
        loaded = four_ranks(check)[folder]
        for ours, expected in list(zip(loaded, saved, strict=True))[: 2 if check == "load_on_three" else 4]:
            assert_equal(ours, expected)


@pytest.mark.parametrize("check", ["damaged", "other_optimizer", "replaced", "full_state"])
def test_in_the_ranks(two_ranks: Done, check: str) -> None:
    two_ranks(check)


def test_a_rank_that_died(two_ranks: Done) -> None:
    """What the second rank's end left behind is no hindrance, for loading or for the next checkpoint."""
    expected = two_ranks("dying")
    place = two_ranks.folder / "last"
    model = Exact()
    optimizer = optim.AdamW(model.parameters(), **EIGHT)
    assert load_checkpoint(place, model, optimizer) == "the first"
    assert_equal({**values(model), **state_of(model, optimizer)}, expected)
    save_checkpoint(place, model, optimizer, extra="the third")
    assert load_checkpoint(place, model, optimizer) == "the third"
    assert sorted(file.name for file in place.parent.glob(".last*")) == []


def test_one_rank_alone(tmp_path: Any) -> None:
    """Without a process group; parameters that have no state, and one that has none yet."""
    model = Exact()
    model.blocks[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(0, 0).backward()
    model.scale.grad = None
    optimizer.step()
    save_checkpoint(tmp_path / "here", model, optimizer)
    other = Exact()
    other.blocks[0].weight.requires_grad_(False)
    loaded = torch.optim.AdamW(other.parameters(), lr=0.5)
    load_checkpoint(tmp_path / "here", other, loaded)
    assert_equal(values(other), values(model))
    assert_equal(state_of(other, loaded), state_of(model, optimizer))
    assert loaded.param_groups[0]["lr"] == 0.01 and not loaded.state[other.scale]


def test_a_place_that_cannot_be_written(tmp_path: Any) -> None:
    model = Exact()
    optimizer = optim.AdamW(model.parameters())
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file"):
        save_checkpoint(tmp_path / "file" / "here", model, optimizer)
