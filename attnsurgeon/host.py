"""What is operated on: a registered name, the shipped `digits` or your own, with its weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchvision.models import list_models

from attnsurgeon.arguments import typed
from attnsurgeon.borrow import borrowed_randomness
from attnsurgeon.builder import weights_on_meta, without_memory
from attnsurgeon.card import WEIGHT_ARGUMENTS, HostCard, card_of, give_card
from attnsurgeon.checkpoint import Fit, class_counts, load_checkpoint, read_checkpoint
from attnsurgeon.errors import AttnSurgeonError, BadFile, BadOption, HostUnusable, MissingPackage
from attnsurgeon.network import plain_network
from attnsurgeon.sources import DEFAULT_WEIGHTS as DEFAULT_WEIGHTS
from attnsurgeon.sources import NO_WEIGHTS as NO_WEIGHTS
from attnsurgeon.sources import own, source_of
from attnsurgeon.sources.shipped import DIGITS as DIGITS
from attnsurgeon.unwrapping import Checkpoint, bare_checkpoint

Given = nn.Module | Callable[..., nn.Module] | str
"""How a network of the user's own is named again: itself, what makes it, or FILE.py:NAME."""
_named: ContextVar[Given | None] = ContextVar("host of files", default=None)


@dataclass(frozen=True)
class Host:
    """A network in eval mode, and what was found on the way to it.

    Attributes:
        model: its card goes with it (card_of).
        fit: how its weights came out of a checkpoint; None where they did not.
        notices: what the user should know once.
    """

    model: nn.Module
    fit: Fit | None = None
    notices: tuple[str, ...] = ()


def host_names() -> list[str]:
    """Return every name that can be operated on by itself: torchvision's, and `digits`."""
    return [*list_models(), DIGITS]


def load_host(
    name: str,
    *,
    weights: str = DEFAULT_WEIGHTS,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_key: str | None = None,
    num_classes: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    inputs: Sequence[str] = (),
) -> nn.Module:
    """Build a network by name, with its weights, in eval mode; see open_host."""
    return open_host(
        name,
        weights=weights,
        checkpoint=checkpoint,
        checkpoint_key=checkpoint_key,
        num_classes=num_classes,
        arguments=arguments,
        inputs=inputs,
    ).model


def open_host(
    name: str,
    *,
    weights: str = DEFAULT_WEIGHTS,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_key: str | None = None,
    num_classes: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    inputs: Sequence[str] = (),
) -> Host:
    """Build a network by name, with its weights, in eval mode; its card goes with it (card_of).

    Args:
        name: of torchvision's registry, `digits`, `timm:NAME`, or what makes a network of your
            own, as `path/to/file.py:factory` or `package.module:factory`.
        weights: DEFAULT, the name of one of the model's weights, or none (random).
        checkpoint: a file of weights instead.
        checkpoint_key: where in that file they are; see read_checkpoint.
        num_classes: of the classifier, where it is not the default; it is taken from a checkpoint
            that fits with another number of classes and not with the default one.
        arguments: keyword arguments of the builder.
        inputs: shapes of its inputs, as `1,3,32,32`, where they are not what is known of it.

    Raises:
        UnknownName: no such model, weights or factory.
        BadOption: an argument that the builder does not take.
        HostUnusable: a factory that raises, or returns something else than a network.
        WeightsUnavailable: the weights could not be fetched.
        BadFile, CheckpointMismatch: the checkpoint cannot be read or does not fit.
        MissingPackage: timm is not installed.
    """
    check_host(name, weights=weights, checkpoint=checkpoint, num_classes=num_classes)
    extra = dict(arguments or {})
    for key in WEIGHT_ARGUMENTS:
        if key in extra:
            raise BadOption(f"{key} is no --model-arg; use --weights")
    if num_classes is not None:
        extra["num_classes"] = num_classes
    HostCard(None, "").with_inputs(inputs)  # refused before anything is built
    if checkpoint is None:
        host = Host(source_of(name).make(name, weights, extra))
    else:
        host = _with_checkpoint(name, extra, read_checkpoint(checkpoint, checkpoint_key))
    return finish(host, inputs)


def load_outline(
    name: str, arguments: Mapping[str, Any] | None = None, inputs: Sequence[str] = ()
) -> nn.Module:
    """Build a network to be watched: its shapes, its card, and no memory for its weights.

    A network that computes with its weights while it is built has them, at random; one of your
    own has what its factory gives.

    Raises:
        AttnSurgeonError: see load_host.
    """

    def build() -> nn.Module:
        return load_host(name, weights=NO_WEIGHTS, arguments=arguments, inputs=inputs)

    if source_of(name) is not own:
        return without_memory(build)
    with borrowed_randomness(0):
        return build()


def check_host(
    name: str,
    *,
    weights: str = DEFAULT_WEIGHTS,
    checkpoint: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
) -> None:
    """Refuse what load_host would refuse before it builds or fetches anything.

    Raises:
        UnknownName: no such model or weights.
        BadOption: weights and a checkpoint at once, or fewer than one class.
        BadFile: no such file with a factory.
        MissingPackage: timm is not installed.
    """
    source_of(name).check(
        name, NO_WEIGHTS if checkpoint and weights == DEFAULT_WEIGHTS else weights
    )
    if weights not in (DEFAULT_WEIGHTS, NO_WEIGHTS) and checkpoint is not None:
        raise BadOption(f"give --weights {weights} or --checkpoint, not both")
    if num_classes is not None and num_classes < 1:
        raise BadOption(f"--num-classes must be at least 1, not {num_classes}")


def _with_checkpoint(name: str, extra: dict[str, Any], held: Checkpoint) -> Host:
    """Build a network and give it the tensors of a checkpoint, of whatever number of classes.

    Raises:
        CheckpointMismatch: they do not fit.
    """
    model: nn.Module = source_of(name).make(name, NO_WEIGHTS, extra)
    notices = []
    if held.beside:
        notices.append(
            f"{held.source} holds {', '.join(held.beside)} as well as {held.unwrapped[0]}, which "
            "is taken; --checkpoint-key chooses"
        )
    if "num_classes" not in extra:
        other = _of_its_classes(name, extra, model, held)
        if other is not None:
            classes, model = other
            notices.append(f"{held.source} is of {classes} classes, and so is the network")
    return Host(model, load_checkpoint(_inner(model), held), tuple(notices))


def _of_its_classes(
    name: str, extra: dict[str, Any], model: nn.Module, held: Checkpoint
) -> tuple[int, nn.Module] | None:
    """Return the one number of classes with which all shapes are the checkpoint's, and a network.

    What fits as it is, or with no number of classes, is left to the strict comparison.
    """
    inner = _inner(model)
    bare = bare_checkpoint(held, inner.state_dict().keys()).state
    source = source_of(name)
    counts = class_counts(inner, bare)
    for classes in counts if counts and source.takes(name, "num_classes") else ():
        arguments = {**extra, "num_classes": classes}
        try:
            with nullcontext() if source is own else weights_on_meta():
                other = source.make(name, NO_WEIGHTS, arguments)
        except AttnSurgeonError:  # not a number of classes, but of something else
            continue
        state = _inner(other).state_dict()
        if all(state[key].shape == tensor.shape for key, tensor in bare.items()):
            return classes, other if source is own else source.make(name, NO_WEIGHTS, arguments)
    return None


def _inner(model: nn.Module) -> nn.Module:
    return plain_network(model)[0]


def finish(host: Host, inputs: Sequence[str] = ()) -> Host:
    """Return the host without its wrappers, in eval mode, with the inputs asked for on its card.

    Raises:
        HostUnusable: it is wrapped in what cannot be taken off.
        BadOption: see HostCard.with_inputs.
    """
    model, notices = plain_network(host.model)
    card = card_of(host.model) or card_of(model)
    if card is not None:
        card = HostCard(**{**card.__dict__, "class_name": type(model).__name__})
        give_card(model, card.with_inputs(inputs) if inputs else card)
    return Host(model.eval(), host.fit, (*host.notices, *notices))


@typed
@contextmanager
def naming_host(given: Given | None) -> Iterator[None]:
    """Have files of a network of your own loaded with this host, wherever that is done inside.

    Files whose hosts are known by name are loaded as ever. None changes nothing.
    """
    token = _named.set(given if given is not None else _named.get())
    try:
        yield
    finally:
        _named.reset(token)


def rebuild_host(card: HostCard, *, weightless: bool = False) -> nn.Module:
    """Build the plain network of a card with random weights, or without memory for weights.

    Raises:
        HostUnusable: the card is of a network of the user's own.
        BadFile: the card names a network that cannot be built.
        MissingPackage: timm, which built it, is not installed.
    """
    if card.name is None:
        made_by = card.factory or "arguments of its own, in code"
        again = f"path/to/{card.factory}" if card.factory else "FILE.py:NAME of what builds it so"
        raise HostUnusable(
            f"the file was made from your own {card.class_name} ({made_by}), and no code is run "
            f"because a file names it: give --host {again}, or host= to load_model"
        )
    source = source_of(card.name)
    if source is own or not source.knows(card.name):
        raise BadFile(f"the recipe's host {card.name!r} is no torchvision model")
    name, arguments = card.name, card.arguments

    def build() -> nn.Module:
        made: nn.Module = source.make(name, NO_WEIGHTS, arguments)
        return made

    try:
        model = without_memory(build) if weightless else build()
    except MissingPackage:
        raise
    except AttnSurgeonError as error:
        raise BadFile(f"the recipe's host cannot be built: {error}") from error
    give_card(model, card)
    return model.eval()


def given_host(card: HostCard, given: Given | None) -> Given | None:
    """Return what a card's network is to be made of: what is given, or named around the call."""
    return _named.get() if given is None and card.name is None else given


def host_of(card: HostCard, given: Given | None = None, *, weightless: bool = False) -> nn.Module:
    """Return the plain network of a card: rebuilt by its name, or from what the user gives.

    Args:
        card: of a recipe.
        given: the network (it is left untouched), what returns it with the card's arguments, or
            the text that names that.
        weightless: where it is rebuilt, without memory for its weights.

    Raises:
        HostUnusable: it is the user's own and not given, cannot be made, or is of another class.
        BadFile, MissingPackage: see rebuild_host.
    """
    if given is None:
        return rebuild_host(card, weightless=weightless)
    try:
        model = _inner(_made_again(card, given))
        if type(model).__name__ != card.class_name:
            raise HostUnusable(
                f"the file was made from {card.class_name}, not from {type(model).__name__}"
            )
    except AttnSurgeonError as error:
        if isinstance(given, str):
            error.args = (f"--host {given}: {error}",)
        raise
    return model


def _made_again(card: HostCard, given: Given) -> nn.Module:
    """Return the network that is given, or that what is given makes of the card's arguments.

    Raises:
        AttnSurgeonError: see load_host.
    """
    # A network that was recognised has the arguments of its registered builder, not of a factory.
    arguments = card.arguments if card.name is None else {}
    if isinstance(given, nn.Module):
        return given
    if not isinstance(given, str):
        called = getattr(given, "__qualname__", type(given).__name__)
        return own.call_factory(given, arguments, called)
    source = source_of(given)
    source.check(given, NO_WEIGHTS)
    model: nn.Module = source.make(
        given, NO_WEIGHTS, arguments if source is own else card.arguments
    )
    return model
