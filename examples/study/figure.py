"""The picture of the study: accuracy along the steps, and what is left at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

COLOURS = {
    "plain": "#000000",
    "only": "#999999",
    "se": "#0072b2",
    "cbam": "#d55e00",
    "sk": "#009e73",
    "gc": "#cc79a7",
    "nonlocal": "#e69f00",
}
"""Of the first word of an arm; told apart by the colour-blind too."""

BLOCKS = ("se", "cbam", "sk", "gc")
BESIDE = ("plain", "only rescales, per channel")
"""Drawn in every panel, beside the arms of its block."""
SHOWN = (-10.0, 5.0)
"""Points: an arm that lost its network altogether would hide what all others differ by."""


def draw(results: dict[str, Any], path: Path) -> None:
    """Write one picture, .svg or .png; the same results give the same bytes."""
    with mpl.rc_context({"svg.hashsalt": "study", "svg.fonttype": "none", "font.size": 9}):
        figure: Any = Figure(figsize=(11, 9), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=[1, 1.75])
        curves = above.subplots(1, len(BLOCKS), sharey=True)
        for axes, block in zip(curves, BLOCKS, strict=True):
            _curves(axes, results, block)
        curves[0].set_ylabel(f"read rightly, % ({results['seeds']} seeds, 95 % intervals)")
        rows = [row for row in results["arms"] if row["arm"] != "plain"]
        half = -(-len(rows) // 2)
        ends = below.subplots(1, 2, sharex=True)
        for axes, share in zip(ends, (rows[:half], rows[half:]), strict=True):
            _ends(axes, share, half)
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, metadata=metadata)


def _colour(name: str) -> str:
    return COLOURS[name.replace(",", " ").split()[0]]


def _curves(axes: Any, results: dict[str, Any], block: str) -> None:
    """Draw the first half: accuracy along the steps of one block's arms, with its interval."""
    steps = results["steps"]
    for row in results["arms"]:
        name = row["arm"]
        if row["half"] != 1 or (name not in BESIDE and not name.startswith(block)):
            continue
        means, low, high = (
            [100 * (mean + side * half) for mean, half in row["accuracy"]] for side in (0, -1, 1)
        )
        style = ":" if "without" in name else "--" if "zero" in name or "per ch" in name else "-"
        axes.plot(steps, means, style, color=_colour(name), label=name, linewidth=1.6)
        axes.fill_between(steps, low, high, color=_colour(name), alpha=0.1, linewidth=0)
    axes.set_xlabel("steps of fine-tuning")
    axes.set_ylim(5, 75)
    axes.legend(frameon=False, fontsize=7.5, loc="lower right")
    axes.grid(alpha=0.25)


def _ends(axes: Any, rows: list[dict[str, Any]], places: int) -> None:
    """Draw the end of some arms against plain fine-tuning, seed by seed, with its interval."""
    for place, row in enumerate(rows):
        mean, half = (100 * number for number in row["against_plain"])
        colour = _colour(row["arm"])
        if mean < SHOWN[0]:
            told = f"\u25c0 {mean:.0f} \u00b1 {half:.0f}"
            axes.text(SHOWN[0] + 0.2, place, told, color=colour, fontsize=8, va="center")
            continue
        axes.errorbar(mean, place, xerr=half, fmt="o", color=colour, markersize=4, capsize=2)
    axes.axvline(0, color=COLOURS["plain"], linewidth=1)
    axes.set_yticks(range(len(rows)), [row["arm"] for row in rows], fontsize=8)
    axes.set_ylim(places - 0.4, -0.6)
    axes.set_xlim(*SHOWN)
    axes.set_xlabel("points against plain fine-tuning at the end")
    axes.grid(axis="x", alpha=0.25)
