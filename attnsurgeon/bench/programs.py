"""A program of torch.export as it lies on the disk: what runs it, and what input it takes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnsurgeon.bench.exported import (
    DEFAULT_SIZE,
    GATES_KEY,
    RECIPE_KEY,
    SIZE_KEY,
    Fixed,
    is_gate,
    one_image,
    read_names,
    read_size,
)
from attnsurgeon.errors import BadFile, HostUnusable, first_line


class Program(nn.Module):
    """A loaded program as a network; its mode is the one that it was exported in."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.program = graph  # torch.export takes a child called `graph` for something else

    def train(self, mode: bool = True) -> Program:
        """Leave the mode alone: torch refuses to set that of a program."""
        return self

    def forward(self, *inputs: Any) -> Any:
        """Run it."""
        return self.program(*inputs)


@dataclass(frozen=True)
class ProgramFile:
    """What a .pt2 file takes, and where its gates are.

    Attributes:
        module: runs it.
        example: its inputs for one image.
        fixed: for each of them, the axes that the file fixes.
        is_sized: whether it told its height and width.
        gates: name of each gate in the module -> its values.
    """

    module: Program
    example: tuple[Tensor, ...]
    fixed: tuple[Fixed, ...]
    is_sized: bool
    gates: Mapping[str, Tensor]


def read_program(path: Path) -> ProgramFile:
    """Load a program of torch.export.

    Raises:
        BadFile: it is none.
        HostUnusable: it takes inputs that cannot be made up.
    """
    notes = dict.fromkeys((SIZE_KEY, RECIPE_KEY, GATES_KEY), "")
    try:
        program = torch.export.load(io.BytesIO(path.read_bytes()), extra_files=notes)
    except Exception as error:  # of many classes, as the file is damaged here or there
        raise BadFile(
            f"{str(path)!r} is no program of torch.export: {first_line(error)}"
        ) from error
    told = read_size(notes[SIZE_KEY])
    example, fixed, is_sized = [], [], True
    for node in _taken(program, path):
        value = node.meta["val"]
        axes: Fixed = tuple(size if isinstance(size, int) else None for size in value.shape)
        shape = one_image(axes, told or DEFAULT_SIZE)
        if shape is None:
            raise HostUnusable(
                f"no input can be made up for {str(path)!r}: {node.name} is {tuple(value.shape)}"
            )
        example.append(torch.zeros(shape, dtype=value.dtype))
        fixed.append(axes)
        is_sized = is_sized and (told is not None or None not in axes[1:])
    module = Program(program.module())
    layers = read_names(notes[GATES_KEY])
    gates = {
        name: parameter
        for name, parameter in module.named_parameters()
        if notes[RECIPE_KEY] and is_gate(name.removeprefix("program."), layers)
    }
    return ProgramFile(module, tuple(example), tuple(fixed), is_sized, gates)


def _taken(program: Any, path: Path) -> list[Any]:
    """Return the nodes of the inputs.

    Raises:
        HostUnusable: one is no tensor.
    """
    names = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for name in names:
        if name not in nodes or not isinstance(nodes[name].meta.get("val"), Tensor):
            raise HostUnusable(f"no input can be made up for {str(path)!r}: {name} is no tensor")
    return [nodes[name] for name in names]
