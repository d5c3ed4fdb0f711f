"""How far the gates opened, as a bar chart along the depth of the network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attnsurgeon.errors import BadOption
from attnsurgeon.report.plotting import (
    INK,
    OPENED,
    REVERSED,
    check_plotting,
    new_figure,
    write_figure,
)
from attnsurgeon.training.images import Sample
from attnsurgeon.training.openings import Opening

SUFFIXES = (".png", ".svg")


def check_chart(path: Path) -> None:
    """Refuse what cannot be drawn before anything is measured.

    Raises:
        BadOption: neither .png nor .svg.
        MissingPackage: matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise BadOption(f"{path.name!r} is no chart; end it in {' or '.join(SUFFIXES)}")
    check_plotting()


def write_chart(
    openings: Sequence[Opening], sample: Sample, name: str, path: Path, *, force: bool = False
) -> None:
    """Draw gates above, and below what closing each site alone does to the output.

    Raises:
        OutputRefused: see write_figure.
    """
    figure = new_figure(max(5.0, 1.6 + 0.42 * len(openings)), 5.2)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    places = range(len(openings))
    values = [opening.openness for opening in openings]
    above.bar(places, values, color=[OPENED if value >= 0 else REVERSED for value in values])
    above.axhline(0, color=INK, linewidth=0.8)
    has_numbers = all(opening.cut.gate != "layer" for opening in openings)
    above.set_ylabel(f"gate (0 closed{', 1 as published' if has_numbers else ''})")
    above.set_title(f"{Path(name).name}: how far the gates opened", loc="left", fontsize=11)
    below.bar(places, [100 * opening.change.relative for opening in openings], color="#8d99ae")
    below.set_ylabel("output moves, %")
    below.set_xticks(list(places), [_label(o) for o in openings], rotation=60, ha="right")
    below.tick_params(axis="x", labelsize=8)
    below.set_xlabel(f"site closed alone, on {sample.source}", fontsize=9)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
    write_figure(figure, path, force=force)


def _label(opening: Opening) -> str:
    return f"{opening.cut.path} {opening.cut.block}"
