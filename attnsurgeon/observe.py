"""Watch one forward pass: which module adds or concatenates what, and convolves, in which shapes.

The pass runs on meta tensors (no memory, no arithmetic) with stand-ins for the model's
tensors, which are given back; a model that cannot run there runs for real, once. What
attention already inserted does is left out: an operated network looks like its host.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from attnsurgeon.anatomy import own_class
from attnsurgeon.borrow import (
    borrowed_buffers,
    borrowed_modes,
    borrowed_randomness,
    on_meta,
    stand_ins,
)
from attnsurgeon.errors import HostUnusable, first_line
from attnsurgeon.network import check_mode
from attnsurgeon.observation import Observation
from attnsurgeon.watch import Watch


def observe(model: nn.Module, inputs: tuple[Any, ...]) -> Observation:
    """Run the model once in eval mode on inputs of these shapes and return what was seen.

    Nothing of the model changes: parameters, buffers, modes, hooks and random state are as before.
    A pass that comes to ask for numbers, which meta tensors do not have, is taken as far as it
    came, unless a module of a kind that joins paths has not run by then: then it runs for real.

    Raises:
        HostUnusable: the forward pass fails with this input, or torch.inference_mode() is on.
    """
    check_mode()
    with borrowed_modes(model), borrowed_randomness(0), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a host's own warnings belong to the host's own runs
        model.eval()
        seen = _watch_on_meta(model, inputs)
        if seen is not None:
            return seen
        with borrowed_buffers(model):
            return _watch_for_real(model, inputs)


def _watch_on_meta(model: nn.Module, inputs: tuple[Any, ...]) -> Observation | None:
    """Return what the pass on meta tensors showed, or None where that is not enough."""
    watch = Watch(model, stand_ins(inputs))
    try:
        with watch.hooks(), on_meta(model), watch:
            return watch.finish(model(*watch.inputs))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # what cannot be done on meta is tried for real
        is_outline = any(parameter.is_meta for parameter in model.parameters())  # has no numbers
        if not _asks_for_numbers(error) or not (
            is_outline or _has_seen_its_kinds(model, watch.seen)
        ):
            return None
    watch.seen.tokens = watch.tracks.tokens
    watch.seen.complete = False
    return watch.seen


def _asks_for_numbers(error: BaseException) -> bool:
    return isinstance(error, NotImplementedError) or "meta tensors" in str(error)


def _has_seen_its_kinds(model: nn.Module, seen: Observation) -> bool:
    """Tell whether every module of a class that joins paths has run."""
    modules = dict(model.named_modules())
    joining = {own_class(modules[join.path]) for join in seen.joins}
    return bool(joining) and all(
        path in seen.visits for path, module in modules.items() if own_class(module) in joining
    )


def _watch_for_real(model: nn.Module, inputs: tuple[Any, ...]) -> Observation:
    watch = Watch(model, inputs)
    try:
        with watch.hooks(), watch:
            return watch.finish(model(*inputs))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        raise HostUnusable(
            f"{type(model).__name__} does not run on inputs of shape {shapes}: "
            f"{first_line(error)}; give it an input it takes"
        ) from error
