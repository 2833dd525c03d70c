"""What ``quantize_`` did to a model, for people and for programs."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors, memory that several share counted once."""
    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        key = id(tensor) if storage.data_ptr() == 0 else (tensor.device, storage.data_ptr())
        sizes[key] = storage.nbytes()
    return sum(sizes.values())


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared storage counted once."""
    return storage_bytes([*model.parameters(), *model.buffers()])


def format_bytes(count: int) -> str:
    """``count`` bytes in the largest unit that leaves a number above 1."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


@dataclass(frozen=True)
class Converted:
    """A module that was replaced. ``names`` holds every place where it sits in the model."""

    name: str
    before: str
    after: str
    bytes_before: int
    bytes_after: int
    names: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Skipped:
    """A module with a weight matrix that was left alone, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class QuantizationReport:
    """What ``quantize_`` converted and skipped. ``bytes_before`` and ``bytes_after`` are those of the whole model."""

    config: Any
    converted: list[Converted] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0

    def summary(self) -> str:
        """One line: how many layers, how many bytes."""
        ratio = self.bytes_before / self.bytes_after if self.bytes_after else 1.0
        return (
            f"{type(self.config).__name__}: {len(self.converted)} converted, {len(self.skipped)} skipped, "
            f"{format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_after)} ({ratio:.2f}x smaller)"
        )

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table()
        table.add_column("module", overflow="fold")
        table.add_column("result", overflow="fold")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        for row in self.converted:
            result = f"{row.before} -> {row.after}" + (f" ({row.note})" if row.note else "")
            table.add_row(", ".join(row.names), result, format_bytes(row.bytes_before), format_bytes(row.bytes_after))
        for skip in self.skipped:
            table.add_row(skip.name, f"{skip.kind} skipped: {skip.reason}", "", "", style="dim")
        return Group(self.summary(), table)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120, no_color=True, highlight=False).print(self)
        return text.getvalue().rstrip()
