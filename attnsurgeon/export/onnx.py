"""ONNX by torch's dynamo exporter, with a batch, a height and a width that stay free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnsurgeon.borrow import borrowed_modes
from attnsurgeon.errors import (
    BadFile,
    BadOption,
    ExportRefused,
    MissingPackage,
    first_line,
)
from attnsurgeon.export.fold import fold_norms
from attnsurgeon.export.format import Draft, Format, Opened, RunFailed, Runner, Settings, register
from attnsurgeon.export.onnx_file import read_file, write_file
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
    def __init__(self, model: Any, metadata: Mapping[str, str]) -> None:
        self.model = model
        self.metadata = dict(metadata)

    def write(self, path: Path, gates: Mapping[str, Tensor]) -> None:
        import onnx_ir

        for name, value in gates.items():
            initializer = self.model.graph.initializers[name]
            initializer.const_value = onnx_ir.tensor(value.detach().cpu().numpy(), name=name)
        self.model.metadata_props.update(self.metadata)
        write_file(self.model, path)


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


@register(".onnx")
class Onnx(Format):
    """One file for ONNX Runtime and every other runtime that reads the standard."""

    name = "onnx"

    def check(self, settings: Settings) -> None:
        """Refuse versions and opsets that cannot be written.

        Raises:
            BadOption: an opset that does not exist.
            MissingPackage: a version of onnxscript known to be wrong.
        """
        check_onnxscript()
        check_opset(settings.opset)

    def draft(self, model: nn.Module, inputs: tuple[Tensor, ...], settings: Settings) -> Draft:
        """Translate the network by torch.export and torch.onnx.

        Raises:
            ExportRefused: torch.export cannot take the network, or not with free axes.
        """
        self.check(settings)
        _check_bytes(model)
        exported = _export(model, inputs, settings.dynamic)
        fold_norms(exported)
        names = ["input"] if len(inputs) == 1 else [f"input_{i}" for i in range(len(inputs))]
        try:
            program = torch.onnx.export(
                exported, dynamo=True, optimize=False, verbose=False, input_names=names
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportRefused(
                f"{type(model).__name__} cannot be written as ONNX: {_reason(error)}"
            ) from error
        assert program is not None  # it is only when a file name is given
        if settings.dynamic:
            _name_axes(program.model)
        with _as_inputs(program.model, named_gates(model)):
            _optimize(program.model, settings.opset)
        return _OnnxDraft(program.model, settings.metadata or {})

    def open(self, path: Path, gates: Mapping[str, Tensor] | None = None) -> Opened:
        """Check the file and load it in ONNX Runtime on the CPU.

        Raises:
            BadFile: it is no valid ONNX file, or the installed runtime cannot read it.
        """
        import onnx

        file = read_file(path)
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise BadFile(f"{path.name} is no ONNX file that can be run: {error}") from error
        source = str(path) if gates is None else file.with_values(gates)
        return Opened(
            run=_runner(source, path.name), opset=file.opset, fixed_axes=tuple(file.fixed_axes)
        )


def _optimize(model: Any, opset: int | None) -> None:
    from onnxscript import optimizer, version_converter

    optimizer.optimize_ir(model)
    if opset is not None and opset != model.opset_imports.get(""):
        version_converter.convert_version(model, opset, fallback=True)


def _runner(source: str | bytes, name: str) -> Runner:
    """Load a model, from a path or as bytes, in ONNX Runtime on the CPU.

    Raises:
        BadFile: the installed runtime cannot read it.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    try:
        session = onnxruntime.InferenceSession(
            source, _session_options(), providers=["CPUExecutionProvider"]
        )
    except (state.Fail, state.InvalidGraph) as error:
        raise BadFile(f"{name} is no ONNX file that can be run: {error}") from error
    except (state.NotImplemented, state.InvalidArgument, state.InvalidProtobuf) as error:
        raise BadFile(f"onnxruntime cannot read {name}: {_reason(error)}") from error
    names = [node.name for node in session.get_inputs()]

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        feed = {name: part.detach().cpu().numpy() for name, part in zip(names, inputs, strict=True)}
        try:
            return [torch.from_numpy(array) for array in session.run(None, feed)]
        except (state.Fail, state.InvalidArgument, state.RuntimeException) as error:
            raise RunFailed(_reason(error)) from error

    return run


def _session_options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings of its optimizer are no business of the user's
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # between the runs
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
                f"torch.export cannot take {type(model).__name__}: {_reason(error)}{remedy}"
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


def _reason(error: Exception) -> str:
    """Return the first line that says why: torch.export puts a heading with a colon before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines and lines[0].endswith(":") else first_line(error)
