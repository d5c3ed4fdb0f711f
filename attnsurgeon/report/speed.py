"""A bench report as tables."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from attnsurgeon.bench import Report
from attnsurgeon.report.table import new_table


def show_report(report: Report) -> RenderableType:
    """Return the runs and the comparisons."""
    runs = new_table("time per run, gates open")
    for heading in ("target", "engine", "device"):
        runs.add_column(heading)
    for heading in ("batch", "median ms", "p5", "p95", "parameters", "multiply-adds", "MiB"):
        runs.add_column(heading, justify="right")
    data = report.to_json()
    for run in data["runs"]:
        size = run["file_bytes"]
        runs.add_row(
            run["target"],
            run["engine"],
            run["device"],
            str(run["batch"]),
            *(f"{run[key]:.3g}" for key in ("median_ms", "p5_ms", "p95_ms")),
            f"{run['parameters']:,}" if run["parameters"] else "",
            f"{run['macs']:,}" if run["macs"] else "",
            f"{size / 2**20:.1f}" if size else "",
        )
    lines = [
        f"{c['target']} against {c['baseline']}, {c['engine']}, batch {c['batch']}: {c['verdict']}"
        for c in data["comparisons"]
    ]
    lines += [f"note: {note}" for note in data["environment"]["notes"]]
    return Group(runs, *(Text(line) for line in lines))
