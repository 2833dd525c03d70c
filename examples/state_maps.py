"""Which 8-bit map keeps AdamW's state best: train a small language model with each, against float32 state.

    python examples/state_maps.py --steps 500 --csv maps.csv --plot maps.png

Every run starts from the same weights and sees the same batches, in lockstep; all that differs is how the two moments
are stored between steps (blocks of 256, one float32 scale each). A map gives the positive values of 127 or 255 codes:
- dynamic: Dettmers et al., "8-bit optimizers via block-wise quantization" (2022): decades, each cut linearly, the
  larger the finer; what bitsandbytes uses.
- linear: equal steps for the first moment, and for the root of the second.
- square: equal steps in the root of both; what pykernels uses.
Rounding is to the nearest value, or dithered: up with the probability of the fraction, from a Weyl sequence over steps.
"""

from __future__ import annotations

from collections.abc import Callable
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
from torch import Tensor
from train_blocks import Llama, Shape

BLOCK = 256
BETAS, EPS, DECAY = (0.9, 0.999), 1e-8, 0.1


def dynamic(codes: int) -> Tensor:
    """0 and the positive values of the dynamic map: each lower decade is cut into half as many linear steps."""
    bits = 7 if codes == 255 else 6
    values = [torch.zeros(1)]
    for decade in range(bits + 1):
        steps = 2 ** (bits - decade)
        edges = torch.linspace(0.1, 1.0, steps + 1)
        values.append(10.0**-decade * (edges[:-1] + edges[1:]) / 2)
    table = torch.cat(values).sort().values
    return table / table[-1]


def power(exponent: int) -> Callable[[int], Tensor]:
    """(k / codes) ^ exponent for k = 0 .. codes."""
    return lambda codes: (torch.arange(codes + 1) / codes) ** exponent


# For the first moment's magnitude, and for the second moment.
MAPS = {"dynamic": (dynamic, dynamic), "linear": (power(1), power(2)), "square": (power(2), power(2))}
RUNS = ("float32", *(f"{name} {rounding}" for name in MAPS for rounding in ("nearest", "dithered")))


def stored(x: Tensor, table: Tensor, dither: Tensor | None, keep_positive: bool) -> Tensor:
    """x [n, BLOCK] >= 0 after a trip through the codes of the table, scaled by each row's maximum."""
    scale = x.amax(1, keepdim=True)
    unit = torch.where(scale > 0, x / scale, 0.0)
    above = torch.bucketize(unit, table).clamp(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    fraction = (unit - low) / (high - low)
    up = fraction > (0.5 if dither is None else 1.0 - dither)
    code = above - 1 + up.long()
    if keep_positive:
        code = torch.where(unit > 0, code.clamp(min=1), code)
    return table[code] * scale


class MappedAdamW(torch.optim.Optimizer):
    """AdamW in float32 whose matrices' moments pass through a map after every step."""

    def __init__(self, params, lr: float, name: str) -> None:
        super().__init__(params, {"lr": lr})
        self.tables, self.dithered = None, name.endswith("dithered")
        if name != "float32":
            first, second = MAPS[name.split()[0]]
            self.tables = first(127), second(255)

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            state, lr = self.state[p], self.param_groups[0]["lr"]
            if not state:
                state |= {"step": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            state["step"] += 1
            t, m, v = state["step"], state["m"], state["v"]
            m.lerp_(p.grad, 1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(p.grad, p.grad, value=1 - BETAS[1])
            p.mul_(1 - lr * DECAY)
            root = (v / (1 - BETAS[1] ** t)).sqrt_().add_(EPS)
            p.addcdiv_(m, root, value=-lr / (1 - BETAS[0] ** t))
            if self.tables is not None and p.dim() == 2 and p.numel() % BLOCK == 0:
                index = torch.arange(p.numel(), device=p.device).reshape(-1, BLOCK)
                tables = [table.to(p.device) for table in self.tables]
                dither = (index * 0x85EBCA6B + t * 0x9E3779B1) % 2**32 / 2.0**32 if self.dithered else None
                rows = m.reshape(-1, BLOCK)
                m.copy_((rows.sign() * stored(rows.abs(), tables[0], dither, False)).reshape(m.shape))
                v.copy_(stored(v.reshape(-1, BLOCK), tables[1], dither, True).reshape(v.shape))


def train(
    names: tuple[str, ...], steps: int, lr: float, seed: int, every: int, shape: Shape, device: str, show: bool
) -> dict:
    """Trains a run for each name; returns curves as rows of COLUMNS and the final losses."""
    text = corpus()
    cut = len(text) * 19 // 20
    runs = []
    for name in names:
        torch.manual_seed(seed)
        model = Llama(shape, "inputs+preact").to(device)
        runs.append(Run(name, model, MappedAdamW(model.parameters(), lr, name)))
    train_batches = batches(text[:cut], shape.batch, shape.context, steps, seed, device)
    held_out = batches(text[cut:], shape.batch, shape.context, 16, seed, device)
    rows = lockstep(runs, train_batches, held_out, lr, every, device, show)
    return {"final_validation_loss": final_losses(rows), "rows": rows}


def plot(csv_path: Path, png_path: Path) -> None:
    """Draws the distance of each run's loss from float32 state's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), height_ratios=(3, 3), layout="constrained")
    draw_curves(top, bottom, read_csv(csv_path), "8-bit maps for AdamW's state, small language model")
    figure.savefig(png_path, dpi=130)


def report(result: dict) -> None:
    """The lines a person reads."""
    first = next(iter(result["final_validation_loss"].values()))
    for name, loss in result["final_validation_loss"].items():
        print(f"{name:18} {loss:.4f}  {100 * (loss / first - 1):+.2f} %")


def main(argv: list[str] | None = None) -> None:
    parser = command(__doc__, RUNS, RUNS, 500)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parse(parser, argv, RUNS)
    shape = Shape(dim=128, layers=4, heads=4, kv_heads=2, context=64, batch=8)
    result = train(args.names, args.steps, args.lr, args.seed, 25, shape, args.device, not args.json)
    finish(args, result, report, plot)


if __name__ == "__main__":
    main()
