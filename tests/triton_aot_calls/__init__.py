"""Every launch that benchmarks/gpu_static/triton_aot.py compiles.

Each module has calls(), which yields (label, architectures, configuration or None, launch) for every kernel and every
configuration in its lists.
"""

import importlib
import pkgutil
from collections.abc import Iterator


def collect() -> Iterator[tuple]:
    """The launches of every module here."""
    for info in pkgutil.iter_modules(__path__):
        yield from importlib.import_module(f"{__name__}.{info.name}").calls()
