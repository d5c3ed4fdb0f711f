"""Ask whether a network runs on inputs of some shapes, and if not, why."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

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
) -> Exception | None:
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


def _error_of(model: nn.Module, inputs: tuple[Any, ...]) -> Exception | None:
    try:
        model(*inputs)
    except Exception as error:  # of the user's network: it may be anything
        return error
    except SystemExit as error:
        return RuntimeError(f"it ends the program with {error.code}")
    return None
