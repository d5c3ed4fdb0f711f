"""Images of a folder, resized and normalised as the host's weights expect them."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.models import get_weight

from attnsurgeon.card import HostCard, card_of
from attnsurgeon.errors import BadFile, BadOption
from attnsurgeon.export.inputs import Inputs, batch_of, size_of, tensors_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
MOST = 128
"""Images that numbers are calibrated on: the extremes of a map change little with more."""
_NAMED = 3
_TIMM = "timm:"


def image_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the one batch of RGB images, (N, 3, H, W), that a network takes.

    Raises:
        BadOption: it takes something else.
    """
    if len(inputs) == 1 and isinstance(inputs[0], Tensor):
        like = inputs[0]
        if like.ndim == 4 and like.shape[1] == 3:
            return like
    taken = ", ".join(str(list(part.shape)) for part in tensors_of(inputs))
    raise BadOption(
        f"--images is for networks of one RGB image; {type(model).__name__} takes {taken}"
    )


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
            images.append(_prepared(_decoded(file), card, size))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            broken.append(file)  # the decoder raises any of these on whatever is no image
    if broken:
        named = ", ".join(repr(str(file)) for file in broken[:_NAMED])
        raise BadFile(
            f"{len(broken)} of {len(files)} images cannot be read, the first {named}; take them out"
        )
    return images


class Photographs:
    """Images of a folder, as a network of one RGB image is given them.

    Attributes:
        images: each as a batch of one, of the size of the network's input.
        notice: which of the folder's files they are.
    """

    def __init__(self, folder: Path, model: nn.Module, like: Tensor) -> None:
        """Read MOST of them at most, spread evenly over their names.

        Raises:
            BadOption: there is no such folder, or no image in it.
            BadFile: some cannot be read.
        """
        found = image_files(folder)
        step = max(len(found) / MOST, 1.0)
        self.files = [found[int(i * step)] for i in range(min(len(found), MOST))]
        self.card, self.like = card_of(model), like
        read = read_images(self.files, self.card, (like.shape[2], like.shape[3]))
        self.images = [image.to(like) for image in read]
        others = [p for p in sorted(folder.rglob("*")) if p.is_file() and p not in set(found)]
        self.notice = f"calibrated on {len(self.files)} of {len(found)} images of {str(folder)!r}"
        if others:
            self.notice += (
                f"; files that are no images there: {len(others)}, the first "
                f"{', '.join(repr(p.name) for p in others[:_NAMED])}"
            )

    def in_place_of(self, trials: list[Inputs]) -> list[Inputs]:
        """Return batches of images of the same numbers and sizes; few images come again."""
        batches: list[Inputs] = []
        for trial in trials:
            count = batch_of(trial)
            chosen = [self.files[i % len(self.files)] for i in range(count)]
            images = read_images(chosen, self.card, size_of(trial))
            batches.append((torch.cat(images).to(self.like),))
        return batches


def _decoded(file: Path) -> Tensor:
    """Return the pixels as they are looked at, (3, H, W) in uint8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a large picture, odd metadata: it is read all the same
        with Image.open(file) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
            return torch.from_numpy(numpy.array(upright)).permute(2, 0, 1)


def _prepared(image: Tensor, card: HostCard | None, size: tuple[int, int]) -> Tensor:
    """Resize the shorter side, cut the middle out, norm: as the transforms of the weights do."""
    height, width = image.shape[1:]
    share, mode = _framing(card)
    scale = max(size[0] / height, size[1] / width) / share
    wanted = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    pixels = interpolate(image[None].float() / 255, wanted, mode=mode, antialias=True)
    top, left = (wanted[0] - size[0]) // 2, (wanted[1] - size[1]) // 2
    pixels = pixels[:, :, top : top + size[0], left : left + size[1]].clamp(0, 1)
    if card is not None and card.mean and card.std:
        mean, std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (card.mean, card.std))
        pixels = (pixels - mean) / std
    return pixels


def _framing(card: HostCard | None) -> tuple[float, str]:
    """Return which share of the shorter side the weights' transforms cut out, and how they resize.

    All of it where the weights, or what they say about it, are not known.
    """
    known = card.weights if card is not None else None
    if known is None:
        return 1.0, "bilinear"
    if known.startswith(_TIMM):
        models = importlib.import_module("timm.models")
        config: Any = models.get_pretrained_cfg(known.removeprefix(_TIMM))
        share, mode = getattr(config, "crop_pct", 1.0), getattr(config, "interpolation", "")
    else:
        try:
            preset: Any = get_weight(known).transforms()
        except ValueError:  # weights of a file, or of the package's own network
            return 1.0, "bilinear"
        sides = [getattr(preset, name, None) or [1] for name in ("crop_size", "resize_size")]
        share, mode = sides[0][0] / sides[1][0], str(getattr(preset, "interpolation", ""))
    return min(float(share), 1.0), "bicubic" if "bicubic" in mode.lower() else "bilinear"
