"""The targets of a comparison, side by side: in each precision, made ready for each engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from attnsurgeon.bench import engines as known_engines
from attnsurgeon.bench.ceilings import Ceilings, measure_ceilings
from attnsurgeon.bench.cost import Cost
from attnsurgeon.bench.engines import Place
from attnsurgeon.bench.inputs import cast_inputs, lay_out, make_inputs, send_inputs
from attnsurgeon.bench.largest import find_largest
from attnsurgeon.bench.precision import fit_target
from attnsurgeon.bench.ready import Ready, make_ready
from attnsurgeon.bench.request import Request
from attnsurgeon.bench.targets import Inputs, Target
from attnsurgeon.bench.warmup import warm_up

Tell = Callable[[str, float], None]


@dataclass(frozen=True)
class Lineup:
    """The targets as they start: comparable, with what each costs, and an input for one image."""

    targets: tuple[Target, ...]
    costs: tuple[Cost, ...]
    example: Inputs
    request: Request
    _fitted: dict[str | None, tuple[Target, ...]] = field(default_factory=dict)
    _ceilings: dict[str, Ceilings] = field(default_factory=dict)

    def fitted(self, precision: str | None) -> tuple[Target, ...]:
        """Return the targets in a precision, each time the same ones; others are let go."""
        if precision not in self._fitted:
            wanted = {"channels_last": self.request.channels_last, "train": self.request.train}
            self._fitted.clear()
            self._fitted[precision] = tuple(
                fit_target(target, precision, **wanted) for target in self.targets
            )
        return self._fitted[precision]

    def ceilings(self, precision: str) -> Ceilings:
        """Return what the device can do, measured once for each precision."""
        if precision not in self._ceilings:
            self._ceilings[precision] = measure_ceilings(self.request.device, precision)
        return self._ceilings[precision]

    @property
    def known_ceilings(self) -> list[Ceilings]:
        """All that were measured."""
        return list(self._ceilings.values())

    def make_ready(
        self, engine: str, precision: str | None, batch: int, place: Place, tell: Tell
    ) -> tuple[Inputs, list[Ready], float | None]:
        """Return the batch on the CPU, all targets ready, and the ms of sending it there."""
        inputs = make_inputs(self.example, batch, torch.device("cpu"))
        ready, sent_ms = [], None
        targets = self.fitted(precision)
        tell(f"preparing {targets[0].name}", 0.0)
        warm_up(
            engine,
            targets,
            inputs,
            place,
            functools.partial(self.make_one_ready, engine, place=place),
        )
        for target in targets:
            tell(f"preparing {target.name}", 0.0)
            one, sent_ms = self.make_one_ready(engine, target, inputs, place)
            ready.append(one)
        return inputs, ready, sent_ms

    def make_one_ready(
        self, engine: str, target: Target, inputs: Inputs, place: Place
    ) -> tuple[Ready, float | None]:
        """Return one target ready for a batch on the CPU, and the ms of sending the batch."""
        own = lay_out(cast_inputs(inputs, target), channels_last=self.request.channels_last)
        sent, sent_ms = send_inputs(own, place.device)
        return make_ready(known_engines.get(engine), engine, target, sent, place), sent_ms

    def largest_batch(
        self, engine: str, precision: str | None, place: Place, tell: Tell
    ) -> tuple[int, int]:
        """Return the largest batch at which all can be timed, and the least that did not fit."""

        def attempt(batch: int) -> None:
            ready = self.make_ready(engine, precision, batch, place, lambda text, share: None)[1]
            for one in ready:  # between the rounds each moves, and takes its memory twice
                one.runner.move()
            with torch.inference_mode(mode=not place.train):
                for one in ready:
                    one.runner.call()

        return find_largest(attempt, lambda batch: tell(f"trying batch {batch}", 0.0))
