"""One line for each step of the demo: a spinner and the time on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Steps:
    """Shows what is running. ``with steps("Loading", total=3) as advance: ...; advance()``."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextlib.contextmanager
    def __call__(self, description: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        start = time.perf_counter()
        if not self.console.is_terminal:
            self.console.print(f"{description} ...", highlight=False)
            yield lambda: None
            self.console.print(f"{description}: {time.perf_counter() - start:.1f} s", highlight=False)
            return
        columns = [SpinnerColumn(), TextColumn("{task.description}")]
        if total is not None:
            columns += [BarColumn(bar_width=24), MofNCompleteColumn()]
        with Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True) as progress:
            task = progress.add_task(description, total=total)
            yield lambda: progress.advance(task)
        self.console.print(f"[green]done[/] {description} ({time.perf_counter() - start:.1f} s)", highlight=False)
