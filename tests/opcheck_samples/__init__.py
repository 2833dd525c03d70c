"""Calls of operators for tests/test_ops_registry.py: each module has samples() -> {operator: arguments}."""

import importlib
import pkgutil


def collect() -> dict[str, tuple]:
    """The samples of every module here. An operator must be sampled once."""
    found: dict[str, tuple] = {}
    for info in pkgutil.iter_modules(__path__):
        samples = importlib.import_module(f"{__name__}.{info.name}").samples()
        assert found.keys().isdisjoint(samples), f"sampled twice: {found.keys() & samples.keys()}"
        found |= samples
    return found
