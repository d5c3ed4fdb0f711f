"""Write a network for deployment, and prove from disk that the file computes the same.

A new format is one new file in this folder.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnsurgeon.borrow import borrowed_randomness
from attnsurgeon.card import HostCard, card_of
from attnsurgeon.errors import BadOption, ExportDiffers, HostUnusable
from attnsurgeon.export.format import Draft, Format, Settings, format_for, formats
from attnsurgeon.export.proof import Check, check_file, gate_values, opened_values
from attnsurgeon.outputs import atomic_output
from attnsurgeon.sites import default_example
from attnsurgeon.store import make_recipe
from attnsurgeon.surgery import cuts_of
from attnsurgeon.trial import runs_on

__all__ = ["Artifact", "Check", "export_model", "export_suffixes"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


LARGEST_SIDE = 2**14
"""Pixels of an input's side: what is exported is run as well, and has to fit into memory."""


@dataclass(frozen=True)
class Artifact:
    """A file that was written and proven.

    Attributes:
        output: its path.
        format: onnx or torchscript.
        bytes: its size.
        opset: of an ONNX file.
        dynamic: whether batch, height and width are free.
        checks: every comparison with the model, from disk.
        notices: what the user should know once.
    """

    output: str
    format: str
    bytes: int
    opset: int | None
    dynamic: bool
    checks: tuple[Check, ...]
    notices: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "output": self.output,
            "format": self.format,
            "bytes": self.bytes,
            "opset": self.opset,
            "dynamic": self.dynamic,
            "checks": [check.to_json() for check in self.checks],
        }


def export_suffixes() -> list[str]:
    """Return the suffixes that can be exported to."""
    return formats.names()


def export_model(
    model: nn.Module,
    output: str | os.PathLike[str],
    *,
    opset: int | None = None,
    input_size: tuple[int, int] | None = None,
    static: bool = False,
    example: Tensor | None = None,
    force: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Artifact:
    """Write a network to `.onnx` or `.pt`, re-open the file and compare it with the model.

    The comparison runs with the gates as they are and, on a second file made by the same
    passes, with every gate open at a random value; at batch 1, 2 and 5 and at another size.

    Args:
        model: any network that takes one image batch; it is left untouched.
        output: the file; its suffix chooses the format.
        opset: of an ONNX file; the exporter's own choice by default.
        input_size: height and width; those of the host by default.
        static: fix batch (1), height and width, for networks that cannot do otherwise.
        example: an image batch that gives channels, dtype and size instead.
        force: replace an existing file.
        progress: is told what is being done.

    Raises:
        UnknownName: no format has that suffix.
        HostUnusable: the network does not run at that size.
        ExportRefused, BadOption, MissingPackage: see the format.
        OutputRefused: the file cannot be written.
        ExportDiffers: the file does not compute what the model computes; it is removed.
    """
    kind = format_for(output)
    image = _image(model, example, input_size)
    settings = Settings(opset=opset, dynamic=not static, metadata=_metadata(model, image))
    with atomic_output(output, force=force) as part:
        progress(f"translating to {kind.name}")
        draft = kind.draft(model, (_random(image, 1 if static else 2),), settings)
        batches = _batches(model, image, static)
        draft.write(part, gate_values(model))
        if not static:
            _check_free(kind, part)
        checks = _prove(kind, draft, model, part, batches, progress)
        written, size = kind.opset(part), part.stat().st_size
        if opset is not None and written != opset:
            raise BadOption(f"--opset {opset} cannot be written: the exporter made {written}")
    return Artifact(
        output=str(output),
        format=kind.name,
        bytes=size,
        opset=written,
        dynamic=not static,
        checks=tuple(checks),
        notices=draft.notices,
    )


def _check_free(kind: Format, part: Path) -> None:
    """Read the axes back from the file.

    Raises:
        ExportDiffers: one that should be free came out fixed.
    """
    fixed = kind.fixed_axes(part)
    if fixed:
        raise ExportDiffers(
            f"{', '.join(fixed)} came out fixed; nothing was kept; "
            "give --static if that is what you want"
        )


def _prove(
    kind: Format,
    draft: Draft,
    model: nn.Module,
    part: Path,
    batches: list[Tensor],
    progress: Callable[[str], None],
) -> list[Check]:
    """Compare the written file, and its twin with opened gates, with the model.

    Raises:
        ExportDiffers: one comparison failed.
    """
    own = gate_values(model)
    label = "open" if any(bool(value.any()) for value in own.values()) else "closed"
    progress("checking it from disk, gates as they are")
    checks = check_file(kind.open(part), model, own, label, batches)
    if own:
        progress("checking it from disk, gates open")
        opened = opened_values(model, (batches[0],))
        with tempfile.TemporaryDirectory(prefix="attnsurgeon-") as folder:
            twin = Path(folder) / "opened"
            draft.write(twin, opened)
            checks += check_file(kind.open(twin), model, opened, "open", batches)
    for check in checks:
        if not check.passed:
            raise ExportDiffers(
                f"the {kind.name} file differs from the model with gates {check.gates}, batch "
                f"{check.batch}, {check.size[0]}x{check.size[1]} px: max_rel {check.max_rel:.2g}, "
                f"cosine {check.cosine:.4f}; nothing was kept"
            )
    return checks


def _image(model: nn.Module, example: Tensor | None, size: tuple[int, int] | None) -> Tensor:
    """Return one image that the network takes, of the size asked for.

    Raises:
        BadOption: a size below 1.
        HostUnusable: the network does not run at this size.
    """
    card = card_of(model)
    if example is None:
        like = next(iter(model.parameters()), torch.empty(0))
        known = card.example(like) if card else (default_example(model),)
        if len(known) != 1 or known[0].ndim != 4:
            raise HostUnusable("only networks that take one image batch can be exported")
        example = known[0]
    image = example[:1]
    if size is not None:
        if not 1 <= min(size) <= max(size) <= LARGEST_SIDE:
            raise BadOption(f"--input-size must be 1 to {LARGEST_SIDE}, not {size[0]},{size[1]}")
        image = image.new_zeros(1, image.shape[1], *size)
    if not runs_on(model, (image.expand(2, -1, -1, -1),)):
        height, width = image.shape[2:]
        raise HostUnusable(
            f"{type(model).__name__} does not run on {height}x{width} images; "
            "give another --input-size"
        )
    return image


def _batches(model: nn.Module, image: Tensor, static: bool) -> list[Tensor]:
    """Return what both sides are run on: the size asked for, then other batches and sizes."""
    if static:
        return [_random(image, 1)]
    height, width = image.shape[2:]
    small = next(
        size
        for size in ((64, 96), (height + 32, width), (height, width))
        if runs_on(model, (image.new_empty(2, image.shape[1], *size),))
    )
    # Exactness of another batch does not depend on the size, and a small image is soon done.
    return [
        _random(image, 1),
        _random(image.new_empty(1, image.shape[1], *small), 2),
        _random(image.new_empty(1, image.shape[1], *small), 5),
    ]


def _random(image: Tensor, batch: int) -> Tensor:
    with borrowed_randomness(batch):
        return torch.randn(batch, *image.shape[1:]).to(image.device, image.dtype)


def _metadata(model: nn.Module, image: Tensor) -> dict[str, str]:
    """Return what a deployer needs beside the graph: recipe, classes, normalisation."""
    card: HostCard | None = card_of(model)
    metadata = {"input_size": json.dumps(list(image.shape[2:]))}
    if cuts_of(model):
        metadata["attnsurgeon"] = make_recipe(model).dumps()
    if card is not None and card.categories:
        metadata["classes"] = json.dumps(card.categories, ensure_ascii=False)
    if card is not None and card.mean and card.std:
        metadata["mean"], metadata["std"] = json.dumps(card.mean), json.dumps(card.std)
    return metadata
