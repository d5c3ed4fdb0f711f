"""What a site is: a module that attention can be put at, of a kind, in a numbered stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from attnsurgeon.errors import NoSites, PlacementUnavailable
from attnsurgeon.observation import Shape
from attnsurgeon.spots import Spot, sizes_in

KINDS = ("residual", "merge", "layer", "plain")
"""What a site is; the first of them that a network has is what is chosen by default."""


@dataclass(frozen=True)
class Site:
    """A module that attention can be put at.

    Attributes:
        path: dotted path of the module in the model.
        kind: `residual` (it adds a branch and a shortcut), `merge` (it concatenates branches),
            `plain` (of the class of a residual block, without a shortcut), or `layer` (any module
            that returns a feature map).
        layout: what the axes of `shape` are: NCHW, NHWC, NLC, NCDHW or NDHWC.
        channels: C of the module's output, measured.
        shape: of the module's output, measured with the example input (its batch comes first).
        placements: the places that this module has, out of PLACEMENTS.
        blocks: names of the attention blocks that can serve one of them.
        stage: number of the run of sites of one kind and feature size, from 1 in the order of
            execution; of a plain one, the number of the residual stage of its size (0: none is).
        attention: paths of modules in it that are attention already, the network's own.
        also: the other paths by which the same module can be reached.
        refused: placement -> why this module does not have it.
    """

    path: str
    kind: str
    layout: str
    channels: int
    shape: Shape
    placements: tuple[str, ...]
    blocks: tuple[str, ...]
    stage: int = 1
    attention: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict, repr=False)
    spots: Mapping[str, Spot] = field(default_factory=dict, repr=False)

    def spot(self, placement: str) -> Spot:
        """Return the place of that name.

        Raises:
            PlacementUnavailable: the module does not have it; the message says why.
        """
        if placement not in self.spots:
            reason = self.refused.get(placement, f"a {self.kind} site has no such place")
            have = ", ".join(self.placements) or "none"
            raise PlacementUnavailable(
                f"{self.path} has no placement {placement!r}: {reason}; it has {have}"
            )
        return self.spots[placement]


def default_kind(sites: Sequence[Site]) -> str:
    """Return the kind of site that is meant where none is named: residual, or else merge.

    Raises:
        NoSites: the network has neither.
    """
    kinds = {site.kind for site in sites}
    for kind in ("residual", "merge"):
        if kind in kinds:
            return kind
    first = sites[0].path if sites else "PATH"
    raise NoSites(
        "the network has no residual block and no merge of branches; give --kind layer for its "
        f"{len(sites)} activations, name modules, as in --at {first}, or choose another network, "
        "such as resnet50"
    )


def number_stages(sites: Sequence[Site]) -> list[Site]:
    """Return the sites with their stages: runs of one kind and feature size."""
    stages: dict[int, int] = {}
    for kind in ("residual", "merge", "layer"):
        number, size = 0, None
        for i, site in enumerate(sites):
            if site.kind == kind:
                here = feature_size(site)
                if here != size:
                    number, size = number + 1, here
                stages[i] = number
    by_size = {feature_size(s): stages[i] for i, s in enumerate(sites) if s.kind == "residual"}
    return [
        replace(site, stage=stages.get(i, by_size.get(feature_size(site), 0)))
        for i, site in enumerate(sites)
    ]


def feature_size(site: Site) -> Shape:
    """Return the spatial part of a site's shape."""
    return sizes_in(site.shape, site.layout)
