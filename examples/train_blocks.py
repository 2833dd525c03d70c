"""Train a small Llama-style model on the King James text, its blocks saving everything, or INT8, or little.

    python examples/train_blocks.py --steps 300 --csv run.csv --plot run.png

Every run starts from the same weights and sees the same batches, in lockstep; the `save=` dial of
pykernels.nn.TransformerBlock is all that differs. Beside each loss curve stands what the run keeps for backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from king_james import (
    COLUMNS,
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
from torch import Tensor

from pykernels.bench.memory import saved_bytes
from pykernels.nn import SAVE, CausalLM, CausalLMConfig

RUNS = ("all", "int8")


@dataclass(frozen=True)
class Shape:
    """About 10 million parameters in the proportions of Llama 3 8B: four query heads to a key head, MLP of 3.5 x."""

    dim: int = 320
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2
    context: int = 128
    batch: int = 8

    @property
    def intermediate(self) -> int:
        return self.dim * 7 // 2


class Llama(CausalLM):
    """A byte-level causal language model whose logits exist only a tile at a time."""

    def __init__(self, shape: Shape, save: str) -> None:
        config = CausalLMConfig(
            vocab_size=256,
            hidden_size=shape.dim,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
        )
        super().__init__(config, save=save)

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean loss of tokens [batch, context + 1], each predicted from those before it."""
        return super().forward(tokens[:, :-1], tokens[:, 1:])


def train(
    names: tuple[str, ...] = RUNS,
    steps: int = 300,
    shape: Shape = Shape(),
    lr: float = 1e-3,
    seed: int = 0,
    every: int = 20,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    show: bool = True,
) -> dict:
    """Trains a run for each dial value; returns curves as rows of COLUMNS, final losses and saved bytes."""
    text = corpus()
    cut = len(text) * 19 // 20
    runs = []
    for name in names:
        torch.manual_seed(seed)
        model = Llama(shape, name).to(device, dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1)
        runs.append(Run(name, model, optimizer))
    train_batches = batches(text[:cut], shape.batch, shape.context, steps, seed, device)
    held_out = batches(text[cut:], shape.batch, shape.context, 16, seed, device)
    saved = {run.name: saved_bytes(partial(run.model, train_batches[0]), run.model.parameters()) for run in runs}
    rows = lockstep(runs, train_batches, held_out, lr, every, device, show)
    rows = [{**row, "saved_bytes": saved[row["run"]]} for row in rows]
    parameters = sum(p.numel() for p in runs[0].model.parameters())
    return {"final_validation_loss": final_losses(rows), "saved_bytes": saved, "parameters": parameters, "rows": rows}


def report(result: dict) -> None:
    """The table a person reads."""
    from rich.console import Console
    from rich.table import Table

    table = Table("save=", "validation loss", "against first", "saved for backward, MB", "of first")
    first = next(iter(result["final_validation_loss"]))
    for name, loss in result["final_validation_loss"].items():
        base, saved = result["final_validation_loss"][first], result["saved_bytes"]
        table.add_row(
            name,
            f"{loss:.4f}",
            f"{100 * (loss / base - 1):+.2f} %",
            f"{saved[name] / 1e6:.1f}",
            f"{100 * saved[name] / saved[first]:.0f} %",
        )
    console = Console()
    console.print(table)
    console.print(f"{result['parameters']:,} parameters", highlight=False)


def plot(csv_path: Path, png_path: Path) -> None:
    """Draws the curves of a CSV that --csv wrote, and what each run keeps for backward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = read_csv(csv_path)
    device = next(iter(runs.values()))[0]["device"]
    figure, axes = plt.subplot_mosaic(
        [["loss", "bytes"], ["gap", "bytes"]],
        figsize=(9, 6),
        width_ratios=(3, 1),
        height_ratios=(3, 2),
        layout="constrained",
    )
    draw_curves(axes["loss"], axes["gap"], runs, f"Llama-style model on the King James text, {device}")
    saved = {name: int(rows[-1]["saved_bytes"]) / 1e6 for name, rows in runs.items()}
    bars = axes["bytes"].bar(list(saved), list(saved.values()), color=[f"C{i}" for i in range(len(saved))])
    axes["bytes"].bar_label(bars, fmt="%.0f")
    axes["bytes"].set(title="saved for backward", ylabel="MB a step")
    axes["bytes"].tick_params(axis="x", rotation=30)
    png_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path, dpi=130)


def main(argv: list[str] | None = None) -> None:
    args = parse(command(__doc__, RUNS, SAVE, 300), argv, SAVE)
    result = train(args.names, args.steps, seed=args.seed, device=args.device)
    finish(args, result, report, plot, (*COLUMNS, "saved_bytes"))


if __name__ == "__main__":
    main()
