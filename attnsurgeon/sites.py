"""Where attention may go in a network, found from what one pass showed."""

from __future__ import annotations

import fnmatch
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from attnsurgeon import blocks
from attnsurgeon.anatomy import own_class
from attnsurgeon.arguments import typed
from attnsurgeon.blocks.block import AttentionBlock
from attnsurgeon.errors import NoSites, PlacementUnavailable
from attnsurgeon.example import as_inputs
from attnsurgeon.network import plain_network
from attnsurgeon.observation import Join, Observation, Shape
from attnsurgeon.observe import observe
from attnsurgeon.site import KINDS, Site, default_kind, number_stages
from attnsurgeon.spots import PLACEMENTS, Spot, channel_axis, check_used, post_spot, residual_spots
from attnsurgeon.tracks import LAYOUTS

__all__ = ["KINDS", "PLACEMENTS", "Site", "default_kind", "find_sites"]

_ACTIVATIONS = {
    "relu",
    "relu_",
    "hardtanh",
    "hardtanh_",
    "leaky_relu",
    "leaky_relu_",
    "silu",
    "silu_",
    "gelu",
    "hardswish",
    "hardswish_",
    "elu",
    "elu_",
    "mish",
    "sigmoid",
    "tanh",
    "prelu",
    "_prelu_kernel",
}


@typed
def find_sites(model: nn.Module, example: Any = None, *, named: Iterable[str] = ()) -> list[Site]:
    """Return the sites of a model in the order of execution.

    Residual blocks, merges and plain blocks are found by what they did; where there is neither
    a residual block nor a merge, the activations are offered as layers.

    Args:
        model: any network; it is watched through one forward pass and left as it was. Paths are
            those in the network itself where it is compiled or wrapped for parallel training.
        example: an input, or a tuple of inputs; shapes are measured with it. By default that of
            the model's card, or a (1, C, 224, 224) image with the first convolution's channels.
        named: shell patterns of further modules to offer as layers.

    Raises:
        HostUnusable: the model is scripted, quantized or sharded, or does not run on this input.
        NoSites: no module of it joins paths or returns an activation of a known layout.
        PlacementUnavailable: a module named in full returns no feature map.
    """
    model, _ = plain_network(model)
    seen = observe(model, as_inputs(model, example))
    modules = dict(model.named_modules())
    wanted = list(named)
    finder = _Finder(model, seen, set(wanted))
    joins = _joins_by_path(seen)
    classes = {own_class(modules[p]) for p, join in joins.items() if join.kind == "addition"}
    attention = [path for path, module in modules.items() if isinstance(module, AttentionBlock)]
    _check_run(seen, modules, wanted)
    sites = []
    for path, visit in list(seen.visits.items()):
        module = modules[path]
        if not path or not visit.count:
            continue
        if any(f"{path}.".startswith(f"{inside}.") for inside in attention):
            if path in wanted:
                raise PlacementUnavailable(f"{path} is attention itself; name a module of the host")
            continue
        if path in joins:
            site = finder.joining(module, joins[path])
        elif own_class(module) in classes and visit.out_layout:
            site = finder.alone("plain", path, module)
        elif path in wanted or (visit.out_layout and _is_wanted(path, wanted)):
            site = finder.alone("layer", path, module)
        else:
            continue
        sites.append(site)
    if not {"residual", "merge"} & {site.kind for site in sites}:
        sites = _offer_activations(finder, modules, sites)
    if not sites:
        raise NoSites(
            f"{type(model).__name__} has no site: {_why_none(seen)}; choose another network, such "
            "as resnet50"
        )
    return number_stages(sites)


def _why_none(seen: Observation) -> str:
    """Return why nothing in a network is a site, as far as its pass showed."""
    if seen.unplaced:
        path, shape = next(iter(seen.unplaced.items()))
        return (
            f"what {path} adds or concatenates, {'x'.join(map(str, shape))}, is of none of the "
            f"layouts that attention knows ({', '.join(dict.fromkeys(LAYOUTS.values()))}); of maps "
            "of one axis only channels last are"
        )
    return (
        "no module in it adds or concatenates paths that come from one input of its own, or is an "
        "activation that returns a feature map"
    )


def _check_run(seen: Observation, modules: Mapping[str, nn.Module], wanted: Sequence[str]) -> None:
    """Refuse a module named in full that is never run itself, as one whose children others walk.

    Raises:
        PlacementUnavailable: there is nothing that attention could follow.
    """
    for path in wanted:
        if path in modules and seen.complete and path not in seen.visits:
            names = [name for name, _ in modules[path].named_children()]
            told = f"; name one in it that is, such as {path}.{names[-1]}" if names else ""
            raise PlacementUnavailable(f"{path} is not run itself in eval mode{told}")


def _is_wanted(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _offer_activations(
    finder: _Finder, modules: Mapping[str, nn.Module], sites: list[Site]
) -> list[Site]:
    """Add the activations of a network that neither adds nor concatenates."""
    seen = finder.seen
    known = {site.path for site in sites}
    offered = [
        finder.alone("layer", path, modules[path])
        for path, visit in seen.visits.items()
        if path and path not in known and visit.out_layout and visit.operators & _ACTIVATIONS
    ]
    order = {path: i for i, path in enumerate(seen.visits)}
    return sorted([*sites, *offered], key=lambda site: order[site.path])


def _joins_by_path(seen: Observation) -> dict[str, Join]:
    """Return the join that makes a module a site: its last addition, or what it returns joined."""
    found: dict[str, Join] = {}
    for join in seen.joins:
        if join.kind == "addition" or (
            _returns_join(seen, join) and found.get(join.path, join).kind != "addition"
        ):
            found[join.path] = join
    return found


def _returns_join(seen: Observation, join: Join) -> bool:
    """Tell whether what was joined is what the module returns, and not a step on its way."""
    return seen.visits[join.path].out_shape == join.shape


class _Finder:
    """Make sites of modules, from one observation."""

    def __init__(self, model: nn.Module, seen: Observation, named: set[str]) -> None:
        self.seen = seen
        self.named = named
        self.paths: dict[int, list[str]] = defaultdict(list)
        for path, module in model.named_modules(remove_duplicate=False):
            self.paths[id(module)].append(path)

    def joining(self, module: nn.Module, join: Join) -> Site:
        """Return the site of a module that joins paths."""
        if join.kind == "concatenation":
            return self.alone("merge", join.path, module)
        spots, refused = residual_spots(module, self.seen, join)
        visit = self.seen.visits[join.path]
        shape, layout = visit.out_shape, visit.out_layout
        if shape is None or layout is None:
            shape, layout = join.shape, join.layout
        return self._site("residual", join.path, module, shape, layout, spots, refused)

    def alone(self, kind: str, path: str, module: nn.Module) -> Site:
        """Return the site of a module that has no place but the one after it."""
        visit = self.seen.visits[path]
        if visit.out_shape is None or visit.out_layout is None:
            raise PlacementUnavailable(
                f"{path} returns no feature map of a known layout, which attention could follow"
            )
        spots: dict[str, Spot] = {}
        refused: dict[str, str] = {}
        try:
            if kind == "layer" and path not in self.named:  # that may count in train mode only
                check_used(self.seen, path)
            spots["post"] = post_spot(module, self.seen, path)
        except PlacementUnavailable as error:
            refused["post"] = str(error)
        return self._site(kind, path, module, visit.out_shape, visit.out_layout, spots, refused)

    def _site(
        self,
        kind: str,
        path: str,
        module: nn.Module,
        shape: Shape,
        layout: str,
        spots: dict[str, Spot],
        refused: dict[str, str],
    ) -> Site:
        known = itertools.chain(self.paths[id(module)])
        return Site(
            path=path,
            kind=kind,
            layout=layout,
            channels=shape[channel_axis(layout)],
            shape=shape,
            placements=tuple(spots),
            blocks=tuple(name for name in blocks.names() if _serves(name, spots)),
            attention=tuple(
                dict.fromkeys(p for p in self.seen.scalings if f"{p}.".startswith(f"{path}."))
            ),
            also=tuple(other for other in known if other != path),
            refused=refused,
            spots=spots,
        )


def _serves(name: str, spots: Mapping[str, Spot]) -> bool:
    block = blocks.get(name)
    return any(
        placement in block.placements and spot.serves in block.layouts
        for placement, spot in spots.items()
    )
