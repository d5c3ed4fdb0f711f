"""Hold an exported file against the model that it was made from, later and on real images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from attnsurgeon.card import card_of
from attnsurgeon.errors import BadFile, ExportDiffers
from attnsurgeon.export.calm import steady
from attnsurgeon.export.format import Opened, Runner, format_for
from attnsurgeon.export.images import image_files, image_of, read_images
from attnsurgeon.export.inputs import example_inputs, size_of, trials
from attnsurgeon.export.lending import lent_to
from attnsurgeon.export.opening import Opener
from attnsurgeon.export.precision import (
    HALVES,
    PRECISIONS,
    UNROUNDED,
    Precision,
    lowered,
    precision_of,
)
from attnsurgeon.export.proof import Check, check_file, gate_values, run_with_gates

_UNSEEN = (
    "what eight bits make of the maps of {} was not compared: noise is not what it was calibrated "
    "for; give --images DIR"
)


@dataclass(frozen=True)
class Agreement:
    """What was compared.

    Attributes:
        file: the exported file.
        format: its format.
        checks: every comparison; all passed.
        images: path of an image -> the class that both see in it; empty where none were given.
        notices: what was not compared.
    """

    file: str
    format: str
    checks: tuple[Check, ...]
    images: Mapping[str, str]
    notices: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "file": self.file,
            "format": self.format,
            "checks": [check.to_json() for check in self.checks],
            "images": dict(self.images),
        }


def verify_export(
    path: str | os.PathLike[str], model: nn.Module, images: str | os.PathLike[str] | None = None
) -> Agreement:
    """Compare a file with a model again: random inputs, gates opened, and images of a folder.

    Code (.py) is run with the model's own weights, in a process of its own.

    An int8 file was calibrated for images, and with its gates as they are. On random inputs and
    with other gates it is compared with its maps unrounded: its weights and its wiring. What eight
    bits make of the maps is compared on the images.

    Args:
        path: a file of export_model.
        model: what it should compute.
        images: a folder of images; all of them must be seen alike.

    Raises:
        BadFile: the file or an image cannot be read.
        BadOption: no images, or a model that takes none.
        ExportDiffers: the two differ.
    """
    file = Path(path)
    kind = format_for(file)
    if not file.is_file():
        raise BadFile(f"there is no file {str(file)!r}")
    read = kind.reader_for(model)
    opened = read(file, None)
    inputs = example_inputs(model, None, None)
    fixed = {axis.rpartition(".")[2] for axis in opened.fixed_axes}
    batches = trials(model, inputs, fixed)
    own = gate_values(model)
    label = "open" if any(bool(value.any()) for value in own.values()) else "closed"
    precision = _precision_of(opened, file)
    holds, run = opened.holds, opened.run
    del opened
    seen: dict[str, str] = {}
    of_images: list[Check] = []
    if images is not None:
        like = image_of(model, inputs)
        of_images, seen = _compare_images(run, model, like, Path(images), precision)
    is_int8 = precision.name == "int8"
    is_unrounded = is_int8 and kind.has_gates(file, own)
    near = UNROUNDED if is_unrounded else precision
    opener = None
    if own and kind.has_gates(file, own):
        is_own = precision.name not in HALVES or precision_of(model, None) == precision
        cast = None if is_own else lowered(model, precision, inputs)
        opener = Opener(model, batches, precision, cast)
    with lent_to(model, batches, lambda own: holds(precision.cast_gates(own)), opener) as lent:
        if lent or is_unrounded:
            run = read(file, precision.cast_gates(lent)).run
        drawn = [steady(model, own, batch) for batch in batches]
        checks = check_file(run, model, own, label, drawn, near)
        del run  # what holds its weights ends before they are read again
        if opener is not None:
            values = opener.made_with(lent).values
            run = read(file, precision.cast_gates({**values, **lent})).run
            drawn = [steady(model, values, batch) for batch in batches]
            checks += check_file(run, model, values, "open", drawn, near)
    checks += of_images
    failed = [check for check in checks if not check.passed]
    if failed:
        worst = failed[0]
        raise ExportDiffers(
            f"{str(file)!r} differs from the model in {len(failed)} of {len(checks)} runs, first "
            f"with gates {worst.gates}, batch {worst.batch}: max_rel {worst.max_rel:.2g}, top-1 "
            f"same for {100 * worst.top1_agreement:.0f} %"
        )
    unseen = (_UNSEEN.format(file.name),) if is_int8 and images is None else ()
    return Agreement(str(file), kind.name_of(file), tuple(checks), seen, unseen)


def _compare_images(
    run: Runner, model: nn.Module, like: Tensor, folder: Path, precision: Precision
) -> tuple[list[Check], dict[str, str]]:
    """Compare on each image of a folder, and return what class the model sees in it.

    Of a network that gives one row of scores per image, the file must see the same. One that gives
    a map of them is held to the tolerance only: where two classes meet, rounding decides.

    Raises:
        BadFile: there are none, or one cannot be read.
    """
    own, files = gate_values(model), image_files(folder)
    parts = [(part.to(like),) for part in read_images(files, card_of(model), size_of((like,)))]
    checks = check_file(run, model, own, "images", list(parts), precision)
    found = [run_with_gates(model, own, part) for part in parts]
    checks = [
        replace(check, passed=check.passed and (check.top1_agreement == 1 or outputs[0].ndim > 2))
        for check, outputs in zip(checks, found, strict=True)
    ]
    classes = [_class_of(model, outputs) for outputs in found]
    return checks, dict(zip(map(str, files), classes, strict=True))


def _precision_of(opened: Opened, file: Path) -> Precision:
    """Return the precision that a file says it is in.

    Raises:
        BadFile: there is none of that name.
    """
    if opened.precision not in PRECISIONS:
        raise BadFile(f"{file.name} says that it is in {opened.precision!r}, which is not known")
    return PRECISIONS[opened.precision]


def _class_of(model: nn.Module, outputs: list[Tensor]) -> str:
    """Return the name of the class of the largest output, anywhere in a map, or its number."""
    scores = outputs[0][0]
    best = int(scores.reshape(len(scores), -1).amax(1).argmax()) if scores.ndim else 0
    card = card_of(model)
    names = card.categories if card is not None else None
    return names[best] if names and best < len(names) else str(best)
