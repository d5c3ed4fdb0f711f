"""The newest ONNX files that the installed runtime reads: found by trying."""

from __future__ import annotations

import functools


@functools.cache
def newest_opset() -> int:
    """Return the newest operator set that both the installed onnx and the runtime know."""
    import onnx

    known = onnx.defs.onnx_opset_version()
    return next((n for n in range(known, 6, -1) if _reads(n, 8)), known)


@functools.cache
def newest_ir() -> int:
    """Return the newest version of the file format itself that both know."""
    import onnx

    known = int(onnx.IR_VERSION)
    return next((n for n in range(known, 7, -1) if _reads(17, n)), known)


def _reads(opset: int, ir_version: int) -> bool:
    """Tell whether the runtime loads the smallest model of these versions."""
    import onnxruntime
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception:  # whatever it says, it does not read this
        return False
    return True
