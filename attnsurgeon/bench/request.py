"""What a comparison is asked for, refused before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attnsurgeon.bench import engines as known_engines
from attnsurgeon.bench.environment import find_device
from attnsurgeon.errors import BadOption


@dataclass(frozen=True)
class Request:
    """Checked options.

    Attributes:
        engines: names, each once.
        device: that is there.
        batches: numbers of images per call, each once.
        threads: CPU threads of every engine.
        seconds: of measuring for each engine and batch.
        input_size: height and width, if they are not the targets' own.
    """

    engines: tuple[str, ...]
    device: torch.device
    batches: tuple[int, ...]
    threads: int
    seconds: float
    input_size: tuple[int, int] | None

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """Every engine with every batch."""
        return [(engine, batch) for engine in self.engines for batch in self.batches]


def check_request(
    engines: Sequence[str],
    device: str,
    batches: Sequence[int],
    threads: int | None,
    seconds: float,
    input_size: tuple[int, int] | None,
) -> Request:
    """Return what is asked for.

    Raises:
        BadOption: a number out of range.
        UnknownName: no such engine.
        EngineUnavailable: a device that is not there, or that an engine cannot use.
    """
    for flag, numbers in (
        ("--batch", batches),
        ("--threads", () if threads is None else (threads,)),
        ("--input-size", input_size or ()),
    ):
        for number in numbers:
            if number < 1:
                raise BadOption(f"{flag} must be at least 1, not {number}")
    if not (seconds > 0 and math.isfinite(seconds)):
        raise BadOption(f"--seconds must be above 0, not {seconds}")
    if not batches:
        raise BadOption("--batch needs at least one number")
    if not engines:
        raise BadOption(f"--engine needs at least one of {', '.join(known_engines.names())}")
    chosen = {name: known_engines.get(name) for name in engines}
    found = find_device(device)
    for engine in chosen.values():
        engine.check(found)
    return Request(
        engines=tuple(chosen),
        device=found,
        batches=tuple(dict.fromkeys(batches)),
        threads=torch.get_num_threads() if threads is None else threads,
        seconds=seconds,
        input_size=input_size,
    )
