"""A recipe on several ranks: torchrun starts this module on each, and the first tells the command of every step.

Each line on the first rank's standard output is a JSON object: a step, the result, or an error for the user. When the
command that reads them dies, the next line cannot be written and the ranks end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from .batches import Batches
from .errors import TrainingError
from .run import Run, train
from .settings import Settings

LOG = "ranks.log"
TOKENS = "tokens.pt"


def launch(
    name: str, settings: Settings, folder: Path, lock: TextIO, seen: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Runs a recipe under torchrun, `seen` being told {"step", "loss", "speed", ...}; returns its result.

    torchrun holds `lock` too: should this process die, the folder is free again when the ranks are gone.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={settings.nproc}"]
    command += ["-m", __name__, str(folder.absolute()), name]
    threads = max(1, torch.get_num_threads() // settings.nproc)
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    log = folder / name / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] | None = None
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            pass_fds=(lock.fileno(),),
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                message = _parsed(line)
                if "error" in message:
                    raise TrainingError(message["error"])
                result = message.get("result", result)
                if "step" in message:
                    seen(message)
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode or result is None:
        raise TrainingError(f"a rank of {name} ended with status {process.returncode}: {log} says why.")
    return result


def _parsed(line: str) -> dict[str, Any]:
    """A line that is not ours is nothing."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def main(folder: Path, name: str, out: TextIO) -> int:
    """One rank."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def tell(message: dict[str, Any]) -> None:
        if rank == 0:
            print(json.dumps(message), file=out, flush=True)

    settings = Settings.read(folder)
    tokens = torch.load(folder / TOKENS, weights_only=True)
    try:
        batches = Batches(tokens, settings.batch, settings.context, settings.seed, settings.validation, rank, ranks)
        run = Run(name, settings, folder, batches)
        train([run], lambda run: tell(run.now()))
        tell({"result": run.result()})
    except TrainingError as error:
        tell({"error": str(error)})
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2], sys.stdout))
