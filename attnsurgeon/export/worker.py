"""Runs exported files in a process of its own, which imports only what the files need.

This text is handed to a new interpreter, where this package cannot be imported. It reads pickles
from its stdin and answers each on its stdout, until stdin ends: `open` with a number, the kind of
file and what opens it; `run` with that number and inputs; `close` with the number.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from typing import Any

Opened = tuple[Callable[[Any], Any], Any]
"""What runs a file, and what is told about it."""


def open_onnx(path: str, patches: list[tuple[int, bytes]]) -> Opened:
    """Return what runs an ONNX file, with some of its bytes exchanged."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings of its optimizer are no business of the user's
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # between the runs
    source: Any = path
    if patches:
        with open(path, "rb") as stream:  # noqa: PTH123
            data = bytearray(stream.read())
        for start, raw in patches:
            data[start : start + len(raw)] = raw
        source = bytes(data)
        folder = os.path.dirname(os.path.abspath(path))  # noqa: PTH100, PTH120
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", folder
        )
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(arrays: Any) -> Any:
        if len(arrays) != len(names):  # a tracer leaves out what it takes for a constant
            raise ValueError(f"it takes {len(names)} inputs, not {len(arrays)}")
        return session.run(None, dict(zip(names, arrays)))  # noqa: B905 (counted above)

    return run, None


def open_python(path: str, state: dict[str, Any]) -> Opened:
    """Return what runs the network that a file of Python code builds, with these weights."""
    import runpy

    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    model = runpy.run_path(path)["build"]().to(dtype)
    model.load_state_dict(state)
    model.eval()
    return _runner(model), None


def open_torchscript(path: str, values: dict[str, Any]) -> Opened:
    """Return what runs a TorchScript file, some of its parameters exchanged, and its precision."""
    import torch

    notes: dict[str, Any] = {"precision": ""}
    try:
        module = torch.jit.load(path, map_location="cpu", _extra_files=notes).eval()
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        import torchvision  # noqa: F401  (a detector needs its operators)

        module = torch.jit.load(path, map_location="cpu", _extra_files=notes).eval()
    _set(module, values)
    told = notes["precision"]
    return _runner(module), told.decode() if isinstance(told, bytes) else told


def open_program(path: str, values: dict[str, Any]) -> Opened:
    """Return what runs a program of torch.export; the shapes of its inputs, and its precision."""
    import io

    import torch

    notes = {"precision": ""}
    with open(path, "rb") as stream:  # noqa: PTH123
        program = torch.export.load(io.BytesIO(stream.read()), extra_files=notes)
    module = program.module()
    _set(module, values)
    return _runner(module), (input_shapes(program), notes["precision"])


def input_shapes(program: Any) -> dict[str, Any]:
    """Return name of each input -> its axes, None where one is free."""
    kinds = program.graph_signature.input_specs
    held = {spec.arg.name for spec in kinds if spec.kind.name == "USER_INPUT"}
    return {
        node.name: [size if isinstance(size, int) else None for size in node.meta["val"].shape]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in held and "val" in node.meta
    }


def open_package(path: str, values: dict[str, Any]) -> Opened:
    """Return what runs a package of AOTInductor, some constants exchanged, and its metadata."""
    import json

    import torch

    os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"  # else a wrong size is read as a right one
    model = torch._inductor.aoti_load_package(path)
    notes = model.get_metadata()
    names = json.loads(notes.get("constants", "{}"))
    known, exchanged = set(model.get_constant_fqns()), {}
    for name, value in values.items():
        own = known.intersection(names.get(name, [[name]])[0])
        if not own:
            raise KeyError(f"it has no constant {name}")
        exchanged.update(dict.fromkeys(own, value))
    if exchanged:
        model.load_constants(exchanged, check_full_update=False)
    return _runner(model), notes


def _set(module: Any, values: dict[str, Any]) -> None:
    import torch

    parameters = dict(module.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def _runner(model: Any) -> Callable[[Any], Any]:
    import torch

    def run(inputs: Any) -> Any:
        with torch.no_grad():
            return [
                leaf.detach().cpu()
                for leaf in torch.utils._pytree.tree_leaves(model(*inputs))
                if isinstance(leaf, torch.Tensor)
            ]

    return run


def serve() -> None:
    """Answer until there is nothing more to read."""
    sys.modules["attnsurgeon"] = None  # type: ignore[assignment]
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a network prints is no answer
    questions = sys.stdin.buffer
    runs: dict[int, Callable[[Any], Any]] = {}
    while True:
        try:
            kind, number, *rest = pickle.load(questions)
            answer = None
            if kind == "open":
                opener, *arguments = rest
                runs[number], answer = globals()[opener](*arguments)
            elif kind == "run":
                answer = runs[number](*rest)
            elif kind == "close":
                runs.pop(number, None)
            else:
                __import__(rest[0])
        except EOFError:
            return
        except Exception as error:
            pickle.dump((False, f"{type(error).__name__}: {error}"), answers)
        else:
            pickle.dump((True, answer), answers)
        answers.flush()


if __name__ == "__main__":
    serve()
