"""What `gates`, `show` and `remove` say of the study's own result."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from torch import tensor
from torchvision.transforms.v2.functional import to_pil_image

from attnsurgeon.cli import app
from examples.study import data

HOST = ("--host", "examples.study.host:build")
IMAGES = 32
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What the commands norm images by where a network says nothing: files are written for it."""


def look_at(trained: Path) -> list[float]:
    """Run the three commands on a trained network, and return how much each site's maps vary.

    What they write lies beside it.

    Raises:
        RuntimeError: one of them failed; it has said why.
    """
    folder = trained.parent
    images = folder / "images"
    write_images(images)
    page = ("--output", str(folder / "page.html"), "--force")
    chart = ("--output", str(folder / "gates.svg"), "--force")
    plain = ("--output", str(folder / "plain.safetensors"), "--force")
    seen = ("--images", str(images))
    told = json.loads(_call("gates", trained, *seen, *chart, "--json"))
    print(_call("show", trained, str(images / "00.png"), *page), file=sys.stderr)
    print(_call("remove", trained, *seen, *plain), file=sys.stderr)
    return [site["variation"] for site in told["sites"]]


def write_images(folder: Path) -> None:
    """Write held-out images such that reading them gives the network what it was tested on."""
    folder.mkdir(exist_ok=True)
    mean, deviation = (tensor(numbers).view(3, 1, 1) for numbers in (MEAN, DEVIATION))
    for i, shown in enumerate(data.load().held_out[0][:IMAGES]):
        to_pil_image((shown * deviation + mean).clamp(0, 1)).save(folder / f"{i:02}.png")


def _call(command: str, trained: Path, *arguments: str) -> str:
    with redirect_stdout(io.StringIO()) as said:
        code = app(args=[command, str(trained), *HOST, *arguments], standalone_mode=False)
    if code:
        raise RuntimeError(f"attnsurgeon {command} ended with {code}")
    return said.getvalue()
