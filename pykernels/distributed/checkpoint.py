"""save_checkpoint and load_checkpoint: torch.distributed.checkpoint, written whole or not at all, read whole or not."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, set_model_state_dict

from ..optim._shard import local, wrap
from . import _manifest
from ._manifest import CheckpointError, Ranks
from ._mirror import MirrorOptimizer

GROUPS = "groups.pt"
MODEL, STATE = "model.", "optimizer.state."


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    extra: Any = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Writes model and optimizer to the folder `path`; every rank calls it, on a file system that all of them share.

    The folder is written under another name, every file with its SHA-256 in manifest.json, and renamed when it is
    whole: a rank that dies on the way leaves the last checkpoint at `path` as it was. Tensors go through
    torch.distributed.checkpoint, under `model.<name>` and `optimizer.state.<name>.<state>`, so any number of ranks and
    any stage of `zero` can load it, and plain DCP can read it.
    extra: what load_checkpoint is to give back (numbers, strings, tensors, lists and dictionaries of them), the first
    rank's. Without a process group one process writes alone.
    CheckpointError, on every rank, if one of them cannot write.
    """
    place, ranks = Path(path).absolute(), Ranks(process_group)
    folder = _manifest.partial(place)
    ranks.first(lambda: _manifest.begin(place))
    # The state of a fresh optimizer, without the step with zero gradients that DCP would take instead.
    _ready(optimizer)
    saved = _state_of(model, optimizer)
    _quietly(dcp.save, _flat(get_model_state_dict(model), saved), checkpoint_id=folder, ranks=ranks)

    def groups() -> None:
        with (folder / GROUPS).open("wb") as stream:
            torch.save({"param_groups": saved["param_groups"], "extra": extra}, stream)
            stream.flush()
            os.fsync(stream.fileno())

    ranks.first(groups)
    files = _manifest.describe(folder, ranks)
    about = {"world_size": ranks.size, "torch": torch.__version__}
    ranks.first(lambda: _manifest.finish(place, files, about))


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> Any:
    """Reads what save_checkpoint wrote into model and optimizer, whatever the number of ranks then and now; returns
    `extra`. Every rank calls it.

    First every file is checked against the manifest, then every name, shape and dtype against the model's and the
    optimizer's, then all is read into host memory (as much as this rank's shards): nothing changes before that has gone
    well on every rank. CheckpointError, on every rank, says which file or tensor is wrong.
    """
    ranks = Ranks(process_group)
    place = ranks.first(lambda: _manifest.newest(Path(path).absolute()))
    manifest = ranks.first(lambda: _manifest.read(place))
    _manifest.check(place, manifest, ranks)

    fresh = not optimizer.state
    _ready(optimizer)
    try:
        mine = _state_of(model, optimizer)
        stored = ranks.each(lambda: torch.load(place / GROUPS, weights_only=True))
        metadata = ranks.each(lambda: dcp.FileSystemReader(place).read_metadata().state_dict_metadata)
        live = _flat(get_model_state_dict(model), mine)
        # A parameter that had no state when it was saved gets none.
        stateless = {name for name in mine["state"] if not any(k.startswith(f"{STATE}{name}.") for k in metadata)}
        live = {k: v for k, v in live.items() if not any(k.startswith(f"{STATE}{name}.") for name in stateless)}
        ranks.each(lambda: _compare(place, live, metadata, mine["param_groups"], stored["param_groups"]))
        staged = {name: _twin(value) for name, value in live.items()}
        _quietly(dcp.load, staged, checkpoint_id=place, ranks=ranks)
        entries = {
            name: {
                key: staged[f"{STATE}{name}.{key}"] if not torch.is_tensor(value) else value
                for key, value in state.items()
            }
            for name, state in mine["state"].items()
            if name not in stateless
        }
        # The optimizer checks hyperparameters against its own before it takes them.
        ranks.each(lambda: _take_groups(optimizer, entries, stored["param_groups"]))
    except BaseException:
        if fresh:
            _innermost(optimizer).state.clear()
        raise
    with torch.no_grad():
        for name, value in _flat({}, _state_of(model, optimizer)).items():
            if torch.is_tensor(value):
                local(value).copy_(local(staged[name]))
    set_model_state_dict(model, {k.removeprefix(MODEL): v for k, v in staged.items() if k.startswith(MODEL)})
    return stored["extra"]


def _innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    while isinstance(optimizer, MirrorOptimizer):
        optimizer = optimizer.inner
    return optimizer


def _state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return dict(get_optimizer_state_dict(model, optimizer))


def _ready(optimizer: torch.optim.Optimizer) -> None:
    if not optimizer.state and (init := getattr(optimizer, "init_states", None)):
        init()


def _flat(model_state: dict[str, Any], optimizer_state: dict[str, Any]) -> dict[str, Any]:
    flat = {f"{MODEL}{name}": value for name, value in model_state.items()}
    for name, state in optimizer_state["state"].items():
        flat.update({f"{STATE}{name}.{key}": value for key, value in state.items()})
    return flat


def _twin(value: Any) -> Any:
    """Host memory for what `value` holds on this rank."""
    return wrap(torch.empty_like(local(value), device="cpu"), value, value.shape) if torch.is_tensor(value) else value


def _quietly(function: Any, state: dict[str, Any], *, checkpoint_id: Path, ranks: Ranks) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            function(state, checkpoint_id=checkpoint_id, process_group=ranks.group, no_dist=ranks.alone)
        except dcp.api.CheckpointException as error:
            raise CheckpointError(f"{checkpoint_id}: {error}") from error


def _take_groups(optimizer: torch.optim.Optimizer, entries: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    try:
        optimizer.load_state_dict({"state": entries, "param_groups": groups})
    except RuntimeError as error:
        raise CheckpointError(f"load_checkpoint: {error}") from error


def _compare(
    place: Path,
    live: dict[str, Any],
    metadata: dict[str, Any],
    mine: list[dict[str, Any]],
    stored: list[dict[str, Any]],
) -> None:
    """Names, shapes, dtypes and groups of the checkpoint are those that are there."""
    problems = []
    for name, value in live.items():
        entry = metadata.get(name)
        if not torch.is_tensor(value) or entry is None:
            continue
        if not isinstance(entry, TensorStorageMetadata):
            problems.append(f"{name} is not a tensor there")
        elif entry.size != value.shape:
            problems.append(f"{name} has shape {list(entry.size)} there and {list(value.shape)} here")
        elif entry.properties.dtype != value.dtype:
            problems.append(f"{name} is {entry.properties.dtype} there and {value.dtype} here")
    problems += [f"it has no {name}" for name in live if name not in metadata]
    problems += [f"{name} has no place here" for name in metadata if name not in live]
    if [group["params"] for group in mine] != [group["params"] for group in stored]:
        problems.append("its parameter groups are not those of this optimizer")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"load_checkpoint: {place} does not fit: {'; '.join(problems[:5])}{more}")
