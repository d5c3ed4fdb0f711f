"""The inputs that a network is watched with, where nobody gives any."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnsurgeon.card import card_of


def as_inputs(model: nn.Module, example: Any) -> tuple[Any, ...]:
    """Return the positional inputs that an example stands for.

    The default is what the model's card says, or else one image batch of 224 px.
    """
    if example is None:
        card = card_of(model)
        like = next(iter(model.parameters()), None)
        return card.example(like) if card else (default_example(model),)
    return tuple(example) if isinstance(example, tuple | list) else (example,)


def default_example(model: nn.Module, size: tuple[int, int] = (224, 224)) -> Tensor:
    """Return zeros of shape (1, C, *size), C that of the first convolution, on its device."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight
            return torch.zeros(
                1, module.in_channels, *size, device=weight.device, dtype=weight.dtype
            )
    return torch.zeros(1, 3, *size)
