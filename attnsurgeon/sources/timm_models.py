"""The networks of timm's registry, as `timm:NAME`, with timm's own loader of weights."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from attnsurgeon.builder import (
    borrowed_building,
    came_out_of,
    misfit,
    unfetched,
    weights_on_meta,
)
from attnsurgeon.card import HostCard, give_card
from attnsurgeon.errors import (
    AttnSurgeonError,
    BadOption,
    MissingPackage,
    UnknownName,
    WeightsUnavailable,
)

PREFIX = "timm:"
FETCHES = True


def knows(name: str) -> bool:
    """Tell whether a name is one of timm's: `timm:resnet50`, `timm:resnet50.a1_in1k`."""
    return name.startswith(PREFIX)


def check(name: str, weights: str) -> None:
    """Refuse a name that timm's registry does not have.

    Raises:
        MissingPackage: timm is not installed.
        UnknownName: no such model or weights.
    """
    timm = _timm()
    bare = name.removeprefix(PREFIX)
    # Names such as hf-hub:... or local-dir:... would have timm read a network from elsewhere.
    if not timm.is_model(bare):
        raise UnknownName("model of timm", bare, timm.list_models())
    architecture, _, tag = bare.partition(".")
    tags = _tags(architecture)
    for wanted in filter(None, (tag, weights if weights not in ("DEFAULT", "none") else "")):
        if wanted not in tags:
            raise UnknownName(
                f"weight of timm:{architecture}",
                wanted,
                [*tags, "none"],
                "; or give --weights none",
            )
    if weights == "DEFAULT" and not tags:
        raise WeightsUnavailable(
            f"timm has no weights of {architecture}; give --checkpoint FILE with weights you have, "
            "or --weights none for a random network"
        )


def _timm() -> Any:
    """Return timm, which is no dependency.

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise MissingPackage(
            "timm is not installed, which builds timm:NAME; type: pip install timm"
        ) from error


def _tags(architecture: str) -> list[str]:
    listed = _timm().list_pretrained(f"{architecture}.*")
    return [full.partition(".")[2] for full in listed]


def takes(name: str, argument: str) -> bool:
    """Tell whether the builder may take an argument; timm's hand on whatever they get."""
    return True


def make(name: str, weights: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a network of timm's registry; its input size and norms are those of timm's config.

    Args:
        name: `timm:` and a name of timm's, with or without the tag of its weights.
        weights: DEFAULT (those of the tag, or timm's first), a tag, or none.
        arguments: of timm.create_model.

    Raises:
        MissingPackage, UnknownName: see check.
        BadOption: arguments that the network, or the weights, cannot take.
        WeightsUnavailable: the weights could not be fetched.
    """
    check(name, weights)
    bare = name.removeprefix(PREFIX)
    if weights not in ("DEFAULT", "none"):
        bare = f"{bare.partition('.')[0]}.{weights}"
    trained = weights != "none"
    if trained:
        _check_classes(bare, arguments)
    model = _create(bare, trained, arguments)
    give_card(model, _describe(model, bare, arguments, trained=trained))
    return model


def _describe(
    model: nn.Module, bare: str, arguments: Mapping[str, Any], *, trained: bool
) -> HostCard:
    """Write the card: input size, and of trained weights the norms, as timm's config tells."""
    config = importlib.import_module("timm.data").resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    size = arguments.get("img_size", (height, width))
    height, width = (size, size) if isinstance(size, int) else size
    return HostCard(
        name=f"{PREFIX}{bare}",
        class_name=type(model).__name__,
        arguments=dict(arguments),
        weights=_full_name(model, bare) if trained else None,
        input_shapes=((1, arguments.get("in_chans", channels), height, width),),
        mean=tuple(config["mean"]) if trained else None,
        std=tuple(config["std"]) if trained else None,
    )


def recognise(model: nn.Module) -> HostCard | None:
    """Return the card of the network of timm's registry that is exactly this one, or None.

    It is if it prints the same modules with the same settings and has the same keys and shapes
    when it is built by the name that it bears, perhaps with its number of classes.
    """
    config: Any = getattr(model, "pretrained_cfg", None)
    if not type(model).__module__.startswith("timm.") or not hasattr(config, "get"):
        return None
    bare = str(config.get("architecture"))
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    classes = getattr(model, "num_classes", None)
    for arguments in ({}, {"num_classes": classes}):
        try:
            with weights_on_meta():
                twin = _create(bare, False, arguments)
        except (AttnSurgeonError, RuntimeError, TypeError, ValueError):
            continue
        same = type(twin) is type(model) and repr(twin) == repr(model)
        if same and {key: t.shape for key, t in twin.state_dict().items()} == shapes:
            return _describe(twin, bare, arguments, trained=False)
    return None


def _full_name(model: nn.Module, bare: str) -> str:
    """Return the name of the weights as timm gives it, with the tag."""
    config: Any = model.pretrained_cfg
    tag = config.get("tag")
    return f"{PREFIX}{bare.partition('.')[0]}.{tag}" if tag else f"{PREFIX}{bare}"


def _check_classes(bare: str, arguments: Mapping[str, Any]) -> None:
    """Refuse a number of classes that the weights do not have.

    timm would load all the rest and leave the head random, without a word.

    Raises:
        BadOption: it is not that of the weights.
    """
    config = importlib.import_module("timm.models").get_pretrained_cfg(bare)
    asked = arguments.get("num_classes")
    if asked is not None and config is not None and asked != config.num_classes:
        raise BadOption(
            f"the weights of timm:{bare} have {config.num_classes} classes, not {asked}: give "
            "--checkpoint FILE with weights of your own, or --weights none"
        )


def _create(bare: str, trained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    fetching = importlib.import_module("timm.models._builder").load_pretrained
    try:
        with borrowed_building():
            model: nn.Module = _timm().create_model(bare, pretrained=trained, **arguments)
    except Exception as error:  # timm, and what it fetches with, raise whatever they run into
        if came_out_of(error, fetching):
            raise unfetched(f"of timm:{bare}", error) from error
        if arguments:
            raise misfit(f"timm:{bare}", arguments, error) from error
        raise
    return model
