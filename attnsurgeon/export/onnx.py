"""ONNX: one file for ONNX Runtime and every other runtime that reads the standard."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnsurgeon.errors import BadFile, BadOption, ExportRefused, MissingPackage, UnknownName
from attnsurgeon.export import onnx_dynamo, onnx_traced
from attnsurgeon.export.decisions import decisions_notice
from attnsurgeon.export.format import (
    Draft,
    Format,
    Opened,
    Settings,
    refuse_compile,
    refuse_optimize,
    register,
)
from attnsurgeon.export.fresh import FreshProcess
from attnsurgeon.export.inputs import Inputs, tensors_of
from attnsurgeon.export.last_norms import last_norms_written_out
from attnsurgeon.export.onnx_data import DATA, check_data, refer_to
from attnsurgeon.export.onnx_draft import OnnxDraft, finish
from attnsurgeon.export.onnx_file import read_file
from attnsurgeon.export.onnx_runtime import newest_opset
from attnsurgeon.export.onnx_unrounded import NOTE, write_unrounded
from attnsurgeon.export.precision import refuse_precision
from attnsurgeon.gate import named_gates

EXPORTERS = ("auto", "dynamo", "torchscript")

_WRONG_ONNXSCRIPT = {f"0.5.{patch}" for patch in range(7)}
_TOO_OLD = "opset {} was written by the TorchScript-based exporter: the newer one has none so old"
_FELL_BACK = "{}; the TorchScript-based exporter was used instead"


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


def check_opset(opset: int | None, exporter: str = "auto") -> None:
    """Refuse an opset that cannot be written, or not by this exporter, or not be read.

    Raises:
        BadOption: below 17, 17 by the dynamo exporter, or above the newest that the installed
            onnx and onnxruntime know.
    """
    if opset is None:
        return
    oldest, newest = onnx_traced.OLDEST_OPSET, newest_opset()
    if not oldest <= opset <= newest:
        raise BadOption(f"--opset must be {oldest} to {newest}, not {opset}")
    if exporter == "dynamo" and opset < onnx_dynamo.OLDEST_OPSET:
        raise BadOption(
            f"the dynamo exporter writes opset {onnx_dynamo.OLDEST_OPSET} and newer, not {opset}; "
            "give --exporter torchscript"
        )


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
    settings = Settings(opset=opset, dynamic=dynamic, exporter="dynamo")
    draft = Onnx().draft(model, inputs, settings, {})
    draft.write(path, {name: gate.detach() for name, gate in named_gates(model).items()})


def _check_numbers(model: nn.Module) -> None:
    """Refuse weights that ONNX Runtime cannot compute with on the CPU, where files are checked.

    Raises:
        ExportRefused: bfloat16, or convolutions in float64.
    """
    for tensor in model.state_dict().values():
        if tensor.dtype == torch.bfloat16 or (tensor.dtype == torch.float64 and tensor.ndim > 2):
            name = str(tensor.dtype).removeprefix("torch.")
            raise ExportRefused(
                f"{type(model).__name__} is in {name}, which ONNX Runtime does not compute with on "
                "the CPU; export model.float(), or to .pt"
            )


@register(".onnx")
class Onnx(Format):
    """By torch's dynamo exporter, or by the older one where that refuses the network."""

    name = "onnx"

    def check(self, settings: Settings) -> None:
        """Refuse versions, opsets and exporters that do not exist.

        Raises:
            UnknownName: no exporter is called so.
            ExportRefused: freezing or machine code was asked for, or bf16.
            BadOption: an opset that cannot be written or read.
            MissingPackage: a version of onnxscript known to be wrong.
        """
        if settings.exporter not in EXPORTERS:
            raise UnknownName("exporter", settings.exporter, EXPORTERS)
        refuse_optimize(settings, ".onnx")
        refuse_compile(settings, ".onnx")
        refuse_precision(settings, ".onnx", ("fp32", "fp16", "int8"))
        check_onnxscript()
        check_opset(settings.opset, settings.exporter)

    def draft(
        self, model: nn.Module, inputs: Inputs, settings: Settings, metadata: Mapping[str, str]
    ) -> Draft:
        """Translate the network and take out what can be computed beforehand, gates excepted.

        Raises:
            ExportRefused: the exporter cannot take the network, or not with free axes.
        """
        self.check(settings)
        _check_numbers(model)
        with last_norms_written_out(model):
            translated, notices = _translate(model, inputs, settings)
        finish(translated, model, settings.opset)
        return OnnxDraft(translated, metadata, notices)

    def open(self, path: Path, gates: Mapping[str, Tensor] | None = None) -> Opened:
        """Check the file and load it in ONNX Runtime, on the CPU and in a process of its own.

        Where gates are given, if none in number, the maps of an int8 file are left unrounded.

        Raises:
            BadFile: it is no valid ONNX file, or the installed runtime cannot read it.
        """
        if gates is None or NOTE not in read_file(path).notes:
            return self._open(path, gates or {})
        with tempfile.TemporaryDirectory(prefix="attnsurgeon-") as folder:
            twin = Path(folder) / path.name
            write_unrounded(path, twin)
            return self._open(twin, gates)

    def _open(self, path: Path, gates: Mapping[str, Tensor]) -> Opened:
        import onnx

        file = read_file(path)
        check_data(path, file.beside.values())
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise BadFile(f"{path.name} is no ONNX file that can be run: {error}") from error
        process = FreshProcess(path.name, "open_onnx", str(path.absolute()), file.patches(gates))

        def run(inputs: Inputs) -> list[Tensor]:
            arrays = process([part.detach().cpu().numpy() for part in tensors_of(inputs)])
            return [torch.from_numpy(array) for array in arrays]

        return Opened(
            run,
            opset=file.opset,
            fixed_axes=tuple(file.fixed_axes),
            holds=file.holds,
            precision=file.notes.get("precision", "fp32"),
        )

    def has_gates(self, path: Path, gates: Collection[str]) -> bool:
        """Tell whether the file holds these gates by name, and they can be set."""
        file = read_file(path)
        is_in_reach = file.notes.get("precision") != "int8" or NOTE in file.notes
        return is_in_reach and set(gates) <= file.spots.keys()

    def refer(self, path: Path, suffix: str) -> None:
        """Have a file whose weights lie in a second one find it under another name."""
        second = path.with_name(path.name + DATA)
        if second.exists():
            refer_to(path, second.name + suffix)


def _translate(model: nn.Module, inputs: Inputs, settings: Settings) -> tuple[Any, tuple[str, ...]]:
    """Return the network by the exporter asked for, and what to tell about a choice.

    Raises:
        ExportRefused: by the exporter asked for, or by both.
    """
    opset, free = settings.opset, settings.free
    too_old = opset is not None and opset < onnx_dynamo.OLDEST_OPSET
    if settings.exporter == "torchscript" or too_old:
        made = onnx_traced.translate(model, inputs, free=free, opset=opset)
        chosen = settings.exporter == "torchscript"
        told = () if chosen else (_TOO_OLD.format(opset),)
        return made, (*told, *decisions_notice(model, inputs))
    try:
        return onnx_dynamo.translate(model, inputs, free=free), ()
    except ExportRefused as refused:
        if settings.exporter == "dynamo":
            raise
        try:
            made = onnx_traced.translate(model, inputs, free=free, opset=opset)
        except ExportRefused as too:
            raise ExportRefused(f"{refused}; {too}") from refused
        return made, ("; ".join((_FELL_BACK.format(refused), *decisions_notice(model, inputs))),)
