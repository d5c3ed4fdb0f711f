"""A page of attention as one PNG, by matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from attnsurgeon.report.attention_page import COLOURS, Page, Picture
from attnsurgeon.report.plotting import new_figure, write_figure

COLUMNS = 5
_STRIP, _CHART = 0.2, 0.8
"""Heights beside that of a picture, which is 1."""


def write_png(page: Page, path: Path, *, force: bool = False) -> None:
    """Write a page: the image and the maps over it, then strips, then branches.

    Raises:
        MissingPackage: matplotlib is not installed.
        OutputRefused: the file cannot be written, or exists and `force` is not given.
    """
    pictures = (page.photograph, *page.overlays)
    rows = math.ceil(len(pictures) / COLUMNS)
    heights = [1.0] * rows + [_STRIP] * len(page.strips) + [_CHART] * bool(page.branches)
    figure = new_figure(2.4 * COLUMNS, 2.7 * sum(heights) + 0.4)
    figure.suptitle(f"{page.title}\n{COLOURS}", x=0.01, ha="left", fontsize=11)
    grid = figure.add_gridspec(len(heights), COLUMNS, height_ratios=heights)
    for i, picture in enumerate(pictures):
        _show(figure.add_subplot(grid[i // COLUMNS, i % COLUMNS]), picture, "equal", "\n")
    for i, strip in enumerate(page.strips):
        _show(figure.add_subplot(grid[rows + i, :]), strip, "auto", "   ")
    if page.branches:
        _chart(figure.add_subplot(grid[-1, :]), page)
    write_figure(figure, path, force=force)


def _show(axes: Any, picture: Picture, aspect: str, between: str) -> None:
    axes.imshow(picture.pixels.numpy(), aspect=aspect, interpolation="nearest")
    axes.set_title(f"{picture.title}{between}{picture.caption}", fontsize=7, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])


def _chart(axes: Any, page: Page) -> None:
    places = range(len(page.branches))
    shares = list(page.branches.values())
    floor = [0.0] * len(shares)
    for branch in range(max(map(len, shares))):
        heights = [share[branch] if branch < len(share) else 0.0 for share in shares]
        label = "branch 0 (the host's)" if branch == 0 else f"branch {branch}"
        axes.bar(places, heights, bottom=floor, label=label)
        floor = [low + high for low, high in zip(floor, heights, strict=True)]
    axes.set_xticks(list(places), list(page.branches), rotation=30, ha="right", fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(x=0.01)
    axes.set_title("which branch is preferred, mean over channels", fontsize=8, loc="left")
    above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2}
    axes.legend(fontsize=7, ncols=len(shares[0]), frameon=False, **above)
