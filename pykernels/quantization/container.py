"""The safetensors container, read and written piece by piece: tensors need not fit into memory together."""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_LONGEST_HEADER = 100_000_000  # the format's own limit
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
}


class CheckpointError(ValueError):
    """A file that is not what it should be; the message says what to do."""


@dataclass(frozen=True)
class Entry:
    """A tensor in the file: its dtype in safetensors' spelling, and where its bytes are after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Container:
    """The header of a safetensors file; ``data`` is where the tensors' bytes begin."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    data: int


def read_container(path: Path) -> Container:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: the file is missing, is of another format, or is cut short.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Give the path of a .safetensors file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        other = f"{path}: not a safetensors file. Give a .safetensors file; torch.load and save_file convert a .bin."
        if not 2 <= length <= _LONGEST_HEADER:
            raise CheckpointError(other)
        if size < 8 + length:
            raise CheckpointError(_truncated(path, 8 + length, size))
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise CheckpointError(other) from None
    try:
        metadata = dict(header.pop("__metadata__", None) or {})
        entries = {
            name: Entry(str(info["dtype"]), tuple(map(int, info["shape"])), *map(int, info["data_offsets"]))
            for name, info in header.items()
        }
    except (TypeError, KeyError, AttributeError, ValueError):
        raise CheckpointError(other) from None
    for name, entry in entries.items():
        expected = math.prod(entry.shape) * _ITEM_BYTES.get(entry.dtype, 1)
        exact = entry.dtype in _ITEM_BYTES
        if entry.start < 0 or entry.end < entry.start or (exact and entry.nbytes != expected):
            raise CheckpointError(f"{path}: the header's offsets of {name} do not fit its shape. Get the file again.")
    end = 8 + length + max((entry.end for entry in entries.values()), default=0)
    if size != end:
        raise CheckpointError(_truncated(path, end, size))
    return Container(path, entries, metadata, 8 + length)


def _truncated(path: Path, promised: int, size: int) -> str:
    kind = "cut short" if size < promised else "longer than its header says"
    return f"{path}: {kind}: the header promises {promised} bytes, the file has {size}. Download or copy it again."


def lay_out(tensors: dict[str, tuple[str, tuple[int, ...], int]]) -> dict[str, Entry]:
    """Give each tensor (dtype, shape, bytes) its place: wide items first, so that all stay aligned."""
    entries, offset = {}, 0
    for name in sorted(tensors, key=lambda name: (-_ITEM_BYTES.get(tensors[name][0], 1), name)):
        dtype, shape, nbytes = tensors[name]
        entries[name] = Entry(dtype, shape, offset, offset + nbytes)
        offset += nbytes
    return entries


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file in the folder of ``path`` that takes its place on success and is removed on any failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_header(file: BinaryIO, entries: dict[str, Entry], metadata: dict[str, str]) -> int:
    """Write the header and reserve the data after it. Returns where the data begins."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for name, entry in entries.items():
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (entry.start, entry.end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    data = 8 + len(text)
    file.truncate(data + max((entry.end for entry in entries.values()), default=0))
    return data
