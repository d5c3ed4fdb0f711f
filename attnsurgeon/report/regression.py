"""What changed between two results files, as a table."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from attnsurgeon.bench.interval import Estimate
from attnsurgeon.bench.regression import Regression
from attnsurgeon.report.figures import supported
from attnsurgeon.report.table import new_table


def show_regression(found: Regression) -> RenderableType:
    """Return every change, and what stands in one file only."""
    table = new_table("new over old")
    table.add_column("what")
    for heading in ("old", "new"):
        table.add_column(heading, justify="right")
    table.add_column("change")
    for change in found.changes:
        table.add_row(change.what, _shown(change.old), _shown(change.new), change.verdict)
    notes = [*found.unmatched, *(f"note: {note}" for note in found.notes)]
    return Group(table, *(Text(note) for note in notes))


def _shown(figure: Estimate) -> str:
    return supported(figure.ratio, (figure.low, figure.high))
