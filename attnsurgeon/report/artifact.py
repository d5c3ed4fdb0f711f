"""An exported file as a table of the checks it passed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attnsurgeon.export import Agreement, Artifact, Check
from attnsurgeon.report.table import new_table


def show_artifact(artifact: Artifact) -> RenderableType:
    """Return every comparison with the model, and what was written."""
    axes = f"{_listed(artifact.fixed)} fixed" if artifact.fixed else "batch, height and width free"
    opset = f", opset {artifact.opset}" if artifact.opset else ""
    numbers = f" in {artifact.precision.name}" if artifact.precision else ""
    size = f"{artifact.bytes / 2**20:.1f} MiB"
    return Group(
        _table(artifact.output, artifact.checks),
        Text(f"written  {artifact.output}: {artifact.format}{numbers}{opset}, {size}, {axes}"),
    )


def _listed(axes: Sequence[str]) -> str:
    *first, last = axes
    return f"{', '.join(first)} and {last}" if first else last


def show_agreement(found: Agreement) -> RenderableType:
    """Return every comparison of a file with its model, and the classes seen in images."""
    seen = [Text(f"{name}  {kind}") for name, kind in found.images.items()]
    return Group(
        _table(found.file, found.checks),
        *seen,
        Text(
            f"agreed   {found.file} computes what the model computes, in {len(found.checks)} runs"
        ),
    )


def _table(name: str, checks: Iterable[Check]) -> Table:
    table = new_table(f"{name} against the model, from disk")
    for heading in ("gates", "batch", "size"):
        table.add_column(heading)
    for heading in ("max abs", "max rel", "cosine", "top-1 same", ""):
        table.add_column(heading, justify="right")
    for check in checks:
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
    return table
