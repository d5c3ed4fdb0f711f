"""Where the cost sits: the host with one site's attention alone, and all without that one."""

from __future__ import annotations

import dataclasses
import glob
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from attnsurgeon.bench.doubts import machine_doubts
from attnsurgeon.bench.findings import Job, SiteCost, SiteCosts
from attnsurgeon.bench.ratios import HOW, compared, ratio_of
from attnsurgeon.bench.rounds import Race, is_settled
from attnsurgeon.bench.targets import Inputs, Target
from attnsurgeon.bench.timing import Runner, race
from attnsurgeon.bench.watch import Watch
from attnsurgeon.borrow import borrowed_buffers
from attnsurgeon.errors import BadOption
from attnsurgeon.plan import Cut
from attnsurgeon.surgery import cuts_of, remove_attention


def check_sites(targets: Sequence[Target]) -> None:
    """Refuse targets of which nothing could be taken out.

    Raises:
        BadOption: none of them is a network that holds attention.
    """
    if not any(_is_operated(target) for target in targets):
        raise BadOption(
            "--per-site needs a network with attention of attnsurgeon: give a .safetensors file "
            "that `attnsurgeon insert` wrote"
        )


def _is_operated(target: Target) -> bool:
    return target.model is not None and bool(cuts_of(target.model))


def cost_sites(
    target: Target,
    job: Job,
    inputs: Inputs,
    prepare: Callable[[Target], Runner],
    seconds: float,
    tell: Callable[[str, float], None],
    keep: Callable[[SiteCosts], None],
) -> None:
    """Time every site of a target on its own, where it has any.

    Four networks run in turn for each site: the host, the host with that attention alone, all
    but that one, and all.

    Args:
        target: with its gates open.
        job: what runs it, for the record.
        inputs: one batch on the CPU.
        prepare: makes a network ready, its first run done.
        seconds: for each site.
        tell: is told which site it is, and the share that is done.
        keep: is given what was found, of all sites or, where an error or an interrupt ends it, of
            those before.
    """
    if not _is_operated(target):
        return
    paths = list(dict.fromkeys(cut.path for cut in cuts_of(target.module)))
    shapes = _feature_shapes(target.module, inputs)
    watch = Watch(torch.device(job.device))
    host, whole = (prepare(one) for one in (_without(target, paths), target))
    costs: list[SiteCost] = []
    races: list[Race] = []
    try:
        for number, path in enumerate(paths):
            tell(f"site {path}", number / len(paths))
            others = [other for other in paths if other != path]
            only, rest = (prepare(_without(target, gone)) for gone in (others, [path]))
            races.append(race([host, only, rest, whole], seconds))
            costs.append(_cost_of(_cut_at(target.module, path), shapes[path], races[-1]))
    finally:
        if costs:
            doubts = _doubts(paths, races[: len(costs)], seconds, watch)
            keep(_together(job, target.name, costs, races, doubts))


def _together(
    job: Job, name: str, costs: Sequence[SiteCost], races: Sequence[Race], doubts: Sequence[str]
) -> SiteCosts:
    together = ratio_of(races, 3)
    return SiteCosts(
        job=job,
        target=name,
        sites=tuple(costs),
        sum_alone_in=math.fsum(cost.alone_in.ratio - 1 for cost in costs),
        whole=together.ratio - 1,
        whole95=(together.low - 1, together.high - 1),
        doubts=tuple(doubts),
    )


def _doubts(paths: Sequence[str], races: Sequence[Race], seconds: float, watch: Watch) -> list[str]:
    """Return the reasons not to trust the costs of the sites, or their sum."""
    restless = [path for path, found in zip(paths, races, strict=False) if not is_settled(found)]
    disturbed = {
        path: HOW[compared(found).part]
        for path, found in zip(paths, races, strict=False)
        if found.is_disturbed()
    }
    doubts = []
    if len(races) < len(paths):
        doubts.append(
            f"incomplete: {len(races)} of {len(paths)} sites were timed, and the sum is of those"
        )
    whole = HOW.get(compared(*races).part)
    if disturbed and set(disturbed.values()) != {whole}:
        doubts.append(f"disturbed: of the calls of all sites, for the whole: {whole}")
    for how in dict.fromkeys(disturbed.values()):
        at = ", ".join(path for path, done in disturbed.items() if done == how)
        doubts.append(f"disturbed: at {at} something else held up most calls; {how}")
    if restless:
        doubts.append(
            f"not stable: at {', '.join(restless)} the last rounds disagree with those before; "
            f"give more than --seconds {seconds:g}"
        )
    return [*doubts, *machine_doubts(watch.look())]


def _without(target: Target, paths: Sequence[str]) -> Target:
    """Return the target without the attention at these sites; gates and weights stay."""
    if not paths:
        return target
    bare = remove_attention(target.module, [glob.escape(path) for path in paths])
    return dataclasses.replace(target, model=bare.eval())


def _cut_at(model: nn.Module, path: str) -> Cut:
    return next(cut for cut in cuts_of(model) if cut.path == path)


def _cost_of(cut: Cut, shape: tuple[int, ...], found: Race) -> SiteCost:
    alone_in, alone_out = ratio_of(found, 1), ratio_of(found, 3, baseline=2)
    return SiteCost(cut.path, cut.placement, cut.block, shape, alone_in, alone_out)


def _feature_shapes(model: nn.Module, inputs: Inputs) -> dict[str, tuple[int, ...]]:
    """Run once and note what each site's attention is given, without the batch."""
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = []
    for cut in cuts_of(model):

        def note(module: nn.Module, given: tuple[Tensor, ...], path: str = cut.path) -> None:
            shapes.setdefault(path, tuple(given[0].shape[1:]))

        hooks.append(model.get_submodule(cut.child).register_forward_pre_hook(note))
    one = tuple(part[:1] if isinstance(part, Tensor | list) else part for part in inputs)
    try:
        with torch.no_grad(), borrowed_buffers(model):
            model(*one)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes
