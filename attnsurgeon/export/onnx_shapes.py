"""Write the shapes of an ONNX file's Reshape nodes as constants, where their axes stay free.

Exporters compute a free shape from that of the input: Shape, Squeeze, Mul and Concat before each
Reshape, on numbers that no accelerator likes to wait for. The operator itself knows two signs: 0
takes an axis over as it is, and -1 takes what is left. (N, C, H, W) -> (N, C, HW) is [0, C, -1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def write_constant_shapes(model: Any) -> int:
    """Give each Reshape of an onnx_ir.Model a constant shape where there is one; return how many.

    What computed the shapes is taken out.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph, count = model.graph, 0
    for node in list(graph):
        if node.op_type != "Reshape" or node.domain or node.inputs[1].const_value is not None:
            continue
        before, after = node.inputs[0].shape, node.outputs[0].shape
        dims = None if before is None or after is None else constant_shape(before, after)
        if dims is None:
            continue
        name = f"{node.outputs[0].name}_shape"
        value = onnx_ir.val(name, const_value=onnx_ir.tensor(dims, onnx_ir.DataType.INT64, name))
        graph.register_initializer(value)
        node.replace_input_with(1, value)
        node.attributes.pop("allowzero", None)
        count += 1
    if count:
        RemoveUnusedNodesPass()(model)
    return count


def constant_shape(before: Sequence[Any], after: Sequence[Any]) -> list[int] | None:
    """Return the shape argument that makes one shape of the other, or None if there is no constant.

    Free axes are told by their symbols; 0 stands for one that is where it was, -1 for one other.
    """
    dims = []
    for i, axis in enumerate(after):
        if isinstance(axis, int):
            if axis == 0:  # which would be taken for the sign
                return None
            dims.append(axis)
        elif i < len(before) and _symbol(axis) is not None and _symbol(axis) == _symbol(before[i]):
            dims.append(0)
        else:
            dims.append(-1)
    return dims if dims.count(-1) <= 1 else None


def _symbol(axis: Any) -> str | None:
    """Return the name of a free axis; an axis without a name is like no other."""
    value = getattr(axis, "value", axis)
    return value if isinstance(value, str) else None
