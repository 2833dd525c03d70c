"""The benchmark harness: `python -m pykernels bench`, and benchmarks/bench.py in the repository."""

from __future__ import annotations

from .cli import main

__all__ = ["main"]
