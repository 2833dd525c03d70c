"""`python -m pykernels plan`: will a model fit, and what to switch on first; with --params, memory by ZeRO stage."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from . import memory
from .distributed import plan as stages
from .memory.planner import DoesNotFit, describe, gigabytes
from .memory.recipe import Recipe
from .memory.tracing import KINDS
from .nn import CausalLMConfig

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def nbytes(text: str) -> int:
    """ "80GB", "24 GiB", "8e9" in bytes."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    try:
        size = int(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    except (KeyError, ValueError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, accepts a size such as 80GB or 24GiB")
    return size


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, accepts a whole number of 1 or more")
    return int(text)


def code(config: CausalLMConfig, made: memory.Plan) -> str:
    """A script that trains by the plan; its batches are random ids, to be replaced."""
    recipe = made.recipe
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    shape = "".join(f"    {name}={value!r},\n" for name, value in fields.items() if value != defaults[name])
    lines = ["import torch", "from pykernels import optim"]
    lines += ["from pykernels import Int8TrainingConfig, quantize_"] if recipe.int8_training else []
    lines += ["from pykernels.nn import CausalLM, CausalLMConfig"]
    device = '"cuda" if torch.cuda.is_available() else "cpu"'
    optimizer = recipe.optimizer if recipe.optimizer.startswith("torch.") else f"optim.{recipe.optimizer}"
    optimizer = optimizer.replace("torch.", "torch.optim.") if optimizer.startswith("torch.") else optimizer
    options = "lr=3e-4"
    if not recipe.optimizer.startswith("torch."):
        options += f", state_bits={recipe.state_bits}, rounding={recipe.rounding!r}"
    many = made.world_size > 1
    if recipe.stage or many:
        lines += ["from pykernels.distributed import zero"] if recipe.stage else []
        lines += [] if recipe.stage else ["from torch.nn.parallel import DistributedDataParallel"]
        lines += ["", "# torchrun --nproc-per-node " + str(made.world_size)]
        lines += ["torch.distributed.init_process_group()", "rank = torch.distributed.get_node_local_rank()"]
        lines += ['device = f"cuda:{rank}" if torch.cuda.is_available() else "cpu"']
        lines += ["if torch.cuda.is_available():", "    torch.cuda.set_device(rank)"]
    else:
        lines += ["from pykernels.distributed import OffloadedOptimizer"] if recipe.offload else []
        lines += ["", f"device = {device}"]
    lines += [f"config = CausalLMConfig(\n{shape})"]
    build = "eager=True" if recipe.eager else f"save={_runs(recipe.save)}"
    lines += [f"model = CausalLM(config, {build}, dtype=torch.{recipe.dtype}, device=device)"]
    lines += ["quantize_(model, Int8TrainingConfig())"] if recipe.int8_training else []
    if recipe.stage:
        offload = f", offload={recipe.offload!r}" if recipe.offload else ""
        lines += [f"model, optimizer = zero(model, {optimizer}, stage={recipe.stage}{offload}, {options})"]
    elif recipe.offload:
        lines += [f"optimizer = OffloadedOptimizer(model.parameters(), {optimizer}, {options})"]
    else:
        lines += [f"optimizer = {optimizer}(model.parameters(), {options})"]
    if many and not recipe.stage:
        lines += ["model = DistributedDataParallel(model, gradient_as_bucket_view=True)"]
    whose = "your data"
    if many:
        lines += ["torch.manual_seed(rank)"]
        whose = "your data, a part for each rank"
    loss = "model(tokens[:, :-1], tokens[:, 1:])"
    if recipe.loss == "logits" and not recipe.eager:
        lines.insert(1, "import pykernels.functional as F")
        loss = "F.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])"
    lines += [
        "",
        "for step in range(10):",
        f"    tokens = torch.randint({config.vocab_size}, ({made.batch}, {made.seq + 1}), device=device)  # {whose}",
        f"    loss = {loss}",
        "    loss.backward()",
        "    optimizer.step()",
        "    optimizer.zero_grad()",
        "    print(step, loss.item())",
    ]
    lines += ["torch.distributed.destroy_process_group()"] if many else []
    return "\n".join(lines) + "\n"


def _runs(save: str | tuple[str, ...]) -> str:
    if isinstance(save, str):
        return json.dumps(save)
    return " + ".join(f"[{json.dumps(value)}] * {len(list(group))}" for value, group in groupby(save))


def show(config: CausalLMConfig, made: memory.Plan) -> None:
    """The tables for people, in units of 10^9 bytes."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    devices = "one device" if made.world_size == 1 else f"each of {made.world_size} devices"
    console.print(
        f"{made.parameter_count:,} parameters on {devices}, {made.batch} x {made.seq} tokens: {describe(made.recipe)}",
        highlight=False,
    )
    table = Table()
    table.add_column("bytes of")
    table.add_column("at the peak", justify="right")
    table.add_column("at most", justify="right")
    for kind in KINDS:
        if made.bytes[kind]:
            table.add_row(kind, gigabytes(made.at_peak[kind]), gigabytes(made.bytes[kind]))
    table.add_section()
    table.add_row(f"peak, in {made.peak_phase}", gigabytes(made.peak), "")
    for phase, peak in made.phases.items():
        table.add_row(f"  peak of {phase}", gigabytes(peak), "")
    console.print(table)
    if made.steps:
        order = Table(title="what to switch on, in this order")
        order.add_column("")
        order.add_column("peak", justify="right")
        order.add_column("fits" if made.device_memory else "")
        for what, peak in made.steps:
            fits = "" if made.device_memory is None else "yes" if peak <= made.device_memory else "no"
            order.add_row(what, gigabytes(peak), fits)
        console.print(order)
    console.print("Not in it: the CUDA context, fragmentation, and scratch that a kernel takes by itself.")
    console.print()
    console.print(code(config, made), markup=False, soft_wrap=True)


def draw(made: memory.Plan, path: Path) -> None:
    """What the peak is made of, and the peak after each thing that is switched on, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    bottom = 0.0
    for kind in KINDS:
        size = made.at_peak[kind] / 1e9
        if size:
            left.bar(["at the peak"], [size], bottom=bottom, width=0.5, label=f"{kind}: {size:.2f}")
            bottom += size
    left.set(ylabel="GB (10^9 bytes)", title=f"{made.peak / 1e9:.2f} GB in {made.peak_phase}", xlim=(-0.5, 1.8))
    left.legend(fontsize="small", loc="center right")
    names, peaks = zip(*(made.steps or ((describe(made.recipe), made.peak),)), strict=True)
    right.barh([f"{i}. {name[:44]}" for i, name in enumerate(names)], [peak / 1e9 for peak in peaks])
    right.invert_yaxis()
    right.set(xlabel="peak, GB", title="switched on one after the other")
    if made.device_memory:
        right.axvline(made.device_memory / 1e9, color="C3", linestyle="--")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str]) -> int:
    """The command line of `plan`."""
    if any(argument.split("=")[0] == "--params" for argument in argv):
        return stages.main(argv)
    parser = argparse.ArgumentParser(
        prog="python -m pykernels plan",
        description=__doc__,
        epilog="With --params N in place of --config: the memory of parameters, gradients and state under each ZeRO "
        "stage; `plan --params 1 --help` lists its options.",
    )
    parser.add_argument("--config", required=True, help="a config.json of a Llama, Mistral or Qwen2, or its folder")
    parser.add_argument("--batch", type=positive, required=True, help="sequences on each device")
    parser.add_argument("--seq", type=positive, required=True, help="tokens in a sequence")
    parser.add_argument("--gpus", type=positive, default=1, help="devices (default 1)")
    parser.add_argument("--memory", type=nbytes, help="of each, such as 80GB; without it the defaults are planned")
    parser.add_argument("--dtype", choices=memory.recipe.DTYPES, default="bfloat16", help="(default bfloat16)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="whose kernels (default cuda)")
    parser.add_argument("--int8-training", action="store_true", help="also try INT8 training")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, help="draw a stacked bar into this PNG")
    options = parser.parse_args(argv)
    where: dict[str, Any] = {"batch": options.batch, "seq": options.seq, "world_size": options.gpus}
    where["device"] = options.device
    try:
        config = CausalLMConfig.from_file(options.config)
        if options.memory is None:
            made = memory.plan(config, recipe=Recipe(options.dtype), **where)
        else:
            made = memory.search(
                config,
                device_memory=options.memory,
                dtype=options.dtype,
                int8_training=options.int8_training,
                **where,
            )
        if options.plot:
            draw(made, options.plot)
    except (DoesNotFit, ValueError, RuntimeError, OSError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    if options.json:
        json.dump({**made.as_dict(), "code": code(config, made)}, sys.stdout, indent=2)
        print()
    else:
        show(config, made)
    return 0
