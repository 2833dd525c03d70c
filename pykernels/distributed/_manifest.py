"""A checkpoint folder that is whole or is not there: written beside its place, listed in a manifest, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

NAME = "manifest.json"
FORMAT = 1
T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the same on every rank."""


class Ranks:
    """The ranks that work on one checkpoint; one without a process group."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.alone = not dist.is_initialized()
        self.group = group
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.size = 1 if self.alone else dist.get_world_size(group)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in their order."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def each(self, work: Callable[[], T]) -> T:
        """This rank's result of `work`, or one CheckpointError on every rank."""
        result, problem = None, None
        try:
            result = work()
        except Exception as error:
            problem = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        problems = list(dict.fromkeys(text for text in self.gather(problem) if text is not None))
        if problems:
            raise CheckpointError("; ".join(problems))
        return result  # type: ignore[return-value]

    def first(self, work: Callable[[], T]) -> T:
        """The result of the first rank's `work`, on every rank."""
        return self.gather(self.each(lambda: work() if self.rank == 0 else None))[0]  # type: ignore[return-value]


def partial(path: Path) -> Path:
    """Where a checkpoint is written before it is whole."""
    return path.parent / f".{path.name}.partial"


def previous(path: Path) -> Path:
    """Where the last checkpoint lies for the moment in which the new one takes its place."""
    return path.parent / f".{path.name}.previous"


def newest(path: Path) -> Path:
    """The checkpoint to read: the one at `path`, or the last one if a writer died between its two renames."""
    return previous(path) if not path.exists() and previous(path).exists() else path


def begin(path: Path) -> None:
    """An empty folder to write into; what a writer that died left there goes."""
    shutil.rmtree(partial(path), ignore_errors=True)
    partial(path).mkdir(parents=True)


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream: Any) -> str:
    state = hashlib.sha256()
    while block := stream.read(1 << 20):
        state.update(block)
    return state.hexdigest()


def describe(folder: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """{file: its bytes and digest}; every rank reads its share."""
    names = ranks.first(lambda: sorted(file.name for file in folder.iterdir() if file.name != NAME))

    def mine() -> dict[str, dict[str, Any]]:
        share = names[ranks.rank :: ranks.size]
        return {name: {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)} for name in share}

    return {name: entry for part in ranks.gather(ranks.each(mine)) for name, entry in part.items()}


def finish(path: Path, files: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
    """The manifest, and the renames that make the folder the checkpoint at `path`."""
    folder = partial(path)
    with (folder / NAME).open("w") as stream:
        json.dump({"format": FORMAT, **about, "files": files}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    _sync(folder)
    if path.exists():
        shutil.rmtree(previous(path), ignore_errors=True)
        os.replace(path, previous(path))
    os.replace(folder, path)
    _sync(path.parent)
    shutil.rmtree(previous(path), ignore_errors=True)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint."""
    if not path.is_dir():
        raise CheckpointError(f"load_checkpoint: there is no checkpoint at {path}")
    if not (path / NAME).is_file():
        raise CheckpointError(f"load_checkpoint: {path / NAME} is missing: this is not a whole checkpoint")
    try:
        manifest = json.loads((path / NAME).read_text())
        known, files = manifest["format"], manifest["files"]
        assert all(isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str) for entry in files.values())
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise CheckpointError(f"load_checkpoint: {path / NAME} is damaged: {error}") from error
    if known != FORMAT:
        raise CheckpointError(f"load_checkpoint: expected format {FORMAT} in {path / NAME}, got {known!r}")
    return manifest


def check(path: Path, manifest: dict[str, Any], ranks: Ranks) -> None:
    """Every file is there with its bytes and its digest; every rank reads its share."""

    def mine() -> None:
        wrong = []
        for name in sorted(manifest["files"])[ranks.rank :: ranks.size]:
            file, entry = path / name, manifest["files"][name]
            if not file.is_file():
                wrong.append(f"{name} is missing")
            elif (size := file.stat().st_size) != entry["bytes"]:
                wrong.append(f"{name} has {size} bytes, not {entry['bytes']}")
            elif digest(file) != entry["sha256"]:
                wrong.append(f"{name} is not what was written: its SHA-256 differs")
        if wrong:
            raise CheckpointError(f"load_checkpoint: the checkpoint at {path} is damaged: {', '.join(wrong)}")

    ranks.each(mine)
