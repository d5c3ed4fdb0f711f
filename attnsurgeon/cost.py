"""What a module costs on paper: multiply-adds, counted on meta tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from attnsurgeon.borrow import borrowed_modes, borrowed_randomness, on_meta


def multiply_adds(module: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Return the multiply-adds of one eval pass, as torch.utils.flop_counter counts them, halved.

    Convolutions and matrix products count; elementwise operations and pooling do not. Nothing is
    computed and the module is left as it was.
    """
    counter = FlopCounterMode(display=False)
    shapes = tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), inputs)
    with borrowed_modes(module), borrowed_randomness(0), on_meta(module), torch.no_grad(), counter:
        module.eval()
        module(*shapes)
    return int(counter.get_total_flops()) // 2
