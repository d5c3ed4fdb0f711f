"""Open what a MODEL argument names: a file of attnsurgeon, or a host with its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from attnsurgeon.checkpoint import read_checkpoint
from attnsurgeon.errors import BadOption, HostUnusable
from attnsurgeon.host import (
    DEFAULT_WEIGHTS,
    NO_WEIGHTS,
    Given,
    Host,
    check_host,
    finish,
    load_host,
    load_outline,
    open_host,
)
from attnsurgeon.sites import Site, find_sites
from attnsurgeon.sources import own, source_of
from attnsurgeon.store import is_model_file, load_model
from attnsurgeon.training.trained import load_trained


def open_model(
    model: str,
    *,
    weights: str = DEFAULT_WEIGHTS,
    checkpoint: Path | None = None,
    checkpoint_key: str | None = None,
    num_classes: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    inputs: Sequence[str] = (),
    host: Given | None = None,
) -> nn.Module:
    """Return what a MODEL argument names; see open_target."""
    return open_target(
        model,
        weights=weights,
        checkpoint=checkpoint,
        checkpoint_key=checkpoint_key,
        num_classes=num_classes,
        arguments=arguments,
        inputs=inputs,
        host=host,
    ).model


def open_target(
    model: str,
    *,
    weights: str = DEFAULT_WEIGHTS,
    checkpoint: Path | None = None,
    checkpoint_key: str | None = None,
    num_classes: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    inputs: Sequence[str] = (),
    host: Given | None = None,
) -> Host:
    """Open what a MODEL argument names: a file of attnsurgeon, or a host with its weights.

    Raises:
        AttnSurgeonError: see load_model and open_host.
        BadOption: an argument that a file, or a name, cannot take.
    """
    if checkpoint_key is not None and checkpoint is None:
        raise BadOption("--checkpoint-key is for a --checkpoint; give that too")
    if not is_model_file(model):
        if host is not None:
            raise BadOption(f"--host is for a file made from your own network; {model} names one")
        return open_host(
            model,
            weights=weights,
            checkpoint=checkpoint,
            checkpoint_key=checkpoint_key,
            num_classes=num_classes,
            arguments=arguments,
            inputs=inputs,
        )
    if num_classes is not None or arguments or weights not in (DEFAULT_WEIGHTS, NO_WEIGHTS):
        raise BadOption(
            f"{model!r} is a file with a network of its own: of --weights, --num-classes and "
            "--model-arg it takes none; give --checkpoint for other weights"
        )
    return finish(open_file(model, host, checkpoint, checkpoint_key), inputs)


def open_file(
    file: str | os.PathLike[str],
    host: Given | None = None,
    checkpoint: Path | None = None,
    checkpoint_key: str | None = None,
) -> Host:
    """Open a file of attnsurgeon, perhaps with the weights that a training script saved later.

    Raises:
        AttnSurgeonError: see load_model and load_trained.
    """
    loaded = load_model(file, host)
    if checkpoint is None:
        return Host(loaded)
    return Host(loaded, load_trained(loaded, read_checkpoint(checkpoint, checkpoint_key)))


def watch(
    model: str,
    arguments: Mapping[str, Any] | None = None,
    inputs: Sequence[str] = (),
    host: Given | None = None,
) -> list[Site]:
    """Return the sites of what a MODEL argument names, without memory for a host's weights.

    Raises:
        AttnSurgeonError: see open_model and find_sites.
    """
    given: dict[str, Any] = {"arguments": arguments, "inputs": inputs}
    if host is not None or is_model_file(model):
        return find_sites(open_model(model, weights=NO_WEIGHTS, host=host, **given))
    check_host(model, weights=NO_WEIGHTS)
    try:
        return find_sites(load_outline(model, **given))
    except HostUnusable:  # it asks for numbers, which an outline does not have
        if source_of(model) is own:
            raise
        return find_sites(load_host(model, weights=NO_WEIGHTS, **given))
