"""Programs of torch.export as they lie on the disk: .pt2 files, as they are or compiled."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

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
from attnsurgeon.export.compiled import axes_of, gates_of, inputs_of, notes_of
from attnsurgeon.export.precision import PRECISIONS


@dataclass(frozen=True)
class Package:
    """What a compiled .pt2 file takes, and where its gates are.

    Attributes:
        example: its inputs for one image.
        fixed: for each of them, the axes that the file fixes.
        is_sized: whether it told its height and width.
        gates: name of each gate -> zeros of its shape.
    """

    example: tuple[Tensor, ...]
    fixed: tuple[Fixed, ...]
    is_sized: bool
    gates: Mapping[str, Tensor]


def read_package(path: Path) -> Package:
    """Return what a compiled .pt2 file says of itself; nothing of it is run.

    Raises:
        HostUnusable: it does not say what it takes, or it is nothing that can be made up.
    """
    notes = notes_of(path)
    inputs = axes_of(notes)
    if not inputs:
        raise HostUnusable(
            f"{str(path)!r} does not say what it takes; make it by attnsurgeon export --compile"
        )
    precision = PRECISIONS.get(notes.get("precision", ""), PRECISIONS["fp32"])
    return Package(
        *_inputs_of(path, inputs, notes.get(SIZE_KEY, "")),
        gates={
            name: torch.zeros(shape, dtype=precision.dtype)
            for name, (_, shape) in gates_of(notes).items()
        },
    )


@dataclass(frozen=True)
class Program:
    """A network as torch.export saw it, what it takes, and its gates.

    Attributes:
        module: runs it.
        example: its inputs for one image.
        fixed: for each of them, the axes that the file fixes.
        is_sized: whether the file told its height and width.
        gates: name of each gate -> the parameter.
    """

    module: fx.GraphModule
    example: tuple[Tensor, ...]
    fixed: tuple[Fixed, ...]
    is_sized: bool
    gates: Mapping[str, Tensor]


def read_program(path: Path) -> Program:
    """Load a .pt2 file that is not compiled.

    Raises:
        BadFile: it is no program of torch.export.
        HostUnusable: it takes nothing that can be made up.
    """
    notes = dict.fromkeys((SIZE_KEY, RECIPE_KEY, GATES_KEY), "")
    try:
        with _silent_log():
            program = torch.export.load(io.BytesIO(path.read_bytes()), extra_files=notes)
    except Exception as error:  # of a dozen classes, as the file is no zip, or of another version
        raise BadFile(
            f"{str(path)!r} is no program of torch.export: {first_line(error)}"
        ) from error
    held = program.module(check_guards=False)
    module = fx.GraphModule(held, held.graph)  # unlike the other, it has modes and can be copied
    layers = read_names(notes[GATES_KEY])
    return Program(
        module,
        *_inputs_of(path, inputs_of(program), notes[SIZE_KEY]),
        # Names mean nothing in a file that is not of export_model: it has another author.
        gates={
            name: parameter
            for name, parameter in module.named_parameters()
            if notes[RECIPE_KEY] and is_gate(name, layers)
        },
    )


@contextmanager
def _silent_log() -> Iterator[None]:
    """Keep torch.export from logging the traceback of an error that is told in one line."""
    log = logging.getLogger(torch.export.__name__)
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before


def _inputs_of(
    path: Path, inputs: Mapping[str, tuple[Sequence[int | None], torch.dtype]], size: str
) -> tuple[tuple[Tensor, ...], tuple[Fixed, ...], bool]:
    """Return inputs for one image, the axes that are fixed, and whether the size is known."""
    told = read_size(size)
    example, fixed = [], []
    for name, (axes, dtype) in inputs.items():
        shape = one_image(tuple(axes), told or DEFAULT_SIZE)
        if shape is None:
            raise HostUnusable(f"no input can be made up for {str(path)!r}: {name} is {axes}")
        example.append(torch.zeros(shape, dtype=dtype))
        fixed.append(tuple(axes))
    is_sized = told is not None or all(None not in axes[1:] for axes in fixed)
    return tuple(example), tuple(fixed), is_sized


def load_package(path: Path, gates: Mapping[str, Tensor]) -> Any:
    """Load a compiled .pt2 file with other values for its gates.

    Raises:
        BadFile: it cannot be loaded here.
    """
    inductor: Any = torch._inductor
    try:
        model = inductor.aoti_load_package(str(path))
        if gates:
            known, named = set(model.get_constant_fqns()), gates_of(notes_of(path))
            values = {own: gates[g] for g in gates for own in known.intersection(named[g][0])}
            model.load_constants(values, check_full_update=False)
    except RuntimeError as error:
        raise BadFile(
            f"{str(path)!r} cannot be loaded here: {first_line(error)}; compile it on this machine "
            "by attnsurgeon export --compile"
        ) from error
    return model
