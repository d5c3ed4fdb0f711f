"""What `gates`, `show` and `remove` say of the study's own result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from torchvision.transforms.v2.functional import to_pil_image

from examples.study import data

HOST = ("--host", "examples.study.host:build")
IMAGES = 32


def look_at(trained: Path) -> None:
    """Run the three commands on a trained network; what they write lies beside it.

    Raises:
        CalledProcessError: one of them failed.
    """
    folder = trained.parent
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for i, shown in enumerate(data.load().held_out[0][:IMAGES]):
        pixels = (shown * data.DEVIATION + data.MEAN).clamp(0, 1)
        to_pil_image(pixels).save(images / f"{i}.png")
    seen = ("--images", str(images), "--force")
    page = ("--output", str(folder / "page.html"), "--force")
    _call("gates", trained, *seen, "--output", str(folder / "gates.svg"))
    _call("show", trained, str(images / "0.png"), *page)
    _call("remove", trained, *seen, "--output", str(folder / "plain.safetensors"))


def _call(command: str, trained: Path, *arguments: str) -> None:
    start = [sys.executable, "-c", "from attnsurgeon.cli import main; main()"]
    words = [*start, command, str(trained), *HOST, *arguments]
    root = Path(__file__).parents[2]  # where `examples` is found
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    subprocess.run(words, check=True, stdout=sys.stderr, env={**os.environ, "PYTHONPATH": path})
