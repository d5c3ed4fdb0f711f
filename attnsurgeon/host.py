"""What is operated on: a torchvision name or the shipped `digits`, built with its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import WeightsEnum, get_model_builder, get_model_weights, list_models

from attnsurgeon import digits
from attnsurgeon.borrow import borrowed_randomness
from attnsurgeon.builder import build_network, weights_on_meta
from attnsurgeon.card import WEIGHT_ARGUMENTS, HostCard, give_card
from attnsurgeon.checkpoint import load_state, read_checkpoint
from attnsurgeon.errors import AttnSurgeonError, BadFile, BadOption, HostUnusable, UnknownName
from attnsurgeon.inputs import input_shapes
from attnsurgeon.sites import default_example

DIGITS = "digits"
DEFAULT_WEIGHTS = "DEFAULT"
NO_WEIGHTS = "none"


def host_names() -> list[str]:
    """Return every name that can be operated on: torchvision's, and `digits`."""
    return [*list_models(), DIGITS]


def load_host(
    name: str,
    *,
    weights: str = DEFAULT_WEIGHTS,
    checkpoint: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a network by name, with its weights, in eval mode; its card goes with it (card_of).

    Args:
        name: a name of torchvision's registry, or `digits`.
        weights: DEFAULT, the name of one of the model's weights, or none (random).
        checkpoint: a file of weights instead.
        num_classes: of the classifier, where it is not the default.
        arguments: keyword arguments of the builder.

    Raises:
        UnknownName: no such model or weights.
        BadOption: an argument that the builder does not take.
        WeightsUnavailable: the weights could not be fetched.
        BadFile, CheckpointMismatch: the checkpoint cannot be read or does not fit.
    """
    check_host(name, weights=weights, checkpoint=checkpoint, num_classes=num_classes)
    extra = dict(arguments or {})
    for key in WEIGHT_ARGUMENTS:
        if key in extra:
            raise BadOption(f"{key} is no --model-arg; use --weights")
    if num_classes is not None:
        extra["num_classes"] = num_classes
    if name == DIGITS:
        model = _load_digits(weights, checkpoint, extra)
    else:
        model = _load_registered(name, weights, checkpoint, extra)
    if checkpoint is not None:
        load_state(model, read_checkpoint(checkpoint), repr(str(checkpoint)))
    return model.eval()


def load_outline(name: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a network to be watched: its shapes, its card, and no memory for its weights.

    A network that computes with its weights while it is built has them, at random.

    Raises:
        UnknownName, BadOption: see load_host.
    """
    try:
        with weights_on_meta():
            return load_host(name, weights=NO_WEIGHTS, arguments=arguments)
    except RuntimeError as error:
        if isinstance(error, AttnSurgeonError) or "meta" not in str(error):
            raise
    with borrowed_randomness(0):
        return load_host(name, weights=NO_WEIGHTS, arguments=arguments)


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
    """
    if name not in host_names():
        raise UnknownName("model", name, host_names(), "; `attnsurgeon models` lists all")
    if weights not in (DEFAULT_WEIGHTS, NO_WEIGHTS):
        if name == DIGITS:
            raise UnknownName("weight of digits", weights, [DEFAULT_WEIGHTS, NO_WEIGHTS])
        _find_weights(name, get_model_weights(name), weights)
        if checkpoint is not None:
            raise BadOption(f"give --weights {weights} or --checkpoint, not both")
    if num_classes is not None and num_classes < 1:
        raise BadOption(f"--num-classes must be at least 1, not {num_classes}")


def _load_digits(
    weights: str, checkpoint: str | os.PathLike[str] | None, extra: dict[str, Any]
) -> nn.Module:
    card = digits.read_card()
    shipped = weights == DEFAULT_WEIGHTS and checkpoint is None
    if shipped and extra:
        raise BadOption("the shipped digits weights take no model arguments; give --weights none")
    model = build_network(card.model, {**card.arguments, **extra})
    if shipped:
        model.load_state_dict(digits.read_weights())
    give_card(
        model,
        HostCard(
            name=DIGITS,
            class_name=type(model).__name__,
            arguments=extra,
            weights=DEFAULT_WEIGHTS if shipped else None,
            input_shapes=((1, 3, *card.input_size),),
            mean=tuple(card.mean),
            std=tuple(card.std),
            categories=tuple(card.categories) if "num_classes" not in extra else None,
        ),
    )
    return model


def _load_registered(
    name: str, weights: str, checkpoint: str | os.PathLike[str] | None, extra: dict[str, Any]
) -> nn.Module:
    known = get_model_weights(name)
    chosen = None
    if checkpoint is None and weights != NO_WEIGHTS:
        chosen = _find_weights(name, known, weights)
    model = build_network(name, extra, chosen)
    give_card(model, _describe(name, model, extra, chosen))
    return model


def _find_weights(name: str, known: Any, weights: str) -> WeightsEnum:
    members: dict[str, WeightsEnum] = dict(known.__members__)
    in_full = {f"{known.__name__}.{short}": member for short, member in members.items()}
    if weights not in members and weights not in in_full:
        raise UnknownName(
            f"weight of {name}", weights, [*members, "none"], "; or give --weights none"
        )
    return {**members, **in_full}[weights]


def _describe(
    name: str, model: nn.Module, extra: dict[str, Any], chosen: WeightsEnum | None
) -> HostCard:
    """Write the card: the published input size, the classes and norms of the weights."""
    preset = chosen.transforms() if chosen is not None else None
    channels = default_example(model, (1, 1)).shape[1]
    known = [chosen] if chosen is not None else list(get_model_weights(name))
    shapes, is_list = input_shapes(name, model, channels, known)
    return HostCard(
        name=name,
        class_name=type(model).__name__,
        arguments=extra,
        weights=str(chosen) if chosen is not None else None,
        input_shapes=shapes,
        listed=is_list,
        mean=tuple(getattr(preset, "mean", None) or ()) or None,
        std=tuple(getattr(preset, "std", None) or ()) or None,
        categories=tuple(chosen.meta["categories"])
        if chosen and "categories" in chosen.meta
        else None,
    )


def rebuild_host(card: HostCard, *, weightless: bool = False) -> nn.Module:
    """Build the plain network of a card with random weights, or without memory for weights.

    Raises:
        HostUnusable: the card is of a network of the user's own.
        BadFile: the card names a network that cannot be built.
    """
    if card.name is None:
        raise HostUnusable(
            f"the file was made from your own {card.class_name}: load it with "
            "load_model(path, host=your_network)"
        )
    name, arguments = card.name, dict(card.arguments)
    if name == DIGITS:
        shipped = digits.read_card()
        name, arguments = shipped.model, {**shipped.arguments, **arguments}
    elif name not in list_models():
        raise BadFile(f"the recipe's host {name!r} is no torchvision model")
    try:
        with weights_on_meta() if weightless else nullcontext():
            model = build_network(name, arguments)
    except AttnSurgeonError as error:
        raise BadFile(f"the recipe's host cannot be built: {error}") from error
    give_card(model, card)
    return model.eval()


def recognise(model: nn.Module) -> HostCard | None:
    """Return the card of the torchvision builder that makes exactly this network, or None.

    A builder makes it if a network it builds without memory prints the same modules with the
    same settings and has the same keys and shapes.
    """
    if not type(model).__module__.startswith("torchvision.models."):
        return None
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    tries: list[dict[str, Any]] = [{}]
    if linear:
        tries.append({"num_classes": linear[-1].out_features})
    names = [n for n in list_models() if not n.startswith("quantized")]
    module = Path(type(model).__module__.replace(".", "/")).name
    names.sort(key=lambda n: module not in n)  # those of the class's own file first
    wanted = repr(model)
    keys = {key: tensor.shape for key, tensor in model.state_dict().items()}
    for arguments in tries:
        for name in names:
            card = _if_same(name, arguments, type(model), wanted, keys)
            if card is not None:
                return card
    return None


def _if_same(
    name: str, arguments: dict[str, Any], kind: type, wanted: str, keys: Mapping[str, torch.Size]
) -> HostCard | None:

    if get_model_builder(name).__module__ != kind.__module__:
        return None
    try:
        with weights_on_meta():
            candidate = build_network(name, arguments)
    except (AttnSurgeonError, TypeError, ValueError, RuntimeError):
        return None
    same = type(candidate) is kind and repr(candidate) == wanted
    if not same or {k: t.shape for k, t in candidate.state_dict().items()} != keys:
        return None
    return _describe(name, candidate, arguments, None)
