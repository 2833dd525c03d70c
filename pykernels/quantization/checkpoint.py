"""The command line of ``python -m pykernels quantize``."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from .convert import DEFAULT_EXCLUDE, Progress, Selection, quantize_checkpoint, quantize_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Quantise a checkpoint on disk. Returns 0, 1 for a bad input, 130 when interrupted, 143 when terminated."""
    parser = argparse.ArgumentParser(
        prog="python -m pykernels quantize",
        description="Quantise the linear weights of a safetensors file, or of a folder of them, to INT8.",
    )
    parser.add_argument("source", type=Path, metavar="IN", help="a .safetensors file, or a Hugging Face model folder")
    parser.add_argument("target", type=Path, metavar="OUT", help="the file or folder to write")
    parser.add_argument("--group-size", type=int, help="columns that share a scale; default: one scale a row")
    parser.add_argument("--include", metavar="REGEX", help="quantise only the tensors whose name contains this")
    parser.add_argument(
        "--exclude",
        metavar="REGEX",
        default=DEFAULT_EXCLUDE,
        help="leave alone what contains this; default: lm_head, embeddings and norms; '' for nothing",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    convert = quantize_folder if arguments.source.is_dir() else quantize_checkpoint
    try:
        selection = Selection(arguments.group_size, arguments.include, arguments.exclude or None)
        with _termination_as_exception(), _bar() as progress:
            report = convert(arguments.source, arguments.target, selection, progress)
    except (ValueError, OSError) as error:
        print(f"quantize: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {arguments.target} was not written", file=sys.stderr)
        return 130
    except _Terminated:
        print(f"terminated: {arguments.target} was not written", file=sys.stderr)
        return 143
    print(report.to_json() if arguments.json else f"{arguments.target}: {report}")
    return 0


class _Terminated(BaseException):
    """SIGTERM arrived."""


@contextlib.contextmanager
def _termination_as_exception() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that the temporary file is removed."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    try:
        previous: Any = signal.signal(signal.SIGTERM, handler)
    except ValueError:  # not in the main thread: its owner handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn(), TextColumn("{task.fields[name]}"))
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Quantising", total=None, name="")
        yield lambda done, total, name: bar.update(task, completed=done, total=total, name=name)
