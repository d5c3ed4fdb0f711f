"""Lend a model for a measurement and give back everything: modes, buffers, random state."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from attnsurgeon.answers import AnswersAtOnce


@contextmanager
def borrowed_modes(model: nn.Module) -> Iterator[None]:
    """Give each module its own train/eval mode back, whatever happens inside."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def borrowed_buffers(model: nn.Module) -> Iterator[None]:
    """Give every buffer (running statistics, counters) its tensor and its content back.

    What a forward keeps in plain attributes (anchors, a pyramid) is put back as well.
    """
    modules = list(model.modules())
    held = [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    attributes = _attributes(modules)
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, content in held:
                buffer.copy_(content)
                module._buffers[name] = buffer
        _put_back(attributes)


def _attributes(modules: list[nn.Module]) -> list[tuple[nn.Module, dict[str, Any]]]:
    return [(module, _plain_attributes(module)) for module in modules]


def _put_back(attributes: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    for module, values in attributes:
        held = module.__dict__
        for name in [name for name in held if name[:1] != "_" and name not in values]:
            del held[name]
        held.update(values)


@contextmanager
def on_meta(model: nn.Module) -> Iterator[None]:
    """Put stand-ins without memory in the place of all tensors, and the very tensors back.

    Each module is visited once, by whatever paths it can be reached, and tied tensors stay tied.
    What a forward keeps in plain attributes (anchors, say) is put back as well.
    """
    modules = list(model.modules())
    stores: list[dict[str, Any]] = [
        store for module in modules for store in (module._parameters, module._buffers)
    ]
    held = [
        (tensors, name, tensor)
        for tensors in stores
        for name, tensor in tensors.items()
        if tensor is not None
    ]
    stand_ins: dict[int, torch.Tensor] = {}
    attributes = _attributes(modules)
    try:
        for tensors, name, tensor in held:
            if id(tensor) not in stand_ins:
                stand_ins[id(tensor)] = _without_memory(tensor)
            tensors[name] = stand_ins[id(tensor)]
        with AnswersAtOnce():  # type: ignore[no-untyped-call]  # not annotated in torch
            yield
    finally:
        for tensors, name, tensor in held:
            tensors[name] = tensor
        _put_back(attributes)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return what a module holds beside tensors, children and hooks; collections as copies."""
    return {
        name: copy.copy(value) if type(value) in (list, dict, set) else value
        for name, value in module.__dict__.items()
        if name[:1] != "_"  # an insertion asks often, and this is soonest told
    }


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, tensor.requires_grad)
    return empty


def stand_ins(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return inputs of the same shapes without memory."""
    found: tuple[Any, ...] = tree_map_only(
        torch.Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), inputs
    )
    return found


@contextmanager
def borrowed_randomness(seed: int) -> Iterator[None]:
    """Draw from generators that start at `seed`; give the callers' generators back as they were."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed_all(seed)
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def borrowed_values(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Give the parameters their values and their requires_grad back."""
    held = [(parameter.detach().clone(), parameter.requires_grad) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, (value, needs_grad) in zip(parameters, held, strict=True):
                parameter.copy_(value)
                parameter.requires_grad_(needs_grad)


@contextmanager
def borrowed_numerics() -> Iterator[None]:
    """Compare on CUDA with TF32 and autotuning off: both would differ between two runs."""
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    ):
        precision = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
