"""A torch.export program: what torch.export.load reads, and compilers after it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnsurgeon.errors import BadFile, first_line
from attnsurgeon.export.format import (
    Draft,
    Format,
    Opened,
    RunFailed,
    Runner,
    Settings,
    leaves_on_cpu,
    refuse_onnx_settings,
    refuse_optimize,
    register,
)
from attnsurgeon.export.inputs import Inputs, free_axes, on_cpu
from attnsurgeon.export.onnx_dynamo import export_program
from attnsurgeon.export.precision import HALVES, refuse_precision

if TYPE_CHECKING:
    from torch.export import ExportedProgram  # 0.1 s that only an export need wait for


class _ProgramDraft(Draft):
    def __init__(self, program: ExportedProgram, metadata: Mapping[str, str]) -> None:
        self.program = program
        self.metadata = dict(metadata)
        for node in program.graph.nodes:  # folders of this machine are nobody's business
            node.meta.pop("stack_trace", None)

    def write(self, path: Path, gates: Mapping[str, Tensor]) -> None:
        state = self.program.state_dict
        for name, value in gates.items():
            old, new = state[name], nn.Parameter(value)  # the model keeps its own
            # A module in two places has two names here, and the graph may read either.
            state.update({other: new for other, held in state.items() if held is old})
        memory = io.BytesIO()  # by name, only one that ends in .pt2 is taken
        torch.export.save(self.program, memory, extra_files=self.metadata)
        path.write_bytes(memory.getbuffer())


@register(".pt2")
class TorchProgram(Format):
    """One file with the graph and the weights, for torch.export.load."""

    name = "torch.export"

    def check(self, settings: Settings) -> None:
        """Refuse settings of other formats.

        Raises:
            ExportRefused: an opset, an exporter, freezing or int8 was asked for.
        """
        refuse_onnx_settings(settings, ".pt2")
        refuse_optimize(settings, ".pt2")
        refuse_precision(settings, ".pt2", ("fp32", *HALVES))

    def draft(
        self, model: nn.Module, inputs: Inputs, settings: Settings, metadata: Mapping[str, str]
    ) -> Draft:
        """Translate the network.

        Raises:
            ExportRefused: torch.export cannot take it, or not with free axes.
        """
        self.check(settings)
        return _ProgramDraft(export_program(model, inputs, dynamic=settings.dynamic), metadata)

    def open(self, path: Path, gates: Mapping[str, Tensor] | None = None) -> Opened:
        """Load the file.

        Raises:
            BadFile: it is no program of torch.export.
        """
        notes = {"precision": ""}
        try:
            with path.open("rb") as stream:
                program = torch.export.load(io.BytesIO(stream.read()), extra_files=notes)
        except Exception as error:  # a zip file, JSON and a graph are read: anything may be wrong
            raise BadFile(
                f"{path.name} is no program of torch.export: {first_line(error)}"
            ) from error
        module = program.module()
        parameters = dict(module.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, value in (gates or {}).items():
                parameters[name].copy_(value)
        precision = notes["precision"] or "fp32"
        return Opened(_runner(module), fixed_axes=_fixed_axes(program), precision=precision)


def _runner(module: Any) -> Runner:
    def run(inputs: Inputs) -> list[Tensor]:
        with torch.no_grad():
            try:
                return leaves_on_cpu(module(*on_cpu(inputs)))
            except Exception as error:  # its guards raise what they like
                raise RunFailed(first_line(error)) from error

    return run


def _fixed_axes(program: ExportedProgram) -> tuple[str, ...]:
    """Return the image axes of the inputs that the program fixes to a number."""
    held = {
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind.name == "USER_INPUT"
    }
    return tuple(
        f"{node.name}.{axis}"
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in held and "val" in node.meta
        for i, axis in free_axes(node.meta["val"].ndim).items()
        if isinstance(node.meta["val"].shape[i], int)
    )
