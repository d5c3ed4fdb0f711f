"""Make the cuts of a plan in a model, and undo them."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from attnsurgeon import blocks
from attnsurgeon.arguments import typed
from attnsurgeon.blocks.block import AttentionBlock
from attnsurgeon.borrow import borrowed_randomness
from attnsurgeon.errors import (
    AttnSurgeonError,
    BadFile,
    BadOption,
    PatternUnmatched,
    first_line,
    nearest,
)
from attnsurgeon.gate import give_form
from attnsurgeon.plan import Cut, Plan
from attnsurgeon.selection import as_patterns
from attnsurgeon.wiring import splices, wire


def cuts_of(model: nn.Module) -> tuple[Cut, ...]:
    """Return the cuts that were made in a model, in order; none for an untouched one."""
    made: tuple[Cut, ...] = model.__dict__.get("_attnsurgeon_cuts", ())
    return made


def attention_paths(model: nn.Module) -> list[str]:
    """Return the dotted paths of the attention in a model; every new key begins with one.

    A module that can be reached by several paths has keys under each of them.
    """
    modules = model.named_modules(remove_duplicate=False)
    return [path for path, module in modules if isinstance(module, AttentionBlock)]


def is_new_key(key: str, paths: Iterable[str]) -> bool:
    """Tell whether a key of a state dict belongs to attention at one of these paths."""
    return any(key.startswith(f"{path}.") for path in paths)


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Insert the attention of a plan into this very model.

    Everything is refused before the first cut is made, and a cut that fails takes back those
    before it. New parts join in the mode, dtype and device of the block they are put into.

    Raises:
        BadFile: a cut names a block that the model does not have, or a child that is taken.
        BadOption: an option out of range.
        PlacementUnavailable: a block's forward lacks the place.
    """
    for cut in plan.cuts:
        _check(model, cut)
    made = [build_attention(model, cut) for cut in plan.cuts]
    before = cuts_of(model)
    last = {cut.path: cut for cut in plan.cuts}
    done: list[Cut] = []
    try:
        for cut, attention in zip(plan.cuts, made, strict=True):
            done.append(cut)
            _attach(model, cut, attention)
            if last[cut.path] is cut:  # a block is wired once, whatever is put into it
                _wire_all(model, [other for other in plan.cuts if other.path == cut.path])
    except BaseException:
        _detach(model, reversed(done))
        raise
    model.__dict__["_attnsurgeon_cuts"] = (*before, *plan.cuts)


@typed
def remove_attention(model: nn.Module, at: str | Iterable[str] = "*") -> nn.Module:
    """Return a copy of the model without the attention at the matching sites.

    What trained together with the attention stays as trained. With every attention removed the
    copy is the host again: its classes, its keys, its tensors.

    Raises:
        PatternUnmatched: a pattern that matches no operated site.
    """
    return without_cuts(model, cuts_at(model, at))


def cuts_at(model: nn.Module, at: str | Iterable[str]) -> list[Cut]:
    """Return the cuts at the sites that match a pattern.

    Raises:
        PatternUnmatched: a pattern that matches no operated site.
    """
    cuts, patterns = cuts_of(model), as_patterns(at)
    paths = [cut.path for cut in cuts]
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            raise PatternUnmatched(
                f"{pattern!r} matches none of the {len(paths)} operated sites"
                f"{nearest(pattern, paths)}"
            )
    return [cut for cut in cuts if any(fnmatch.fnmatchcase(cut.path, p) for p in patterns)]


def without_cuts(model: nn.Module, unwanted: Iterable[Cut]) -> nn.Module:
    """Return a copy of the model without the attention of these of its cuts."""
    children = {cut.child for cut in unwanted}
    bare = copy.deepcopy(model)
    _detach(bare, [cut for cut in cuts_of(model) if cut.child in children])
    kept = [cut for cut in cuts_of(model) if cut.child not in children]
    bare.__dict__["_attnsurgeon_cuts"] = tuple(kept)
    if not kept:
        del bare.__dict__["_attnsurgeon_cuts"]
    return bare


def _check(model: nn.Module, cut: Cut) -> None:
    try:
        block = model.get_submodule(cut.path)
    except AttributeError:
        raise BadFile(f"{type(model).__name__} has no module {cut.path!r} to operate on") from None
    if hasattr(block, cut.splice.child):
        raise BadFile(f"{cut.path} already has something called {cut.splice.child!r}")


def build_attention(model: nn.Module, cut: Cut) -> AttentionBlock:
    """Return the attention of a cut; its weights depend on the seed and its own place only."""
    text = f"{cut.seed}:{cut.path}:{cut.splice.child}:{cut.block}"
    own_seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    with borrowed_randomness(own_seed):
        try:
            attention = blocks.build(cut.block, cut.place, cut.options)
            give_form(attention, cut.gate)
        except AttnSurgeonError as error:
            raise type(error)(f"{cut.block} at {cut.path}: {error}") from None
        except RuntimeError as error:  # of torch: more memory than there is
            if not cut.options:
                raise
            told = ", ".join(f"{option}={value!r}" for option, value in cut.options.items())
            raise BadOption(
                f"{cut.block} cannot be built with {told}: {first_line(error)}"
            ) from error
    like = next(
        (p for p in _parameters_near(model, cut.path) if p.is_floating_point()), torch.empty(0)
    )
    attention = attention.to(device=like.device, dtype=like.dtype)
    blocks.try_out(cut.block, attention, cut.place, cut.sizes)
    return attention


def _parameters_near(model: nn.Module, path: str) -> Iterable[torch.Tensor]:
    yield from model.get_submodule(path).parameters()
    yield from model.parameters()


def _attach(model: nn.Module, cut: Cut, attention: AttentionBlock) -> None:
    block = model.get_submodule(cut.path)
    attention.train(block.training)
    block.add_module(cut.splice.child, attention)


def _wire_all(model: nn.Module, cuts: Iterable[Cut]) -> None:
    """Have one block call the attention of these cuts, after what it calls already."""
    cuts = list(cuts)
    block = model.get_submodule(cuts[0].path)
    wire(block, (*splices(block), *(cut.splice for cut in cuts)))


def _detach(model: nn.Module, cuts: Iterable[Cut]) -> None:
    """Take the attention of these cuts out of its blocks, each of which is wired once."""
    unwanted: dict[str, list[str]] = {}
    for cut in cuts:
        unwanted.setdefault(cut.path, []).append(cut.splice.child)
    for path, children in unwanted.items():
        block = model.get_submodule(path)
        wire(block, tuple(s for s in splices(block) if s.child not in children))
        for child in children:
            block._modules.pop(child, None)


def count_parameters(model: nn.Module) -> Mapping[str, int]:
    """Return the numbers of parameters: `before`, `added` (without gates), `gates`, `after` (all).

    before + added + gates = after.
    """
    paths = attention_paths(model)
    counts = {"before": 0, "added": 0, "gates": 0, "after": 0}
    for name, parameter in model.named_parameters():
        kind = "before"
        if is_new_key(name, paths):
            kind = "gates" if name.endswith(".openness") else "added"
        counts[kind] += parameter.numel()
        counts["after"] += parameter.numel()
    return counts
