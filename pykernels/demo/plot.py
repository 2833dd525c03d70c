"""The demo's picture: for each model its size, its two latencies and what quantisation costs in quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

from .report import TITLES
from .run import Row

_OURS, _THEIRS, _INK, _MUTED = "#1f6feb", "#a8b0ba", "#1f2328", "#6e7781"


@dataclass(frozen=True)
class Panel:
    """What one row of bars shows: a title, the length of a bar, its label and, where one bar dwarfs all, a limit."""

    title: str
    length: Callable[[Row], float]
    label: Callable[[Row], str]
    clip: bool = False


def _value(key: str) -> Callable[[Row], float]:
    return lambda row: row.values[key]


def _label(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: form.format(row.values[key])


PANELS = {
    "SmolLM2-135M": (
        Panel("model size, MB", lambda r: r.values["bytes"] / 1e6, lambda r: f"{r.values['bytes'] / 1e6:.0f}"),
        Panel("prefill of 512 tokens, ms", _value("prefill_ms"), _label("prefill_ms", "{:.0f}")),
        Panel("one decoding step, ms", _value("decode_ms"), _label("decode_ms", "{:.1f}")),
        Panel(
            "rise of the loss, nats/token",
            lambda r: max(r.values["loss_rise"], 0.0),
            _label("loss_rise", "{:+.4f}"),
            clip=True,
        ),
    ),
    "MiniLM-L6": (
        Panel("model size, MB", lambda r: r.values["bytes"] / 1e6, lambda r: f"{r.values['bytes'] / 1e6:.0f}"),
        Panel("1 sentence, ms", _value("one_ms"), _label("one_ms", "{:.1f}")),
        Panel("32 sentences, ms", _value("batch_ms"), _label("batch_ms", "{:.0f}")),
        Panel(
            "1 − cosine to float32",
            lambda r: max(1 - r.values["cosine"], 0.0),
            lambda r: f"{abs(1 - r.values['cosine']):.5f}",
            clip=True,
        ),
    ),
}


def _draw(axes: Any, rows: Sequence[Row], panel: Panel) -> None:
    lengths = [panel.length(row) if not row.absent else 0.0 for row in rows]
    ordered = sorted(lengths)
    longest = ordered[-1]
    if panel.clip and len(ordered) > 2 and ordered[-1] > 3 * ordered[-2] > 0:
        longest = 1.5 * ordered[-2]
    limit = 1.45 * longest if longest > 0 else 1.0
    for y, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ours = row.variant.startswith("pykernels")
        axes.barh(y, min(length, longest), height=0.68, color=_OURS if ours else _THEIRS)
        text = "absent" if row.absent else panel.label(row)
        if length > longest:
            axes.plot([0.78 * longest, 0.84 * longest], [y - 0.5, y + 0.5], color="white", linewidth=3)
        color = _MUTED if row.absent else _INK
        axes.text(min(length, longest) + 0.02 * limit, y, text, va="center", ha="left", fontsize=9, color=color)
    axes.set_xlim(0, limit)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title(panel.title, fontsize=10, loc="left", color=_INK)
    axes.xaxis.set_visible(False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color("#d0d7de")
    axes.tick_params(length=0, labelcolor=_INK, labelsize=9)


def save_plot(rows: Sequence[Row], caption: str, path: Path) -> None:
    """Write the picture of ``rows`` as a PNG.

    Args:
        caption: one line under the panels: the machine and the versions.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    shown = {model: [row for row in rows if row.model == model] for model in PANELS}
    shown = {model: found for model, found in shown.items() if found}
    bars = max(len(found) for found in shown.values())
    height = (0.30 * bars + 0.95) * len(shown) + 0.35
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08, rect=(0, 0.35 / height, 1, 1 - 0.35 / height))
    figure = pyplot.figure(figsize=(13, height), layout=layout)
    parts = figure.subfigures(len(shown), 1, squeeze=False)[:, 0]
    for part, (model, found) in zip(parts, shown.items(), strict=True):
        part.suptitle(TITLES[model], x=0.008, ha="left", fontsize=12, fontweight="bold", color=_INK)
        line = part.subplots(1, 4)
        for axes, panel in zip(line, PANELS[model], strict=True):
            _draw(axes, found, panel)
            axes.set_yticks(range(len(found)), [""] * len(found))
        line[0].set_yticklabels([row.variant for row in found])
        for label, row in zip(line[0].get_yticklabels(), found, strict=True):
            label.set_fontweight("bold" if row.variant.startswith("pykernels") else "normal")
    figure.text(0.008, 0.12 / height, f"{caption}. Shorter is better everywhere.", fontsize=8.5, color=_MUTED)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, facecolor="white")
    pyplot.close(figure)
