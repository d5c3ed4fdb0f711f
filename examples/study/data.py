"""Scikit-learn's digits made hard: a small share to learn from, turned, noisy, hidden, inverted."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

SIZE = 24
MEAN, DEVIATION = 0.3, 0.35
HELD_OUT = 597
SHARE = 300
"""Images that fine-tuning sees; the host was trained on all that are not held out."""
DRAWS = 2
"""Changed copies of each held-out image; they are the same for every network."""


@dataclass(frozen=True)
class Domain:
    """How far images are changed, at random and each by itself.

    Attributes:
        turn: largest rotation in degrees.
        shift: largest translation as a share of half the image.
        noise: largest standard deviation of the noise; the ink goes from 0 to 1.
        hidden: side of a square of any brightness, in pixels.
        inverted: share of the images that are white on black instead.
    """

    turn: float
    shift: float
    noise: float
    hidden: int
    inverted: float

    def change(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return inputs of a network, (N, 3, SIZE, SIZE), for images (N, 1, 8, 8) in 0 to 1."""
        count = len(images)

        def draw(*shape: int) -> Tensor:
            return torch.rand(count, *shape, generator=generator)

        angle = math.radians(self.turn) * (2 * draw() - 1)
        scale, moved = 0.95 + 0.3 * draw(), self.shift * (2 * draw(2) - 1)
        turned = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1)
        theta = torch.cat([turned.view(-1, 2, 2) * scale.view(-1, 1, 1), moved.unsqueeze(2)], 2)
        grid = affine_grid(theta, [count, 1, SIZE, SIZE], align_corners=False)
        out = grid_sample(images, grid, align_corners=False)
        if self.hidden:
            corner = (draw(2) * (SIZE - self.hidden)).long()
            places = torch.arange(SIZE)
            rows, columns = (
                (places >= corner[:, i : i + 1]) & (places < corner[:, i : i + 1] + self.hidden)
                for i in (0, 1)
            )
            inside = (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)
            out = torch.where(inside, draw(1, 1, 1), out)
        flipped = draw(1, 1, 1) < self.inverted
        out = torch.where(flipped, 1 - out, out)
        noise = torch.randn(out.shape, generator=generator)
        out = out + self.noise * draw(1, 1, 1) * noise
        return (
            ((out - MEAN) / DEVIATION)
            .expand(-1, 3, -1, -1)
            .contiguous(memory_format=torch.channels_last)
        )


CLEAN = Domain(turn=10, shift=0.1, noise=0.2, hidden=0, inverted=0.0)
"""What the host is trained on."""
HARD = Domain(turn=20, shift=0.2, noise=0.6, hidden=7, inverted=0.25)
"""What it is fine-tuned and tested on: another domain."""


@dataclass(frozen=True, eq=False)
class Data:
    """Images (N, 1, 8, 8) and labels of the host's training, of fine-tuning, and held-out ones."""

    host: tuple[Tensor, Tensor]
    share: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]


@functools.cache
def load() -> Data:
    """Return the three parts; the held-out images are changed already, to inputs of a network."""
    found = load_digits()
    images = torch.from_numpy(found.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(found.target).long()
    rest, held = train_test_split(
        range(len(labels)), test_size=HELD_OUT, random_state=0, stratify=found.target
    )
    share, _ = train_test_split(rest, train_size=SHARE, random_state=0, stratify=found.target[rest])
    generator = torch.Generator().manual_seed(0)
    copies = torch.cat([HARD.change(images[held], generator) for _ in range(DRAWS)])
    return Data(
        (images[rest], labels[rest]),
        (images[share], labels[share]),
        (copies, labels[held].repeat(DRAWS)),
    )


@functools.lru_cache(maxsize=1)
def lessons(data: Data, seed: int, steps: int, batch: int) -> Sequence[tuple[Tensor, Tensor]]:
    """Return the batches of fine-tuning, drawn once for all arms of a seed."""
    images, labels = data.share
    generator = torch.Generator().manual_seed(1000 + seed)
    drawn = []
    for _ in range(steps):
        chosen = torch.randint(len(labels), (batch,), generator=generator)
        drawn.append((HARD.change(images[chosen], generator), labels[chosen]))
    return drawn
