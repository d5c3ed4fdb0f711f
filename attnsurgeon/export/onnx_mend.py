"""Put right what onnxscript's optimizer does to graphs whose sizes depend on data.

Detectors are such: a level of their pyramid may propose nothing, and everything after it is empty.
"""

from __future__ import annotations

from typing import Any


def mend(model: Any) -> None:
    """Mend an optimised onnx_ir.Model where it lies."""
    import onnx_ir

    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.inputs:
            if value is not None:
                _enter(model, value)
        if node.op_type == "Reshape":
            _flatten(node)


def _enter(model: Any, value: Any) -> None:
    """Enter a constant that was made for a node and left out of the graph.

    So it is with the shape of a Reshape that is made of two; such a file cannot be read.
    """
    held = model.graph.initializers
    is_lost = value.const_value is not None and value.producer() is None and value.graph is None
    if is_lost and not value.is_graph_input():
        while value.name in held:
            value.name = f"{value.name}_"
        held[value.name] = value


def _flatten(node: Any) -> None:
    """Make a Reshape to (0, -1) the Flatten that it was: of nothing, -1 cannot be inferred."""
    import onnx_ir

    shape = node.inputs[1].const_value
    allows_zero = node.attributes.get_int("allowzero", 0)
    if shape is None or allows_zero or shape.numpy().tolist() != [0, -1]:
        return
    node.op_type = "Flatten"
    node.resize_inputs(1)
    node.attributes["axis"] = onnx_ir.AttrInt64("axis", 1)
