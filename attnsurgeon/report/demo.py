"""The demo's story in one table."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from attnsurgeon.demo import Demo
from attnsurgeon.report.insertion import show_insertion
from attnsurgeon.report.speed import show_report
from attnsurgeon.report.table import new_table

_NAMES = {"before": "digits, untouched", "after": "with attention, gates closed"}


def show_demo(done: Demo) -> RenderableType:
    """Return the insertion, the accuracies, the cost and the files."""
    table = new_table(f"read right of {done.images} held-out digits")
    table.add_column("network")
    table.add_column("accuracy", justify="right")
    for name, accuracy in done.accuracy.items():
        table.add_row(_NAMES.get(name, name), f"{100 * accuracy:.2f} %")
    return Group(
        show_insertion(done.insertion),
        Text(""),
        table,
        Text("logits            bitwise equal before and after"),
        Text(""),
        show_report(done.speed),
        Text(""),
        Text("files"),
        *(Text(f"  {path}") for path in done.files),
    )
