"""Give an operated network the weights that a training script saved."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from attnsurgeon.checkpoint import Fit, load_checkpoint
from attnsurgeon.errors import CheckpointMismatch
from attnsurgeon.gate import gate_numbers
from attnsurgeon.surgery import attention_paths, is_new_key
from attnsurgeon.unwrapping import Checkpoint, bare_checkpoint

_PLACE = re.compile(r"(.*\battention_[a-z]+(?:_[0-9]+)?)\.")


def load_trained(model: nn.Module, held: Checkpoint) -> Fit:
    """Give an operated network a checkpoint of itself, and return what of it was taken.

    Raises:
        CheckpointMismatch: it does not fit; a checkpoint of the plain host or of another plan is
            told as what it is.
    """
    try:
        return load_checkpoint(model, held)
    except CheckpointMismatch as error:
        reason = _reason(model, bare_checkpoint(held, model.state_dict().keys()).state)
        if not reason:
            raise
        raise CheckpointMismatch(f"{held.source} {reason}") from error


def _reason(model: nn.Module, keys: Iterable[str]) -> str:
    """Return what a checkpoint is that lacks or has other attention, or an empty string."""
    own, found = set(attention_paths(model)), _places(keys)
    if own == found:
        return _other_form(model, keys)
    if not found:
        host = {key for key in model.state_dict() if not is_new_key(key, own)}
        if not host <= set(keys):
            return ""
        return (
            f"is of the plain host: all attention is missing, the first {min(own)}; give it to "
            "`attnsurgeon insert HOST --checkpoint`, or a checkpoint of the operated network"
        )
    apart = sorted(own ^ found)
    return (
        f"is of another plan: attention stands at {len(found)} places in it and at {len(own)} in "
        f"the file, and they differ in {len(apart)}, the first {apart[0]}; give the file that was "
        "trained"
    )


def _other_form(model: nn.Module, keys: Iterable[str]) -> str:
    """Return that a checkpoint's gates are of another form, told by which of them have numbers."""
    own = set(gate_numbers(model))
    apart = sorted(own ^ {key for key in keys if key.rpartition(".")[2] == "openness"})
    if not apart:
        return ""
    has, lacks = ("the file", "it") if apart[0] in own else ("it", "the file")
    return (
        f"is of another form of gate: {has} has a number where {lacks} has none, the first "
        f"{apart[0]}; give it to a file of the --gate that it was trained with"
    )


def _places(keys: Iterable[str]) -> set[str]:
    return {match[1] for key in keys if (match := _PLACE.match(key))}
