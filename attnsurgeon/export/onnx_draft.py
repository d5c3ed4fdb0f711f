"""A translated ONNX graph on its way to a file: what is done to it once, and how it is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from attnsurgeon.export.format import Draft
from attnsurgeon.export.onnx_file import write_file
from attnsurgeon.export.onnx_mend import mend
from attnsurgeon.export.onnx_runtime import newest_ir
from attnsurgeon.export.onnx_shapes import write_constant_shapes
from attnsurgeon.export.pools import rewrite_pools
from attnsurgeon.export.program import logs_held_back
from attnsurgeon.gate import named_gates


class OnnxDraft(Draft):
    """A finished graph; each write sets its gates anew."""

    def __init__(
        self, model: Any, metadata: Mapping[str, str], notices: tuple[str, ...] = ()
    ) -> None:
        self.model = model
        self.notices = notices
        self.metadata = dict(metadata)

    def write(self, path: Path, gates: Mapping[str, Tensor]) -> None:
        """Write the file with these gates, and a second one beside it where it takes two."""
        import onnx_ir

        for name, value in gates.items():
            initializer = self.model.graph.initializers[name]
            initializer.const_value = onnx_ir.tensor(value.detach().cpu().numpy(), name=name)
        self.model.metadata_props.update(self.metadata)
        write_file(self.model, path, gates)

    def __del__(self) -> None:
        """Let go of the weights: onnxscript's rules keep the graph that they saw last."""
        for value in self.model.graph.initializers.values():
            value.const_value = None


def finish(translated: Any, model: nn.Module, opset: int | None) -> None:
    """Take out of a graph what can be computed beforehand, gates excepted, and where it was made.

    Args:
        translated: the graph, as an exporter left it; it is changed where it lies.
        model: what it was made from.
        opset: to convert it to; the exporter's own where it is None.
    """
    _name_gates(translated, model)
    with _as_inputs(translated, named_gates(model)):
        _optimize(translated, opset)
        write_constant_shapes(translated)
    rewrite_pools(translated)
    _forget_origins(translated)
    translated.ir_version = min(translated.ir_version, newest_ir())


def _name_gates(translated: Any, model: nn.Module) -> None:
    """Call each gate by its first path, as named_gates does; a shared module has several."""
    initializers = translated.graph.initializers
    paths: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(path)
    for name, gate in named_gates(model).items():
        other = next((path for path in paths[id(gate)] if path in initializers), None)
        if name not in initializers and other is not None:
            value = initializers.pop(other)
            value.name = name
            initializers[name] = value


@contextmanager
def _as_inputs(model: Any, names: Iterable[str]) -> Iterator[None]:
    """Hide the values of some initializers from the passes of the optimizer.

    A gate that is folded away, or merged with another because both are 0, can never again be
    opened in the file: what is behind it could not be proven.
    """
    held = {name: model.graph.initializers.pop(name) for name in names}
    tensors = {name: value.const_value for name, value in held.items()}
    for value in held.values():
        value.const_value = None
        model.graph.inputs.append(value)
    try:
        yield
    finally:
        # By name: a conversion to another opset leaves other objects in their places.
        for value in [value for value in model.graph.inputs if value.name in tensors]:
            model.graph.inputs.remove(value)
            value.const_value = tensors[value.name]
            model.graph.initializers[value.name] = value


def _optimize(model: Any, opset: int | None) -> None:
    from onnxscript import optimizer, version_converter

    with logs_held_back():  # of what they leave as it is, and which converter they ask
        optimizer.optimize_ir(model)
        mend(model)
        if opset is not None and opset != model.opset_imports.get(""):
            version_converter.convert_version(model, opset, fallback=True)


def _forget_origins(model: Any) -> None:
    """Take out what exporters note of every node: call stacks, with the folders of this machine."""
    for graph in model.graphs():
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
    model.metadata_props.clear()
