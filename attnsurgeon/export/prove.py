"""Prove a written file from disk: with its gates as they are, and with all of them opened."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from attnsurgeon.errors import BadOption, ExportDiffers
from attnsurgeon.export.format import Draft, Opened, Reader, Runner, Settings
from attnsurgeon.export.inputs import Inputs, tensors_of
from attnsurgeon.export.lending import NOTICE as LENT
from attnsurgeon.export.lending import lent_to, steady
from attnsurgeon.export.opening import open_gates
from attnsurgeon.export.proof import Check, check_file, gate_values

_UNSEEN = (
    "{} of {} gates move no output visibly with these weights, the first {}: the opened check says "
    "nothing about them alone"
)


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

    Raises:
        ExportDiffers: one comparison failed.
        ExportRefused: opening the gates shows nothing.
    """
    own = gate_values(model)
    label = "open" if any(bool(value.any()) for value in own.values()) else "closed"
    progress("checking it from disk, gates as they are")
    written = read(part, None)
    _check_header(written, settings)
    opset, holds, run = written.opset, written.holds, written.run
    del written
    with lent_to(model, batches, holds) as lent:
        notices: tuple[str, ...] = (LENT.format(type(model).__name__, _list(lent)),) if lent else ()
        if lent:
            run = read(part, lent).run
        checks = check_file(run, model, own, label, [steady(model, own, b) for b in batches])
        del run, holds
        if own:
            progress("checking it from disk, gates open")
            opening = open_gates(model, min(batches, key=_pixels))
            values = opening.values
            if opening.unseen:
                notices += (_UNSEEN.format(len(opening.unseen), len(own), opening.unseen[0]),)
            with _opened_file(read, twin, part, {**values, **lent}) as run:
                drawn = [steady(model, values, b) for b in batches]
                checks += check_file(run, model, values, "open", drawn)
    for check in checks:
        if not check.passed:
            raise ExportDiffers(
                f"the {name} file differs from the model with gates {check.gates}, batch "
                f"{check.batch}, {check.size[0]}x{check.size[1]} px: max_rel {check.max_rel:.2g}, "
                f"cosine {check.cosine:.4f}; nothing was kept"
            )
    return Proof(tuple(checks), opset, notices)


def _check_header(written: Opened, settings: Settings) -> None:
    """Refuse a file that says it is not what was asked for.

    Raises:
        ExportDiffers: an axis that should be free came out fixed.
        BadOption: it has another opset.
    """
    if settings.dynamic and written.fixed_axes:
        raise ExportDiffers(
            f"{', '.join(written.fixed_axes)} came out fixed; nothing was kept; "
            "give --static if that is what you want"
        )
    if settings.opset not in (None, written.opset):
        raise BadOption(
            f"--opset {settings.opset} cannot be written: the exporter made {written.opset}"
        )


def _list(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first} and {len(others)} other tensors" if others else first


def _pixels(inputs: Inputs) -> int:
    return sum(part.numel() for part in tensors_of(inputs))


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
