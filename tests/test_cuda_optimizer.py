"""The CUDA optimizer_update_, kernel and binding, run thread by thread on the CPU against the reference."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.cuda_emulator import harness as emu


@pytest.mark.skipif(shutil.which("g++") is None, reason="the CUDA emulator is built with g++")
def test_updates_are_the_references_bit_for_bit() -> None:
    """In a process of its own, because the binding takes the place of the CPU operator."""
    script = emu.HERE / "drive_optimizer.py"
    done = subprocess.run(
        [sys.executable, str(script), str(emu.bindings())],
        env={**os.environ, "PYTHONPATH": str(emu.ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("compared ")
