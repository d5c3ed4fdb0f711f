"""Matplotlib, where it is installed, without a screen; the same figure gives the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attnsurgeon.errors import MissingPackage
from attnsurgeon.outputs import atomic_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPENED, REVERSED, INK = "#2a6f97", "#c8553d", "#333333"
"""Of gates above 0, of gates below 0, of text."""


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches; no window is opened and no global state touched.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    check_plotting()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def check_plotting(remedy: str = "") -> None:
    """Refuse to go on without matplotlib.

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingPackage(
            f"pictures need matplotlib: pip install 'attnsurgeon[plot]'{remedy}"
        ) from error


def write_figure(figure: Figure, path: Path, *, force: bool = False) -> None:
    """Write a figure as its suffix says, whole or not at all.

    Raises:
        OutputRefused: the file cannot be written, or exists and `force` is not given.
    """
    import matplotlib as mpl

    kind = path.suffix.lower().removeprefix(".")
    undated = {"Date": None} if kind == "svg" else {"Software": None}
    with (
        atomic_output(path, force=force) as part,
        mpl.rc_context({"svg.hashsalt": "attnsurgeon", "svg.fonttype": "none"}),
    ):
        figure.savefig(part, format=kind, dpi=120, metadata=undated)
