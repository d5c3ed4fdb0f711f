"""ONNX Runtime: the newest files that the installed one reads, and how it runs one."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from attnsurgeon.errors import BadFile, first_line
from attnsurgeon.export.format import RunFailed, Runner
from attnsurgeon.export.inputs import Inputs, tensors_of


def runner(source: str | bytes, name: str) -> Runner:
    """Load a model, from a path or as bytes, on the CPU.

    Raises:
        BadFile: the installed runtime cannot read it.
    """
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    try:
        session = _session(source)
    except (state.Fail, state.InvalidGraph) as error:
        raise BadFile(f"{name} is no ONNX file that can be run: {error}") from error
    except (state.NotImplemented, state.InvalidArgument, state.InvalidProtobuf) as error:
        raise BadFile(f"onnxruntime cannot read {name}: {first_line(error)}") from error
    names = [node.name for node in session.get_inputs()]

    def run(inputs: Inputs) -> list[Tensor]:
        parts = tensors_of(inputs)
        if len(parts) != len(names):  # a tracer leaves out what it takes for a constant
            raise RunFailed(f"it takes {len(names)} inputs, not {len(parts)}")
        feed = {name: part.detach().cpu().numpy() for name, part in zip(names, parts, strict=True)}
        try:
            return [torch.from_numpy(array) for array in session.run(None, feed)]
        except (state.Fail, state.InvalidArgument, state.RuntimeException) as error:
            raise RunFailed(first_line(error)) from error

    return run


def _session(source: str | bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings of its optimizer are no business of the user's
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # between the runs
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


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
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version
    )
    try:
        _session(model.SerializeToString())
    except Exception:  # whatever it says, it does not read this
        return False
    return True
