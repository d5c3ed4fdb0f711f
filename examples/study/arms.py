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
        gate_rate: of the gates, where it is another.
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
    gate_rate: float | None = None
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
    mix, centred = Arm("se mix"), Arm("se centred", gate="centred")
    layer = Arm("se layer", gate="layer")
    for block in ("se", "cbam"):
        for form in (centred, layer):
            yield replace(form, name=f"{block} {form.gate}", block=block)
    for form in (mix, centred):
        yield replace(form, name=f"{form.name}, per channel", per_channel=True)
        for gain in (3, 10):  # `layer` starts at zero, whatever that is multiplied by
            yield replace(form, name=f"{form.name}, start x{gain}", gain=gain)
        yield replace(form, name=f"{form.name}, annealed to 1", anneal=120)
    for form in (mix, centred, layer):
        for rate in (1, 100):
            yield replace(form, name=f"{form.name}, rate x{rate}", rate=rate)
        yield replace(form, name=f"{form.name}, warm-up", warm_up=40)
    yield replace(mix, name="se mix, gates x10, layers x1", rate=1, gate_rate=10)
    yield replace(mix, name="se mix, gates x1, layers x10", rate=10, gate_rate=1)
    for gate in ("mix", "centred", "layer"):
        yield Arm(f"cbam {gate}, rate x1", block="cbam", gate=gate, rate=1)
    yield Arm("sk mix, rate x1", block="sk", rate=1)
    for gate in _ZEROS:
        yield Arm(f"gc {gate}, rate x1", block="gc", gate=gate, rate=1)
    for gate in _ZEROS:
        yield Arm(f"nonlocal {gate}", block="nonlocal", gate=gate)
        yield Arm(f"nonlocal {gate}, rate x1", block="nonlocal", gate=gate, rate=1)
    for rate in (1, 100):
        yield Arm(f"only rescales, one number, rate x{rate}", control="openness", rate=rate)
        yield Arm(
            f"only rescales, per channel, rate x{rate}", gate="layer", control="bias", rate=rate
        )


_ZEROS = ("mix", "layer")
"""Of what is added, `layer` is the zero start that its paper publishes."""
ARMS = (*_first(), *_second())
