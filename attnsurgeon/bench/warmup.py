"""What an engine sets up once in a process, done before anything is measured: it is no target's.

Libraries, threads and kernels would otherwise be charged to whoever runs first, which is the
baseline: to its memory, its first run and the time of loading it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from attnsurgeon.bench.engines import Place
from attnsurgeon.bench.memory import release_memory
from attnsurgeon.bench.targets import Inputs, Target
from attnsurgeon.borrow import borrowed_randomness

_warm: set[tuple[str, str, bool, bool]] = set()


def warm_up(
    engine: str,
    targets: Sequence[Target],
    inputs: Inputs,
    place: Place,
    run: Callable[[Target, Inputs], Any],
) -> None:
    """Run an engine once in this process: on a small network, or on a file where all are files.

    Args:
        engine: its name.
        targets: what is to be timed on it.
        inputs: of these.
        place: where.
        run: makes a target ready for inputs, which runs it.
    """
    are_files = all(target.only for target in targets)  # some of which no other engine runs
    own = engine, str(place.device), place.train, are_files
    if own in _warm:
        return
    run(*((targets[0], inputs) if are_files else _small()))
    release_memory()
    _warm.add(own)


def _small() -> tuple[Target, Inputs]:
    with borrowed_randomness(0):
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        ).eval()
    inputs = (torch.zeros(1, 3, 32, 32),)
    return Target("a small network", inputs, "random", model=net), inputs
