"""Which transformers is installed, and whether it is one that this integration knows."""

from __future__ import annotations

from importlib import metadata

OLDEST, BEFORE = (4, 56), (6, 0)


def check_version() -> None:
    """ImportError, with what to install, unless transformers is there and of a version that is served."""
    install = "pip install 'pykernels[transformers]'"
    try:
        found = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        raise ImportError(f"pykernels.integrations.transformers needs transformers: {install}") from None
    if not OLDEST <= version_of(found) < BEFORE:
        raise ImportError(
            f"pykernels.integrations.transformers serves transformers from 4.56 on and 5.x, found {found}: {install}"
        )


def version_of(text: str) -> tuple[int, int]:
    """(major, minor) of a version; (0, 0) of one that cannot be read."""
    major, minor = [*text.split("."), "", ""][:2]
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def needs(major: int, what: str, instead: str) -> None:
    """ImportError unless transformers is at least of this major version."""
    found = metadata.version("transformers")
    if version_of(found) < (major, 0):
        raise ImportError(f"{what} needs transformers {major}, found {found}: {instead}, or upgrade")
