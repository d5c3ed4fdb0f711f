"""The networks of torchvision's registry, with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import WeightsEnum, get_model_builder, get_model_weights, list_models

from attnsurgeon.builder import build_network, without_memory
from attnsurgeon.card import HostCard, give_card
from attnsurgeon.errors import AttnSurgeonError, BadOption, UnknownName
from attnsurgeon.example import default_example
from attnsurgeon.inputs import input_shapes


def knows(name: str) -> bool:
    """Tell whether torchvision has a network of that name."""
    return name in list_models()


def check(name: str, weights: str) -> None:
    """Refuse a name that there is not, and weights that cannot be operated on.

    Raises:
        UnknownName: no such model or weights.
        BadOption: quantized weights.
    """
    if not knows(name):
        known = [*list_models(), "digits"]
        raise UnknownName("model", name, known, "; `attnsurgeon models` lists all")
    members = get_model_weights(name)
    if weights == "none":
        return
    chosen = _find_weights(name, members, weights)
    if "unquantized" in chosen.meta:
        raise BadOption(
            f"the weights {chosen.name} of {name} are quantized, which cannot be operated on; take "
            f"{name.removeprefix('quantized_')}, or give --checkpoint FILE with float weights, or "
            "--weights none"
        )


def takes(name: str, argument: str) -> bool:
    """Tell whether the builder may take an argument; most hand on whatever they get."""
    return True


def make(name: str, weights: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a network with its weights; see builder.build_network.

    Raises:
        UnknownName: it has no such weights.
        BadOption, WeightsUnavailable: see build_network.
    """
    known = get_model_weights(name)
    chosen = _find_weights(name, known, weights) if weights != "none" else None
    model = build_network(name, arguments, chosen)
    give_card(model, _describe(name, model, arguments, chosen))
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
    name: str, model: nn.Module, arguments: Mapping[str, Any], chosen: WeightsEnum | None
) -> HostCard:
    """Write the card: the published input size, the classes and norms of the weights."""
    preset = chosen.transforms() if chosen is not None else None
    channels = default_example(model, (1, 1)).shape[1]
    known = [chosen] if chosen is not None else list(get_model_weights(name))
    shapes, is_list = input_shapes(name, model, channels, known, arguments)
    return HostCard(
        name=name,
        class_name=type(model).__name__,
        arguments=arguments,
        weights=str(chosen) if chosen is not None else None,
        input_shapes=shapes,
        listed=is_list,
        mean=tuple(getattr(preset, "mean", None) or ()) or None,
        std=tuple(getattr(preset, "std", None) or ()) or None,
        categories=tuple(chosen.meta["categories"])
        if chosen and "categories" in chosen.meta
        else None,
    )


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
        candidate = without_memory(lambda: build_network(name, arguments))
    except (AttnSurgeonError, TypeError, ValueError, RuntimeError):
        return None
    same = type(candidate) is kind and repr(candidate) == wanted
    if not same or {k: t.shape for k, t in candidate.state_dict().items()} != keys:
        return None
    return _describe(name, candidate, arguments, None)
