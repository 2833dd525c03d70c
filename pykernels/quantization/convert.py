"""Quantising a checkpoint on disk, tensor by tensor (``python -m pykernels quantize``)."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .. import functional as F
from .container import CheckpointError, Container, Entry, lay_out, read_container, replacing, write_header
from .places import CONTRACTION_LIMIT
from .report import format_bytes

DEFAULT_EXCLUDE = r"(^|\.)(lm_head|shared|wte|wpe|[^.]*embed[^.]*|[^.]*norm[^.]*)(\.|$)"
INDEX = "model.safetensors.index.json"

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK_BYTES = 16 << 20
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class CheckpointReport:
    """What was written: names of the quantised weights, how many tensors were copied, and the bytes of all tensors."""

    quantized: list[str]
    copied: int
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        return (
            f"{len(self.quantized)} weights quantised, {self.copied} tensors copied, "
            f"{format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_after)}"
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Selection:
    """Which weights to quantise, and how.

    Args:
        group_size: columns that share a scale (for ``Int8WeightOnlyConfig(group_size)``); None for one scale a row.
        include: a regular expression that a tensor's name must contain, or None for any.
        exclude: a regular expression that it must not contain. The default spares lm_head, embeddings and norms.
    """

    group_size: int | None = None
    include: str | None = None
    exclude: str | None = DEFAULT_EXCLUDE

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size: got {self.group_size}, accepts a positive int.")
        for argument, pattern in (("include", self.include), ("exclude", self.exclude)):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise ValueError(f"{argument}: got {pattern!r}, accepts a regular expression ({error}).") from None

    def takes(self, name: str, entry: Entry) -> bool:
        """True for a float matrix called ``*.weight`` that the patterns select."""
        is_weight = name.rpartition(".")[2] == "weight" and len(entry.shape) == 2 and entry.dtype in _FLOATS
        return (
            is_weight
            and 0 < entry.shape[1] <= CONTRACTION_LIMIT
            and (self.include is None or re.search(self.include, name) is not None)
            and (self.exclude is None or re.search(self.exclude, name) is None)
        )


def quantize_checkpoint(
    source: Path | str, target: Path | str, selection: Selection | None = None, progress: Progress | None = None
) -> CheckpointReport:
    """Quantise the linear weights of a safetensors file; everything else is copied byte for byte.

    ``X.weight`` becomes int8, and ``X.scale`` float32 stands beside it: what a model after ``quantize_`` loads. Rows
    pass through in blocks of 16 MiB, so memory does not grow with the file. ``target`` appears when it is complete
    and on disk; a failure or an interrupt leaves no file, and an older ``target`` as it was.

    Args:
        progress: called as ``progress(bytes done, bytes in all, tensor name)``.

    Raises:
        CheckpointError: ``source`` is missing, not safetensors or cut short, or a weight is not finite.
        ValueError: ``group_size`` does not divide a selected weight's columns.
    """
    source, target = Path(source), Path(target)
    selection = selection or Selection()
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"target: got {target}, the source itself; accepts another path.")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent}: no such folder. Make it first.")
    container = read_container(source)
    chosen = [name for name, entry in container.entries.items() if selection.takes(name, entry)]
    entries = lay_out(_tensors(container, selection, chosen))
    metadata = container.metadata | {"pykernels": json.dumps({"group_size": selection.group_size})}
    total = sum(entry.nbytes for entry in container.entries.values())
    done = 0
    with source.open("rb") as reader, replacing(target) as writer:
        data = write_header(writer, entries, metadata)
        quantized = set(chosen)
        for name, entry in sorted(container.entries.items(), key=lambda item: item[1].start):
            for start, block in _blocks(reader, container, entry):
                if name in quantized:
                    _write_quantized(writer, data, entries, name, entry, start, block, selection.group_size)
                else:
                    writer.seek(data + entries[name].start + start)
                    writer.write(block)
                done += len(block)
                if progress is not None:
                    progress(done, total, name)
    after = sum(entry.nbytes for entry in entries.values())
    return CheckpointReport(chosen, len(container.entries) - len(chosen), total, after)


def scale_name(weight_name: str) -> str:
    """``X.weight`` -> ``X.scale``."""
    return weight_name.removesuffix("weight") + "scale"


def _tensors(
    container: Container, selection: Selection, chosen: list[str]
) -> dict[str, tuple[str, tuple[int, ...], int]]:
    tensors = {name: (e.dtype, e.shape, e.nbytes) for name, e in container.entries.items()}
    for name in chosen:
        rows, columns = container.entries[name].shape
        group = selection.group_size
        if group is not None and columns % group:
            raise ValueError(
                f"group_size: got {group}, which does not divide the {columns} columns of {name};"
                " accepts a divisor, or exclude that tensor."
            )
        if scale_name(name) in container.entries:
            raise CheckpointError(f"{container.path}: already holds {scale_name(name)}. Exclude {name} or rename it.")
        shape = (rows,) if group is None else (rows, columns // group)
        tensors[name] = ("I8", (rows, columns), rows * columns)
        tensors[scale_name(name)] = ("F32", shape, 4 * rows * (1 if group is None else columns // group))
    return tensors


def _blocks(reader: BufferedReader, container: Container, entry: Entry) -> Iterator[tuple[int, bytearray]]:
    """Yield (offset, bytes) of a tensor in whole rows."""
    row = entry.nbytes // entry.shape[0] if len(entry.shape) == 2 and entry.shape[0] else 1
    step = max(_BLOCK_BYTES // max(row, 1), 1) * max(row, 1)
    reader.seek(container.data + entry.start)
    for start in range(0, entry.nbytes, step):
        block = bytearray(min(step, entry.nbytes - start))
        if reader.readinto(block) != len(block):
            raise CheckpointError(f"{container.path}: became shorter while it was read. Copy it again.")
        yield start, block


def _write_quantized(
    writer: BinaryIO,
    data: int,
    entries: dict[str, Entry],
    name: str,
    source: Entry,
    start: int,
    block: bytearray,
    group_size: int | None,
) -> None:
    columns = source.shape[1]
    weight = torch.frombuffer(block, dtype=_FLOATS[source.dtype]).view(-1, columns)
    codes, scale = F.quantize_rowwise(weight) if group_size is None else F.quantize_blockwise(weight, group_size)
    if not bool(torch.isfinite(scale).all()):
        raise CheckpointError(f"{name}: got NaN or infinite weights, accepts finite ones. Exclude it or repair it.")
    row = start // (source.nbytes // source.shape[0])
    per_row = scale.numel() // weight.shape[0]
    for key, offset, values in ((name, row * columns, codes), (scale_name(name), 4 * row * per_row, scale)):
        writer.seek(data + entries[key].start + offset)
        writer.write(_bytes(values))


def _bytes(values: Tensor) -> memoryview:
    return values.contiguous().view(-1).numpy().data.cast("B")


def quantize_folder(
    source: Path | str, target: Path | str, selection: Selection | None = None, progress: Progress | None = None
) -> CheckpointReport:
    """Quantise a Hugging Face folder: its (sharded) safetensors, the index rewritten, the other files copied.

    ``target`` must not exist; it appears when it is complete. Errors are those of ``quantize_checkpoint``.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise CheckpointError(f"{target}: exists already. Give a folder that does not.")
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"{source}: holds no .safetensors file. Give a folder that does.")
    total = sum(shard.stat().st_size for shard in shards)
    report = CheckpointReport([], 0, 0, 0)
    weight_map: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        for shard in shards:
            before = report.bytes_before
            step = None if progress is None else _shifted(progress, before, total)
            part = quantize_checkpoint(shard, folder / shard.name, selection, step)
            weight_map |= dict.fromkeys(read_container(folder / shard.name).entries, shard.name)
            report = CheckpointReport(
                report.quantized + part.quantized,
                report.copied + part.copied,
                report.bytes_before + part.bytes_before,
                report.bytes_after + part.bytes_after,
            )
        for file in source.iterdir():
            if file.is_file() and file not in shards and file.name != INDEX:
                shutil.copy2(file, folder / file.name)
        if (source / INDEX).is_file():
            index = {"metadata": {"total_size": report.bytes_after}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        folder.rename(target)
    return report


def _shifted(progress: Progress, before: int, total: int) -> Progress:
    return lambda done, _, name: progress(before + done, total, name)
