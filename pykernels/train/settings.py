"""What a run is made of, checked before it starts, and kept in its folder so that --resume need not be told again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..nn import CausalLMConfig
from .errors import TrainingError

FILE = "run.json"


@dataclass(frozen=True)
class Size:
    """A model in Llama's proportions, and the batch at which its activations outweigh its weights as a large one's."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    context: int
    batch: int

    def config(self, vocab_size: int, context: int) -> CausalLMConfig:
        """Of a model with as many positions as it is trained on, so that the tables of rope are no larger."""
        return CausalLMConfig(
            max_position_embeddings=context,
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
        )


SIZES = {
    "tiny": Size(64, 2, 4, 2, 176, context=64, batch=4),
    "small": Size(192, 4, 6, 2, 512, context=256, batch=8),
    "medium": Size(512, 8, 8, 2, 1408, context=512, batch=8),
}


@dataclass(frozen=True)
class Settings:
    """All that the losses depend on, but for the corpus, whose tokens lie in the run's folder."""

    model: CausalLMConfig
    recipes: tuple[str, ...]
    corpus: str
    tokenizer: str
    context: int
    batch: int
    steps: int
    lr: float
    seed: int
    every: int
    validation: int
    save_every: int
    nproc: int
    device: str

    def write(self, folder: Path) -> None:
        """Leaves them in the run's folder."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["model"] = {field.name: getattr(self.model, field.name) for field in fields(self.model)}
        (folder / FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """Those of the run in a folder."""
        file = folder / FILE
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            model = CausalLMConfig.from_dict(values["model"])
            return cls(**{**values, "model": model, "recipes": tuple(values["recipes"])})
        except FileNotFoundError:
            raise TrainingError(f"{folder}: holds no run to go on with: leave out --resume to start one.") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise TrainingError(f"{file}: not the settings of a run ({error}): give another --output.") from None

    def compare(self, given: Mapping[str, Any], folder: Path) -> None:
        """TrainingError if an option that was given is not the run's."""
        for name, value in given.items():
            mine = getattr(self, name)
            if name == "model":
                for field in fields(value):
                    here, there = getattr(value, field.name), getattr(mine, field.name)
                    if field.name != "vocab_size" and here != there:
                        raise TrainingError(
                            f"{folder}: its run is of another model, {field.name} {there}, not {here}: give that model "
                            "or another --output."
                        )
            elif mine != value:
                option = name.replace("_", "-")
                raise TrainingError(
                    f"{folder}: its run was started with --{option} {mine}, not {value}: give the same, or another "
                    "--output."
                )


def configuration(options: argparse.Namespace) -> CausalLMConfig | None:
    """The model that --config names; None for a --size, whose vocabulary is the tokenizer's."""
    if options.config is None:
        return None
    try:
        return CausalLMConfig.from_file(options.config)
    except ValueError as error:
        raise TrainingError(str(error)) from None


def check(settings: Settings, sharded: bool) -> None:
    """TrainingError for numbers that do not go together; sharded: some recipe has ranks."""
    model = settings.model
    if settings.context > model.max_position_embeddings:
        raise TrainingError(
            f"--context: got {settings.context}, the model has {model.max_position_embeddings} positions "
            "(max_position_embeddings)."
        )
    if not sharded:
        return
    for name, value in (("--batch", settings.batch), ("hidden_size", model.hidden_size)):
        if value % settings.nproc:
            raise TrainingError(
                f"--nproc: got {settings.nproc}, which does not divide {name} {value}: give a divisor of both, or "
                f"another {name}."
            )
    if settings.device != "cpu":
        raise TrainingError(
            "--device: zero2 runs on gloo ranks of the CPU here: leave zero2 out, or give --device cpu."
        )
