"""An exported file as a table of the checks it passed."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from attnsurgeon.export import Artifact
from attnsurgeon.report.table import new_table


def show_artifact(artifact: Artifact) -> RenderableType:
    """Return every comparison with the model, and what was written."""
    table = new_table(f"{artifact.output} against the model, from disk")
    for heading in ("gates", "batch", "size"):
        table.add_column(heading)
    for heading in ("max abs", "max rel", "cosine", "top-1 same", ""):
        table.add_column(heading, justify="right")
    for check in artifact.checks:
        table.add_row(
            check.gates,
            str(check.batch),
            f"{check.size[0]}x{check.size[1]}",
            f"{check.max_abs:.1e}",
            f"{check.max_rel:.1e}",
            f"{check.cosine:.6f}",
            f"{100 * check.top1_agreement:.0f} %",
            "passed" if check.passed else "FAILED",
        )
    axes = "batch, height and width free" if artifact.dynamic else "all axes fixed"
    opset = f", opset {artifact.opset}" if artifact.opset else ""
    size = f"{artifact.bytes / 2**20:.1f} MiB"
    return Group(
        table, Text(f"written  {artifact.output}: {artifact.format}{opset}, {size}, {axes}")
    )
