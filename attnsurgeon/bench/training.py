"""One step of training: forward, loss, backward, optimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from attnsurgeon.bench.precision import DTYPES
from attnsurgeon.errors import BadOption

LEARNING_RATE = 0.0
"""All arithmetic of a step, and weights that stay what they are: the last step is as the first."""
MOMENTUM = 0.9
AUTOCAST = ("bf16", "fp16")


def make_step(
    module: nn.Module,
    forward: Callable[..., Any],
    inputs: tuple[Any, ...],
    precision: str | None,
) -> Callable[[], Any]:
    """Return what runs one step of SGD with momentum on the inputs; the module is set to train.

    Half precisions run under autocast with float32 weights, as one trains in them; without a
    gradient scaler, which costs next to nothing.

    Args:
        module: whose parameters learn.
        forward: calls it; the module itself, or what a compiler made of it.
        inputs: of the forward pass; targets are made up.
        precision: fp32, tf32, bf16, fp16, or None for what the module is.

    Raises:
        BadOption: nothing in the network can learn.
    """
    module.train()
    weights = [p for p in module.parameters() if p.requires_grad]
    if not weights:
        raise BadOption(f"{type(module).__name__} has nothing to train; leave --train out")
    optimiser = torch.optim.SGD(weights, lr=LEARNING_RATE, momentum=MOMENTUM)
    device = weights[0].device.type
    is_half = precision in AUTOCAST
    dtype = DTYPES[precision] if is_half and precision else torch.bfloat16

    def step() -> Any:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=dtype, enabled=is_half):
            output = forward(*inputs)
            loss = loss_of(output)
        loss.backward()
        optimiser.step()
        return output

    return step


def loss_of(output: Any) -> Tensor:
    """Return a loss that all of the output takes part in: cross-entropy where it is of classes."""
    losses = [
        functional.cross_entropy(leaf.float(), torch.zeros_like(leaf[:, 0], dtype=torch.long))
        if leaf.ndim == 2
        else leaf.float().square().mean()
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    return torch.stack(losses).sum()
