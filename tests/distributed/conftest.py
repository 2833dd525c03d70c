"""One start of 2 ranks and one of 4 serve all tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from . import ranks as start

STAGES = [
    "torch_adamw",
    "network",
    "ours",
    "placements",
    "clipping",
    "accumulation",
    "missing_gradients",
    "schedules_and_groups",
    "replicas_by_shards",
    "offloading",
]
# What does not depend on the number of ranks.
ONCE = ["existing_fsdp2_model", "same_start", "refusals"]
CHECKS = {
    2: [
        *(f"checks_stages.{name}" for name in (*STAGES, *ONCE)),
        # The last one ends with a rank that dies.
        *(
            f"checks_checkpoint.{name}"
            for name in ("save", "damaged", "other_optimizer", "replaced", "full_state", "dying")
        ),
    ],
    4: [
        *(f"checks_stages.{name}" for name in STAGES),
        *(f"checks_checkpoint.{name}" for name in ("load_on_all", "load_on_three")),
    ],
}


@dataclass(frozen=True)
class Done:
    """The ranks have ended; calling it with a check's name gives what the check returned."""

    world: int
    folder: Path

    def __call__(self, check: str) -> Any:
        return start.result(self.world, check, self.folder)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """2 ranks; they write checkpoints beside their folder."""
    folder = tmp_path_factory.mktemp("ranks") / "2"
    start.run(2, CHECKS[2], folder)
    return Done(2, folder)


@pytest.fixture(scope="session")
def four_ranks(two_ranks: Done) -> Done:
    """4 ranks, which read what 2 have written."""
    folder = two_ranks.folder.parent / "4"
    start.run(4, CHECKS[4], folder)
    return Done(4, folder)


@pytest.fixture(params=["two_ranks", "four_ranks"])
def ranks(request: pytest.FixtureRequest) -> Done:
    """Both in turn."""
    done: Done = request.getfixturevalue(request.param)
    return done
