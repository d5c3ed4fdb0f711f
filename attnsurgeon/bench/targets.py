"""What is timed: a file of attnsurgeon, a model's name, an exported file, or a module."""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnsurgeon.bench.exported import Fixed, read_onnx, read_torchscript
from attnsurgeon.bench.packages import read_package, read_program
from attnsurgeon.borrow import borrowed_randomness
from attnsurgeon.card import card_of
from attnsurgeon.checkpoint import check_readable
from attnsurgeon.errors import BadFile
from attnsurgeon.example import as_inputs
from attnsurgeon.export.compiled import is_compiled
from attnsurgeon.export.onnx_file import Patch, read_file
from attnsurgeon.gate import named_gates, opened
from attnsurgeon.host import host_names, load_host
from attnsurgeon.store import load_model, load_plain
from attnsurgeon.surgery import cuts_of, remove_attention

GATES = (0.25, 0.75)
"""Gates are opened at random in between: closed ones would let a compiler drop the attention."""

SCRIPT_ENGINES = ("torchscript", "torchscript-frozen")
ONNX_ENGINES = ("onnxruntime", "onnxruntime-tensorrt")
PACKAGE_ENGINES = ("aotinductor",)
PROGRAM_ENGINES = (
    "eager",
    "compile",
    "compile-max-autotune",
    "compile-cudagraphs",
    "cudagraphs",
    "aotinductor",
)

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Target:
    """A network to be timed; it belongs to the comparison and may be changed by it.

    Attributes:
        name: as the user typed it, or the module's class.
        example: positional inputs for one image; only shapes and dtypes of floats count.
        weights: `random`, `file`, or `given` with the module.
        model: the network on the CPU, in eval mode; None for an .onnx and a compiled .pt2 file.
        file: where it came from.
        only: the engines that can run it, where not all can.
        fixed: for each input of a file without a model, the axes that it fixes.
        is_sized: whether the example's height and width are known, not guessed.
        is_opened: whether its gates, if it has any, were opened.
        gates: the names of the parameters that were opened.
        patches: bytes of an .onnx file that open its gates.
        keeps_precision: whether its numbers cannot be cast to others.
        values: of the gates of a compiled .pt2 file, by name.
        read_s: how long it took to read or build.
    """

    name: str
    example: Inputs
    weights: str
    model: nn.Module | None = None
    file: Path | None = None
    only: tuple[str, ...] = ()
    fixed: tuple[Fixed, ...] = ()
    is_sized: bool = True
    is_opened: bool = True
    gates: tuple[str, ...] = ()
    patches: tuple[Patch, ...] = ()
    keeps_precision: bool = False
    values: Mapping[str, Tensor] = field(default_factory=dict, hash=False)
    read_s: float = 0.0

    @property
    def module(self) -> nn.Module:
        """The network, where the target is not a file that holds another runtime's."""
        assert self.model is not None
        return self.model


def read_targets(
    things: Sequence[str | os.PathLike[str] | nn.Module], example: Any = None
) -> list[Target]:
    """Return the targets, the baseline first; a single operated one gets its own untouched host.

    Args:
        things: paths, names and modules; modules are copied.
        example: an input, or a tuple of inputs, for modules that do not come from here.

    Raises:
        UnknownName: neither a file nor a model.
        BadFile: a file that is not what it should be.
        HostUnusable: a file of a network of the user's own.
    """
    if len(things) == 1:
        return _with_baseline(things[0], example)
    return [_read(thing, example) for thing in things]


def _with_baseline(thing: str | os.PathLike[str] | nn.Module, example: Any) -> list[Target]:
    target = _read(thing, example)
    if target.model is None or not cuts_of(target.model):
        return [target]
    file = target.file
    plain = load_plain(file) if file is not None else remove_attention(target.model)
    card = card_of(plain)
    name = card.name if card and card.name else type(plain).__name__
    baseline = Target(
        name=f"{name} (untouched host)",
        example=target.example,
        weights=target.weights,
        model=plain.eval(),
    )
    return [baseline, target]


def _read(thing: str | os.PathLike[str] | nn.Module, example: Any) -> Target:
    start = time.perf_counter()
    target = _read_kind(thing, example)
    return dataclasses.replace(target, read_s=time.perf_counter() - start)


def _read_kind(thing: str | os.PathLike[str] | nn.Module, example: Any) -> Target:
    if isinstance(thing, nn.Module):
        return _from_module(thing, example)
    name = os.fspath(thing)
    path = Path(name)
    reader = _READERS.get(path.suffix.lower())
    if reader is not None:
        check_readable(path)
        return reader(name, path)
    if path.is_file() and name not in host_names():
        raise BadFile(
            f"{name!r} cannot be timed: a target is a .safetensors file of attnsurgeon, an .onnx "
            "file, a TorchScript .pt file, a .pt2 file or a model's name"
        )
    with borrowed_randomness(0):
        model = load_host(name, weights="none")
    return Target(name, _own_example(model), "random", model=model)


def _from_safetensors(name: str, path: Path) -> Target:
    model = _opened(load_model(path))
    gates = tuple(named_gates(model))
    return Target(name, _own_example(model), "file", model=model, file=path, gates=gates)


def _from_onnx(name: str, path: Path) -> Target:
    read = read_onnx(path)
    _open(read.gates.values())
    return Target(
        name,
        read.example,
        "file",
        file=path,
        only=ONNX_ENGINES,
        fixed=read.fixed,
        is_sized=read.is_sized,
        is_opened=bool(read.gates),
        keeps_precision=True,
        patches=tuple(read_file(path).patches(read.gates)),
    )


def _from_torchscript(name: str, path: Path) -> Target:
    read = read_torchscript(path)
    _open(read.gates.values())
    return Target(
        name,
        read.example,
        "file",
        model=read.module,
        file=path,
        only=SCRIPT_ENGINES,
        is_sized=read.is_sized,
        is_opened=bool(read.gates),
        gates=tuple(read.gates),
    )


def _from_program(name: str, path: Path) -> Target:
    if is_compiled(path):
        return _from_package(name, path)
    read = read_program(path)
    _open(read.gates.values())
    return Target(
        name,
        read.example,
        "file",
        model=read.module,
        file=path,
        only=PROGRAM_ENGINES,
        fixed=read.fixed,
        is_sized=read.is_sized,
        is_opened=bool(read.gates),
        gates=tuple(read.gates),
        keeps_precision=True,
    )


def _from_package(name: str, path: Path) -> Target:
    read = read_package(path)
    _open(read.gates.values())
    return Target(
        name,
        read.example,
        "file",
        file=path,
        only=PACKAGE_ENGINES,
        fixed=read.fixed,
        is_sized=read.is_sized,
        is_opened=bool(read.gates),
        keeps_precision=True,
        values=read.gates,
    )


_READERS: dict[str, Callable[[str, Path], Target]] = {
    ".safetensors": _from_safetensors,
    ".onnx": _from_onnx,
    ".pt": _from_torchscript,
    ".pt2": _from_program,
}


def _from_module(module: nn.Module, example: Any) -> Target:
    own = _opened(copy.deepcopy(module).eval().cpu())
    is_script = isinstance(own, torch.jit.ScriptModule)
    return Target(
        name=str(module.original_name) if is_script else type(module).__name__,
        example=_own_example(own, example),
        weights="given",
        model=own,
        only=SCRIPT_ENGINES if is_script else (),
        is_opened=not is_script,
        gates=() if is_script else tuple(named_gates(own)),
    )


def _own_example(model: nn.Module, example: Any = None) -> Inputs:
    card = card_of(model)
    if example is None and card is not None:
        like = next((p for p in model.parameters() if p.is_floating_point()), None)
        return card.example(like)
    inputs = as_inputs(model, example)
    return tuple(part.detach().cpu() if isinstance(part, Tensor) else part for part in inputs)


def _opened(model: nn.Module) -> nn.Module:
    """Open every gate of this very model at random, each time the same."""
    _open(named_gates(model).values())
    return model


def _open(gates: Iterable[Tensor]) -> None:
    low, high = GATES
    with torch.no_grad(), borrowed_randomness(0):
        for gate in gates:
            gate.copy_(opened(gate, low, high))
