"""What an engine is: a function that makes a network ready to be called on given inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnsurgeon.bench.profiling import profile_torch
from attnsurgeon.bench.targets import Target
from attnsurgeon.bench.timing import Call, Runner
from attnsurgeon.errors import EngineUnavailable
from attnsurgeon.registry import Registry


@dataclass(frozen=True)
class Place:
    """Where and how a comparison runs.

    Attributes:
        device: cpu or one CUDA device.
        threads: CPU threads of every engine.
        folder: for files that live as long as the comparison.
        precision: fp32, tf32, bf16, fp16; what the network has of its own by default.
        train: whether a call is a whole step of training.
    """

    device: torch.device
    threads: int
    folder: Path
    precision: str | None = None
    train: bool = False


Inputs = tuple[Any, ...]
Prepare = Callable[[Target, Inputs, Place], Runner]


@dataclass(frozen=True)
class Engine:
    """A way to run a network.

    Attributes:
        prepare: makes a target ready for inputs, which lie on the place's device.
        check: refuses a device that the engine cannot use, before anything is loaded.
        can_train: whether it can run a step of training.
        has_layout: whether it minds how torch lays a tensor out in memory.
        lacks: precisions that it has not.
    """

    prepare: Prepare
    check: Callable[[torch.device], None]
    can_train: bool = False
    has_layout: bool = True
    lacks: tuple[str, ...] = ()


_registry: Registry[Engine] = Registry("engine")


def register(
    name: str,
    check: Callable[[torch.device], None] = lambda device: None,
    *,
    can_train: bool = False,
    has_layout: bool = True,
    lacks: tuple[str, ...] = (),
) -> Callable[[Prepare], Prepare]:
    """Return a decorator that enters an engine under the name that users type."""

    def enter(prepare: Prepare) -> Prepare:
        _registry.register(name)(Engine(prepare, check, can_train, has_layout, lacks))
        return prepare

    return enter


def names() -> list[str]:
    """Return the names of all engines, sorted."""
    return _registry.names()


def get(name: str) -> Engine:
    """Return the engine of that name.

    Raises:
        UnknownName: there is none; the message gives the nearest.
    """
    return _registry.get(name)


def check_cuda(name: str) -> Callable[[torch.device], None]:
    """Return a check that refuses the CPU for an engine of CUDA alone."""

    def check(device: torch.device) -> None:
        if device.type != "cuda":
            raise EngineUnavailable(
                f"{name} needs a CUDA device, and this runs on {device}: leave it out, "
                "or give --device cuda where there is one"
            )

    return check


def on_device(module: nn.Module, device: torch.device) -> nn.Module:
    """Return the module itself on the CPU, else a copy on the device."""
    return module if device.type == "cpu" else copy.deepcopy(module).to(device)


def renew_memory(module: nn.Module) -> None:
    """Give every parameter and buffer of a module new memory with the same content."""
    before = []  # held until all have moved: nothing gets its own place back
    for tensor in (*module.parameters(), *module.buffers()):
        before.append(tensor.data)
        tensor.data = tensor.data.clone()


def torch_runner(
    call: Call,
    module: nn.Module,
    place: Place,
    *,
    move: Callable[[], None] | None = None,
    first: Call | None = None,
    is_copied: bool = False,
) -> Runner:
    """Return the runner of something that torch runs.

    Args:
        call: runs it once.
        module: the network whose tensors it reads.
        place: where.
        move: gives it new memory; renews the module's by default.
        first: what the first call is, where it does more than the later ones.
        is_copied: whether it has weights of its own instead of the module's.
    """
    is_cuda = place.device.type == "cuda"
    return Runner(
        call=call,
        move=move or (lambda: renew_memory(module)),
        events=place.device if is_cuda else None,
        first=first,
        is_training=place.train,
        held_bytes=0 if is_cuda or is_copied else tensor_bytes(module),
        profile=lambda: profile_torch(call, place.device, is_training=place.train),
    )


def tensor_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers."""
    tensors = (*module.parameters(), *module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
