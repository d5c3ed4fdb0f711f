"""Prove a written file from disk: with its gates as they are, and with all of them opened."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from attnsurgeon.errors import BadOption, ExportDiffers
from attnsurgeon.export.axes import fixed_by_file
from attnsurgeon.export.calm import steady
from attnsurgeon.export.format import Draft, Opened, Reader, Runner, Settings
from attnsurgeon.export.inputs import Inputs, resized, size_of
from attnsurgeon.export.lending import NOTICE as LENT
from attnsurgeon.export.lending import lent_to
from attnsurgeon.export.opening import Opener
from attnsurgeon.export.precision import PRECISIONS, Precision
from attnsurgeon.export.proof import Check, check_file, gate_values
from attnsurgeon.training.stripping import ungated

_UNSEEN = (
    "{} of {} gates move no output visibly with these weights, the first {}: the opened check says "
    "nothing about them alone"
)

_REMEDIES = {
    "fp16": "; numbers above 65504 or near 0 are lost in fp16: try --precision bf16 or fp32",
    "bf16": "; try --precision fp32",
    "int8": "; give --images more like what the network will see, or --precision fp16",
}


@dataclass(frozen=True)
class Proof:
    """What was compared, and what the user should know about it.

    Attributes:
        checks: every comparison; all passed.
        opset: of the file.
        notices: what could not be seen.
    """

    checks: tuple[Check, ...]
    opset: int | None
    notices: tuple[str, ...]


def prove(
    name: str,
    read: Reader,
    twin: Draft | None,
    part: Path,
    model: nn.Module,
    batches: list[Inputs],
    settings: Settings,
    progress: Callable[[str], None],
    precision: Precision = PRECISIONS["fp32"],
    cast: nn.Module | None = None,
) -> Proof:
    """Compare the written file with the model, as it is and with its gates opened.

    Args:
        name: of the file's format.
        read: opens the file.
        twin: what a twin with opened gates is written from, where the gates were folded.
        part: the file.
        model: what it was made from.
        batches: the inputs of both.
        settings: what was asked for.
        progress: is told what is being done.
        precision: of the file.
        cast: the model in that precision, where it is another than the model's.

    Raises:
        ExportDiffers: one comparison failed.
        ExportRefused: opening the gates shows nothing.
    """
    own = gate_values(model)
    is_open = any(bool(value.any()) for value in own.values()) or bool(ungated(model))
    label = "open" if is_open else "closed"
    progress("checking it from disk, gates as they are")
    written = read(part, None)
    _check_header(written, settings)
    opset, holds, run = written.opset, written.holds, written.run
    del written
    opener = Opener(model, batches, precision, cast)
    asked = opener if own else None
    with lent_to(model, batches, lambda own: holds(precision.cast_gates(own)), asked) as lent:
        notices: tuple[str, ...] = (LENT.format(type(model).__name__, _list(lent)),) if lent else ()
        if lent:
            run = read(part, precision.cast_gates(lent)).run
        drawn = [steady(model, own, batch) for batch in batches]
        checks = check_file(run, model, own, label, drawn, precision)
        _refuse_fixed(name, run, model, checks, batches[0], settings, precision)
        _refuse_failed(name, checks, precision)
        del run
        if own:
            progress("checking it from disk, gates open")
            opening = opener.made_with(lent)
            values = opening.values
            if opening.unseen:
                notices += (_UNSEEN.format(len(opening.unseen), len(own), opening.unseen[0]),)
            drawn = [steady(model, values, batch) for batch in batches]
            held = precision.cast_gates({**values, **lent})
            with _opened_file(read, twin, part, held) as run:
                checks += check_file(run, model, values, "open", drawn, precision)
            _refuse_failed(name, checks, precision)
    return Proof(tuple(checks), opset, notices)


def _refuse_fixed(
    name: str,
    run: Runner,
    model: nn.Module,
    checks: list[Check],
    inputs: Inputs,
    settings: Settings,
    precision: Precision,
) -> None:
    """Refuse a file of which a comparison failed because an axis is not as free as it says.

    Raises:
        ExportDiffers: it is right for the inputs that it was made with, and not for others.
    """
    if all(check.passed for check in checks):
        return

    def agrees(trial: Inputs) -> bool:
        own = gate_values(model)
        return check_file(run, model, own, "", [trial], precision)[0].passed

    batch = 2 if "batch" in settings.free else 1
    axis = fixed_by_file(agrees, model, resized(inputs, batch, size_of(inputs)), settings.free)
    if axis is not None:
        raise ExportDiffers(
            f"the {axis} of the {name} file's input came out fixed: it is right with the one that "
            f"{type(model).__name__} was translated with, and with no other; nothing was kept; "
            "give --static if that is what you want"
        )


def _refuse_failed(name: str, checks: list[Check], precision: Precision) -> None:
    """Refuse a file of which one comparison failed.

    Raises:
        ExportDiffers: it differs by more than its precision allows.
    """
    for check in checks:
        if not check.passed:
            kind = name if precision.name in ("fp32", "fp64") else f"{precision.name} {name}"
            raise ExportDiffers(
                f"the {kind} file differs from the model with gates {check.gates}, batch "
                f"{check.batch}, {check.size[0]}x{check.size[1]} px: max_rel {check.max_rel:.2g}, "
                f"cosine {check.cosine:.4f}; nothing was kept{_REMEDIES.get(precision.name, '')}"
            )


def _check_header(written: Opened, settings: Settings) -> None:
    """Refuse a file that says it is not what was asked for.

    Raises:
        ExportDiffers: an axis that should be free came out fixed.
        BadOption: it has another opset.
    """
    fixed = [axis for axis in written.fixed_axes if axis.rpartition(".")[2] in settings.free]
    if fixed:
        raise ExportDiffers(
            f"{', '.join(fixed)} came out fixed; nothing was kept; "
            "give --static if that is what you want"
        )
    if settings.opset not in (None, written.opset):
        raise BadOption(
            f"--opset {settings.opset} cannot be written: the exporter made {written.opset}"
        )


def _list(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first} and {len(others)} other tensors" if others else first


@contextmanager
def _opened_file(
    read: Reader, twin: Draft | None, part: Path, gates: Mapping[str, Tensor]
) -> Iterator[Runner]:
    """Yield what runs the file with these gates, or its twin where its own are out of reach."""
    if twin is None:
        yield read(part, gates).run
        return
    with tempfile.TemporaryDirectory(prefix="attnsurgeon-") as folder:
        path = Path(folder) / "opened"
        twin.write(path, gates)
        yield read(path, None).run
