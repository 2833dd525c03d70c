"""Running a model over calibration batches: evaluation mode, hooks always removed, a bar when it takes long."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

T = TypeVar("T")


def call_model(model: nn.Module, batch: Any) -> Any:
    """``model(**batch)`` for a mapping, ``model(*batch)`` for a tuple or list, otherwise ``model(batch)``."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


@contextlib.contextmanager
def evaluating(model: nn.Module, handles: list[RemovableHandle]) -> Iterator[None]:
    """Evaluation mode without gradients; on leaving, removes ``handles`` and restores each module's training mode."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode


def track(batches: Iterable[T], description: str, progress: bool | None, delay: float = 1.0) -> Iterator[T]:
    """Yield ``batches``, with a progress bar on stderr.

    Args:
        progress: True for a bar, False for none, None for one on a terminal once ``delay`` seconds have passed.
    """
    wanted = sys.stderr.isatty() if progress is None else progress
    if not wanted:
        yield from batches
        return
    from rich.console import Console
    from rich.progress import Progress

    total = len(batches) if isinstance(batches, Sized) else None
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        bar = task = None
        for done, batch in enumerate(batches):
            if bar is None and (progress or time.monotonic() - start > delay):
                bar = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
                task = bar.add_task(description, total=total)
            if bar is not None and task is not None:
                bar.update(task, completed=done)
            yield batch
