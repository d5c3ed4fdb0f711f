"""What a detector finds, compared as a set: equal scores may come in any order, nothing else may.

Two engines sort equal scores differently, and rounding can exchange neighbours. The rule: in each
image as many objects as the model finds, and to each of the model's one of the file's, of the same
label, with its box and its score within the tolerance, no two to the same. Only then are they put
into one order; after that every field is held to the tolerance by itself, element by element.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attnsurgeon.export.format import leaves, leaves_on_cpu

REQUIRED = ("boxes", "labels", "scores")
"""What an image's mapping must hold to be taken for what a detector found in it."""

Pair = tuple[list[Tensor], list[Tensor]]


class Detections(list[Tensor]):
    """The tensors that a detector returns, image after image; `fields` names those of each."""

    def __init__(self, tensors: list[Tensor], fields: list[list[str]]) -> None:
        super().__init__(tensors)
        self.fields = fields

    def field(self, name: str) -> list[Tensor]:
        """Return one field of every image."""
        names = [each for image in self.fields for each in image]
        return [part for each, part in zip(names, self, strict=True) if each == name]


def outputs_of(output: Any) -> list[Tensor]:
    """Return the tensors of an output on the CPU, as Detections where a detector made it."""
    tensors = leaves_on_cpu(output)
    if not isinstance(output, list) or not output or not all(map(_is_found, output)):
        return tensors
    return Detections(tensors, [list(image) for image in output])


def by_field(output: Any) -> dict[str, list[Tensor]]:
    """Return the tensors that are held to the tolerance together, where they are and with graphs.

    Those are all of an output, called "", or of what a detector found each field: boxes count in
    pixels.
    """
    found, parts = outputs_of(output), leaves(output)
    if not isinstance(found, Detections):
        return {"": parts}
    fields: dict[str, list[Tensor]] = {}
    names = [name for image in found.fields for name in image]
    for name, part in zip(names, parts, strict=True):
        fields.setdefault(name, []).append(part)
    return fields


def _is_found(image: Any) -> bool:
    return (
        isinstance(image, dict)
        and all(isinstance(part, Tensor) and part.ndim > 0 for part in image.values())
        and all(name in image for name in REQUIRED)
        and len({len(part) for part in image.values()}) == 1
    )


def fields_of(expected: Detections, found: list[Tensor], tolerance: float) -> list[Pair]:
    """Return both sides of each field over all images, the found objects in the model's order.

    Where the two do not hold the same number of objects, they are returned as they are.
    """
    if [part.shape for part in expected] != [part.shape for part in found]:
        return [(list(expected), found)]
    pairs: dict[str, Pair] = {}
    for want, have in _images(expected, found):
        order = _order(want, have, tolerance)
        for name, part in want.items():
            wanted, given = pairs.setdefault(name, ([], []))
            wanted.append(part)
            given.append(have[name][order])
    return list(pairs.values())


def _images(
    expected: Detections, found: list[Tensor]
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    start = 0
    for names in expected.fields:
        end = start + len(names)
        yield (
            dict(zip(names, expected[start:end], strict=True)),
            dict(zip(names, found[start:end], strict=True)),
        )
        start = end


def _order(want: dict[str, Tensor], have: dict[str, Tensor], tolerance: float) -> Tensor:
    """Return which found object stands for which of the model's; their own order if one has none.

    The nearest box that is not yet taken is taken: at worst a right file is refused, never a wrong
    one accepted.
    """
    count = len(want["boxes"])
    if not count:
        return torch.arange(0)
    far = _distance(want["boxes"], have["boxes"])
    fits = (far <= tolerance) & (_distance(want["scores"], have["scores"]) <= tolerance)
    fits &= want["labels"][:, None] == have["labels"][None]
    order, free = torch.arange(count), torch.ones(count, dtype=torch.bool)
    for i in range(count):
        open_to = fits[i] & free
        if not open_to.any():
            return torch.arange(count)
        order[i] = torch.where(open_to, far[i], torch.inf).argmin()
        free[order[i]] = False
    return order


def _distance(want: Tensor, have: Tensor) -> Tensor:
    """Return for each pair of objects the largest difference, over the largest number there is."""
    first, second = (part.double().reshape(len(part), -1) for part in (want, have))
    return (first[:, None] - second[None]).abs().amax(2) / (first.abs().max().item() or 1.0)
