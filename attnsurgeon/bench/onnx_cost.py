"""What an .onnx file costs on paper: told by ONNX Runtime's profiler, node by node as written."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnsurgeon.bench.exported import session_for
from attnsurgeon.cost import Count

if TYPE_CHECKING:
    import onnx

Shape = Sequence[int]
WEIGHT_KINDS = (1, 2, 3, 10, 11, 16)
"""Of onnx.proto: floats of all widths, and the bytes of quantized weights. Others are shapes."""


def count_onnx(path: Path, inputs: Sequence[Any]) -> tuple[tuple[tuple[int, ...], ...], Count]:
    """Run a file once and return the shapes of its outputs, and what the run costs.

    Nodes are those of the file, none fused, so that the figures do not hang on the runtime.
    """
    with tempfile.TemporaryDirectory(prefix="attnsurgeon-") as folder:
        session = session_for(path, is_optimised=False, profile_to=Path(folder) / "run")
        names = [node.name for node in session.get_inputs()]
        feed = {name: part.numpy() for name, part in zip(names, inputs, strict=True)}
        outputs = tuple(tuple(array.shape) for array in session.run(None, feed))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return outputs, total(
        event["args"]
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    )


def total(nodes: Any) -> Count:
    """Return the cost of nodes, as the profiler describes them."""
    macs, weight_bytes, map_bytes, uncounted = 0, 0, 0, set()
    for node in nodes:
        counted = MACS.get(node["op_name"])
        if counted is None:
            uncounted.add(node["op_name"])
        else:
            macs += counted(_shapes(node["input_type_shape"]), _shapes(node["output_type_shape"]))
        weight_bytes += int(node["parameter_size"])
        map_bytes += int(node["activation_size"]) + int(node["output_size"])
    return Count(macs, tuple(sorted(uncounted)), weight_bytes, map_bytes)


def _shapes(told: Sequence[Mapping[str, Shape]]) -> list[Shape]:
    return [next(iter(one.values())) for one in told]


def _convolution(weight: int) -> Callable[[list[Shape], list[Shape]], int]:
    """Return what counts one whose weights (out, in / groups, ...) are this input."""
    return lambda taken, made: math.prod(made[0]) * math.prod(taken[weight][1:])


def _transposed(taken: list[Shape], made: list[Shape]) -> int:
    return math.prod(taken[0]) * math.prod(taken[1][1:])


def _product(taken: list[Shape], made: list[Shape]) -> int:
    return math.prod(made[0]) * taken[0][-1]


def _gemm(taken: list[Shape], made: list[Shape]) -> int:
    """Count one whose first factor may lie on its side: its size over the rows of the result."""
    return math.prod(made[0]) * (math.prod(taken[0]) // max(1, made[0][0]))


MACS: dict[str, Callable[[list[Shape], list[Shape]], int]] = {
    "Conv": _convolution(1),
    "ConvInteger": _convolution(1),
    "QLinearConv": _convolution(3),
    "ConvTranspose": _transposed,
    "MatMul": _product,
    "MatMulInteger": _product,
    "QLinearMatMul": _product,
    "Gemm": _gemm,
}
"""Operators whose multiply-adds are counted -> from the shapes of their inputs and outputs."""


def numbers_in(graph: onnx.GraphProto) -> int:
    """Return how many numbers a file holds as weights, constants of its arithmetic included."""
    return sum(
        math.prod(tensor.dims) for tensor in graph.initializer if tensor.data_type in WEIGHT_KINDS
    )
