"""What a comparison is asked for, refused before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attnsurgeon.bench import engines as known_engines
from attnsurgeon.bench.environment import find_device
from attnsurgeon.bench.precision import OFFERED
from attnsurgeon.errors import BadOption, UnknownName

LARGEST = "max"
"""Asks for the largest batch that fits into memory."""
Batch = int | str
MOST = {"--batch": 2**31 - 1, "--threads": 1024, "--input-size": 2**16}
"""Beyond these, libraries overflow or end the process instead of saying that it is too much."""


@dataclass(frozen=True)
class Request:
    """Checked options.

    Attributes:
        engines: names, each once.
        device: that is there.
        batches: numbers of images per call, each once; `max` is the largest that fits.
        threads: CPU threads of every engine.
        seconds: of measuring for each job.
        input_size: height and width, if they are not the targets' own.
        precisions: each once; None is the targets' own.
        channels_last: whether torch's engines lay maps out with the channels last.
        train: whether whole steps of training are timed.
        per_site: whether each site is timed alone.
        profile: whether operators are timed by the engine.
    """

    engines: tuple[str, ...]
    device: torch.device
    batches: tuple[Batch, ...]
    threads: int
    seconds: float
    input_size: tuple[int, int] | None
    precisions: tuple[str | None, ...] = (None,)
    channels_last: bool = False
    train: bool = False
    per_site: bool = False
    profile: bool = False

    @property
    def jobs(self) -> list[tuple[str, str | None, Batch]]:
        """Every engine with every precision and batch."""
        return [
            (engine, precision, batch)
            for engine in self.engines
            for precision in self.precisions
            for batch in self.batches
        ]


def check_request(
    engines: Sequence[str],
    device: str,
    batches: Sequence[Batch],
    threads: int | None,
    seconds: float,
    input_size: tuple[int, int] | None,
    precisions: Sequence[str] = (),
    *,
    channels_last: bool = False,
    train: bool = False,
    per_site: bool = False,
    profile: bool = False,
) -> Request:
    """Return what is asked for.

    Raises:
        BadOption: a number out of range, or options that do not go together.
        UnknownName: no such engine or precision.
        EngineUnavailable: a device that is not there, or that an engine cannot use.
    """
    _check_numbers(batches, threads, seconds, input_size)
    if not engines:
        raise BadOption(f"--engine needs at least one of {', '.join(known_engines.names())}")
    chosen = {name: known_engines.get(name) for name in engines}
    found = find_device(device)
    for engine in chosen.values():
        engine.check(found)
    _check_precisions(precisions, found)
    for name, engine in chosen.items():
        if train and not engine.can_train:
            raise BadOption(f"{name} cannot train; leave it or --train out")
        missing = [precision for precision in precisions if precision in engine.lacks]
        if missing:
            raise BadOption(
                f"{name} takes no {missing[0]}; leave it or --precision {missing[0]} out"
            )
        if channels_last and not engine.has_layout:
            raise BadOption(f"{name} has a layout of its own; leave it or --channels-last out")
    if train and per_site:
        raise BadOption("--per-site measures inference; leave it or --train out")
    return Request(
        engines=tuple(chosen),
        device=found,
        batches=tuple(dict.fromkeys(batches)),
        threads=torch.get_num_threads() if threads is None else threads,
        seconds=seconds,
        input_size=input_size,
        precisions=tuple(dict.fromkeys(precisions)) or (None,),
        channels_last=channels_last,
        train=train,
        per_site=per_site,
        profile=profile,
    )


def _check_numbers(
    batches: Sequence[Batch],
    threads: int | None,
    seconds: float,
    input_size: tuple[int, int] | None,
) -> None:
    for batch in batches:
        if isinstance(batch, str) and batch != LARGEST:
            raise BadOption(f"--batch takes whole numbers or {LARGEST}, not {batch!r}")
    for flag, numbers in (
        ("--batch", [batch for batch in batches if not isinstance(batch, str)]),
        ("--threads", () if threads is None else (threads,)),
        ("--input-size", input_size or ()),
    ):
        for number in numbers:
            if number < 1:
                raise BadOption(f"{flag} must be at least 1, not {number}")
            if number > MOST[flag]:
                raise BadOption(f"{flag} must be at most {MOST[flag]}, not {number}")
    if not seconds > 0:
        raise BadOption(f"--seconds must be above 0, not {seconds}")
    if math.isinf(seconds):
        raise BadOption("--seconds must be finite, not inf")
    if not batches:
        raise BadOption("--batch needs at least one number")


def _check_precisions(precisions: Sequence[str], device: torch.device) -> None:
    for precision in precisions:
        if precision not in OFFERED:
            raise UnknownName("precision", precision, OFFERED)
        if precision == "tf32" and device.type != "cuda":
            raise BadOption(f"--precision tf32 is of CUDA devices, and this runs on {device}")
