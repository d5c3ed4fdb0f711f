"""Images as a network is given them: files of a folder, the held-out digits, or noise."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from attnsurgeon import digits
from attnsurgeon.card import HostCard, card_of
from attnsurgeon.checkpoint import check_readable
from attnsurgeon.errors import BadFile, BadOption, first_line
from attnsurgeon.probes import random_inputs

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
"""Of the files in a folder that are taken for images."""
MOST = 64
"""Images of one measurement; what varies over them is seen with fewer."""
NOISE = 8
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CARD = HostCard(name=None, class_name="")


@dataclass(frozen=True)
class Sample:
    """Inputs of a network, (N, ...) each or a list of N images, and where they are from."""

    inputs: tuple[Any, ...]
    source: str

    @property
    def count(self) -> int:
        """How many images there are."""
        return len(self.inputs[0])


@dataclass(frozen=True)
class Photograph:
    """One image: as it is shown, (3, H, W) in uint8, and as the network reads it, (1, C, H, W)."""

    path: str
    shown: Tensor
    read: Tensor


def read_photograph(path: str | os.PathLike[str], model: nn.Module) -> Photograph:
    """Read an image file as the network of a card wants it: resized, cropped, normed.

    The shorter side is scaled to the input's and the middle cut out. Mean and deviation are the
    card's; a colour network without them gets ImageNet's.

    Raises:
        BadFile: missing, empty, or no image.
        BadOption: the network does not take images.
    """
    card = card_of(model) or _CARD
    shape = card.input_shapes[0]
    if len(card.input_shapes) != 1 or len(shape) != 4 or shape[1] not in (1, 3):
        raise BadOption(
            f"{card.name or type(model).__name__} takes no single image (its inputs are "
            f"{[list(s) for s in card.input_shapes]}), so no picture of it can be made from files"
        )
    file = Path(path)
    image = _decode(file)
    side = max(shape[2:])
    shown = F.center_crop(F.resize(image, [side], antialias=True), list(shape[2:]))
    scaled = F.to_dtype(shown, torch.float32, scale=True)
    if shape[1] == 1:
        scaled = F.rgb_to_grayscale(scaled)
    mean, std = (card.mean, card.std) if card.mean and card.std else _IMAGENET
    normed = F.normalize(scaled, list(mean[: shape[1]]), list(std[: shape[1]]))
    like = next(model.parameters())
    return Photograph(str(file), shown, normed[None].to(like.device, like.dtype))


def _decode(file: Path) -> Tensor:
    check_readable(file)
    try:
        with Image.open(file) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadFile(
            f"{str(file)!r} cannot be read as an image: {first_line(error)}; give PNG or JPEG"
        ) from error
    pixels: Tensor = F.pil_to_tensor(upright)
    return pixels


def sample_inputs(model: nn.Module, folder: Path | None = None) -> Sample:
    """Return images to measure a network on.

    Args:
        model: with a card, as a loaded one has.
        folder: of image files, taken in the order of their names; without one, the held-out
            digits where the host is the digits network, else noise.

    Raises:
        BadOption: there is no such folder, or no image in it.
        BadFile: an image cannot be read.
    """
    if folder is not None:
        files = image_files(folder)
        read = torch.cat([read_photograph(file, model).read for file in files])
        return Sample((read,), f"{len(files)} images of {folder}")
    card = card_of(model) or _CARD
    like = next(model.parameters(), None)
    if card.name == "digits" and like is not None:
        images = digits.held_out()[0][:MOST].to(like.device, like.dtype)
        return Sample((images,), f"{len(images)} held-out digits")
    return Sample(random_inputs(card.example(like), NOISE), f"{NOISE} inputs of noise")


def image_files(folder: Path) -> Sequence[Path]:
    """Return the image files of a folder and those below it, in order, at most MOST.

    Raises:
        BadOption: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise BadOption(f"there is no folder {str(folder)!r} of images")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    if not files:
        raise BadOption(f"there is no image in {str(folder)!r}; they end in {', '.join(SUFFIXES)}")
    return files[:MOST]
