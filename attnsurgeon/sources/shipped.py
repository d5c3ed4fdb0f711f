"""The `digits` network that comes with the package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from attnsurgeon import digits
from attnsurgeon.builder import build_network
from attnsurgeon.card import HostCard, give_card
from attnsurgeon.errors import BadOption, UnknownName

DIGITS = "digits"
FETCHES = True


def knows(name: str) -> bool:
    """Tell whether this is the shipped network."""
    return name == DIGITS


def check(name: str, weights: str) -> None:
    """Refuse other weights than the shipped ones.

    Raises:
        UnknownName: there are none of that name.
    """
    if weights not in ("DEFAULT", "none"):
        raise UnknownName("weight of digits", weights, ["DEFAULT", "none"])


def takes(name: str, argument: str) -> bool:
    """Tell whether the builder may take an argument."""
    return True


def make(name: str, weights: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build it with the shipped weights, or with random ones.

    Raises:
        BadOption: arguments beside the shipped weights, or that the builder cannot take.
    """
    card = digits.read_card()
    shipped = weights != "none"
    if shipped and arguments:
        raise BadOption("the shipped digits weights take no model arguments; give --weights none")
    model = build_network(card.model, {**card.arguments, **arguments})
    if shipped:
        model.load_state_dict(digits.read_weights())
    give_card(
        model,
        HostCard(
            name=DIGITS,
            class_name=type(model).__name__,
            arguments=arguments,
            weights=weights if shipped else None,
            input_shapes=((1, 3, *card.input_size),),
            mean=tuple(card.mean),
            std=tuple(card.std),
            categories=tuple(card.categories) if "num_classes" not in arguments else None,
        ),
    )
    return model
