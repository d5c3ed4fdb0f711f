"""Where attention may go: the residual blocks of a network, found from what one pass showed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnsurgeon import blocks
from attnsurgeon.anatomy import Anatomy, ancestry, dissect, find_conv, find_tail, trace_own_forward
from attnsurgeon.blocks.block import Place
from attnsurgeon.card import card_of
from attnsurgeon.errors import NoSites, PlacementUnavailable
from attnsurgeon.network import plain_network
from attnsurgeon.observe import Addition, Convolution, Observation, Shape, observe
from attnsurgeon.wiring import Splice, check_place

PLACEMENTS = ("post", "standard", "pre", "identity", "conv", "replace")
"""All placements, by the names of the Squeeze-and-Excitation paper (section 6.4), and `replace`."""


Traced = tuple[fx.Graph, Anatomy | None]
"""The graph of a block's own forward, and its parts."""


@dataclass(frozen=True)
class Spot:
    """One place at a site: its measured width and shape, and how attention is spliced in there."""

    place: Place
    shape: Shape
    splice: Splice


@dataclass(frozen=True)
class Site:
    """A residual block that attention can be put at.

    Attributes:
        path: dotted path of the block in the model.
        kind: `residual`, an addition of a branch and a shortcut.
        layout: what the axes of `shape` are, such as NCHW.
        channels: C of the block's output, measured.
        shape: of the block's output, measured with the example input (its batch comes first).
        placements: the places that this block has, out of PLACEMENTS.
        blocks: names of the attention blocks that can serve it.
        stage: number of the run of sites of one feature size, from 1 in the order of execution.
        refused: placement -> why this block does not have it.
    """

    path: str
    kind: str
    layout: str
    channels: int
    shape: Shape
    placements: tuple[str, ...]
    blocks: tuple[str, ...]
    stage: int = 1
    refused: Mapping[str, str] = field(default_factory=dict, repr=False)
    spots: Mapping[str, Spot] = field(default_factory=dict, repr=False)

    def spot(self, placement: str) -> Spot:
        """Return the place of that name.

        Raises:
            PlacementUnavailable: the block does not have it; the message says why.
        """
        if placement not in self.spots:
            reason = self.refused.get(placement, f"its feature map is {self.layout}")
            have = ", ".join(self.placements) or "none"
            raise PlacementUnavailable(
                f"{self.path} has no placement {placement!r}: {reason}; it has {have}"
            )
        return self.spots[placement]


def find_sites(model: nn.Module, example: Any = None) -> list[Site]:
    """Return the residual blocks of a model in the order of execution.

    Args:
        model: any network; it is watched through one forward pass and left as it was. Paths are
            those in the network itself where it is compiled or wrapped for parallel training.
        example: an input, or a tuple of inputs; shapes are measured with it. By default that of
            the model's card, or a (1, C, 224, 224) image with the first convolution's channels.

    Raises:
        HostUnusable: the model is scripted, quantized or sharded, or does not run on this input.
        NoSites: no module of it adds two activations of one shape.
    """
    model, _ = plain_network(model)
    inputs = as_inputs(model, example)
    seen = observe(model, inputs)
    additions = {addition.path: addition for addition in seen.additions if addition.path}
    if not additions:
        raise NoSites(
            f"{type(model).__name__} has no residual block: no module in it adds two activations "
            "of one shape; choose a residual network, such as resnet50"
        )
    sites = [_site(model, seen, addition) for addition in additions.values()]
    return _number_stages(sites)


def as_inputs(model: nn.Module, example: Any) -> tuple[Any, ...]:
    """Return the positional inputs that an example stands for.

    The default is what the model's card says, or else one image batch of 224 px.
    """
    if example is None:
        card = card_of(model)
        like = next(iter(model.parameters()), None)
        return card.example(like) if card else (default_example(model),)
    return tuple(example) if isinstance(example, tuple | list) else (example,)


def default_example(model: nn.Module, size: tuple[int, int] = (224, 224)) -> Tensor:
    """Return zeros of shape (1, C, *size), C that of the first convolution, on its device."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight
            return torch.zeros(
                1, module.in_channels, *size, device=weight.device, dtype=weight.dtype
            )
    return torch.zeros(1, 3, *size)


def _site(model: nn.Module, seen: Observation, addition: Addition) -> Site:
    layout = _layout(seen, addition)
    site = Site(
        path=addition.path,
        kind="residual",
        layout=layout,
        channels=addition.shape[1] if layout.startswith("NC") else addition.shape[-1],
        shape=addition.shape,
        placements=(),
        blocks=(),
    )
    serving = [name for name in blocks.names() if layout in blocks.get(name).layouts]
    if not serving:
        return site
    spots, refused = _spots(model.get_submodule(addition.path), seen, addition)
    return replace(
        site,
        placements=tuple(spots),
        blocks=tuple(n for n in serving if set(blocks.get(n).placements) & set(spots)),
        refused=refused,
        spots=spots,
    )


def _layout(seen: Observation, addition: Addition) -> str:
    """Tell which axis holds the channels, from whether convolutions work on maps of this size."""
    if len(addition.shape) != 4:
        return {3: "NLC", 5: "NCDHW"}.get(len(addition.shape), "?")
    sizes = [conv.out_shape[2:] for conv in _convs_in(seen, addition.path)]
    return "NCHW" if addition.shape[2:] in sizes else "NHWC"


def _convs_in(seen: Observation, path: str) -> list[Convolution]:
    return [conv for conv in seen.convolutions if conv.path.startswith(f"{path}.")]


def _spots(
    block: nn.Module, seen: Observation, addition: Addition
) -> tuple[dict[str, Spot], dict[str, str]]:
    """Try every placement in the block; return what is there, and why the rest is not."""
    if "forward" in block.__dict__:
        reason = "its forward is set on the object and not by its class"
        return {}, dict.fromkeys(PLACEMENTS, reason)
    spots: dict[str, Spot] = {}
    refused: dict[str, str] = {}
    passed = _passed(block, seen, addition.path)
    middle: Convolution | None = None
    tail = 0

    @functools.cache
    def traced(opened: str) -> Traced:
        graph = trace_own_forward(block, [f"{opened}.conv"] if opened else [])
        return graph, dissect(block, graph, passed)

    try:
        middle, tail = _middle_conv(block, seen, addition.path, traced)
    except PlacementUnavailable as error:
        refused = {"conv": str(error), "replace": str(error)}
    if seen.visits[addition.path].out_shape is None:
        refused["post"] = "it does not return one tensor"
    for placement in PLACEMENTS:
        if placement in refused:
            continue
        if placement in ("conv", "replace"):
            assert middle is not None  # else it was refused above
            spot = _conv_spot(addition.path, placement, middle, tail, passed)
        else:
            spot = _path_spot(seen, addition, placement, passed)
        try:
            if placement == "replace":
                _check_replaceable(middle)
            if placement != "post":
                check_place(*traced(_parent(spot.splice.conv or "")), spot.splice)
        except PlacementUnavailable as error:
            refused[placement] = str(error)
        else:
            spots[placement] = spot
    return spots, refused


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _passed(block: nn.Module, seen: Observation, path: str) -> tuple[str, ...]:
    names = (name for name, _ in block.named_modules() if name)
    return tuple(name for name in names if seen.visits[f"{path}.{name}"].passed_through)


def _path_spot(
    seen: Observation, addition: Addition, placement: str, passed: tuple[str, ...]
) -> Spot:
    """Return the place at an end of a path: its width is that of the block's input or addition."""
    shape = addition.shape
    if placement == "pre":
        shape = seen.visits[addition.path].in_shape or shape
    splice = Splice(f"attention_{placement}", placement, passed=passed)
    return Spot(Place(shape[1]), shape, splice)


def _conv_spot(
    path: str, placement: str, conv: Convolution, tail: int, passed: tuple[str, ...]
) -> Spot:
    place = Place(conv.out_channels)
    if placement == "replace":
        place = Place(conv.out_channels, conv.in_channels, conv.stride, conv.dilation[0])
    relative = conv.path.removeprefix(f"{path}.")
    splice = Splice(f"attention_{placement}", placement, relative, tail, passed)
    return Spot(place, conv.out_shape, splice)


def _middle_conv(
    block: nn.Module, seen: Observation, path: str, traced: Callable[[str], Traced]
) -> tuple[Convolution, int]:
    """Return the first convolution of the branch that looks at neighbours, and its tail's length.

    Raises:
        PlacementUnavailable: the block has none, or calls it more than once.
    """
    for conv in _convs_in(seen, path):
        if max(conv.kernel) == 1:
            continue
        relative = conv.path.removeprefix(f"{path}.")
        graph, anatomy = traced(_parent(relative))
        node = find_conv(graph, relative)
        if node is None or anatomy is None or node not in ancestry(anatomy.branch):
            continue

        def same_shape(name: str) -> bool:
            visit = seen.visits[f"{path}.{name}"]
            return visit.in_shape == visit.out_shape

        return conv, find_tail(block, node, same_shape)[1]
    raise PlacementUnavailable("its branch calls no convolution with a kernel above 1 exactly once")


def _check_replaceable(conv: Convolution | None) -> None:
    """Refuse a convolution whose place a 3x3 of any dilation cannot take."""
    assert conv is not None  # looked for before
    if conv.kernel != (3, 3):
        raise PlacementUnavailable(
            f"its middle convolution is {conv.kernel[0]}x{conv.kernel[1]}, not 3x3"
        )
    if conv.padding != conv.dilation or conv.dilation[0] != conv.dilation[1]:
        raise PlacementUnavailable("its 3x3 convolution does not pad to the size it reads")


def _number_stages(sites: list[Site]) -> list[Site]:
    numbered = []
    stage = 0
    size: Shape | None = None
    for site in sites:
        here = feature_size(site)
        if here != size:
            stage, size = stage + 1, here
        numbered.append(replace(site, stage=stage))
    return numbered


def feature_size(site: Site) -> Shape:
    """Return the spatial part of a site's shape."""
    return site.shape[2:] if site.layout.startswith("NC") else site.shape[1:-1]
