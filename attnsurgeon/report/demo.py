"""The demo's story in one table."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from attnsurgeon.demo import Demo, Lesson
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
        *(Text(line) for line in _told(done.lesson)),
        Text(""),
        show_report(done.speed),
        Text(""),
        Text("files"),
        *(Text(f"  {path}") for path in done.files),
    )


def _told(lesson: Lesson) -> list[str]:
    """Return what the fine-tuning did."""
    before, after = (100 * lesson.accuracy[when] for when in ("before", "after"))
    gates = sorted(lesson.gates.values(), key=abs)
    return [
        f"fine-tuned        {lesson.steps} steps on {lesson.images} digits under heavy noise",
        f"noisy digits      {before:.1f} % read right before, {after:.1f} % after"
        f" ({lesson.tested_on} others than it saw)",
        f"gates             all were 0; now {abs(gates[0]):.2f} to {abs(gates[-1]):.2f} open",
        f"next              attnsurgeon gates {lesson.file}",
    ]
