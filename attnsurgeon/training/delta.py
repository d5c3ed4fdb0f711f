"""Files of the attention alone: what was inserted, and the host's buffers that moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from attnsurgeon.card import HostCard
from attnsurgeon.errors import BadOption, HostUnusable
from attnsurgeon.host import load_host
from attnsurgeon.origin import origin_of, sha256_of
from attnsurgeon.recipe import Recipe
from attnsurgeon.surgery import attention_paths, is_new_key

ONLY = "attention"
_GIVE_IT = "give that host with its weights: --host FILE.py:FACTORY, or load_model(path, host=...)"


def select_moved(model: nn.Module, recipe: Recipe, only: str) -> tuple[Recipe, dict[str, Tensor]]:
    """Return the recipe and the tensors of a file that needs its host again.

    Raises:
        BadOption: `only` is not "attention".
        HostUnusable: a parameter of the host moved, or nobody knows what it was.
    """
    if only != ONLY:
        raise BadOption(f"only takes {ONLY!r}, not {only!r}")
    if origin_of(model) is None:
        raise HostUnusable(
            f"what this {type(model).__name__} was before training is not known: it was not made "
            "by insert_attention or load_model; save it whole"
        )
    trained = [name for name, _ in model.named_parameters() if name in recipe.origin]
    if trained:
        raise HostUnusable(
            f"{len(trained)} parameters of the host were trained too, the first {trained[0]}: save "
            "the model whole, or train it after freeze_host(model)"
        )
    paths = attention_paths(model)
    state = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if is_new_key(key, paths) or key in recipe.origin
    }
    return replace(recipe, only=ONLY), state


def complete(
    part: Mapping[str, Tensor], recipe: Recipe, host: nn.Module | None, source: str
) -> dict[str, Tensor]:
    """Return all tensors of the network whose attention a file holds.

    Args:
        part: the tensors of the file.
        recipe: its recipe.
        host: the plain network with its weights; by default the recipe's, with the published
            weights it names.
        source: what to call the file in errors.

    Raises:
        HostUnusable: no host is given nor known, or its tensors are not the recorded ones.
        WeightsUnavailable: the published weights cannot be fetched.
    """
    held = (host if host is not None else _published(recipe.host, source)).state_dict()
    wanted = {**recipe.sha256, **recipe.origin}
    wrong = [k for k, digest in wanted.items() if k not in held or sha256_of(held[k]) != digest]
    if wrong:
        raise HostUnusable(
            f"{source} belongs to another host: {len(wrong)} of {len(wanted)} tensors are not "
            f"those its attention was trained on (SHA-256), the first {wrong[0]}; {_GIVE_IT}"
        )
    return {**{key: held[key] for key in wanted}, **part}


def _published(card: HostCard, source: str) -> nn.Module:
    if card.name is None or card.weights is None:
        raise HostUnusable(
            f"{source} holds the attention only, and its host {card.name or card.class_name} had "
            f"no published weights; {_GIVE_IT}"
        )
    return load_host(card.name, weights=card.weights, arguments=card.arguments)
