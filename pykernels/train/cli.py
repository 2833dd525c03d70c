"""The command line of `train`: what is asked is checked, prepared, run, reported."""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console

from . import ranks, report
from .batches import Batches
from .corpus import KING_JAMES, read_text
from .curves import write_csv
from .errors import TrainingError
from .progress import watch
from .recipes import RECIPES
from .run import Run, train
from .settings import FILE, SIZES, Settings, check, configuration
from .tokenizer import KINDS, encode

DEFAULTS: dict[str, Any] = {
    "corpus": KING_JAMES,
    "tokenizer": "bpe",
    "steps": 300,
    "lr": 1e-3,
    "seed": 0,
    "every": 20,
    "validation": 8,
    "save_every": 100,
    "nproc": 2,
}
VOCAB, WAIT = 2048, 15.0


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, accepts 1 or more")
    return value


def _rate(text: str) -> float:
    if not 0.0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}, accepts a number above 0")
    return value


def parser() -> argparse.ArgumentParser:
    """Options of the run's settings have no default here: what was given is compared with a run that goes on."""
    made = argparse.ArgumentParser(
        prog="python -m pykernels train",
        description="Train a small language model with several recipes, from the same weights and on the same batches.",
        epilog="recipes: " + "; ".join(f"{recipe.name}: {recipe.about}" for recipe in RECIPES.values()) + ".",
    )
    made.add_argument("--recipes", help=f"of {', '.join(RECIPES)}; the first is the baseline (default all)")
    made.add_argument("--output", type=Path, default=Path("train"), metavar="DIR", help="the run's folder (train)")
    made.add_argument("--resume", action="store_true", help="go on with the run in DIR from its checkpoints")
    made.add_argument("--overwrite", action="store_true", help="remove the run in DIR first")
    model = made.add_argument_group("model")
    which = model.add_mutually_exclusive_group()
    which.add_argument("--size", choices=SIZES, help="a model with its batch and context (small)")
    which.add_argument("--config", type=Path, metavar="FILE", help="config.json of a Llama, Mistral or Qwen2")
    data = made.add_argument_group("data")
    data.add_argument("--corpus", metavar="PATH", help=f"a UTF-8 file or folder ({KING_JAMES}: from a package)")
    data.add_argument("--tokenizer", choices=KINDS, help="bytes, or a BPE trained on the corpus (bpe)")
    data.add_argument("--vocab", type=_positive, help=f"ids of the BPE ({VOCAB}; with --config the model's)")
    training = made.add_argument_group("training")
    training.add_argument("--batch", type=_positive, help="sequences a step")
    training.add_argument("--context", type=_positive, help="tokens a sequence")
    training.add_argument("--steps", type=_positive, help="(300)")
    training.add_argument("--lr", type=_rate, help="highest learning rate (0.001)")
    training.add_argument("--seed", type=int, help="(0)")
    training.add_argument("--every", type=_positive, help="steps between two points of the curve (20)")
    training.add_argument("--validation", type=_positive, help="batches that are held out (8)")
    training.add_argument("--save-every", type=_positive, help="steps between two checkpoints (100)")
    training.add_argument("--nproc", type=_positive, help="ranks of zero2 (2)")
    training.add_argument("--device", help="cpu or cuda (cuda where there is one, without zero2)")
    result = made.add_argument_group("result")
    result.add_argument("--json", action="store_true", help="print one JSON object in place of progress and table")
    result.add_argument("--csv", type=Path, metavar="FILE", help="the curves (DIR/train.csv)")
    result.add_argument("--plot", type=Path, metavar="FILE", help="the picture (DIR/train.png)")
    return made


def recipes(text: str | None, device: str | None) -> tuple[str, ...]:
    """The names in --recipes, each once."""
    if text is None:
        return tuple(name for name, recipe in RECIPES.items() if not recipe.ranks or (device or "cpu") == "cpu")
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in RECIPES]:
        raise TrainingError(f"--recipes: unknown {', '.join(map(repr, unknown))}: choose from {', '.join(RECIPES)}.")
    return names


@contextmanager
def locked(folder: Path) -> Iterator[TextIO]:
    """The folder, made and held; a run that was just killed may need a moment to let it go."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise TrainingError(f"{folder}: cannot write there ({error.strerror}): give another --output.") from None
    with lock:
        end = time.monotonic() + WAIT
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > end:
                    raise TrainingError(f"{folder}: another run is writing there: give another --output.") from None
                time.sleep(0.2)
        yield lock


def sharded(names: Sequence[str]) -> bool:
    """Whether some recipe has ranks."""
    return any(RECIPES[name].ranks for name in names)


def prepare(options: argparse.Namespace, folder: Path) -> tuple[Settings, tuple[str, ...]]:
    """Settings and recipes: those of the run in `folder`, or new ones with the corpus made into tokens."""
    names = recipes(options.recipes, options.device)
    config = configuration(options)
    size = SIZES[options.size or "small"]
    if options.resume:
        settings = Settings.read(folder)
        names = names if options.recipes else settings.recipes
        keys = (*DEFAULTS, "batch", "context", "device")
        given = {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
        if config is not None or options.size:
            given["model"] = config or size.config(settings.model.vocab_size, settings.context)
        settings.compare(given, folder)
        check(settings, sharded(names))
        return settings, names
    if (folder / FILE).exists() and not options.overwrite:
        raise TrainingError(
            f"{folder}: holds a run: --resume goes on with it, --overwrite removes it, or give another --output."
        )
    _clear(folder)
    values = {
        key: default if getattr(options, key) is None else getattr(options, key) for key, default in DEFAULTS.items()
    }
    kind = values["tokenizer"]
    device = options.device or ("cuda" if torch.cuda.is_available() and not sharded(names) else "cpu")
    values |= {
        "batch": options.batch or size.batch,
        "context": options.context or size.context,
        "device": device,
        "recipes": names,
    }
    vocab = options.vocab or (config.vocab_size if config else VOCAB)
    if kind == "bpe" and vocab < 256:
        raise TrainingError(f"--vocab: got {vocab}, accepts 256 or more: every byte is an id.")
    needed = 256 if kind == "bytes" else vocab
    if config is not None and needed > config.vocab_size:
        raise TrainingError(
            f"{options.config}: vocab_size is {config.vocab_size}, the tokenizer has {needed} ids: give a smaller "
            "--vocab, or a config with more."
        )
    check(Settings(model=config or size.config(vocab, values["context"]), **values), sharded(names))
    tokens, ids = encode(read_text(values["corpus"]), kind, vocab, folder)
    settings = Settings(model=config or size.config(ids, values["context"]), **values)
    Batches(tokens, settings.batch, settings.context, settings.seed, 1)  # for its check
    torch.save(tokens, folder / ranks.TOKENS)
    settings.write(folder)
    return settings, names


def _clear(folder: Path) -> None:
    """Removes what a run leaves, and nothing else."""
    for name in RECIPES:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (FILE, ranks.TOKENS, "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)


def run_all(
    settings: Settings, names: tuple[str, ...], folder: Path, lock: TextIO, show: bool
) -> dict[str, dict[str, Any]]:
    """{recipe: its result}. Those of one process train in lockstep, those with ranks after them, one by one."""
    results: dict[str, dict[str, Any]] = {}
    alone = [name for name in names if not RECIPES[name].ranks]
    with watch(names, settings.steps, settings.every, show) as seen:
        if alone:
            tokens = torch.load(folder / ranks.TOKENS, weights_only=True)
            batches = Batches(tokens, settings.batch, settings.context, settings.seed, settings.validation)
            runs = [Run(name, settings, folder, batches) for name in alone]
            train(runs, lambda run: seen(run.name, run.now()))
            results = {run.name: run.result() for run in runs}
            del runs
        for name in names:
            if name not in results:
                results[name] = ranks.launch(name, settings, folder, lock, partial(seen, name))
    return {name: results[name] for name in names}


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and reports. 0, or 2 with a sentence on standard error for what the user can mend."""
    options = parser().parse_args(argv)
    folder: Path = options.output
    try:
        if options.resume and options.overwrite:
            raise TrainingError("--resume and --overwrite exclude each other: give one.")
        with locked(folder) as lock:
            settings, names = prepare(options, folder)
            results = run_all(settings, names, folder, lock, not options.json)
            finish(options, settings, results)
    except TrainingError as error:
        print(f"pykernels train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nStopped. Go on with: python -m pykernels train --resume --output {folder}", file=sys.stderr)
        return 130
    return 0


def finish(options: argparse.Namespace, settings: Settings, results: dict[str, dict[str, Any]]) -> None:
    """The CSV, the picture, and the table or the JSON object."""
    folder: Path = options.output
    table, picture = options.csv or folder / "train.csv", options.plot or folder / "train.png"
    rows = [row for name, result in results.items() for row in report.rows_of(name, result, settings)]
    written = [table]
    try:
        write_csv(table, rows, report.COLUMNS)
        try:
            report.plot(table, picture)
            written.append(picture)
        except ModuleNotFoundError as error:
            print(f"No picture: {error.name} is not installed (pip install 'pykernels[train]').", file=sys.stderr)
    except OSError as error:
        raise TrainingError(f"{error.filename}: cannot be written ({error.strerror}): give another path.") from None
    if options.json:
        json.dump({"recipes": results, "rows": rows}, sys.stdout)
        print()
        return
    console = Console()
    console.print(report.table(results))
    parameters = next(iter(results.values()))["parameters"]
    console.print(f"{parameters:,} parameters. Wrote {', '.join(map(str, written))}.", highlight=False)
