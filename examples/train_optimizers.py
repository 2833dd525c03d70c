"""Train a small language model with AdamW in every width of state and weight, against torch's own in float32.

    python examples/train_optimizers.py --steps 500 --csv run.csv --plot run.png

Every run starts from the same weights and sees the same batches, in lockstep. bf16 weights are widened for the forward
pass and their gradients rounded back to bf16, so that what differs is what the optimizer keeps and how it rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

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
from torch import Tensor, nn
from train_blocks import Llama, Shape

from pykernels.optim import AdamW

BETAS, DECAY = (0.9, 0.95), 0.1
SHAPE = Shape(dim=128, layers=4, heads=4, kv_heads=2, context=64)


def ours(**options: Any) -> Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]:
    """A factory of pykernels' AdamW with these options."""
    return lambda parameters, lr: AdamW(parameters, lr, betas=BETAS, weight_decay=DECAY, **options)


# Name: (dtype of the weights, factory of the optimizer).
RUNS = {
    "torch": (torch.float32, lambda p, lr: torch.optim.AdamW(p, lr, betas=BETAS, weight_decay=DECAY, fused=True)),
    "32-bit": (torch.float32, ours()),
    "16-bit": (torch.float32, ours(state_bits=16)),
    "8-bit": (torch.float32, ours(state_bits=8)),
    "bf16 nearest": (torch.bfloat16, ours()),
    "bf16 stochastic": (torch.bfloat16, ours(rounding="stochastic")),
    "bf16 kahan": (torch.bfloat16, ours(rounding="kahan")),
    "bf16 split_master": (torch.bfloat16, ours(rounding="split_master")),
    "bf16 stochastic 8-bit": (torch.bfloat16, ours(rounding="stochastic", state_bits=8)),
}


class Widened(nn.Module):
    """The model with its parameters in another dtype, computing in float32."""

    def __init__(self, model: Llama, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.model.lm_head.weight.dtype == torch.float32:
            return self.model(tokens)
        wide = {name: p.float() for name, p in self.model.named_parameters()}
        return torch.func.functional_call(self.model, wide, (tokens,))


def kept_bytes(run: Run) -> float:
    """Bytes a parameter of the weights and of all that the optimizer keeps between steps."""
    parameters = list(run.model.parameters())
    state = [t for p in parameters for t in run.optimizer.state[p].values() if isinstance(t, Tensor) and t.dim()]
    return sum(t.numel() * t.element_size() for t in [*parameters, *state]) / sum(p.numel() for p in parameters)


def train(
    names: tuple[str, ...] = tuple(RUNS),
    steps: int = 500,
    shape: Shape = SHAPE,
    lr: float = 2e-3,
    seed: int = 0,
    every: int = 25,
    device: str = "cpu",
    show: bool = True,
) -> dict:
    """Trains a run for each name; returns curves as rows of COLUMNS, final losses and bytes a parameter."""
    text = corpus()
    cut = len(text) * 19 // 20
    runs = []
    for name in names:
        dtype, factory = RUNS[name]
        torch.manual_seed(seed)
        model = Widened(Llama(shape, "inputs+preact"), dtype).to(device)
        runs.append(Run(name, model, factory(model.parameters(), lr)))
    train_batches = batches(text[:cut], shape.batch, shape.context, steps, seed, device)
    held_out = batches(text[cut:], shape.batch, shape.context, 16, seed, device)
    rows = lockstep(runs, train_batches, held_out, lr, every, device, show)
    kept = {run.name: kept_bytes(run) for run in runs}
    rows = [{**row, "bytes_per_parameter": kept[row["run"]]} for row in rows]
    parameters = sum(p.numel() for p in runs[0].model.parameters())
    return {
        "final_validation_loss": final_losses(rows),
        "bytes_per_parameter": kept,
        "parameters": parameters,
        "rows": rows,
    }


def report(result: dict) -> None:
    """The table a person reads."""
    from rich.console import Console
    from rich.table import Table

    table = Table("optimizer", "validation loss", "against first", "weights and state, bytes a parameter")
    base = next(iter(result["final_validation_loss"].values()))
    for name, loss in result["final_validation_loss"].items():
        kept = result["bytes_per_parameter"][name]
        table.add_row(name, f"{loss:.4f}", f"{100 * (loss / base - 1):+.2f} %", f"{kept:.2f}")
    console = Console()
    console.print(table)
    console.print(f"{result['parameters']:,} parameters", highlight=False)


def plot(csv_path: Path, png_path: Path) -> None:
    """Draws the curves of a CSV that --csv wrote, and what each run keeps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = read_csv(csv_path)
    figure, axes = plt.subplot_mosaic(
        [["loss", "bytes"], ["gap", "bytes"]],
        figsize=(12, 7),
        width_ratios=(3, 2),
        height_ratios=(3, 2),
        layout="constrained",
    )
    device = next(iter(runs.values()))[0]["device"]
    draw_curves(axes["loss"], axes["gap"], runs, f"AdamW on the King James text, {device}")
    kept = {name: float(rows[-1]["bytes_per_parameter"]) for name, rows in runs.items()}
    bars = axes["bytes"].barh(list(kept), list(kept.values()), color=[f"C{i}" for i in range(len(kept))])
    axes["bytes"].bar_label(bars, fmt="%.2f", padding=2)
    axes["bytes"].margins(x=0.15)
    axes["bytes"].invert_yaxis()
    axes["bytes"].set(title="weights and state", xlabel="bytes a parameter")
    png_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path, dpi=130)


def main(argv: list[str] | None = None) -> None:
    args = parse(command(__doc__, tuple(RUNS), tuple(RUNS), 500), argv, tuple(RUNS))
    result = train(args.names, args.steps, seed=args.seed, device=args.device, show=not args.json)
    finish(args, result, report, plot, (*COLUMNS, "bytes_per_parameter"))


if __name__ == "__main__":
    main()
