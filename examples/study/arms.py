"""The arms of the study: what stands in the network, and how it is let in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

OPTIONS: dict[str, dict[str, Any]] = {
    "se": {"reduction": 4},
    "cbam": {"reduction": 4},
    "sk": {"reduction": 4, "min_width": 8, "groups": 4},
    "gc": {"reduction": 4},
    "nonlocal": {},
}
"""The widths here are 12 to 48: the papers' r = 16 would leave one or two hidden units."""


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Attributes:
        name: in tables.
        half: 1, gates or none; 2, how the gate should open.
        block: its attention; None for the plain network.
        gate: its form.
        ungated: put the published block into the trained network, as people do.
        per_channel: one number of the gate for each channel.
        gain: what the last layer's start is multiplied by.
        rate: of gates and attention, over the host's.
        warm_up: steps with the host frozen at first.
        anneal: steps in which the gates are led to 1.
        control: only these may learn of the attention, whose map is the same for all images.
    """

    name: str
    half: int = 2
    block: str | None = "se"
    gate: str = "mix"
    ungated: bool = False
    per_channel: bool = False
    gain: float = 1.0
    rate: float = 10.0
    warm_up: int = 0
    anneal: int = 0
    control: str = ""


def _first() -> Iterator[Arm]:
    yield Arm("plain", half=1, block=None)
    for block in ("se", "cbam", "sk", "gc"):
        yield Arm(f"{block} gated", half=1, block=block)
        yield Arm(f"{block} without gates", half=1, block=block, ungated=True)
    yield Arm("gc, its own zero start", half=1, block="gc", gate="layer")
    yield Arm("only rescales, one number", half=1, control="openness")
    yield Arm("only rescales, per channel", half=1, gate="layer", control="bias")


def _second() -> Iterator[Arm]:
    for block in ("se", "cbam"):
        for gate in ("centred", "layer"):
            yield Arm(f"{block} {gate}", block=block, gate=gate)
    mix, centred, layer = Arm("se mix"), Arm("se centred", gate="centred"), Arm("", gate="layer")
    for arm in (mix, centred):
        yield replace(arm, name=f"{arm.name}, per channel", per_channel=True)
    yield replace(mix, name="se mix, start x10", gain=10)
    yield replace(centred, name="se centred, start x3", gain=3)
    yield replace(centred, name="se centred, start x10", gain=10)
    yield replace(mix, name="se mix, annealed to 1", anneal=120)
    for arm in (mix, replace(layer, name="se layer")):
        yield replace(arm, name=f"{arm.name}, rate x1", rate=1)
        yield replace(arm, name=f"{arm.name}, rate x100", rate=100)
        yield replace(arm, name=f"{arm.name}, warm-up", warm_up=40)
    for block, gate in (("cbam", "mix"), ("sk", "mix"), *((b, g) for b in _ADDED for g in _ZEROS)):
        yield Arm(f"{block} {gate}, rate x1", block=block, gate=gate, rate=1)
    yield Arm("cbam layer, rate x1", block="cbam", gate="layer", rate=1)
    yield Arm("only rescales, one number, rate x1", control="openness", rate=1)
    yield Arm("only rescales, per channel, rate x1", gate="layer", control="bias", rate=1)
    yield Arm("only rescales, per channel, rate x100", gate="layer", control="bias", rate=100)


_ADDED = ("gc", "nonlocal")
_ZEROS = ("mix", "layer")
"""Of what is added, `layer` is the zero start that its paper publishes."""
ARMS = (*_first(), *_second())
