"""Give an operated network the weights that a training script saved."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from attnsurgeon.checkpoint import Fit, load_checkpoint
from attnsurgeon.errors import CheckpointMismatch
from attnsurgeon.gate import gate_numbers
from attnsurgeon.noted import Noted
from attnsurgeon.recipe import KEY, Recipe
from attnsurgeon.surgery import attention_paths, cuts_of, is_new_key
from attnsurgeon.unwrapping import Checkpoint, bare_checkpoint

_OF_ITS_FORM = "give it to a file of the --gate that it was trained with"
_PLACE = re.compile(r"(.*\battention_[a-z]+(?:_[0-9]+)?)\.")


def load_trained(model: nn.Module, held: Checkpoint) -> Fit:
    """Give an operated network a checkpoint of itself, and return what of it was taken.

    Raises:
        CheckpointMismatch: it does not fit; a checkpoint of the plain host or of another plan is
            told as what it is.
    """
    bare = bare_checkpoint(held, model.state_dict().keys())
    told = _noted_otherwise(model, bare) or _told_otherwise(model, bare)
    if told:
        raise CheckpointMismatch(f"{held.source} {told}")
    try:
        return load_checkpoint(model, held)
    except CheckpointMismatch as error:
        reason = _reason(model, bare.state)
        if not reason:
            raise
        raise CheckpointMismatch(f"{held.source} {reason}") from error


def _noted_otherwise(model: nn.Module, bare: Checkpoint) -> str:
    """Return which gates are of another form by what torch noted beside the tensors, if any."""
    own = {path: m.form for path, m in model.named_modules() if isinstance(m, Noted)}
    for path, form in bare.forms.items():
        if own.get(path, form) != form:
            return (
                f"is of another form of gate: {form!r} where the file has {own[path]!r}, the first "
                f"{path}; {_OF_ITS_FORM}"
            )
    return ""


def _told_otherwise(model: nn.Module, bare: Checkpoint) -> str:
    """Return how the recipe of a checkpoint differs at a place where both have attention, if so.

    Options that change no tensor's shape, and the forms of gates, are told by nothing else.
    """
    if KEY not in bare.metadata:
        return ""
    theirs = {cut.child: cut for cut in Recipe.loads(bare.metadata[KEY], bare.source).cuts}
    for own in cuts_of(model):
        other = theirs.get(own.child, own)
        for name in ("block", "options", "gate"):
            mine, found = getattr(own, name), getattr(other, name)
            if mine != found:
                return (
                    f"is of another plan: {name} {found!r} at {own.child}, where the file has "
                    f"{mine!r}; give it to the file that it was trained from"
                )
    return ""


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
        f"{apart[0]}; {_OF_ITS_FORM}"
    )


def _places(keys: Iterable[str]) -> set[str]:
    return {match[1] for key in keys if (match := _PLACE.match(key))}
