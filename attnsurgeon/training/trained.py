"""Give an operated network the weights that a training script saved."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from attnsurgeon.checkpoint import Fit, load_checkpoint
from attnsurgeon.errors import CheckpointMismatch
from attnsurgeon.surgery import attention_paths, is_new_key
from attnsurgeon.unwrapping import Checkpoint, bare_checkpoint

_PLACE = re.compile(r"(.*\battention_[a-z]+(?:_[0-9]+)?)\.")


def load_trained(model: nn.Module, held: Checkpoint) -> Fit:
    """Load a checkpoint of this very operated network, as read_checkpoint read it.

    Raises:
        CheckpointMismatch: it does not fit; a checkpoint of the plain host or of another plan is
            told as what it is.
    """
    try:
        return load_checkpoint(model, held)
    except CheckpointMismatch as error:
        bare = bare_checkpoint(held, model.state_dict().keys())
        reason = _reason(model, bare.state)
        if not reason:
            raise
        raise CheckpointMismatch(f"{held.source} {reason}") from error


def _reason(model: nn.Module, keys: Iterable[str]) -> str:
    """Return what a checkpoint is that lacks or has other attention, or an empty string."""
    own, found = set(attention_paths(model)), _places(keys)
    if own == found:
        return ""
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


def _places(keys: Iterable[str]) -> set[str]:
    return {match[1] for key in keys if (match := _PLACE.match(key))}
