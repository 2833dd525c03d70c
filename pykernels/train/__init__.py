"""``python -m pykernels train``: one small language model, trained with several recipes, measured and compared."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the work is in .cli, which needs torch.distributed."""
    from .cli import main as run

    return run(argv)
