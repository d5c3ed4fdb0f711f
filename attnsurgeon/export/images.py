"""Images of a folder, resized and normalised as the host's weights expect them."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from attnsurgeon.card import HostCard
from attnsurgeon.errors import BadFile, BadOption

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
_NAMED = 3


def image_files(folder: Path) -> list[Path]:
    """Return the images below a folder, sorted.

    Raises:
        BadOption: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise BadOption(f"there is no folder {str(folder)!r} of images")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise BadOption(
            f"no image is below {str(folder)!r}: there should be {', '.join(SUFFIXES)} files"
        )
    return found


def read_images(files: list[Path], card: HostCard | None, size: tuple[int, int]) -> list[Tensor]:
    """Return each image as a batch of one, with the mean and deviation of the card's weights.

    Raises:
        BadFile: some cannot be read; the first few are named.
    """
    images, broken = [], []
    for file in files:
        try:
            with Image.open(file) as picture:
                pixels = torch.from_numpy(numpy.array(picture.convert("RGB")))
            images.append(_prepared(pixels.permute(2, 0, 1), card, size))
        except (OSError, ValueError, SyntaxError):  # of the decoder, on whatever is no image
            broken.append(file)
    if broken:
        named = ", ".join(repr(str(file)) for file in broken[:_NAMED])
        raise BadFile(
            f"{len(broken)} of {len(files)} images cannot be read, the first {named}; take them out"
        )
    return images


def _prepared(image: Tensor, card: HostCard | None, size: tuple[int, int]) -> Tensor:
    """Resize the shorter side, cut the middle out, norm."""
    height, width = image.shape[1:]
    scale = max(size[0] / height, size[1] / width)
    wanted = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    pixels = interpolate(image[None].float() / 255, wanted, mode="bilinear", antialias=True)
    top, left = (wanted[0] - size[0]) // 2, (wanted[1] - size[1]) // 2
    pixels = pixels[:, :, top : top + size[0], left : left + size[1]]
    if card is not None and card.mean and card.std:
        mean, std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (card.mean, card.std))
        pixels = (pixels - mean) / std
    return pixels
