"""The places at one module where attention can be spliced in, and why the others are not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import fx, nn

from attnsurgeon.anatomy import Anatomy, ancestry, dissect, find_conv, find_tail
from attnsurgeon.blocks.block import Place
from attnsurgeon.errors import PlacementUnavailable
from attnsurgeon.observation import Convolution, Join, Observation, Shape
from attnsurgeon.splicing import Splice, check_place
from attnsurgeon.tracing import trace_own_forward
from attnsurgeon.wiring import check_follows

PLACEMENTS = ("post", "standard", "pre", "identity", "conv", "replace")
"""All placements, by the names of the Squeeze-and-Excitation paper, and `replace`."""

Found = TypeVar("Found")
Traced = tuple[fx.Graph, Anatomy | None]
"""The graph of a block's own forward, and its parts."""


@dataclass(frozen=True)
class Spot:
    """One place at a site: its measured width and shape, and how attention is spliced in there.

    `serves` is the layout that a block must be able to serve: that of the map, or NLC where the
    positions are there but not in the order of a map, as in windows.
    """

    place: Place
    shape: Shape
    splice: Splice
    serves: str = "NCHW"


def channel_axis(layout: str) -> int:
    """Return the axis of the channels in a layout such as NHWC."""
    return layout.index("C")


def sizes_in(shape: Shape, layout: str) -> Shape:
    """Return the spatial part of a shape."""
    return tuple(size for size, axis in zip(shape, layout, strict=True) if axis not in "NC")


def post_spot(module: nn.Module, seen: Observation, path: str) -> Spot:
    """Return the place after a module.

    Raises:
        PlacementUnavailable: it returns no map, or not one of one width.
    """
    if "forward" in module.__dict__:
        raise PlacementUnavailable("its forward is set on the object and not by its class")
    visit = seen.visits[path]
    if visit.out_shape is None:
        raise PlacementUnavailable("it does not return one tensor")
    if visit.out_layout is None:
        raise PlacementUnavailable("what it returns is no feature map")
    if len(visit.widths) > 1:
        raise PlacementUnavailable(f"it runs {visit.count} times, with different widths")
    _check_read(seen, path)
    spot = _spot("post", visit.out_shape, visit.out_layout, seen)
    check_follows(module, spot.splice, whole=path not in seen.taken_apart)
    return spot


def check_used(seen: Observation, path: str) -> None:
    """Refuse a module of which no output is computed: attention there could never count.

    Raises:
        PlacementUnavailable: it is one.
    """
    if not seen.visits[path].is_used:
        raise PlacementUnavailable("no output of the network is computed from it in eval mode")


def _check_read(seen: Observation, path: str) -> None:
    """Refuse a module after which only class tokens are read: attention there could never count."""
    if not seen.visits[path].is_read:
        raise PlacementUnavailable(
            "only the class token of what it returns is read, which attention leaves alone"
        )


def _spot(
    placement: str,
    shape: Shape,
    layout: str,
    seen: Observation,
    passed: tuple[str, ...] = (),
    serves: str | None = None,
) -> Spot:
    dims = len(shape) - 2
    place = Place(shape[channel_axis(layout)], stride=(1,) * dims, dims=dims)
    tokens = seen.tokens if layout == "NLC" else 0
    splice = Splice(
        f"attention_{placement}", placement, passed=passed, layout=layout, tokens=tokens
    )
    return Spot(place, shape, splice, serves or layout)


def residual_spots(
    block: nn.Module, seen: Observation, join: Join
) -> tuple[dict[str, Spot], dict[str, str]]:
    """Try every placement in a residual block; return what is there, and why the rest is not."""
    if "forward" in block.__dict__:
        reason = "its forward is set on the object and not by its class"
        return {}, dict.fromkeys(PLACEMENTS, reason)
    seeker = _Seeker(block, seen, join)
    spots: dict[str, Spot] = {}
    refused: dict[str, str] = {}
    for placement in PLACEMENTS:
        try:
            spots[placement] = seeker.find(placement)
        except PlacementUnavailable as error:
            refused[placement] = str(error)
    return spots, refused


def _once(find: Callable[..., Found]) -> Callable[..., Found]:
    """Return a function that looks once, and returns or refuses the same ever after."""
    found: dict[Any, Found] = {}
    refused: dict[Any, str] = {}

    def look(*args: Any) -> Found:
        if args in refused:
            raise PlacementUnavailable(refused[args])
        try:
            if args not in found:
                found[args] = find(*args)
        except PlacementUnavailable as error:
            refused[args] = str(error)
            raise
        return found[args]

    return look


class _Seeker:
    """Look for the places of one residual block, tracing its forward once for all of them."""

    def __init__(self, block: nn.Module, seen: Observation, join: Join) -> None:
        self.block, self.seen, self.join = block, seen, join
        names = (name for name, _ in block.named_modules() if name)
        self.passed = tuple(n for n in names if seen.visits[f"{join.path}.{n}"].passed_through)
        self.traced = _once(self._trace)
        self.middle = _once(self._find_middle)

    def _trace(self, opened: str) -> Traced:
        convs = [f"{opened}.conv"] if opened else []
        graph = trace_own_forward(self.block, convs, closed=lambda: self.traced("")[0])
        return graph, dissect(self.block, graph, self.passed)

    def find(self, placement: str) -> Spot:
        """Return the place of that name.

        Raises:
            PlacementUnavailable: the block does not have it; the message says why.
        """
        if placement == "post":
            return post_spot(self.block, self.seen, self.join.path)
        _check_read(self.seen, self.join.path)
        if len(self.seen.visits[self.join.path].widths) > 1:
            raise PlacementUnavailable("it runs more than once, with different widths")
        spot = self._at_conv(placement) if placement in ("conv", "replace") else self._on(placement)
        check_place(*self.traced(_parent(spot.splice.conv or "")), spot.splice)
        return spot

    def _on(self, placement: str) -> Spot:
        """Return the place at an end of a path: of the block's input, or of its addition."""
        visit = self.seen.visits[self.join.path]
        if placement == "pre" and self._starts_at_input():
            shape, layout = visit.in_shape or self.join.shape, visit.in_layout or self.join.layout
            return _spot(placement, shape, layout, self.seen, self.passed)
        # What is added in windows is returned as a map: inside, positions are in no map's order.
        serves = self.join.layout if visit.out_shape in (self.join.shape, None) else "NLC"
        return _spot(placement, self.join.shape, self.join.layout, self.seen, self.passed, serves)

    def _starts_at_input(self) -> bool:
        anatomy = self.traced("")[1]
        return anatomy is None or anatomy.source.op == "placeholder"

    def _at_conv(self, placement: str) -> Spot:
        conv, tail = self.middle()
        dims = len(conv.kernel)
        place = Place(conv.out_channels, stride=(1,) * dims, dims=dims)
        if placement == "replace":
            _check_replaceable(conv)
            place = Place(
                conv.out_channels, conv.in_channels, conv.stride, conv.dilation[0], dims=dims
            )
        layout = "NCHW" if dims == 2 else "NCDHW"
        relative = conv.path.removeprefix(f"{self.join.path}.")
        splice = Splice(
            f"attention_{placement}", placement, relative, tail, self.passed, layout=layout
        )
        return Spot(place, conv.out_shape, splice, layout)

    def _find_middle(self) -> tuple[Convolution, int]:
        """Return the first convolution of the branch that looks at neighbours, and its tail.

        Raises:
            PlacementUnavailable: the block has none, or calls it more than once.
        """
        inside = f"{self.join.path}."
        for conv in self.seen.convolutions:
            if not conv.path.startswith(inside) or max(conv.kernel) == 1:
                continue
            relative = conv.path.removeprefix(inside)
            graph, anatomy = self.traced(_parent(relative))
            node = find_conv(graph, relative)
            if node is not None and anatomy is not None and node in ancestry(anatomy.branch):
                return conv, find_tail(self.block, node, self._same_shape())[1]
        raise PlacementUnavailable(
            "its branch calls no convolution with a kernel above 1 exactly once"
        )

    def _same_shape(self) -> Callable[[str], bool]:
        def same(name: str) -> bool:
            visit = self.seen.visits[f"{self.join.path}.{name}"]
            return visit.in_shape == visit.out_shape

        return same


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _check_replaceable(conv: Convolution) -> None:
    """Refuse a convolution whose place a 3x3 of any dilation cannot take."""
    told = "x".join(map(str, conv.kernel))
    wanted = "x".join("3" for _ in conv.kernel)
    if set(conv.kernel) != {3}:
        raise PlacementUnavailable(f"its middle convolution is {told}, not {wanted}")
    if conv.padding != conv.dilation or len(set(conv.dilation)) != 1:
        raise PlacementUnavailable(f"its {told} convolution does not pad to the size it reads")
