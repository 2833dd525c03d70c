"""A line for each recipe while it trains: loss, tokens a second, bytes at the peak of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Seen = Callable[[str, dict[str, Any]], None]


def bars(show: bool, numbers: str) -> Progress:
    """Bars on standard error, with these numbers after each."""
    columns = (TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn(numbers), console=Console(stderr=True), disable=not show)


@contextlib.contextmanager
def watch(names: Sequence[str], steps: int, every: int, show: bool) -> Iterator[Seen]:
    """Gives a function of a recipe's name and its {"step", "loss", "speed", "peak"}.

    On a terminal bars, elsewhere a line at each `every` steps; nothing without `show`.
    """
    console = Console(stderr=True)
    if not show or not console.is_terminal:

        def tell(name: str, now: dict[str, Any]) -> None:
            if show and (now["step"] % every == 0 or now["step"] == steps):
                numbers = f"loss {now['loss']:.4f}  {now['speed']:,.0f} tokens/s  {_megabytes(now)}"
                console.print(f"{name:>12} {now['step']:>6}/{steps}  {numbers}", highlight=False)

        yield tell
        return
    with bars(True, "loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} tokens/s  {task.fields[memory]}") as shown:
        tasks = {name: shown.add_task(name, total=steps, loss=float("nan"), speed=0.0, memory="") for name in names}

        def update(name: str, now: dict[str, Any]) -> None:
            shown.update(
                tasks[name], completed=now["step"], loss=now["loss"], speed=now["speed"], memory=_megabytes(now)
            )

        yield update


def _megabytes(now: dict[str, Any]) -> str:
    return f"{now['peak'] / 1e6:.1f} MB" if "peak" in now else ""
