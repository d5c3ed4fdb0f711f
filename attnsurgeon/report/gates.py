"""How far the gates opened, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from attnsurgeon.report.table import new_table
from attnsurgeon.training.images import Sample
from attnsurgeon.training.openings import Opening


def show_openings(name: str, openings: Sequence[Opening], sample: Sample) -> RenderableType:
    """Return one row for each attention, along the depth."""
    table = new_table(f"gates of {name}")
    table.add_column("site", overflow="fold")
    for heading in ("block", "placement"):
        table.add_column(heading)
    for heading in ("gate", "varies", "output", "top-1"):
        table.add_column(heading, justify="right")
    for opening in openings:
        top1 = opening.change.top1
        table.add_row(
            opening.cut.path,
            opening.cut.block,
            opening.cut.placement,
            " ".join(f"{value:+.4f}" for value in opening.gates.values()),
            f"{opening.variation:.1%}",
            f"{opening.change.relative:.2%}",
            "" if top1 is None else f"{top1:.1%}",
        )
    return Group(table, *(Text(line) for line in summary(openings, sample)))


def summary(openings: Sequence[Opening], sample: Sample) -> list[str]:
    """Return the lines under the table."""
    lines = [f"measured on {sample.source}"]
    if all(opening.openness == 0 for opening in openings):
        lines.append("every gate is closed: as inserted, not trained since")
    if "noise" in sample.source:
        lines.append("noise says little about `varies` and `output`: give --images FOLDER")
    return lines


def openings_to_json(
    name: str, openings: Sequence[Opening], sample: Sample, chart: Path | None
) -> dict[str, Any]:
    """Return plain values."""
    return {
        "file": name,
        "images": {"source": sample.source, "count": sample.count},
        "chart": None if chart is None else str(chart),
        "sites": [opening.to_json() for opening in openings],
    }
