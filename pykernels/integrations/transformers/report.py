"""What ``fuse_`` did to a model, for people and for programs."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

from ...quantization.report import Skipped


@dataclass(frozen=True)
class Converted:
    """A module with another forward: its name, its class, and what it is now."""

    name: str
    kind: str
    what: str


@dataclass(frozen=True)
class FusionReport:
    """What ``fuse_`` converted and what it left alone, and why. ``save`` is the dial's value."""

    save: str
    converted: list[Converted] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def summary(self) -> str:
        """One line: how many modules of which kind."""
        counts: dict[str, int] = {}
        for row in self.converted:
            counts[row.what] = counts.get(row.what, 0) + 1
        kinds = ", ".join(f"{count} {what}" for what, count in counts.items()) or "nothing"
        return f'fuse_(save="{self.save}"): {kinds} converted, {len(self.skipped)} skipped'

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table()
        for heading in ("module", "class", "result"):
            table.add_column(heading, overflow="fold")
        for row in self.converted:
            table.add_row(row.name or "(root)", row.kind, row.what)
        for skip in self.skipped:
            table.add_row(skip.name or "(root)", skip.kind, f"skipped: {skip.reason}", style="dim")
        return Group(self.summary(), table)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120, no_color=True, highlight=False).print(self)
        return text.getvalue().rstrip()
