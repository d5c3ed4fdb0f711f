"""What the attention looks at in one image: pictures and numbers, before any file format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from attnsurgeon.card import card_of
from attnsurgeon.gate import gates_by_path
from attnsurgeon.surgery import attention_paths
from attnsurgeon.training.images import Photograph
from attnsurgeon.training.maps import BRANCH, CONTEXT, SPATIAL, AttentionMap, watch_maps

HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
"""Colours from the least to the most, in equal steps of rising lightness."""
COLOURS = "Each map is coloured from its own least (dark) to its own most (bright)."
_SHINE = 0.6
"""Share of the heat where it lies over the image."""


@dataclass(frozen=True)
class Picture:
    """Pixels, (H, W, 3) in uint8, and what they are."""

    title: str
    caption: str
    pixels: Tensor


@dataclass(frozen=True)
class Page:
    """All that is shown of one image.

    Attributes:
        title: the image and what the network reads in it.
        photograph: the image as the network was given it.
        overlays: maps over positions, laid over the image.
        strips: weights of channels, one row for each branch.
        branches: site -> share of each branch, as SK prefers them along the depth.
        numbers: of every map, plain values.
    """

    title: str
    photograph: Picture
    overlays: tuple[Picture, ...]
    strips: tuple[Picture, ...]
    branches: dict[str, tuple[float, ...]]
    numbers: tuple[dict[str, Any], ...]


def make_page(model: nn.Module, photograph: Photograph) -> Page:
    """Run the network on one image and lay out every map on the way, along the depth."""
    output, maps = watch_maps(model, (photograph.read,))
    depth = {child: i for i, child in enumerate(attention_paths(model))}
    maps.sort(key=lambda found: depth[found.cut.child])
    shown = photograph.shown.permute(1, 2, 0)
    name = Path(photograph.path).name
    reading = _reading(model, output)
    return Page(
        title=f"{name}: {reading}" if reading else name,
        photograph=Picture(name, "as the network is given it", shown),
        overlays=tuple(
            Picture(_title(found), _caption(model, found), _laid_over(shown, found.values[0]))
            for found in maps
            if _is_over_positions(found)
        ),
        strips=tuple(
            Picture(_title(found), _caption(model, found), heat(_rows(found)))
            for found in maps
            if not _is_over_positions(found)
        ),
        branches={
            _title(found): tuple(found.values[0].mean(1).tolist())
            for found in maps
            if found.kind == BRANCH
        },
        numbers=tuple(_numbers(found) for found in maps),
    )


def heat(values: Tensor) -> Tensor:
    """Return colours, (H, W, 3) in uint8, for values (H, W), from their least to their most."""
    least, most = values.min(), values.max()
    scaled = (values - least) / (most - least) if most > least else torch.zeros_like(values)
    anchors = torch.tensor(HEAT, dtype=torch.float32)
    place = scaled * (len(HEAT) - 1)
    lower = place.floor().clamp(0, len(HEAT) - 2).long()
    share = (place - lower).unsqueeze(-1)
    return torch.lerp(anchors[lower], anchors[lower + 1], share).round().to(torch.uint8)


def _laid_over(shown: Tensor, values: Tensor) -> Tensor:
    size = (shown.shape[0], shown.shape[1])
    wide = interpolate(values[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    grey = shown.float().mean(2, keepdim=True).expand(-1, -1, 3)
    return torch.lerp(grey, heat(wide).float(), _SHINE).round().to(torch.uint8)


def _is_over_positions(found: AttentionMap) -> bool:
    """Tell whether a map can be laid over the image: one value for each place in a plane."""
    return found.kind in (SPATIAL, CONTEXT) and found.values.ndim == 3


def _rows(found: AttentionMap) -> Tensor:
    values = found.values[0]
    return values if found.kind == BRANCH else values.flatten()[None]


def _title(found: AttentionMap) -> str:
    return f"{found.cut.path} {found.cut.block} {found.kind}"


def _caption(model: nn.Module, found: AttentionMap) -> str:
    values = found.values[0]
    text = f"{values.min():.3g} to {values.max():.3g}"
    gates = gates_by_path(model.get_submodule(found.cut.child))
    own = gates.get(found.name, next(iter(gates.values()), None))
    if own is None:
        return text
    flat = torch.cat([tensor.detach().flatten() for tensor in own.values()])
    return f"{text}, gate {flat[flat.abs().argmax()].item():+.3f}"


def _numbers(found: AttentionMap) -> dict[str, Any]:
    values = found.values[0]
    return {
        "path": found.cut.path,
        "block": found.cut.block,
        "placement": found.cut.placement,
        "kind": found.kind,
        "shape": list(values.shape),
        "min": values.min().item(),
        "mean": values.mean().item(),
        "max": values.max().item(),
        "branches": values.mean(1).tolist() if found.kind == BRANCH else None,
    }


def _reading(model: nn.Module, output: Any) -> str:
    """Return the class that is read and its probability, where the output is one of classes."""
    if not isinstance(output, Tensor) or output.ndim != 2:
        return ""
    shares = output[0].float().softmax(0)
    best = int(shares.argmax())
    card = card_of(model)
    names: Sequence[str] = (card.categories if card else None) or ()
    name = names[best] if best < len(names) else f"class {best}"
    return f"read as {name!r} ({shares[best]:.1%})"
