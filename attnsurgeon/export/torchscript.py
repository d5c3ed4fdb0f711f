"""TorchScript, scripted where that works, else traced. The one file that knows torch.jit.

What is to be frozen is first rewritten so that attention costs less, where torch.export takes the
network, and traced from that.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnsurgeon.borrow import borrowed_modes
from attnsurgeon.errors import BadFile, ExportRefused
from attnsurgeon.export.axes import fixed_by_file
from attnsurgeon.export.decisions import decisions_notice
from attnsurgeon.export.format import (
    Draft,
    Format,
    Opened,
    Settings,
    refuse_compile,
    refuse_onnx_settings,
    register,
)
from attnsurgeon.export.fresh import FreshProcess
from attnsurgeon.export.in_place import reuse_maps
from attnsurgeon.export.inputs import Inputs, on_cpu
from attnsurgeon.export.precision import HALVES, refuse_precision
from attnsurgeon.export.program import rewritten_program
from attnsurgeon.export.scales import join_scales

NOTICE = (
    "TorchScript is deprecated as of torch 2.11: the file runs where torch.jit still is; "
    "prefer .onnx for new deployments"
)
_TRACED = "the network cannot be scripted; it was traced instead"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.jit from repeating what NOTICE says once, and the tracer from doubting shapes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\..*deprecated")
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        yield


def make_torchscript(model: nn.Module, inputs: Inputs) -> torch.jit.ScriptModule:
    """Return the network in eval mode as TorchScript, scripted where possible, else traced.

    Raises:
        ExportRefused: it can be neither scripted nor traced.
    """
    return _make(model, inputs)[0]


def _make(model: nn.Module, inputs: Inputs) -> tuple[torch.jit.ScriptModule, bool]:
    with _quiet(), torch.no_grad(), borrowed_modes(model):
        model.eval()
        try:
            return torch.jit.script(model), True
        except Exception:  # whatever the compiler cannot take is tried by tracing
            pass
        try:
            return torch.jit.trace(model, inputs, check_trace=False, strict=False), False
        except Exception as error:
            first = str(error).strip().splitlines()[0]
            raise ExportRefused(
                f"{type(model).__name__} can be neither scripted nor traced: {first}; "
                "export it to .onnx"
            ) from error


def freeze_torchscript(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """Return a copy with its weights as constants, optimised for inference where it lies."""
    with _quiet(), torch.no_grad():
        frozen: torch.jit.ScriptModule = torch.jit.freeze(module.eval())
        return torch.jit.optimize_for_inference(frozen)


class _ScriptDraft(Draft):
    def __init__(
        self,
        scripted: torch.jit.ScriptModule,
        metadata: Mapping[str, str],
        notices: tuple[str, ...] = (),
        *,
        frozen: bool,
    ) -> None:
        self.folds_gates = frozen
        self.scripted = scripted
        self.metadata = dict(metadata)
        self.notices = (NOTICE, *notices)

    def write(self, path: Path, gates: Mapping[str, Tensor]) -> None:
        # Saved and read again first: the draft shares its parameters with the user's model.
        with _quiet(), torch.no_grad():
            memory = io.BytesIO()
            torch.jit.save(self.scripted, memory)
            memory.seek(0)
            twin = torch.jit.load(memory)
            _set(twin, gates)
            if self.folds_gates:
                twin = torch.jit.freeze(twin.eval())
            written = io.BytesIO()
            torch.jit.save(twin, written, _extra_files=self.metadata)
        # Written by Python: on a full disk torch.jit.save would end the whole process.
        path.write_bytes(written.getbuffer())


@register(".pt")
class TorchScript(Format):
    """One file with code and weights, for libtorch and torch.jit.load."""

    name = "torchscript"
    needs = "torch"

    def check(self, settings: Settings) -> None:
        """Refuse settings of other formats.

        Raises:
            ExportRefused: an opset, an exporter, machine code or int8 was asked for.
        """
        refuse_onnx_settings(settings, ".pt")
        refuse_compile(settings, ".pt")
        refuse_precision(settings, ".pt", ("fp32", *HALVES))

    def draft(
        self, model: nn.Module, inputs: Inputs, settings: Settings, metadata: Mapping[str, str]
    ) -> Draft:
        """Script or trace the network.

        Raises:
            ExportRefused: neither works.
        """
        self.check(settings)
        if settings.optimize and (rewritten := _rewritten(model, inputs, settings.free)):
            return _ScriptDraft(rewritten, metadata, frozen=True)
        scripted, is_scripted = _make(model, inputs)
        notices: tuple[str, ...] = ()
        if not is_scripted:
            _check_trace(model, inputs, scripted, settings.free)
            notices = ("; ".join((_TRACED, *decisions_notice(model, inputs))),)
        return _ScriptDraft(scripted, metadata, notices, frozen=settings.optimize)

    def open(self, path: Path, gates: Mapping[str, Tensor] | None = None) -> Opened:
        """Load the file in a process of its own.

        Raises:
            BadFile: it is not TorchScript.
        """
        values = {name: value.cpu() for name, value in (gates or {}).items()}
        process = FreshProcess(path.name, "open_torchscript", str(path.absolute()), values)
        return Opened(
            lambda inputs: process(on_cpu(inputs)),
            holds=lambda values: _holds(path, values),
            precision=process.told or "fp32",
        )

    def has_gates(self, path: Path, gates: Collection[str]) -> bool:
        """Tell whether the file has parameters still: one that was frozen has none."""
        return any(True for _ in load_torchscript(path)[0].parameters())


def _rewritten(
    model: nn.Module, inputs: Inputs, free: Collection[str]
) -> torch.jit.ScriptModule | None:
    """Return the network with its attention rewritten, or none where that cannot be traced."""
    try:
        program = rewritten_program(model, inputs, free=free)
    except ExportRefused:  # it may still be scripted
        return None
    if _reads_sizes(program):
        return None  # a trace would hold the sizes that it was made with
    join_scales(program)
    reuse_maps(program)
    module = program.module(check_guards=False)
    plain = fx.GraphModule(module, module.graph)  # it checks no inputs, which cannot be traced
    with _quiet(), torch.no_grad():
        try:
            traced: torch.jit.ScriptModule = torch.jit.trace(
                plain, inputs, check_trace=False, strict=False
            )
        except RuntimeError:
            return None
    return traced


def _reads_sizes(program: torch.export.ExportedProgram) -> bool:
    return any(node.target is torch.ops.aten.sym_size.int for node in program.graph.nodes)


def _set(module: torch.jit.ScriptModule, gates: Mapping[str, Tensor]) -> None:
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in gates.items():
            parameters[name].copy_(value)


def _holds(path: Path, values: Mapping[str, Tensor]) -> set[str]:
    held = dict(load_torchscript(path)[0].named_parameters())
    return {name for name in values if name in held and torch.equal(held[name], values[name].cpu())}


def load_torchscript(
    path: Path, notes: Iterable[str] = ()
) -> tuple[torch.jit.ScriptModule, dict[str, str]]:
    """Load a file on the CPU in eval mode, and the metadata of these names ("" where it has none).

    Raises:
        BadFile: it is not TorchScript.
    """
    found: dict[str, Any] = dict.fromkeys(notes, "")
    load: Any = torch.jit.load
    try:
        with _quiet():
            module = load(path, map_location="cpu", _extra_files=found).eval()
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise BadFile(f"{str(path)!r} is no TorchScript file: {first}") from error
    texts = {name: v.decode() if isinstance(v, bytes) else v for name, v in found.items()}
    return module, texts


def _check_trace(
    model: nn.Module, inputs: Inputs, traced: torch.jit.ScriptModule, free: Collection[str]
) -> None:
    """Refuse a trace that does not run where an axis changes of which the network takes any size.

    Raises:
        ExportRefused: it is fixed to what it was made with.
    """

    def runs(others: Inputs) -> bool:
        try:
            with _quiet(), torch.no_grad(), borrowed_modes(model):
                model.eval()
                traced(*others)
        except RuntimeError:
            return False
        return True

    axis = fixed_by_file(runs, model, inputs, free)
    if axis is not None:
        raise ExportRefused(
            f"the trace of {type(model).__name__} takes the {axis} that it was made with only; "
            "give --static"
        )
