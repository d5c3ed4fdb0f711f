"""Pages of attention: where each is written, and what was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from attnsurgeon.errors import BadOption
from attnsurgeon.outputs import check_output
from attnsurgeon.report.attention_page import Page
from attnsurgeon.report.page_html import write_html
from attnsurgeon.report.page_png import write_png
from attnsurgeon.report.plotting import check_plotting

SUFFIXES = (".png", ".html")


def check_pages(
    images: Sequence[Path], output: Path | None, *, html: bool, force: bool
) -> list[Path]:
    """Return where the page of each image goes; all of it is refused before any work is done.

    Raises:
        BadOption: one file for several images, or two pages of one name.
        MissingPackage: PNG without matplotlib.
        OutputRefused: a page cannot be written.
    """
    folder, targets = output or Path(), []
    if output is not None and output.suffix.lower() in SUFFIXES and not output.is_dir():
        if len(images) > 1:
            raise BadOption(f"{len(images)} images make as many pages: give a folder as -o")
        if html and output.suffix.lower() != ".html":
            raise BadOption(f"--html writes no {output.suffix}; end -o in .html")
        targets = [output]
    else:
        suffix = ".html" if html else ".png"
        targets = [folder / f"{image.stem}_attention{suffix}" for image in images]
    twice = [target for i, target in enumerate(targets) if target in targets[:i]]
    if twice:
        raise BadOption(f"two images would both be drawn in {str(twice[0])!r}; draw one at a time")
    if any(target.suffix.lower() == ".png" for target in targets):
        check_plotting(", or give --html")
    return [check_output(target, force=force) for target in targets]


def write_page(page: Page, path: Path, *, force: bool = False) -> None:
    """Write a page as its suffix says.

    Raises:
        OutputRefused: it cannot be written.
    """
    write = write_html if path.suffix.lower() == ".html" else write_png
    write(page, path, force=force)


def show_pages(name: str, pages: Mapping[Path, Page]) -> RenderableType:
    """Return one line for each page."""
    lines = [f"what {name} looks at"]
    for target, page in pages.items():
        counts = f"{len(page.overlays)} maps over it, {len(page.strips)} strips"
        lines.append(f"{page.title}: {counts}, written {target}")
    return Text("\n".join(lines))


def pages_to_json(name: str, images: Sequence[Path], pages: Mapping[Path, Page]) -> dict[str, Any]:
    """Return plain values."""
    return {
        "file": name,
        "pages": [
            {
                "image": str(image),
                "page": str(target),
                "title": page.title,
                "maps": list(page.numbers),
            }
            for image, (target, page) in zip(images, pages.items(), strict=True)
        ],
    }
