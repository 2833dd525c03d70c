"""Plots, made from a CSV and nothing else: every figure names the file and the commits it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .rows import Row, ratios, read_csv

OURS = "#c2185b"
COLORS = {
    "torch float32": "#9e9e9e",
    "torch bfloat16": "#616161",
    "torch eager": "#9e9e9e",
    "torch.ao x86": "#1565c0",
    "torch.ao fbgemm": "#42a5f5",
    "torch.ao onednn": "#90caf9",
    "torch._int_mm": "#2e7d32",
    "torch._int_mm compiled": "#81c784",
    "torch.compile of the formula": "#00897b",
    "torch.compile": "#00897b",
    "torch linear_cross_entropy": "#ffb300",
    "torch checkpointed chunks": "#8d6e63",
    "torch checkpoint": "#8d6e63",
    "pykernels all": "#880e4f",
    "pykernels inputs+preact": "#ad1457",
    "pykernels int8": "#c2185b",
    "pykernels recompute_mlp": "#e91e63",
    "pykernels recompute_qkv": "#f06292",
    "pykernels checkpoint": "#f8bbd0",
    "pykernels recompute": "#f06292",
    "pykernels DTensor": "#f06292",
    "torch fused DTensor": "#1565c0",
    "torchao compiled": "#ef6c00",
    "bitsandbytes": "#6d4c41",
    "torch._weight_int8pack_mm": "#7e57c2",
    "pykernels": OURS,
    "pykernels float32": "#f06292",
    "torch fused float32": "#424242",
    "torch fused bfloat16": "#9e9e9e",
    "torch foreach": "#cfd8dc",
    "torchao 8-bit": "#ef6c00",
    "bitsandbytes 8-bit": "#6d4c41",
    "C loop": "#26a69a",
}
BLOCKS = ("rms_norm", "layer_norm", "swiglu", "geglu", "rope", "dropout")
LOSSES = ("cross_entropy", "linear_cross_entropy", "linear_kl_div")
HAS_COLD = ("int8_linear", "int8_weight_only_linear")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "figure.dpi": 120,
    "savefig.dpi": 120,
}


def draw(path: Path, out: Path, ops: Sequence[str] = ()) -> list[Path]:
    """Draws every figure the rows of `path` allow into `out` and returns the files; `ops` limits the operations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in read_csv(path) if row.op == "ceiling" or not ops or row.op in ops]
    measured = [row for row in rows if row.measured]
    out.mkdir(parents=True, exist_ok=True)
    drawings: list[tuple[str, Callable[..., Any], list[Row]]] = [
        (
            "roofline",
            roofline,
            [row for row in rows if row.op == "ceiling" or (row.ours and row.operations and row.arithmetic == "int8")],
        ),
        ("int8_linear-ratios", heatmaps, [row for row in measured if row.op == "int8_linear"]),
        ("int8_linear", rates, [row for row in rows if row.op in ("int8_linear", "ceiling")]),
        ("int8_weight_only_linear", rates, [row for row in rows if row.op in ("int8_weight_only_linear", "ceiling")]),
        ("int8_matmul", percents, [row for row in measured if row.op == "int8_matmul"]),
        ("quantize", percents, [row for row in measured if row.op.startswith("quantize")]),
        (
            "int8_training_linear",
            partial(
                time_and_bytes,
                base="torch bfloat16",
                field="saved_bytes",
                title="bytes saved for backward beside the weight",
            ),
            [row for row in measured if row.op == "int8_training_linear"],
        ),
        ("blocks", lanes, [row for row in measured if row.op in BLOCKS]),
        ("optimizers", partial(lanes, times=True), [row for row in measured if row.op == "optimizer_step"]),
        (
            "transformer_block",
            partial(time_and_bytes, base="torch eager", field="saved_bytes", title="bytes saved for backward"),
            [row for row in measured if row.op == "transformer_block"],
        ),
        (
            "losses",
            partial(
                time_and_bytes, base="torch eager", field="peak_bytes", title="most bytes held, beyond the arguments"
            ),
            [row for row in measured if row.op in LOSSES],
        ),
    ]
    written = []
    with pyplot.rc_context(STYLE):
        for name, drawing, chosen in drawings:
            if not any(row.measured for row in chosen):
                continue
            figure = drawing(pyplot, chosen)
            commits = ", ".join(sorted({row.commit for row in chosen if row.measured and row.commit}))
            device = next(row.device for row in chosen)
            threads = next((f", {row.threads} threads" for row in chosen if row.threads), "")
            figure.text(
                0.01, 0.005, f"{device}{threads} · {path.name} · commit {commits}", fontsize=7.5, color="#777777"
            )
            written.append(out / f"{path.stem}-{name}.png")
            figure.savefig(written[-1])
            pyplot.close(figure)
    return written


def _ceiling(rows: Sequence[Row], kind: str) -> float | None:
    """Operations or bytes per second."""
    for row in rows:
        if row.op == "ceiling" and row.variant == kind:
            return row.tops * 1e12 if row.tops else row.gbps * 1e9 if row.gbps else None
    return None


def _color(provider: str) -> str:
    return COLORS.get(provider, "#455a64")


def _order(rows: Sequence[Row]) -> list[str]:
    """Providers, ours first, then as the palette has them."""
    known = list(COLORS)
    found = {row.provider for row in rows if row.op != "ceiling"}
    return sorted(
        found, key=lambda name: (not name.startswith("pykernels"), known.index(name) if name in known else 99)
    )


def roofline(pyplot: Any, rows: list[Row]) -> Any:
    """Our rows under the two roofs: read bandwidth and the int8 instruction. Hollow: the machine was busy."""
    figure, axes = pyplot.subplots(figsize=(9, 5.6), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    points = [
        (row.operations / row.bytes, row)
        for row in rows
        if row.measured and row.operations and row.bytes and (row.cache == "cold" or row.op not in HAS_COLD)
    ]
    peak, read = _ceiling(rows, "int8"), _ceiling(rows, "read")
    if peak and read:
        names = {row.variant: row.provider for row in rows if row.op == "ceiling"}
        low, high = min([x for x, _ in points] + [1.0]) / 2, max([x for x, _ in points] + [1e3]) * 2
        axes.plot([low, peak / read, high], [read * low * 1e-12, peak * 1e-12, peak * 1e-12], color="#222222")
        peak_text, read_text = f"{names['int8']}: {peak * 1e-12:.3g} TOPS", f"{names['read']}: {read * 1e-9:.3g} GB/s"
        axes.text(high, peak * 1.06e-12, peak_text, ha="right", va="bottom", fontsize=9)
        axes.annotate(read_text, (low * 3, read * low * 3e-12), (12, -10), textcoords="offset points", fontsize=9)
    looks = {
        "int8_linear": ("o", OURS),
        "int8_matmul": ("s", "#1565c0"),
        "int8_weight_only_linear": ("^", "#ef6c00"),
        "int8_training_linear": ("D", "#2e7d32"),
    }
    for op in dict.fromkeys(row.op for _, row in points):
        marker, color = looks.get(op, ("P", "#455a64"))
        axes.scatter([], [], s=45, marker=marker, color=color, label=op)
        for quiet in (1, 0):
            chosen = [(x, row) for x, row in points if row.op == op and row.quiet == quiet]
            axes.scatter(
                [x for x, _ in chosen],
                [row.tops for _, row in chosen],
                s=[16 + 9 * row.dims[1] / 1024 for _, row in chosen],
                marker=marker,
                facecolors=color if quiet else "none",
                edgecolors=color,
                alpha=0.8,
                linewidths=0.8,
            )
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="TOPS")
    axes.set_title("pykernels on the roofline (larger markers: larger N; int8_linear and W8A16 with cold weights)")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(loc="lower right")
    return figure


def heatmaps(pyplot: Any, rows: list[Row]) -> Any:
    """Time of the fastest peer over ours in every cell, the peer named."""
    from matplotlib.colors import TwoSlopeNorm

    found = ratios(rows)
    caches = [cache for cache in ("cold", "warm") if any(ours.cache == cache for ours, _, _ in found)]
    figure, panels = pyplot.subplots(
        1, len(caches), figsize=(6.2 * len(caches), 4.8), squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    norm = TwoSlopeNorm(1.0, 0.5, 3.0)
    for axes, cache in zip(panels[0], caches, strict=True):
        cells = {ours.dims[:2]: (ours, peer, ratio) for ours, peer, ratio in found if ours.cache == cache}
        ms, ns = sorted({m for m, _ in cells}), sorted({n for _, n in cells})
        grid = [[float("nan")] * len(ns) for _ in ms]
        for (m, n), (ours, peer, ratio) in cells.items():
            i, j = ms.index(m), ns.index(n)
            quiet = ours.quiet and peer.quiet
            grid[i][j] = ratio if quiet else float("nan")
            dark = quiet and (ratio > 2.3 or ratio < 0.6)
            name = f"vs {peer.provider}" if quiet else f"vs {peer.provider}, busy machine"
            place = {"ha": "center", "va": "center", "color": "white" if dark else "#222222" if quiet else "#999999"}
            axes.text(j, i, f"{ratio:.2f}x\n", fontsize=12, fontweight="bold" if quiet else "normal", **place)
            axes.text(j, i, f"\n{name}", fontsize=7.5, **place)
        axes.imshow(grid, cmap="PiYG", norm=norm, aspect="auto")
        axes.set(
            xticks=range(len(ns)),
            xticklabels=ns,
            yticks=range(len(ms)),
            yticklabels=ms,
            xlabel="N = K",
            ylabel="M",
            title=f"weights {cache}",
        )
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.suptitle(f"{rows[0].op}: how many times faster than the fastest peer", fontweight="bold")
    return figure


def rates(pyplot: Any, rows: list[Row]) -> Any:
    """TOPS over M for every provider, one panel a weight size, weights cold."""
    peak = _ceiling(rows, "int8")
    chosen = [row for row in rows if row.measured and row.cache == "cold"]
    sizes = sorted({row.dims[1] for row in chosen})
    figure, panels = pyplot.subplots(
        1, len(sizes), figsize=(3.8 * len(sizes) + 3.0, 5.6), squeeze=False, sharey=True, layout="constrained"
    )
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    for axes, size in zip(panels[0], sizes, strict=True):
        for provider in reversed(_order(chosen)):
            line = sorted(
                (row for row in chosen if row.provider == provider and row.dims[1] == size), key=lambda row: row.dims[0]
            )
            ours = provider.startswith("pykernels")
            axes.plot(
                [row.dims[0] for row in line],
                [row.tops for row in line],
                color=_color(provider),
                marker="o",
                markersize=5 if ours else 3.5,
                linewidth=2.6 if ours else 1.3,
                label=provider,
            )
        if peak:
            axes.axhline(peak * 1e-12, color="#222222", linestyle="--", linewidth=1)
        ms = sorted({row.dims[0] for row in chosen})
        axes.set(xscale="log", yscale="log", xlabel="M", title=f"N = K = {size}", xticks=ms, xticklabels=ms)
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
    panels[0][0].set_ylabel("TOPS" + (" (dashed: the ceiling of the int8 instruction)" if peak else ""))
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside upper center", ncols=min(2 + len(sizes), len(labels)), fontsize=9
    )
    return figure


def percents(pyplot: Any, rows: list[Row]) -> Any:
    """Percent of the ceiling, a group of bars for each cell."""
    groups = list(dict.fromkeys((row.op, row.variant, row.shape) for row in rows))
    providers = _order(rows)
    figure, axes = pyplot.subplots(figsize=(max(7.0, 1.9 * len(groups) + 2.2), 5.0), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    width = 0.84 / len(providers)
    for index, provider in enumerate(providers):
        heights = {(row.op, row.variant, row.shape): row.ceiling_percent for row in rows if row.provider == provider}
        places = [
            i + (index - (len(providers) - 1) / 2) * width for i, group in enumerate(groups) if heights.get(group)
        ]
        values = [heights[group] or 0.0 for group in groups if heights.get(group)]
        bars = axes.bar(places, values, width * 0.92, color=_color(provider), label=provider)
        if provider.startswith("pykernels"):
            axes.bar_label(bars, fmt="%.0f", fontsize=9, fontweight="bold", color=_color(provider))
    same = len({group[0] for group in groups}) == 1
    labels = [
        f"{_times(shape)}" if same and variant == "forward" else f"{op}\n{_times(shape)}\n{variant}"
        for op, variant, shape in groups
    ]
    ceiling = {"int8": "the int8 instruction's rate", "copy": "the copy bandwidth", "read": "the read bandwidth"}
    kinds = sorted({ceiling.get(row.ceiling, row.ceiling) for row in rows if row.ceiling})
    axes.axhline(100, color="#222222", linestyle="--", linewidth=1)
    axes.set(xticks=range(len(groups)), ylabel=f"percent of {' or '.join(kinds)}")
    axes.set_xticklabels(labels, fontsize=9)
    axes.grid(False, axis="x")
    figure.legend(loc="outside upper center", ncols=min(4, len(providers)), fontsize=9)
    return figure


def lanes(pyplot: Any, rows: list[Row], times: bool = False) -> Any:
    """Percent of the ceiling as `percents` draws it, or milliseconds, lying down: for many cells."""
    ordered = sorted(rows, key=lambda row: (row.op, row.variant, row.dims))
    groups = list(dict.fromkeys((row.op, row.variant, row.shape) for row in ordered))
    providers = _order(rows)
    figure, axes = pyplot.subplots(figsize=(9.0, 0.42 * len(groups) + 1.6), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.02, 1, 0.98))
    height = 0.84 / len(providers)
    for index, provider in enumerate(providers):
        found = {
            (row.op, row.variant, row.shape): (row.p50_us or 0.0) / 1e3 if times else row.ceiling_percent
            for row in rows
            if row.provider == provider
        }
        places = [i + (index - (len(providers) - 1) / 2) * height for i, group in enumerate(groups) if found.get(group)]
        values = [found[group] or 0.0 for group in groups if found.get(group)]
        bars = axes.barh(places, values, height * 0.92, color=_color(provider), label=provider)
        if provider.startswith("pykernels"):
            text = "%.1f" if times else "%.0f"
            axes.bar_label(bars, fmt=text, fontsize=8, fontweight="bold", color=_color(provider), padding=2)
    if times:
        axes.set(xscale="log", xlabel="milliseconds a step; shape is tensors × rows × columns")
        labels = [f"{variant}, {_times(shape)}" for _, variant, shape in groups]
    else:
        axes.axvline(100, color="#222222", linestyle="--", linewidth=1)
        axes.set(xlabel="percent of the copy bandwidth, forward and backward")
        labels = [f"{op} {_times(shape)}, {variant.removeprefix('forward+backward ')}" for op, variant, shape in groups]
    axes.set(yticks=range(len(groups)))
    axes.set_yticklabels(labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.grid(False, axis="y")
    figure.legend(loc="outside upper center", ncols=min(4, len(providers)), fontsize=9)
    return figure


def time_and_bytes(pyplot: Any, rows: list[Row], base: str, field: str, title: str) -> Any:
    """Time of a call, and the bytes of a field of its row, each against those of the provider `base`."""
    groups = list(dict.fromkeys((row.op, row.variant, row.shape) for row in rows))
    providers = _order(rows)
    figure, panels = pyplot.subplots(1, 2, figsize=(max(12.0, 3.2 * len(groups) + 2.0), 4.8), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    width = 0.84 / len(providers)
    values: tuple[tuple[str, str, str, Callable[[Row], float | None]], ...] = (
        ("time, forward and backward", "{:.3g} ms", "s", lambda row: row.p50_us and row.p50_us * 1e-3),
        (title, "{:.3g} MB", "GB", lambda row: getattr(row, field) and getattr(row, field) * 1e-6),
    )
    for axes, (heading, text, larger, value) in zip(panels, values, strict=True):
        bases = {(row.op, row.variant, row.shape): value(row) for row in rows if row.provider == base}
        for index, provider in enumerate(providers):
            found = {(row.op, row.variant, row.shape): value(row) for row in rows if row.provider == provider}
            places, heights, labels = [], [], []
            for i, group in enumerate(groups):
                mine, other = found.get(group), bases.get(group)
                if mine and other:
                    places.append(i + (index - (len(providers) - 1) / 2) * width)
                    heights.append(mine / other)
                    labels.append(text.format(mine) if mine < 1000 else f"{mine / 1000:.2f} {larger}")
            bars = axes.bar(places, heights, width * 0.92, color=_color(provider), label=provider)
            axes.bar_label(bars, labels, fontsize=8)
        axes.axhline(1, color="#222222", linestyle="--", linewidth=1)
        axes.set(xticks=range(len(groups)), xticklabels=_labels(groups), ylabel=f"times {base}'s")
        axes.set_title(heading)
        axes.grid(False, axis="x")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize=9)
    return figure


def _labels(groups: list[tuple[str, str, str]]) -> list[str]:
    """The shape of each group, and above it what is not the same for all."""
    ops, variants = ({group[i] for group in groups} for i in range(2))
    return [
        "\n".join(
            [
                *([op] if len(ops) > 1 else []),
                _times(shape),
                *([variant.removeprefix("forward+backward ")] if len(variants) > 1 else []),
            ]
        )
        for op, variant, shape in groups
    ]


def _times(shape: str) -> str:
    return shape.replace("x", " × ")
