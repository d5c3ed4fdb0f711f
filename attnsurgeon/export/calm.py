"""Images on which what a detector finds is not decided by rounding; the model alone tells which.

Whether one box more overlaps too much, or is among the best hundred, can turn on the last bit:
there two right engines would disagree. So the model is run again on inputs that are a little away,
and with scores that are too wherever it ranks by them. Without the latter equal scores would never
show: torchvision's SSD with large activations scores a hundred boxes of an image exactly 1, and
each engine keeps those of them that its own sort leaves in front. That is done twice, the second
time the opposite way: what is on an edge falls off it in one of the two. How much boxes may overlap
is moved as well, so that no pair on the edge is missed: when it is traced, torchvision
moves the boxes of each class to a place of their own before it compares them, thousands of pixels
away, where float32 has steps of 1/2000 of a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from attnsurgeon.borrow import borrowed_randomness
from attnsurgeon.export.detections import Detections
from attnsurgeon.export.inputs import Inputs
from attnsurgeon.export.proof import compare_outputs, run_with_gates, tolerance_of

DIFFERENT = 5
"""Scores at least, among more objects: fewer are those of a network that is silent inside."""
DRAWS = 8
"""Of images, of which those are taken that rounding moves least."""
CALM = 0.2
"""Of the tolerance: where rounding moves no more than that, no other images are tried."""
ROUNDINGS = 10
"""By which inputs are shaken."""
AS_ENGINES = 100
"""The same, where it shall move what a detector finds about as far as another engine does."""
HALF = 0.5
"""Of the tolerance: images are moved no further. A hundred roundings of half precision are ten."""
LAST_BITS = 2
"""By which scores are shaken where they are ranked: by what another softmax may differ."""
MARGIN = 5e-4
"""By which the overlap is moved: what such steps make of boxes a few pixels wide."""
SUPPRESSES, OVERLAP = "torchvision::nms", 2
"""The operator that drops what overlaps, and which of its arguments says how much may."""
RANKED = {"aten::topk": 0, "aten::sort": 0, "torchvision::nms": 1}
"""Operators that rank -> which of their arguments the scores are."""


def tells(outputs: list[Tensor]) -> bool:
    """Tell whether there are objects in every image, and not all of one score."""
    if not isinstance(outputs, Detections):
        return True
    return all(
        len(scores) > 0 and len(scores.unique()) >= min(len(scores), DIFFERENT)
        for scores in outputs.field("scores")
    )


def all_tell(model: nn.Module, gates: Mapping[str, Tensor], batches: Iterable[Inputs]) -> bool:
    """Tell whether a detector finds something in every batch; other networks need not be run."""
    return all(tells(run_with_gates(model, gates, b)) for b in batches if isinstance(b[0], list))


def steady(model: nn.Module, gates: Mapping[str, Tensor], inputs: Inputs) -> Inputs:
    """Return images on which a detector's findings do not hang on rounding; other inputs as is."""
    return steadiest(model, gates, inputs)[0] if isinstance(inputs[0], list) else inputs


def steadiest(
    model: nn.Module, gates: Mapping[str, Tensor], inputs: Inputs
) -> tuple[Inputs, float]:
    """Return the images of some draws that rounding moves least, and the share of the tolerance.

    That is infinite, and the images are those given, where nothing is found on any.
    """
    best, least = inputs, float("inf")
    for seed in range(DRAWS):
        drawn = _redrawn(inputs, seed)
        outputs = run_with_gates(model, gates, drawn)
        if not isinstance(outputs, Detections):
            return inputs, 0.0
        if not tells(outputs):
            continue
        tolerance = tolerance_of(outputs)
        moved = 0.0
        for way in (1, -1):
            with borrowed_randomness(seed), _ShakenRanks(way):
                again = run_with_gates(
                    model, gates, shaken(drawn, way * AS_ENGINES, HALF * tolerance)
                )
            moved = max(moved, compare_outputs(outputs, again, tolerance)[1] / tolerance)
            if not moved < least:
                break
        if moved < least:
            best, least = drawn, moved
        if least < CALM:
            break
    return best, least


def shaken(inputs: Inputs, roundings: int = ROUNDINGS, most: float = math.inf) -> Inputs:
    """Return inputs whose numbers are some roundings away; below 0, the opposite way.

    They are no further away than a share of themselves.
    """
    with borrowed_randomness(2):
        moved: Inputs = tree_map_only(Tensor, lambda part: _shaken(part, roundings, most), inputs)
    return moved


def _shaken(tensor: Tensor, roundings: int, most: float = math.inf) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    step = math.copysign(min(abs(roundings) * torch.finfo(tensor.dtype).eps, most), roundings)
    return tensor * (1 + step * torch.randn(tensor.shape).to(tensor))


class _ShakenRanks(TorchDispatchMode):
    """While entered, scores are shaken in their last bits wherever something is ranked by them.

    Boxes may overlap a little more, too; with a way of -1 all that is the opposite.
    """

    def __init__(self, way: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated in torch
        self.way = way

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        at = RANKED.get(func._schema.name)
        if at is not None:
            args = (*args[:at], _shaken(args[at], self.way * LAST_BITS), *args[at + 1 :])
        if func._schema.name == SUPPRESSES:
            allowed = args[OVERLAP] * (1 + self.way * MARGIN)
            args = (*args[:OVERLAP], allowed, *args[OVERLAP + 1 :])
        return func(*args, **(kwargs or {}))


def _redrawn(inputs: Inputs, seed: int) -> Inputs:
    with borrowed_randomness(seed):
        drawn: Inputs = tree_map_only(
            Tensor, lambda part: torch.randn(part.shape).to(part.device, part.dtype), inputs
        )
    return drawn
