"""The planner's predicted peak against the peak of really training, for six models by five recipes, on the CPU.

    python benchmarks/planner.py --csv benchmarks/results/planner-cpu.csv
    python benchmarks/planner.py --ranks 2 --csv benchmarks/results/planner-ranks-cpu.csv

Each pair trains in a process of its own. Measured are the process's own high-water mark (VmHWM, less what it held once
it had trained a small model by the same recipe: the libraries and their buffers) and the most that PyTorch's allocator
held, which sees what the C++ operators take too. The predicted peak comes from the meta device.

With --ranks the recipes are the stages of ZeRO (0 is DistributedDataParallel), each trained by so many gloo processes;
measured is the allocator's peak of the first. gloo's own threads free late now and then, so it is the least of three.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pykernels import optim
from pykernels.bench.machine import commit, device_name
from pykernels.bench.memory import peak_bytes
from pykernels.distributed import zero
from pykernels.memory import Recipe, plan
from pykernels.nn import CausalLMConfig
from pykernels.nn.attention import _tables

COLUMNS = (
    "model",
    "recipe",
    "ranks",
    "batch",
    "seq",
    "parameters",
    "predicted",
    "allocator",
    "allocator_error_percent",
)
COLUMNS += ("process", "process_error_percent", "peak_phase", "device", "torch", "commit")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and the tokens of a step."""

    config: CausalLMConfig
    batch: int
    seq: int


MODELS = {
    "llama": Case(CausalLMConfig(4096, 384, 1024, 6, 6, 2, max_position_embeddings=512), 4, 192),
    "qwen, tied, bias": Case(
        CausalLMConfig(
            16384, 320, 896, 5, 5, 1, tie_word_embeddings=True, attention_bias="qkv", max_position_embeddings=512
        ),
        3,
        256,
    ),
    "16 heads to 1": Case(CausalLMConfig(2048, 512, 1024, 5, 16, 1, max_position_embeddings=1024), 1, 1024),
    "large vocabulary": Case(CausalLMConfig(49152, 192, 512, 2, 3, 3, max_position_embeddings=512), 2, 256),
    "deep, narrow": Case(CausalLMConfig(1024, 192, 512, 20, 4, 4, max_position_embeddings=512), 8, 256),
    "post-norm, unequal": Case(
        CausalLMConfig(
            8192, 256, (512, 1024, 1536, 1024, 512), 5, 8, norm="post", hidden_act="gelu", max_position_embeddings=512
        ),
        4,
        256,
    ),
}
RECIPES: dict[str, Recipe] = {
    "eager, torch AdamW": Recipe.baseline("float32"),
    "fused": Recipe("float32"),
    "INT8 saved, 8-bit AdamW": Recipe("float32", save="int8", state_bits=8),
    "INT8 training, 8-bit AdamW": Recipe("float32", int8_training=True, state_bits=8),
    "bf16 stochastic, recomputed": Recipe("bfloat16", save=("checkpoint", "recompute_mlp"), rounding="stochastic"),
}
STAGES = {
    f"{name}, {bits}-bit state": Recipe("float32", stage=stage, state_bits=bits)
    for (stage, name), bits in zip(enumerate(("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")), (32, 32, 8, 8), strict=True)
}
SMALL = Case(CausalLMConfig(2048, 256, 768, 2, 4, max_position_embeddings=128), 2, 128)


def recipe_for(name: str, config: CausalLMConfig) -> Recipe:
    """The recipe, its dial repeated over the layers."""
    recipe = {**RECIPES, **STAGES}[name]
    if isinstance(recipe.save, str):
        return recipe
    dial = recipe.save * config.num_hidden_layers
    return dataclasses.replace(recipe, save=dial[: config.num_hidden_layers])


def trainer(recipe: Recipe, case: Case) -> tuple[torch.nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    """A model, its optimizer, and a function that trains a step; gradients stay until the next."""
    torch.manual_seed(0)
    model: torch.nn.Module = recipe.model(case.config, "cpu")
    if recipe.stage:
        model, optimizer = zero(
            model, optim.AdamW, recipe.stage, lr=1e-3, state_bits=recipe.state_bits, rounding=recipe.rounding
        )
    else:
        optimizer = recipe.make_optimizer(model.parameters())
        if dist.is_initialized():
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    tokens = torch.randint(case.config.vocab_size, (case.batch, case.seq + 1))
    loss_of = recipe.loss_of(model, tokens[:, :-1], tokens[:, 1:])

    def step() -> None:
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()

    return model, optimizer, step


def allocator_peak(recipe: Recipe, case: Case) -> int:
    """The most bytes that PyTorch's allocator holds during the second step, parameters and state included."""
    model, optimizer, step = trainer(recipe, case)
    for _ in range(2):  # DDP arranges its buckets anew after the first
        step()
    optimizer.zero_grad()
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
    tables = [t for key, pair in _tables.items() if key[-1].type == "cpu" for t in pair]
    kept = [t.to_local() if isinstance(t, DTensor) else t for t in (*model.parameters(), *state, *tables)]
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())
    if isinstance(model, DistributedDataParallel):
        held += sum(p.nbytes for p in model.parameters())  # its buckets
    return held + peak_bytes(step, torch.device("cpu"))


def ranks_peak(model: str, recipe_name: str, ranks: int) -> int:
    """allocator_peak of the first of several ranks, the least of three steps."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__]
    done = subprocess.run(
        [*command, "--one", model, recipe_name, "--ranks", str(ranks)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return min(json.loads(done.stdout.splitlines()[-1])["allocator"])


def process_peak(recipe: Recipe, case: Case) -> int:
    """The most bytes that the process holds while it trains two steps, beyond what a small model left behind."""
    small = dataclasses.replace(recipe, save=recipe.save if isinstance(recipe.save, str) else recipe.save[:2])
    trainer(small, SMALL)[2]()
    _tables.clear()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    _model, _optimizer, step = trainer(recipe, case)
    for _ in range(2):
        step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(model: str, recipe_name: str) -> dict[str, int]:
    """Both peaks of a pair, in a process whose malloc gives back what is freed."""
    command = [sys.executable, __file__, "--one", model, recipe_name]
    quick = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, env={**os.environ, **quick}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(model: str, recipe_name: str, ranks: int) -> dict[str, object]:
    """A row of the table."""
    case = MODELS[model]
    recipe = recipe_for(recipe_name, case.config)
    made = plan(case.config, batch=case.batch, seq=case.seq, world_size=ranks, recipe=recipe, device="cpu")
    got = measure(model, recipe_name) if ranks == 1 else {"allocator": ranks_peak(model, recipe_name, ranks)}
    errors = {f"{key}_error_percent": f"{100 * (made.peak / value - 1):.2f}" for key, value in got.items()}
    return {
        "model": model,
        "recipe": recipe_name,
        "batch": case.batch,
        "seq": case.seq,
        "parameters": made.parameter_count,
        "predicted": made.peak,
        **got,
        **errors,
        "peak_phase": made.peak_phase,
    }


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """The table so far."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in COLUMNS if name in rows[0]])
        writer.writeheader()
        writer.writerows(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="write the table here")
    parser.add_argument("--models", default=";".join(MODELS), help="names, separated by ;")
    parser.add_argument("--recipes", help="names, separated by ;")
    parser.add_argument("--ranks", type=int, default=1, help="processes (1)")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "RECIPE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        case = MODELS[options.one[0]]
        recipe = recipe_for(options.one[1], case.config)
        if options.ranks > 1:
            dist.init_process_group("gloo")
            peaks = [allocator_peak(recipe, case) for _ in range(3)]
            if dist.get_rank() == 0:
                print(json.dumps({"allocator": peaks}))
            dist.destroy_process_group()
            return 0
        process = process_peak(recipe, case)
        print(json.dumps({"process": process, "allocator": allocator_peak(recipe, case)}))
        return 0
    recipes = RECIPES if options.ranks == 1 else STAGES
    about = {"ranks": options.ranks} if options.ranks > 1 else {}
    about |= {"device": device_name(torch.device("cpu")), "torch": torch.__version__, "commit": commit()}
    rows = []
    for model in options.models.split(";"):
        for recipe_name in options.recipes.split(";") if options.recipes else recipes:
            found = row(model, recipe_name, options.ranks)
            rows.append({**found, **about})
            if options.csv:
                write(options.csv, rows)
            print({k: found[k] for k in COLUMNS if k in found and k not in ("batch", "seq", "parameters")}, flush=True)
    worst = max(abs(float(str(value))) for r in rows for key, value in r.items() if key.endswith("_error_percent"))
    print(f"worst error {worst:.2f} %")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
