"""A network as a program of torch.export, as it is or rewritten so that attention costs less."""

from __future__ import annotations

import inspect
import io
import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from attnsurgeon.borrow import borrowed_modes
from attnsurgeon.errors import ExportRefused, first_line
from attnsurgeon.export.early import read_early
from attnsurgeon.export.fold import fold_norms
from attnsurgeon.export.inputs import Inputs, free_axes, tensors_of
from attnsurgeon.export.terms import move_terms
from attnsurgeon.gate import named_gates

_SPECIALIZED = re.compile(r"size\(\)\[(\d+)\] as dynamic but .*? to be a constant \((\d+)\)")
"""How torch.export says that a free axis came out fixed: which, and to what."""


def export_program(
    model: nn.Module, inputs: Inputs, *, free: Collection[str]
) -> torch.export.ExportedProgram:
    """Return the network in eval mode as torch.export sees it, with these image axes free.

    Raises:
        ExportRefused: it cannot take the network, or not with free axes.
    """
    any_size = torch.export.Dim.DYNAMIC  # unlike AUTO, it refuses to come out fixed
    shapes = tree_map(
        lambda part: (
            dict.fromkeys(free_axes(part.ndim, free), any_size)
            if isinstance(part, Tensor)
            else None
        ),
        inputs,
    )
    with torch.no_grad(), borrowed_modes(model), logs_held_back():
        model.eval()
        try:
            return torch.export.export(
                model, inputs, dynamic_shapes=_like_signature(model, shapes) if free else None
            )
        except Exception as error:  # the exporter raises errors of a dozen unrelated classes
            remedy = "; give --static to fix batch, height and width" if free else ""
            reason = _fixed_by_code(error, inputs) or reason_of(error)
            raise ExportRefused(
                f"torch.export cannot take {type(model).__name__}: {reason}{remedy}"
            ) from error


@contextmanager
def logs_held_back() -> Iterator[None]:
    """Keep torch from telling the whole graph of what it refuses: the error says why."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _like_signature(model: nn.Module, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return one entry per input; a host with *args in front wants them in a tuple of its own."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    variadic = bool(parameters) and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL
    return (tuple(shapes),) if variadic else tuple(shapes)


def rewritten_program(
    model: nn.Module, inputs: Inputs, *, free: Collection[str]
) -> torch.export.ExportedProgram:
    """Return the program with norms folded, and attention read and added where it costs least.

    Its tensors keep their names, gates also their shapes, so that it is opened as before.

    Raises:
        ExportRefused: torch.export cannot take the network, or not with free axes.
    """
    program = export_program(model, inputs, free=free)
    gates = _gate_paths(model)
    fold_norms(program, gates)
    read_early(program, gates)
    move_terms(program)
    return program


def _gate_paths(model: nn.Module) -> set[str]:
    """Return every path of every gate; a shared module has several."""
    gates = {id(gate) for gate in named_gates(model).values()}
    named = model.named_parameters(remove_duplicate=False)
    return {path for path, parameter in named if id(parameter) in gates}


def _fixed_by_code(error: Exception, inputs: Inputs) -> str:
    """Return which free axes the network's code makes constants of, where that is what was said."""
    axes = free_axes(max((part.ndim for part in tensors_of(inputs)), default=4))
    found = {axes.get(int(i), f"axis {i}"): n for i, n in _SPECIALIZED.findall(str(error))}
    named = " and ".join(f"the {axis} to {n}" for axis, n in found.items())
    return f"its code fixes {named}" if named else ""


def reason_of(error: Exception) -> str:
    """Return the first line that says why: torch.export puts a heading with a colon before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines and lines[0].endswith(":") else first_line(error)
