"""Runs an exported file in a process of its own, which imports only what the file needs.

This text is handed to a new interpreter, where this package cannot be imported. It reads pickles
from its stdin and answers each on its stdout: first the kind of file with what opens it, then
inputs, until stdin ends.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from typing import Any


def open_onnx(path: str, patches: list[tuple[int, bytes]]) -> Callable[[Any], Any]:
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
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(arrays: Any) -> Any:
        if len(arrays) != len(names):  # a tracer leaves out what it takes for a constant
            raise ValueError(f"it takes {len(names)} inputs, not {len(arrays)}")
        return session.run(None, dict(zip(names, arrays)))  # noqa: B905 (counted above)

    return run


def open_python(path: str, state: dict[str, Any]) -> Callable[[Any], Any]:
    """Return what runs the network that a file of Python code builds, with these weights."""
    import runpy

    import torch

    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    model = runpy.run_path(path)["build"]().to(dtype)
    model.load_state_dict(state)
    model.eval()

    def run(inputs: Any) -> Any:
        with torch.no_grad():
            return [
                leaf
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
    opener, *arguments = pickle.load(questions)
    run: Callable[[Any], Any] | None = None
    while True:
        try:
            if run is None:
                run, answer = globals()[opener](*arguments), None
            else:
                answer = run(pickle.load(questions))
        except EOFError:
            return
        except Exception as error:
            pickle.dump((False, f"{type(error).__name__}: {error}"), answers)
        else:
            pickle.dump((True, answer), answers)
        answers.flush()
        if run is None:
            return


if __name__ == "__main__":
    serve()
