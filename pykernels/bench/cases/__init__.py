"""One file per operation. Each has OP, cells(quick, cuda) -> list[Cell], work(...) and build(cell, context)."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def load() -> dict[str, ModuleType]:
    """Every case by its operation's name: a file added here is measured, nothing else registers it."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    return {module.OP: module for module in modules}
