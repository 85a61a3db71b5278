"""Figures as SVG text: what was lost, and which channels were split off."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from splitq_jax.errors import InputError
from splitq_jax.eval.report import FLOAT, Channels, Summary

INK, MUTED, GRID = "#1c2733", "#66727f", "#e3e7eb"
BAR, OURS = "#a9b8c6", "#1f6fb2"
VISION, TEXT = "#c8553d", "#1f6fb2"  # told apart by lightness as well
STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "xtick.color": MUTED,
    "ytick.color": INK,
    "ytick.major.size": 0,
    "svg.hashsalt": "splitq",  # the same figure, the same bytes
}


def losses(summaries: Sequence[Summary]) -> str:
    """Draw a line of two panels for each scheme: accuracy with its 95 % interval, and KL from float; one bar a method.

    The dashed line is the float model's accuracy. Every axis starts at 0; the accuracies share theirs. No bar where nothing was compared.

    Raises:
      InputError: nothing but the float model; matplotlib is missing.
    """
    methods = list(dict.fromkeys(s.row.method for s in summaries if s.row.scheme != FLOAT))
    schemes = list(dict.fromkeys(s.row.scheme for s in summaries if s.row.scheme != FLOAT))
    reference = next((s.row for s in summaries if s.row.scheme == FLOAT), None)
    if not schemes:
        raise InputError("report: only the float model was evaluated; there is nothing to compare")
    figure, axes = _subplots(len(schemes), 2, (11.0, len(schemes) * (0.75 + 0.24 * len(methods))), False, True)
    for (left, right), scheme in zip(axes, schemes, strict=True):
        found = {s.row.method: s.row for s in summaries if s.row.scheme == scheme}
        y = [methods.index(m) for m in found]
        colours = [OURS if m.startswith("splitq") else BAR for m in found]
        accuracy = np.array([100 * r.accuracy for r in found.values()])
        ends = 100 * np.array([r.interval for r in found.values()]).T  # 2 M
        error = {"ecolor": INK, "elinewidth": 1, "capsize": 2}
        left.barh(y, accuracy, 0.66, xerr=np.abs(ends - accuracy), color=colours, error_kw=error)
        for i, value in zip(y, accuracy, strict=True):
            left.text(108, i, f"{value:.1f}", va="center", ha="right", color=INK, fontsize=8)
        if reference is not None:
            left.axvline(100 * reference.accuracy, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        left.set(xlim=(0, 108), xticks=range(0, 101, 20))
        left.set_title(f"{scheme.upper()}: accuracy, %", loc="left", fontweight="bold")
        kl = np.array([r.kl or 0.0 for r in found.values()])
        right.barh(y, kl, 0.66, color=colours)
        for i, row in zip(y, found.values(), strict=True):
            if row.kl is not None:
                right.text(row.kl + 0.012 * kl.max(), i, f"{row.kl:.3f}", va="center", color=INK, fontsize=8)
        right.set(xlim=(0, max(1.12 * float(kl.max()), 1e-9)))
        right.locator_params(axis="x", nbins=5)
        right.set_title("KL from float, nats", loc="left", fontweight="bold")
        for axis in (left, right):
            axis.set_yticks(range(len(methods)), methods)
            axis.set_ylim(len(methods) - 0.4, -0.6)  # the first method on top
            axis.grid(axis="x", color=GRID, linewidth=0.8)
    return _svg(figure)


def channel_maxima(channels: Channels) -> str:
    """Draw each input channel's largest magnitude over the calibration tokens, for vision and for text (log scale).

    Channels that were split off are drawn large: C_v in the vision panel, C_t in the text panel, with the other set in outline.
    """
    figure, axes = _subplots(2, 1, (11.0, 4.2), True, False)
    index = np.arange(channels.vision.size)
    panels = (
        ("vision tokens", channels.vision, VISION, channels.vision_chosen, TEXT, channels.text_chosen),
        ("text tokens", channels.text, TEXT, channels.text_chosen, VISION, channels.vision_chosen),
    )
    for (axis,), (name, value, colour, own, other_colour, other) in zip(axes, panels, strict=True):
        floor = float(np.min(value[value > 0], initial=1.0))  # a log scale has no 0
        height = np.maximum(value, floor)
        axis.vlines(index, floor, height, color=BAR, linewidth=max(0.3, min(1.2, 500 / max(index.size, 1))))
        axis.scatter(other, height[other], 14, facecolors="white", edgecolors=other_colour, linewidths=0.9, zorder=3)
        axis.vlines(own, floor, height[own], color=colour, linewidth=1.2)
        axis.scatter(own, height[own], 18, color=colour, zorder=4)
        axis.set_yscale("log")
        axis.minorticks_off()
        axis.set_ylim(floor * 0.8, float(height.max()) * 2)
        axis.set_xlim(-0.01 * index.size, 1.01 * index.size)
        axis.set_title(f"{channels.site}: {name}", loc="left", fontweight="bold")
        axis.set_title(f"{len(own)} channels split off", loc="right", color=colour, fontsize=9)
        axis.set_ylabel("largest |x|")
        axis.tick_params(axis="y", colors=MUTED)
        axis.grid(axis="y", color=GRID, linewidth=0.8)
    axes[1][0].set_xlabel("input channel")
    return _svg(figure)


def _subplots(rows: int, columns: int, size: tuple[float, float], sharex: bool, sharey: bool) -> tuple[Any, Any]:
    """Make a figure of its own, without pyplot's global state."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as e:
        raise InputError("plots need matplotlib: pip install 'splitq-jax[demo]'") from e
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.06))
        axes = figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
