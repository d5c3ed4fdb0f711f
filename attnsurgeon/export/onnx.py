"""ONNX by torch's dynamo exporter, with a batch, a height and a width that stay free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnsurgeon.borrow import borrowed_modes
from attnsurgeon.errors import BadFile, BadOption, ExportRefused, MissingPackage
from attnsurgeon.export.format import Draft, Format, RunFailed, Runner, Settings, register
from attnsurgeon.gate import named_gates

OLDEST_OPSET = 18
"""The dynamo exporter writes 18 and up."""

MOST_BYTES = 2**31
"""An ONNX file is one protobuf message, which cannot be larger."""

AXES = ("batch", None, "height", "width")
"""Names of the free axes of an image batch."""

_WRONG_ONNXSCRIPT = {f"0.5.{patch}" for patch in range(7)}


def check_onnxscript() -> None:
    """Refuse versions that write wrong files.

    Raises:
        MissingPackage: onnxscript 0.5.0 to 0.5.6, whose BatchNorm fusion gave wrong biases.
    """
    found = version("onnxscript")
    if found in _WRONG_ONNXSCRIPT:
        raise MissingPackage(
            f"onnxscript {found} exports convolutions with wrong biases (0.5.0 to 0.5.6 do); "
            "type: pip install -U onnxscript"
        )


def check_opset(opset: int | None) -> None:
    """Refuse an opset that cannot be written.

    Raises:
        BadOption: below 18, or above the newest that the installed onnx knows.
    """
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise BadOption(f"--opset must be {OLDEST_OPSET} to {newest}, not {opset}")


def write_onnx(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    path: Path,
    *,
    opset: int | None = None,
    dynamic: bool = True,
) -> None:
    """Write a network as it stands to an ONNX file, unchecked; export_model proves what it writes.

    Raises:
        ExportRefused, BadOption, MissingPackage: see Onnx.draft.
    """
    draft = Onnx().draft(model, inputs, Settings(opset=opset, dynamic=dynamic))
    draft.write(path, {name: gate.detach() for name, gate in named_gates(model).items()})


def _check_bytes(model: nn.Module) -> None:
    """Refuse weights that do not fit into one ONNX file.

    Raises:
        ExportRefused: 2 GiB or more, the limit of the format's encoding.
    """
    held = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if held >= MOST_BYTES:
        raise ExportRefused(
            f"{type(model).__name__} holds {held / 2**30:.1f} GiB and one ONNX file less than 2; "
            "export it to .pt"
        )


class _OnnxDraft(Draft):
    def __init__(self, program: Any, opset: int | None, metadata: Mapping[str, str]) -> None:
        self.program = program
        self.opset = opset
        self.metadata = dict(metadata)

    def write(self, path: Path, gates: Mapping[str, Tensor]) -> None:
        import onnx_ir
        from onnxscript import optimizer, version_converter

        # Gates are set before constants are folded, so that both the closed and the opened file
        # come out of the same passes: a gate set afterwards would miss what was folded.
        model = self.program.model.clone()
        for name, value in gates.items():
            initializer = model.graph.initializers[name]
            initializer.const_value = onnx_ir.tensor(value.detach().cpu().numpy(), name=name)
        optimizer.optimize_ir(model)
        if self.opset is not None and self.opset != model.opset_imports.get(""):
            version_converter.convert_version(model, self.opset, fallback=True)
        model.metadata_props.update(self.metadata)
        onnx_ir.save(model, path)


@register(".onnx")
class Onnx(Format):
    """One file for ONNX Runtime and every other runtime that reads the standard."""

    name = "onnx"

    def draft(self, model: nn.Module, inputs: tuple[Tensor, ...], settings: Settings) -> Draft:
        """Translate the network by torch.export and torch.onnx.

        Raises:
            BadOption: an opset that does not exist.
            MissingPackage: a version of onnxscript known to be wrong.
            ExportRefused: torch.export cannot take the network, or not with free axes.
        """
        check_onnxscript()
        check_opset(settings.opset)
        _check_bytes(model)
        exported = _export(model, inputs, settings.dynamic)
        names = ["input"] if len(inputs) == 1 else [f"input_{i}" for i in range(len(inputs))]
        try:
            program = torch.onnx.export(
                exported, dynamo=True, optimize=False, verbose=False, input_names=names
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportRefused(
                f"{type(model).__name__} cannot be written as ONNX: {_first_line(error)}"
            ) from error
        assert program is not None  # it is only when a file name is given
        if settings.dynamic:
            _name_axes(program.model)
        return _OnnxDraft(program, settings.opset, settings.metadata or {})

    def open(self, path: Path) -> Runner:
        """Check the file and load it in ONNX Runtime on the CPU.

        Raises:
            BadFile: it is no valid ONNX file, or the installed runtime cannot read it.
        """
        import onnx
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        try:
            onnx.checker.check_model(str(path))
            session = onnxruntime.InferenceSession(
                str(path), _session_options(), providers=["CPUExecutionProvider"]
            )
        except (onnx.checker.ValidationError, state.Fail, state.InvalidGraph) as error:
            raise BadFile(f"{path.name} is no ONNX file that can be run: {error}") from error
        except (state.NotImplemented, state.InvalidArgument, state.InvalidProtobuf) as error:
            raise BadFile(f"onnxruntime cannot read {path.name}: {_first_line(error)}") from error
        names = [node.name for node in session.get_inputs()]

        def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
            feed = {
                name: part.detach().cpu().numpy() for name, part in zip(names, inputs, strict=True)
            }
            try:
                return [torch.from_numpy(array) for array in session.run(None, feed)]
            except (state.Fail, state.InvalidArgument, state.RuntimeException) as error:
                raise RunFailed(_first_line(error)) from error

        return run

    def opset(self, path: Path) -> int | None:
        """Return the version of the default operator set."""
        import onnx

        model = onnx.load(str(path), load_external_data=False)
        return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None)

    def fixed_axes(self, path: Path) -> list[str]:
        """Return the image axes of the inputs that the file fixes to a number."""
        import onnx

        model = onnx.load(str(path), load_external_data=False)
        return [
            f"{node.name}.{axis}"
            for node in model.graph.input
            for axis, dim in zip(AXES, node.type.tensor_type.shape.dim, strict=False)
            if axis is not None and dim.HasField("dim_value")
        ]


def _session_options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings of its optimizer are no business of the user's
    return options


def _export(
    model: nn.Module, inputs: tuple[Tensor, ...], dynamic: bool
) -> torch.export.ExportedProgram:
    free = torch.export.Dim.DYNAMIC  # unlike AUTO, it refuses to come out fixed
    shapes = tuple(
        {i: free for i, axis in enumerate(AXES[: part.ndim]) if axis is not None} for part in inputs
    )
    with torch.no_grad(), borrowed_modes(model):
        model.eval()
        try:
            return torch.export.export(
                model, inputs, dynamic_shapes=_like_signature(model, shapes) if dynamic else None
            )
        except Exception as error:  # the exporter raises errors of a dozen unrelated classes
            remedy = "; give --static to fix batch, height and width" if dynamic else ""
            raise ExportRefused(
                f"torch.export cannot take {type(model).__name__}: {_first_line(error)}{remedy}"
            ) from error


def _like_signature(model: nn.Module, shapes: Sequence[Any]) -> tuple[Any, ...]:
    """Return one entry per input; a host with *args in front wants them in a tuple of its own."""
    import inspect

    parameters = list(inspect.signature(model.forward).parameters.values())
    variadic = bool(parameters) and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL
    return (tuple(shapes),) if variadic else tuple(shapes)


def _name_axes(model: Any) -> None:
    """Call the free axes batch, height and width wherever their symbols stand."""
    import onnx_ir

    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, dim in zip(AXES, value.shape, strict=False):
            if axis is not None and isinstance(dim, onnx_ir.SymbolicDim) and dim.value:
                names.setdefault(dim.value, axis)
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in names) or r"(?!)")
    values = [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]
    for value in values:
        for i, dim in enumerate(value.shape or ()):
            if isinstance(dim, onnx_ir.SymbolicDim) and dim.value:
                value.shape[i] = pattern.sub(lambda found: names[found.group()], dim.value)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return told or type(error).__name__
