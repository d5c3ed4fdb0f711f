"""An int8 file with its feature maps left unrounded: so its gates can be opened later.

Opened gates change every map behind them, and the steps in which a file holds its maps are those of
the gates that it was calibrated with. Without the steps what remains are the file's own weights, of
eight bits, and its own wiring: as much of it as opened gates can show.

A quantizer takes out each ReLU and clip that the first and last step of a map stand for; without
the steps they have to come back, so the file notes them when it is made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NOTE = "clamps"
"""Of an int8 file: name of a map -> the least and largest number that the network lets through."""

Clamp = tuple[float | None, float | None]


def note_clamps(plain: Path, target: Path) -> None:
    """Have a quantized file tell which clamps of the one that it was made of it has no more."""
    import onnx

    made = onnx.load(target)
    kept = {node.output[0] for node in made.graph.node if node.op_type in ("Relu", "Clip")}
    found = _clamps(onnx.load(plain, load_external_data=False).graph)
    left_out = {name: clamp for name, clamp in found.items() if name not in kept}
    made.metadata_props.add(key=NOTE, value=json.dumps(left_out))
    onnx.save(made, target)


def write_unrounded(path: Path, target: Path) -> None:
    """Write an int8 file again, with its maps in float32 and its weights as they are."""
    import onnx

    model = onnx.load(path)
    notes = {each.key: each.value for each in model.metadata_props}
    clamps: dict[str, Clamp] = json.loads(notes[NOTE])
    graph = model.graph
    rounded = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "QuantizeLinear"}
    nodes = [
        _passed_on(graph, rounded[node.input[0]], node.output[0], clamps)
        if node.op_type == "DequantizeLinear" and node.input[0] in rounded
        else node
        for node in graph.node
        if node.op_type != "QuantizeLinear"
    ]
    graph.ClearField("node")
    graph.node.extend(nodes)
    onnx.save(model, target)


def _clamps(graph: Any) -> dict[str, Clamp]:
    """Return every ReLU and clip, by what it makes; bounds that are computed are no numbers."""
    from onnx import numpy_helper

    held = {tensor.name: tensor for tensor in graph.initializer}

    def bound(node: Any, place: int) -> float | None:
        name = node.input[place] if len(node.input) > place else ""
        return float(numpy_helper.to_array(held[name])) if name in held else None

    return {
        node.output[0]: (0.0, None) if node.op_type == "Relu" else (bound(node, 1), bound(node, 2))
        for node in graph.node
        if node.op_type in ("Relu", "Clip")
    }


def _passed_on(graph: Any, source: str, name: str, clamps: dict[str, Clamp]) -> Any:
    """Return the node that hands a map on as it is, but for what the network clamps."""
    import numpy
    from onnx import helper, numpy_helper

    bounds = []
    for end, bound in zip(("low", "high"), clamps.get(source, (None, None)), strict=True):
        bounds.append("" if bound is None else f"{name}_{end}")
        if bound is not None:
            graph.initializer.append(numpy_helper.from_array(numpy.float32(bound), bounds[-1]))
    kind = "Clip" if any(bounds) else "Identity"
    return helper.make_node(kind, [source, *(bounds if any(bounds) else ())], [name])
