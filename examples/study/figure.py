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


BLOCKS = (("se", "cbam"), ("sk", "gc"))
BESIDE = ("plain", "only rescales, per channel")
"""Drawn in every panel, beside the arms of its block."""


def draw(results: dict[str, Any], path: Path) -> None:
    """Write one picture, .svg or .png; the same results give the same bytes."""
    with mpl.rc_context({"svg.hashsalt": "study", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(11, 7), layout="constrained")
        panels = figure.subplot_mosaic(
            [[*row, "ends"] for row in BLOCKS], width_ratios=[1, 1, 1.15]
        )
        for block in (block for row in BLOCKS for block in row):
            _curves(panels[block], results, block)
        _ends(panels["ends"], results)
        figure.suptitle(
            f"held-out images read rightly, % ({results['seeds']} seeds, 95 % intervals)",
            x=0.01,
            ha="left",
        )
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
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.grid(alpha=0.25)


def _ends(axes: Any, results: dict[str, Any]) -> None:
    """Draw both halves: the end against plain fine-tuning, seed by seed, with its interval."""
    rows = [row for row in results["arms"] if row["arm"] != "plain"][::-1]
    for i, row in enumerate(rows):
        mean, half = (100 * number for number in row["against_plain"])
        colour = _colour(row["arm"])
        axes.errorbar(mean, i, xerr=half, fmt="o", color=colour, markersize=4, capsize=2)
    axes.axvline(0, color=COLOURS["plain"], linewidth=1)
    axes.set_yticks(range(len(rows)), [row["arm"] for row in rows], fontsize=7.5)
    axes.set_xlabel("points against plain fine-tuning at the end")
    axes.grid(axis="x", alpha=0.25)
