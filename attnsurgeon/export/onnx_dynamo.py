"""Translate a network to ONNX by torch.export and torch's dynamo exporter."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from attnsurgeon.errors import ExportRefused
from attnsurgeon.export.inputs import Inputs, free_axes, tensors_of
from attnsurgeon.export.program import reason_of, rewritten_program
from attnsurgeon.export.terms import gate_weights

OLDEST_OPSET = 18
"""The exporter writes 18 and up."""


def translate(model: nn.Module, inputs: Inputs, *, free: Collection[str]) -> Any:
    """Return the network as an onnx_ir.Model, not optimised yet.

    Raises:
        ExportRefused: torch.export cannot take the network, or not with free axes.
    """
    exported = rewritten_program(model, inputs, free=free)
    gate_weights(exported)
    try:
        program = torch.onnx.export(
            exported, dynamo=True, optimize=False, verbose=False, input_names=input_names(inputs)
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportRefused(
            f"{type(model).__name__} cannot be written as ONNX: {reason_of(error)}"
        ) from error
    assert program is not None  # it is only when a file name is given
    if free:
        _name_axes(program.model)
    return program.model


def input_names(inputs: Inputs) -> list[str]:
    """Return `input`, or one numbered name per tensor where there are several."""
    count = len(tensors_of(inputs))
    return ["input"] if count == 1 else [f"input_{i}" for i in range(count)]


def _name_axes(model: Any) -> None:
    """Call the free axes batch, height and width wherever their symbols stand."""
    import onnx_ir

    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for i, axis in free_axes(len(value.shape)).items():
            dim = value.shape[i]
            if isinstance(dim, onnx_ir.SymbolicDim) and dim.value:
                names.setdefault(dim.value, axis)
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in names) or r"(?!)")
    values = [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]
    for value in values:
        for i, dim in enumerate(value.shape or ()):
            if isinstance(dim, onnx_ir.SymbolicDim) and dim.value:
                value.shape[i] = pattern.sub(lambda found: names[found.group()], dim.value)
