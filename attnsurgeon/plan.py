"""Which block at which site: cuts, chosen by pattern, to and from JSON."""

from __future__ import annotations

import fnmatch
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
    NoSites,
    PatternUnmatched,
    PlacementUnavailable,
    UnknownName,
    nearest,
)
from attnsurgeon.observe import Shape
from attnsurgeon.schema import read_as
from attnsurgeon.sites import PLACEMENTS, Site
from attnsurgeon.wiring import Splice

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

    @property
    def child(self) -> str:
        """Dotted path of the attention in the operated model; the prefix of its new keys."""
        return f"{self.path}.{self.splice.child}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values that `from_json` reads."""
        return {
            "path": self.path,
            "placement": self.placement,
            "block": self.block,
            "options": dict(self.options),
            "place": asdict(self.place),
            "shape": list(self.shape),
            "splice": asdict(self.splice),
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cut:
        """Read what `to_json` wrote.

        Raises:
            BadFile: a field is missing, unknown, of the wrong kind or out of range.
            UnknownName, BadOption: no such block or option.
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
        if self.splice.placement != self.placement or not _CHILD.fullmatch(self.splice.child):
            raise ValueError(f"cut.splice is not one of placement {self.placement!r}")
        place = self.place
        widths = (place.channels, place.in_channels or 1, *place.stride, place.dilation)
        in_range = all(1 <= number <= _MOST for number in (*widths, *self.shape))
        if not in_range or self.splice.tail not in range(_LONGEST_TAIL + 1):
            raise ValueError("a width or size of a cut is out of range")


@dataclass(frozen=True)
class Plan:
    """The cuts to make, in order, and the chosen sites that cannot have one, with the reason."""

    cuts: tuple[Cut, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)


def make_plan(
    model: nn.Module,
    sites: Sequence[Site],
    block: str,
    *,
    at: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    stages: Iterable[int] = (),
    every: int = 1,
    placement: str = "post",
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    stack: bool = False,
) -> Plan:
    """Choose sites by pattern, stage and step, and plan the same attention at each.

    Args:
        model: the network the sites are of; only the names of its children are read.
        sites: what find_sites returned.
        block: name of the attention.
        at: shell patterns on the dotted path; a site is chosen that matches one of them.
        exclude: shell patterns of sites to leave out.
        stages: numbers of stages to choose from; all if empty.
        every: of the chosen sites take each `every`-th, beginning with the first.
        placement: one of sites.PLACEMENTS.
        options: of the block.
        seed: of the new weights.
        stack: take sites too that have the same block at the same placement already.

    Raises:
        UnknownName: no such block, placement or option.
        BadOption: a value out of range.
        PatternUnmatched: a pattern or stage that no site has.
        PlacementUnavailable: a site named in full, or all sites, do not have the placement, or
            have this block there already.
        NoSites: nothing is left to operate on.
    """
    values = check_request(block, placement=placement, every=every, options=options)
    chosen = select_sites(sites, at=at, exclude=exclude, stages=stages, every=every)
    literal = {pattern for pattern in as_patterns(at) if not _is_wild(pattern)}
    cuts: list[Cut] = []
    skipped: dict[str, str] = {}
    for site in chosen:
        try:
            if not stack:
                _refuse_twin(model, site, block, placement)
            cuts.append(_plan_cut(model, site, block, placement, values, seed))
        except PlacementUnavailable as error:
            if site.path in literal:
                raise
            skipped[site.path] = str(error)
    if not cuts:
        raise PlacementUnavailable(next(iter(skipped.values())))
    return Plan(tuple(cuts), skipped)


def check_request(
    block: str,
    *,
    placement: str = "post",
    every: int = 1,
    options: Mapping[str, Any] | None = None,
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
    if every < 1:
        raise BadOption(f"--every must be at least 1, not {every}")
    return blocks.check_options(block, options or {})


def _plan_cut(
    model: nn.Module,
    site: Site,
    block: str,
    placement: str,
    options: Mapping[str, Any],
    seed: int,
) -> Cut:
    if site.layout not in blocks.get(block).layouts:
        raise PlacementUnavailable(
            f"{block} cannot serve {site.path}: its feature map is {site.layout}"
        )
    spot = site.spot(placement)
    taken = {name for name, _ in model.get_submodule(site.path).named_children()}
    child = spot.splice.child
    number = 1
    while child in taken:  # a second attention at one place
        number += 1
        child = f"{spot.splice.child}_{number}"
    splice = Splice(**{**asdict(spot.splice), "child": child})
    return Cut(site.path, placement, block, options, spot.place, spot.shape, splice, seed)


def _refuse_twin(model: nn.Module, site: Site, block: str, placement: str) -> None:
    place = re.compile(rf"attention_{placement}(_[0-9]+)?")
    for name, child in model.get_submodule(site.path).named_children():
        if place.fullmatch(name) and isinstance(child, blocks.get(block)):
            raise PlacementUnavailable(
                f"{site.path} has {block} at {placement!r} already; give --stack (stack=True) to "
                "put another behind it, or choose other sites by --at or --exclude"
            )


def as_patterns(patterns: str | Iterable[str]) -> list[str]:
    """Return one pattern or many as a list."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _is_wild(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def select_sites(
    sites: Sequence[Site],
    *,
    at: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    stages: Iterable[int] = (),
    every: int = 1,
) -> list[Site]:
    """Return the sites that match, in their order. See make_plan.

    Raises:
        PatternUnmatched: a pattern or stage that no site has.
        NoSites: nothing is left.
    """
    paths = [site.path for site in sites]
    wanted, unwanted = as_patterns(at) or ["*"], as_patterns(exclude)
    for pattern in (*wanted, *unwanted):
        if not fnmatch.filter(paths, pattern):
            hint = nearest(pattern, paths) or f"; the first is {paths[0]!r}" if paths else ""
            raise PatternUnmatched(f"{pattern!r} matches none of the {len(paths)} sites{hint}")
    known = {site.stage for site in sites}
    numbers = list(stages)
    for number in numbers:
        if number not in known:
            raise PatternUnmatched(f"there is no stage {number}; the stages are 1 to {max(known)}")
    chosen = [
        site
        for site in sites
        if any(fnmatch.fnmatchcase(site.path, pattern) for pattern in wanted)
        and not any(fnmatch.fnmatchcase(site.path, pattern) for pattern in unwanted)
        and (not numbers or site.stage in numbers)
    ][::every]
    if not chosen:
        raise NoSites("no site is left after --at, --stage and --exclude; loosen one of them")
    return chosen
