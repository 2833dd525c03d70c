"""Launches for tests/test_triton_aot.py: each module has calls(), which yields what its _calls() says."""

import importlib
import pkgutil
from collections.abc import Iterator


def collect() -> Iterator[tuple]:
    """The launches of every module here."""
    for info in pkgutil.iter_modules(__path__):
        yield from importlib.import_module(f"{__name__}.{info.name}").calls()
