"""Ask whether a network runs on inputs of some shapes, and if not, why."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from attnsurgeon.borrow import (
    borrowed_buffers,
    borrowed_modes,
    borrowed_randomness,
    on_meta,
    stand_ins,
)


def runs_on(model: nn.Module, inputs: tuple[Any, ...], *, train: bool = False) -> bool:
    """Tell whether the model takes inputs of these shapes in eval mode, and in train mode if asked.

    In eval mode nothing is computed, unless the model makes tensors of its own, which need real
    ones beside. Train mode runs for real: its norms are taken apart on meta tensors, which takes
    longer than small inputs do.
    """
    return why_it_fails(model, inputs, train=train) is None


def why_it_fails(
    model: nn.Module, inputs: tuple[Any, ...], *, train: bool = False
) -> BaseException | None:
    """Return what the model raises on inputs of these shapes, or None if it runs. See runs_on."""
    with borrowed_modes(model), borrowed_randomness(0), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.eval()
        with on_meta(model):
            error = _error_of(model, stand_ins(inputs))
        with borrowed_buffers(model):
            if error is not None:
                error = _error_of(model, inputs)
            if error is None and train:
                model.train()
                error = _error_of(model, inputs)
    return error


def remedy(model: nn.Module, inputs: tuple[Any, ...]) -> str:
    """Return what to do about a network that fails on a batch of these inputs."""
    one = tree_map(
        lambda leaf: leaf[:1] if isinstance(leaf, Tensor) and leaf.ndim else leaf, inputs
    )
    if inputs and not isinstance(inputs[0], list) and runs_on(model, one):
        return (
            "batches of 2 and of 3 are tried, and it runs on a batch of 1 only: have its forward "
            "take a batch of any size"
        )
    return "give a network and weights that run"


def _error_of(model: nn.Module, inputs: tuple[Any, ...]) -> BaseException | None:
    try:
        model(*inputs)
    except KeyboardInterrupt:
        raise
    except SystemExit as error:
        return RuntimeError(f"it ends the program with {error.code}")
    except BaseException as error:  # of the user's network: it may be anything
        return error
    return None
