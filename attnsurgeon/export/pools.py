"""Write means and maxima as the ONNX operators that runtimes are fastest at.

A mean or a maximum over all positions is a GlobalAveragePool or GlobalMaxPool, which ONNX Runtime
computes in its blocked layout, where a ReduceMean has the whole map put in order first. A mean over
channels is the product with a row of 1 / C: reductions over a middle axis are not vectorised.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_POOLS = {"ReduceMean": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}
_POSITIONS, _CHANNELS = [2, 3], [1]


def rewrite_pools(model: Any) -> int:
    """Rewrite the means and maxima of 4-dimensional maps in an onnx_ir.Model; return how many."""
    count = 0
    for node in list(model.graph):
        axes = _reduced(node)
        if axes == _POSITIONS:
            made = _global_pool(node)
        elif axes == _CHANNELS and node.op_type == "ReduceMean" and _has_known_channels(node):
            made = _channel_mean(model.graph, node)
        else:
            continue
        out, held = made[-1].outputs[0], node.inputs[1]
        out.name, out.shape, out.type = (getattr(node.outputs[0], n) for n in _KEPT)
        model.graph.insert_before(node, made)
        node.outputs[0].replace_all_uses_with(out, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        if not held.uses():
            model.graph.initializers.pop(held.name, None)
        count += 1
    return count


_KEPT = ("name", "shape", "type")


def _reduced(node: Any) -> list[int] | None:
    """Return the axes that a node reduces a float map of 4 axes by, if it keeps them as 1."""
    import onnx_ir

    if node.op_type not in _POOLS or node.domain not in ("", "ai.onnx") or len(node.inputs) < 2:
        return None
    source, axes = node.inputs
    known = onnx_ir.convenience.get_const_tensor(axes)
    keep = node.attributes.get("keepdims")
    if known is None or (keep is not None and not keep.as_int()):
        return None
    if source.shape is None or len(source.shape) != 4 or source.dtype is None:
        return None
    if not source.dtype.is_floating_point():
        return None
    return sorted(int(axis) % 4 for axis in known.numpy())


def _has_known_channels(node: Any) -> bool:
    """Tell whether the second axis has one length: of a map that was turned it may be free."""
    return isinstance(node.inputs[0].shape[1], int)


def _global_pool(node: Any) -> list[Any]:
    import onnx_ir

    return [onnx_ir.node(_POOLS[node.op_type], [node.inputs[0]])]


def _channel_mean(graph: Any, node: Any) -> list[Any]:
    """Return (N, C, H, W) -> (N, C, HW) -> (N, 1, HW) -> (N, 1, H, W)."""
    import onnx_ir

    source = node.inputs[0]
    channels = source.shape[1]
    name = node.outputs[0].name

    def constant(label: str, value: Any) -> Any:
        tensor = onnx_ir.tensor(value, name=f"{name}_{label}")
        held = onnx_ir.val(tensor.name, const_value=tensor)
        graph.register_initializer(held)
        return held

    share = np.full((1, channels), 1 / channels, dtype=source.dtype.numpy())
    flat = onnx_ir.node("Reshape", [source, constant("rows", np.array([0, channels, -1]))])
    mean = onnx_ir.node("MatMul", [constant("share", share), flat.outputs[0]])
    size = onnx_ir.node("Shape", [source], attributes={"start": 2})
    first = constant("first", np.array([0, 1]))
    shape = onnx_ir.node("Concat", [first, size.outputs[0]], attributes={"axis": 0})
    back = onnx_ir.node("Reshape", [mean.outputs[0], shape.outputs[0]])
    return [flat, mean, size, shape, back]
