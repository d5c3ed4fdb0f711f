"""Write a network for deployment, and prove from disk that the file computes the same.

A new format is one new file in this folder.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from attnsurgeon.arguments import typed
from attnsurgeon.card import HostCard, card_of
from attnsurgeon.errors import ExportDiffers
from attnsurgeon.export.against import Agreement, verify_export
from attnsurgeon.export.axes import fixed_by_network
from attnsurgeon.export.axes import told as told_fixed
from attnsurgeon.export.format import Settings, format_for, formats
from attnsurgeon.export.fresh import ready_process
from attnsurgeon.export.images import Photographs, image_of
from attnsurgeon.export.inputs import AXES, Inputs, example_inputs, resized, size_of, trials
from attnsurgeon.export.onnx_int8 import Int8Draft
from attnsurgeon.export.precision import HALVES, Precision, lowered, precision_of
from attnsurgeon.export.proof import Check, gate_values
from attnsurgeon.export.prove import prove
from attnsurgeon.export.strip import strip_decided
from attnsurgeon.gate import gate_numbers, named_gates
from attnsurgeon.outputs import atomic_output
from attnsurgeon.store import make_recipe
from attnsurgeon.surgery import cuts_of

__all__ = ["Agreement", "Artifact", "Check", "export_model", "export_suffixes", "verify_export"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

_REJECTED = ".rejected"
LARGE_BYTES = 2**28
"""Of a file: from here on it pays to look for what exporters leave in circles, for 0.3 s."""


@dataclass(frozen=True)
class Artifact:
    """A file that was written and proven.

    Attributes:
        output: its path.
        format: onnx, torchscript, torch.export, aotinductor or python.
        bytes: its size, with that of a second file where the weights need one.
        opset: of an ONNX file.
        fixed: which of batch, height and width are not free.
        checks: every comparison with the model, from disk.
        notices: what the user should know once.
        precision: that was asked for, or None: the model's own.
    """

    output: str
    format: str
    bytes: int
    opset: int | None
    fixed: tuple[str, ...]
    checks: tuple[Check, ...]
    notices: tuple[str, ...] = ()
    precision: Precision | None = None

    @property
    def dynamic(self) -> bool:
        """Tell whether batch, height and width are free."""
        return not self.fixed

    def to_json(self) -> dict[str, Any]:
        """Return plain values; a precision that was asked for, and what it allows, as well."""
        asked = {}
        if self.precision is not None:
            asked = {"precision": self.precision.name, "tolerance": self.precision.to_json()}
        return {
            "output": self.output,
            "format": self.format,
            "bytes": self.bytes,
            "opset": self.opset,
            "dynamic": self.dynamic,
            **asked,
            "checks": [check.to_json() for check in self.checks],
        }


def export_suffixes() -> list[str]:
    """Return the suffixes that can be exported to."""
    return formats.names()


@typed
def export_model(
    model: nn.Module,
    output: str | os.PathLike[str],
    *,
    opset: int | None = None,
    input_size: tuple[int, int] | None = None,
    static: bool = False,
    exporter: str = "auto",
    optimize: bool = False,
    compile: bool = False,
    precision: str | None = None,
    images: str | os.PathLike[str] | None = None,
    strip: bool = False,
    example: Any = None,
    force: bool = False,
    keep_rejected: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Artifact:
    """Write a network to a file for deployment, re-open it and compare it with the model.

    The suffix chooses the format: .onnx, .pt (TorchScript), .pt2 (torch.export), .py (plain code).

    The comparison runs with the gates as they are and with every gate open at a value of its own
    (in the file itself, or where a format folds them, in a twin made by the same passes); at batch
    1, 2 and 5 and at another size.

    Args:
        model: any network; it is left untouched.
        output: the file; its suffix chooses the format.
        opset: of an ONNX file; the exporter's own choice by default.
        input_size: height and width; those of the host by default.
        static: fix batch (1), height and width, for networks that cannot do otherwise.
        exporter: of an ONNX file: dynamo, torchscript, or auto, which takes the second where
            torch.export refuses the network.
        optimize: freeze a TorchScript file: its weights become constants, its norms are folded.
        compile: a .pt2 file to machine code, by AOTInductor; needs a C++ compiler.
        precision: fp32, fp16 or bf16, which the file's inputs and outputs are then in as well, or
            int8 (an .onnx file that takes float32). Each is compared with the model in fp32, by
            the tolerances of PRECISIONS; by default the file is in the model's own.
        images: a folder of images that int8 is calibrated on.
        strip: leave out attention whose gates are all 0, and gates that are all 1 (they can then
            not be set in the file).
        example: an image batch that gives channels, dtype and size instead; or a tuple of
            inputs, or a list of images for a network that takes lists.
        force: replace an existing file.
        keep_rejected: keep a file that differs as `output`.rejected.
        progress: is told what is being done.

    Raises:
        UnknownName: no format has that suffix, or no precision that name.
        HostUnusable: the network does not run at that size.
        ExportRefused, BadOption, MissingPackage: see the format; or the network does not run in
            the precision, or takes no images to be calibrated on.
        BadFile: an image cannot be read.
        OutputRefused: the file cannot be written.
        IdentityBroken: see strip_decided.
        ExportDiffers: the file does not compute what the model computes; it is removed.
    """
    kind = format_for(output)
    settings = Settings(
        opset=opset,
        dynamic=not static,
        exporter=exporter,
        optimize=optimize,
        compile=compile,
        precision=precision,
        images=None if images is None else Path(images),
        strip=strip,
    )
    kind.check(settings)
    chosen = precision_of(model, precision)
    inputs = example_inputs(model, example, input_size)
    photographs = _photographs(settings, model, inputs)
    batches = trials(model, inputs, AXES if static else ())
    fixed = {} if static else fixed_by_network(model, batches)
    settings = replace(settings, fixed=frozenset(fixed))
    told: tuple[str, ...] = (told_fixed(model, fixed, inputs),) if fixed else ()
    if strip:
        model, stripped = strip_decided(model, inputs)
        told = (*told, stripped)
    metadata = {**_metadata(model, inputs), "precision": chosen.name}
    meanwhile = ready_process(kind.needs) if kind.needs else nullcontext()
    with meanwhile, atomic_output(output, force=force) as part:
        progress(f"translating to {kind.name}")
        pair = resized(inputs, 2 if "batch" in settings.free else 1, size_of(inputs))
        cast = lowered(model, chosen, pair) if chosen.name in HALVES and precision else None
        draft = kind.draft(cast or model, chosen.cast(pair), settings, metadata)
        gates = chosen.cast_gates(gate_values(model))
        notices = (*told, *draft.notices)
        try:
            if photographs is not None:
                progress("checking it before it is quantized")
                draft.write(part, gates)
                prove(kind.name, kind.open, None, part, model, batches, settings, lambda _: None)
                for file in list(part.parent.iterdir()):  # int8 may need one only
                    file.unlink()
                draft = Int8Draft(draft, photographs.images)
                batches = photographs.in_place_of(batches)
                notices = (*notices, photographs.notice)
                progress(f"quantizing it on {len(photographs.images)} images")
            draft.write(part, gates)
            size = sum(file.stat().st_size for file in part.parent.iterdir())
            name = kind.name_of(part)
            read = draft.reader or kind.open
            twin = draft if draft.folds_gates else None
            del draft  # its weights need not stand in memory beside those that are read
            if size > LARGE_BYTES:
                gc.collect()
            proof = prove(name, read, twin, part, model, batches, settings, progress, chosen, cast)
        except ExportDiffers as error:
            if not keep_rejected:
                raise
            kind.refer(part, _REJECTED)
            raise _kept(error, part, output) from error
    return Artifact(
        output=str(output),
        format=name,
        bytes=size,
        opset=proof.opset,
        fixed=tuple(axis for axis in AXES if axis not in settings.free),
        checks=proof.checks,
        notices=(*notices, *proof.notices),
        precision=chosen if precision else None,
    )


def _kept(error: ExportDiffers, part: Path, output: str | os.PathLike[str]) -> ExportDiffers:
    """Keep what differs under other names, and return the error that says so."""
    rejected = f"{os.fspath(output)}{_REJECTED}"
    for file in list(part.parent.iterdir()):
        file.replace(Path(output).with_name(f"{file.name}{_REJECTED}"))
    return ExportDiffers(str(error).replace("nothing was kept", f"it was kept as {rejected!r}"))


def _photographs(settings: Settings, model: nn.Module, inputs: Inputs) -> Photographs | None:
    """Return what int8 is calibrated on, or None for any other precision.

    Raises:
        BadOption: the network takes other inputs than one image, or there are no images.
        BadFile: some cannot be read.
    """
    if settings.images is None:
        return None
    return Photographs(settings.images, model, image_of(model, inputs))


def _metadata(model: nn.Module, inputs: Inputs) -> dict[str, str]:
    """Return what a deployer needs beside the graph: recipe, classes, normalisation."""
    card: HostCard | None = card_of(model)
    metadata = {"input_size": json.dumps(list(size_of(inputs)))}
    if cuts_of(model):
        metadata["attnsurgeon"] = make_recipe(model).dumps()
        gates = list(named_gates(model))
        if len(gates) > len(gate_numbers(model)):  # numbers are known by their names
            metadata["gates"] = json.dumps(gates)
    if card is not None and card.categories:
        metadata["classes"] = json.dumps(card.categories, ensure_ascii=False)
    if card is not None and card.mean and card.std:
        metadata["mean"], metadata["std"] = json.dumps(card.mean), json.dumps(card.std)
    return metadata
