"""`attnsurgeon verify`: hold a file to its promises again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnsurgeon.cli.hosts import OwnHost
from attnsurgeon.cli.shell import say, say_json, tell

EXAMPLES = """\b
Examples:
  attnsurgeon verify resnet50_se.safetensors
  attnsurgeon verify resnet50_se.safetensors --json
  attnsurgeon verify resnet50_se.onnx --against resnet50_se.safetensors --images photos
"""


def add_to(app: typer.Typer) -> None:
    """Enter the command."""
    app.command("verify", short_help="Hold a file to its promises again.", epilog=EXAMPLES)(verify)


def verify(
    file: Annotated[Path, typer.Argument(help="A file of attnsurgeon insert, or an exported one.")],
    against: Annotated[
        str | None, typer.Option(help="Of an exported file: the model it should compute.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="With --against: a folder of images to compare on.")
    ] = None,
    host: OwnHost = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a file against its recipe: tensor hashes, identity with closed gates, live gates.

    With --against an exported file is compared with its model again, on random inputs and on the
    images of a folder. Exit 3 if a promise is broken, 4 if an exported file differs.
    """
    if against is not None:
        _against(file, against, images, host, as_json)
        return
    from attnsurgeon.errors import BadOption

    if images is not None:
        raise BadOption("--images is for exported files; give --against MODEL")
    from attnsurgeon.export.format import formats

    if file.suffix.lower() in formats:
        raise BadOption(f"{str(file)!r} is an exported file; give --against MODEL, its model")
    from attnsurgeon.inspection import inspect_file
    from attnsurgeon.report.inspection import show_inspection

    tell(f"checking {file}")
    found = inspect_file(file, host)
    say_json(found.to_json()) if as_json else say(show_inspection(found))


def _against(file: Path, model: str, images: Path | None, host: str | None, as_json: bool) -> None:
    from attnsurgeon.export.against import verify_export
    from attnsurgeon.export.format import format_for
    from attnsurgeon.opening import open_target
    from attnsurgeon.report.artifact import show_agreement

    format_for(file)
    tell(f"loading {model}")
    opened = open_target(model, host=host)
    tell(f"checking {file}")
    found = verify_export(file, opened.model, images)
    for notice in found.notices:
        tell(notice)
    say_json(found.to_json()) if as_json else say(show_agreement(found))
