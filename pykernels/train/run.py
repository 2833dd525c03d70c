"""One recipe in training: its model and optimizer, what has been seen of it, and the checkpoint it goes on from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ..bench.memory import peak_bytes, saved_bytes
from ..distributed import CheckpointError, _manifest, load_checkpoint, save_checkpoint
from .batches import Batches, learning_rate, seed_of
from .errors import TrainingError
from .recipes import CLIP, RECIPES, clipper, make_model, make_optimizer
from .settings import Settings

CHECKPOINT = "checkpoint"
PERCENTILES = (20, 50, 80)


class Run:
    """A recipe after `step` steps.

    Every step draws its batch and its random numbers from the seed and its own number, and everything else that it
    reads is in the checkpoint: a run that goes on gives the losses, bit for bit, of one that was never stopped.

    losses: of every step. validation: [step, loss] at every settings.every. seconds: of every step, None for the first
    of a process and the one whose memory is measured. memory: bytes on a rank, see `measure`.
    """

    def __init__(self, name: str, settings: Settings, folder: Path, batches: Batches) -> None:
        self.recipe, self.settings, self.folder, self.batches = RECIPES[name], settings, folder / name, batches
        self.step, self.losses, self.validation = 0, [], []  # type: ignore[var-annotated]
        self.seconds: list[float | None] = []
        self.memory: dict[str, int] = {}
        device = settings.device
        model = make_model(self.recipe, settings.model, settings.seed, device)
        self.parameters = sum(p.numel() for p in model.parameters())
        if not _manifest.newest(self.folder / CHECKPOINT).exists():
            ids = batches(0).to(device)
            # Before it is sharded: what FSDP has gathered would be counted too.
            self.memory["saved"] = saved_bytes(partial(model, ids[:, :-1], ids[:, 1:]), model.parameters())
        self.model, self.optimizer = make_optimizer(self.recipe, model, settings.lr)
        self.ranks = dist.get_world_size() if self.recipe.ranks else 1
        self._clip = clipper(self.recipe)
        if not self.memory:
            self._load()
        self._first = self.step

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.settings.batch * self.settings.context

    def step_seconds(self, percent: int) -> float:
        """A percentile of the steps that were timed."""
        timed = sorted(s for s in self.seconds if s is not None)
        return timed[min(len(timed) * percent // 100, len(timed) - 1)] if timed else 0.0

    @property
    def speed(self) -> float:
        """Tokens a second, by the 20th percentile of the steps: what else the machine does disturbs it least."""
        seconds = self.step_seconds(20)
        return self.tokens / seconds if seconds else 0.0

    def loss(self, ids: Tensor) -> Tensor:
        return self.model(ids[:, :-1], ids[:, 1:])

    def train_step(self) -> None:
        """Forward, backward, clipping and update on the batch of this step."""
        ids = self.batches(self.step).to(self.settings.device)
        torch.manual_seed(seed_of(self.settings.seed, self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.settings.steps, self.settings.lr)
        start = time.perf_counter()
        # The state is there from the second step on.
        measured = self.step > 0 and "peak" not in self.memory
        value = self._measure(ids) if measured else self._update(ids)
        seconds = time.perf_counter() - start
        self.losses.append(self._mean(value))
        self.seconds.append(None if measured or self.step == self._first else seconds)
        self.step += 1

    def _update(self, ids: Tensor, after_backward: Callable[[], None] = lambda: None) -> float:
        loss = self.loss(ids)
        loss.backward()
        after_backward()
        self._clip(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _measure(self, ids: Tensor) -> float:
        """A step like the others; memory gets "parameters", "gradients", "state" and "peak", the largest rank's."""
        found: list[float] = []
        parameters = list(self.model.parameters())

        def gradients() -> None:
            self.memory["gradients"] = _bytes(p.grad for p in parameters)

        self.memory["parameters"] = _bytes(parameters)
        self.memory["state"] = _bytes(value for state in self.optimizer.state.values() for value in state.values())
        held = self.memory["parameters"] + self.memory["state"]
        step = partial(self._update, ids, gradients)
        self.memory["peak"] = held + peak_bytes(lambda: found.append(step()), torch.device(self.settings.device))
        if self.ranks > 1:
            for key in sorted(self.memory):
                largest = torch.tensor(self.memory[key])
                dist.all_reduce(largest, dist.ReduceOp.MAX)
                self.memory[key] = int(largest)
        return found[0]

    @torch.no_grad()
    def validate(self) -> None:
        """Appends the mean loss of the held-out batches."""
        self.model.eval()
        values = [self.loss(ids.to(self.settings.device)).item() for ids in self.batches.held_out]
        self.model.train()
        if self.recipe.ranks:
            for module in self.model.modules():
                if isinstance(module, FSDPModule):  # it would keep what it has gathered until the next backward
                    module.reshard()
        self.validation.append([self.step, self._mean(sum(values) / len(values))])

    def _mean(self, value: float) -> float:
        """Of all ranks."""
        if self.ranks == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total) / self.ranks

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            save_checkpoint(self.folder / CHECKPOINT, self.model, self.optimizer, extra=self.record())
        except (CheckpointError, OSError) as error:
            raise TrainingError(f"cannot write the checkpoint of {self.name}: {error}") from None

    def _load(self) -> None:
        path = self.folder / CHECKPOINT
        try:
            extra = load_checkpoint(path, self.model, self.optimizer)
        except CheckpointError as error:
            raise TrainingError(f"{error}: it is another model's or damaged; give another --output.") from None
        for key in ("step", "losses", "validation", "seconds", "memory"):
            setattr(self, key, extra[key])

    def record(self) -> dict[str, Any]:
        """What has been seen: numbers and lists of them."""
        return {
            "step": self.step,
            "losses": self.losses,
            "validation": self.validation,
            "seconds": self.seconds,
            "memory": self.memory,
        }

    def now(self) -> dict[str, Any]:
        """What progress shows after a step."""
        return {"step": self.step, "loss": self.losses[-1], "speed": self.speed, **self.memory}

    def result(self) -> dict[str, Any]:
        """`record` with what the report says of the recipe."""
        record: dict[str, Any] = {**self.record(), "about": self.recipe.about, "ranks": self.ranks}
        record["parameters"] = self.parameters
        record |= {f"step_ms_p{percent}": 1e3 * self.step_seconds(percent) for percent in PERCENTILES}
        return {**record, "tokens_per_step": self.tokens, "tokens_per_second": self.speed}


def train(runs: Sequence[Run], seen: Callable[[Run], None]) -> None:
    """Every run to its last step, each step by all runs in turn; those that are behind first come level."""
    for step in range(min(run.step for run in runs), runs[0].settings.steps):
        for run in runs:
            if run.step > step:
                continue
            run.train_step()
            last = run.step == run.settings.steps
            if last or run.step % run.settings.every == 0:
                run.validate()
            if last or run.step % run.settings.save_every == 0:
                run.save()
            seen(run)


def _bytes(tensors: Iterable[Any]) -> int:
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in local)
