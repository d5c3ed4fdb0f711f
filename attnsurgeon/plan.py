"""Which block at which site: cuts, chosen by pattern, to and from JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from attnsurgeon import blocks
from attnsurgeon.blocks.block import Place
from attnsurgeon.errors import (
    AttnSurgeonError,
    BadFile,
    BadOption,
    PlacementUnavailable,
    UnknownName,
)
from attnsurgeon.gate import DEFAULT_FORM, form_named
from attnsurgeon.observation import Shape
from attnsurgeon.schema import read_as
from attnsurgeon.selection import literals, select_sites
from attnsurgeon.sites import KINDS, PLACEMENTS, Site
from attnsurgeon.splicing import Splice
from attnsurgeon.spots import sizes_in
from attnsurgeon.tracks import LAYOUTS

_CHILD = re.compile(r"attention_[a-z]+(_[0-9]+)?")
_MOST = 2**24
"""Of channels and pixels that a file may ask for: products of them must not overflow."""
_LONGEST_TAIL = 2
"""Steps that belong to a convolution: a norm and an activation."""


@dataclass(frozen=True)
class Cut:
    """One attention at one place of one block: everything that is needed to make it again."""

    path: str
    placement: str
    block: str
    options: Mapping[str, Any]
    place: Place
    shape: Shape
    splice: Splice
    seed: int = 0
    gate: str = DEFAULT_FORM

    @property
    def child(self) -> str:
        """Dotted path of the attention in the operated model; the prefix of its new keys."""
        return f"{self.path}.{self.splice.child}"

    @property
    def sizes(self) -> Shape:
        """Spatial sizes of the map that the attention reads, without tokens that go past it."""
        sizes = sizes_in(self.shape, self.splice.layout)
        return (sizes[0] - self.splice.tokens,) if self.splice.tokens else sizes

    def to_json(self) -> dict[str, Any]:
        """Return plain values that `from_json` reads; the default gate goes without saying."""
        form = {} if self.gate == DEFAULT_FORM else {"gate": self.gate}
        return {
            **form,
            "path": self.path,
            "placement": self.placement,
            "block": self.block,
            "options": dict(self.options),
            "place": self.place.to_json(),
            "shape": list(self.shape),
            "splice": asdict(self.splice),
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cut:
        """Read what `to_json` wrote.

        Raises:
            BadFile: a field is missing, unknown, of the wrong kind or out of range.
            UnknownName, BadOption: no such block, option or form of gate.
        """
        try:
            cut: Cut = read_as(cls, data, "cut")
            cut._check()
            return replace(cut, options=blocks.check_options(cut.block, cut.options))
        except ValueError as error:
            if isinstance(error, AttnSurgeonError):
                raise
            raise BadFile(str(error)) from error

    def _check(self) -> None:
        """Refuse what no insertion writes; the child's name goes into source code.

        Raises:
            ValueError: a name or number out of range.
            UnknownName: no such block.
        """
        if self.placement not in blocks.get(self.block).placements:
            raise ValueError(f"{self.block} has no placement {self.placement!r}")
        form_named(self.gate)
        if self.splice.placement != self.placement or not _CHILD.fullmatch(self.splice.child):
            raise ValueError(f"cut.splice is not one of placement {self.placement!r}")
        if self.splice.layout not in LAYOUTS.values() or len(self.shape) != len(self.splice.layout):
            raise ValueError(f"cut.splice has the layout {self.splice.layout!r}, its shape another")
        place = self.place
        if place.dims != len(self.shape) - 2 or self.splice.tokens not in range(self.shape[1]):
            raise ValueError("the dimensions or tokens of a cut are not those of its shape")
        widths = (place.channels, place.in_channels or 1, *place.stride, place.dilation)
        in_range = all(1 <= number <= _MOST for number in (*widths, *self.shape))
        if not in_range or self.splice.tail not in range(_LONGEST_TAIL + 1):
            raise ValueError("a width or size of a cut is out of range")


@dataclass(frozen=True)
class Plan:
    """The cuts to make, in order, and the chosen sites that cannot have one, with the reason.

    `attended` are the paths of the chosen sites that hold attention of the network's own.
    """

    cuts: tuple[Cut, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    attended: tuple[str, ...] = ()


def make_plan(
    model: nn.Module,
    sites: Sequence[Site],
    block: str,
    *,
    at: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    stages: Iterable[int] = (),
    every: int = 1,
    kind: str | None = None,
    placement: str = "post",
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    before: Sequence[Cut] = (),
    stack: bool = False,
    gate: str = DEFAULT_FORM,
) -> Plan:
    """Choose sites by kind, pattern, stage and step, and plan the same attention at each.

    Args:
        model: the network the sites are of; only the names of its children are read.
        sites: what find_sites returned.
        block: name of the attention.
        at: shell patterns on the dotted path; a site is chosen that matches one of them.
        exclude: shell patterns of sites to leave out.
        stages: numbers of stages to choose from; all if empty.
        every: of the chosen sites take each `every`-th, beginning with the first.
        kind: one of sites.KINDS; by default residual, or merge where there is no residual site. A
            site named in full is chosen whatever its kind.
        placement: one of sites.PLACEMENTS.
        options: of the block.
        seed: of the new weights.
        before: cuts that will be made before these.
        stack: take sites too that have the same block at the same placement already.
        gate: one of gate.FORMS.

    Raises:
        UnknownName: no such block, placement, option or form of gate.
        BadOption: a value out of range.
        PatternUnmatched: a pattern or stage that no site has.
        PlacementUnavailable: a site named in full, or all sites, do not have the placement, or
            have this block there already.
        NoSites: nothing is left to operate on.
    """
    values = check_request(
        block, placement=placement, every=every, kind=kind, options=options, gate=gate
    )
    chosen = select_sites(sites, at=at, exclude=exclude, stages=stages, every=every, kind=kind)
    literal = set(literals(at))
    cuts: list[Cut] = []
    skipped: dict[str, str] = {}
    for site in chosen:
        try:
            if not stack:
                _refuse_twin(model, site, block, placement, before)
            cut = _plan_cut(model, site, block, placement, values, seed, before)
            cuts.append(replace(cut, gate=gate))
        except PlacementUnavailable as error:
            if site.path in literal:
                raise
            skipped[site.path] = str(error)
    if not cuts:
        raise PlacementUnavailable(next(iter(skipped.values())))
    attended = tuple(site.path for site in chosen if site.attention)
    return Plan(tuple(cuts), skipped, attended)


def check_request(
    block: str,
    *,
    placement: str = "post",
    every: int = 1,
    kind: str | None = None,
    options: Mapping[str, Any] | None = None,
    gate: str = DEFAULT_FORM,
) -> dict[str, Any]:
    """Refuse what no network could satisfy, before one is loaded; return the options as typed.

    Raises:
        UnknownName, BadOption, PlacementUnavailable: see make_plan.
    """
    block_type = blocks.get(block)
    if placement not in PLACEMENTS:
        raise UnknownName("placement", placement, PLACEMENTS)
    if placement not in block_type.placements:
        having = ", ".join(n for n in blocks.names() if placement in blocks.get(n).placements)
        raise PlacementUnavailable(
            f"{block} cannot be put at {placement!r}; it takes {', '.join(block_type.placements)}"
            f" ({placement!r} is for {having})"
        )
    if kind is not None and kind not in KINDS:
        raise UnknownName("kind of site", kind, KINDS)
    if every < 1:
        raise BadOption(f"--every must be at least 1, not {every}")
    values = blocks.check_options(block, options or {})
    blocks.check_form(block, gate, values)
    return values


def _plan_cut(
    model: nn.Module,
    site: Site,
    block: str,
    placement: str,
    options: Mapping[str, Any],
    seed: int,
    before: Sequence[Cut],
) -> Cut:
    spot = site.spot(placement)
    if spot.serves not in blocks.get(block).layouts:
        raise PlacementUnavailable(
            f"{block} cannot serve {site.path} at {placement!r}: its feature map is {spot.serves}"
        )
    taken = {name for name, _ in model.get_submodule(site.path).named_children()}
    taken |= {cut.splice.child for cut in before if cut.path == site.path}
    child = spot.splice.child
    number = 1
    while child in taken:  # a second attention at one place
        number += 1
        child = f"{spot.splice.child}_{number}"
    splice = Splice(**{**asdict(spot.splice), "child": child})
    return Cut(site.path, placement, block, options, spot.place, spot.shape, splice, seed)


def _refuse_twin(
    model: nn.Module, site: Site, block: str, placement: str, before: Sequence[Cut]
) -> None:
    place = re.compile(rf"attention_{placement}(_[0-9]+)?")
    children = model.get_submodule(site.path).named_children()
    is_there = any(place.fullmatch(n) and isinstance(c, blocks.get(block)) for n, c in children)
    wanted = (site.path, placement, block)
    if is_there or wanted in {(cut.path, cut.placement, cut.block) for cut in before}:
        raise PlacementUnavailable(
            f"{site.path} has {block} at {placement!r} already; give --stack (stack=True) to "
            "put another behind it, or choose other sites by --at or --exclude"
        )
