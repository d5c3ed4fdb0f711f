"""The inputs that a network is watched with, where nobody gives any."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from attnsurgeon.card import card_of
from attnsurgeon.errors import BadOption


def as_inputs(model: nn.Module, example: Any) -> tuple[Any, ...]:
    """Return the positional inputs that an example stands for.

    The default is what the model's card says, or else one image batch of 224 px.

    Raises:
        BadOption: it holds no tensor.
    """
    if example is None:
        card = card_of(model)
        like = next(iter(model.parameters()), None)
        return card.example(like) if card else (default_example(model),)
    inputs = tuple(example) if isinstance(example, tuple | list) else (example,)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(inputs)):
        kind = type(example).__name__
        raise BadOption(f"an example is a tensor, or a tuple of inputs with one in it, not {kind}")
    return inputs


def default_example(model: nn.Module, size: tuple[int, int] = (224, 224)) -> Tensor:
    """Return zeros of shape (1, C, *size), C that of the first convolution, on its device."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight
            return torch.zeros(
                1, module.in_channels, *size, device=weight.device, dtype=weight.dtype
            )
    return torch.zeros(1, 3, *size)
