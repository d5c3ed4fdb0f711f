"""A torch.export program: what torch.export.load reads, and compilers after it.

One of them, AOTInductor, can make its package of machine code at once.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attnsurgeon.errors import BadFile
from attnsurgeon.export import compiled
from attnsurgeon.export.format import (
    Draft,
    Format,
    Opened,
    Settings,
    refuse_onnx_settings,
    refuse_optimize,
    register,
)
from attnsurgeon.export.fresh import FreshProcess
from attnsurgeon.export.inputs import Inputs, free_axes, on_cpu
from attnsurgeon.export.precision import HALVES, refuse_precision
from attnsurgeon.export.program import rewritten_program
from attnsurgeon.export.scales import join_scales

if TYPE_CHECKING:
    from torch.export import ExportedProgram  # 0.1 s that only an export need wait for


class _ProgramDraft(Draft):
    def __init__(self, program: ExportedProgram, metadata: Mapping[str, str]) -> None:
        self.program = program
        self.metadata = dict(metadata)
        for node in program.graph.nodes:  # folders of this machine are nobody's business
            node.meta.pop("stack_trace", None)

    def write(self, path: Path, gates: Mapping[str, Tensor]) -> None:
        self.set(gates)
        memory = io.BytesIO()  # by name, only one that ends in .pt2 is taken
        torch.export.save(self.program, memory, extra_files=self.metadata)
        path.write_bytes(memory.getbuffer())

    def set(self, gates: Mapping[str, Tensor]) -> None:
        """Give the program these gates."""
        state = self.program.state_dict
        for name, value in gates.items():
            old, new = state[name], nn.Parameter(value)  # the model keeps its own
            # A module in two places has two names here, and the graph may read either.
            state.update({other: new for other, held in state.items() if held is old})


class _CompiledDraft(_ProgramDraft):
    notices = (compiled.NOTICE,)

    def write(self, path: Path, gates: Mapping[str, Tensor]) -> None:
        self.set(gates)
        compiled.compile_program(self.program, path, gates, self.metadata)


@register(".pt2")
class TorchProgram(Format):
    """One file with the graph and the weights, for torch.export.load."""

    name = "torch.export"
    needs = "torch"

    def name_of(self, path: Path) -> str:
        """Return what a file is in particular: a program, or machine code."""
        return compiled.NAME if compiled.is_compiled(path) else self.name

    def check(self, settings: Settings) -> None:
        """Refuse settings of other formats.

        Raises:
            ExportRefused: an opset, an exporter, freezing or int8 was asked for.
            MissingPackage: machine code was, and there is no C++ compiler.
        """
        refuse_onnx_settings(settings, ".pt2")
        refuse_optimize(settings, ".pt2")
        refuse_precision(settings, ".pt2", ("fp32", *HALVES))
        if settings.compile:
            compiled.check_compiler()

    def draft(
        self, model: nn.Module, inputs: Inputs, settings: Settings, metadata: Mapping[str, str]
    ) -> Draft:
        """Translate the network.

        Raises:
            ExportRefused: torch.export cannot take it, or not with free axes; or it is to be
                machine code and is not on the CPU.
        """
        self.check(settings)
        if settings.compile:
            compiled.check_device(model)
        program = rewritten_program(model, inputs, free=settings.free)
        join_scales(program)
        return (_CompiledDraft if settings.compile else _ProgramDraft)(program, metadata)

    def open(self, path: Path, gates: Mapping[str, Tensor] | None = None) -> Opened:
        """Load the file in a process of its own.

        Raises:
            BadFile: it is no program of torch.export.
        """
        values = {name: value.cpu() for name, value in (gates or {}).items()}
        if compiled.is_compiled(path):
            return _open_package(path, values)
        try:
            process = FreshProcess(path.name, "open_program", str(path.absolute()), values)
        except BadFile as error:
            raise BadFile(f"{path.name} is no program of torch.export: {error}") from error
        shapes, precision = process.told
        return Opened(
            lambda inputs: process(on_cpu(inputs)),
            fixed_axes=_fixed_axes(shapes),
            precision=precision or "fp32",
        )


def _open_package(path: Path, values: Mapping[str, Tensor]) -> Opened:
    process = FreshProcess(path.name, "open_package", str(path.absolute()), values)
    notes = process.told
    held = compiled.axes_of(notes)
    return Opened(
        lambda inputs: process(on_cpu(inputs)),
        fixed_axes=_fixed_axes({name: axes for name, (axes, _) in held.items()}),
        precision=notes.get("precision", "fp32"),
    )


def _fixed_axes(shapes: Mapping[str, list[int | None]]) -> tuple[str, ...]:
    """Return the image axes of the inputs that the program fixes to a number."""
    return tuple(
        f"{name}.{axis}"
        for name, shape in shapes.items()
        for i, axis in free_axes(len(shape)).items()
        if shape[i] is not None
    )
