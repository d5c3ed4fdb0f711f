"""`attnsurgeon show`: pictures of what the attention looks at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnsurgeon.cli.hosts import OwnHost
from attnsurgeon.cli.shell import say, say_json, tell

EXAMPLES = """\b
Examples:
  attnsurgeon show resnet50_cbam.safetensors dog.jpg
  attnsurgeon show resnet50_cbam.safetensors *.jpg --checkpoint trained.pth --html -o pages
"""


def add_to(app: typer.Typer) -> None:
    """Enter the command."""
    app.command("show", short_help="Picture what the attention looks at.", epilog=EXAMPLES)(show)


def show(
    file: Annotated[Path, typer.Argument(help="A file of attnsurgeon insert or save_model.")],
    image: Annotated[list[Path], typer.Argument(help="Photographs, as PNG or JPEG.")],
    host: OwnHost = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Trained weights of the same network, such as .pth.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="A folder, or for one image a .png or .html file."),
    ] = None,
    html: Annotated[
        bool, typer.Option("--html", help="Write HTML, which needs no matplotlib.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace existing pages.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Draw one page for each image: maps over it, channel weights as strips, SK's branches.

    Each map is coloured from its own least to its own most, which stand beside it with the value
    of its gate: a wide range behind a gate near 0 changes nothing.
    """
    from attnsurgeon.opening import open_file
    from attnsurgeon.report.attention_page import make_page
    from attnsurgeon.report.pages import check_pages, pages_to_json, show_pages, write_page
    from attnsurgeon.training.images import read_photograph

    targets = check_pages(image, output, html=html, force=force)
    tell(f"loading {file}")
    model = open_file(file, host, checkpoint).model
    photographs = [read_photograph(path, model) for path in image]
    pages = {}
    for photograph, target in zip(photographs, targets, strict=True):
        tell(f"watching {photograph.path}")
        pages[target] = make_page(model, photograph)
    for target, page in pages.items():
        tell(f"writing {target}")
        write_page(page, target, force=force)
    name = str(checkpoint or file)
    say_json(pages_to_json(name, image, pages)) if as_json else say(show_pages(name, pages))
