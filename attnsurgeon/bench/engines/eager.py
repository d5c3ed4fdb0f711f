"""The module as it is, called from Python."""

from __future__ import annotations

from attnsurgeon.bench.engines.engine import Inputs, Place, on_device, register, torch_runner
from attnsurgeon.bench.targets import Target
from attnsurgeon.bench.timing import Runner
from attnsurgeon.bench.training import make_step


@register("eager", can_train=True)
def run_eager(target: Target, inputs: Inputs, place: Place) -> Runner:
    """Call the module as it is."""
    module = on_device(target.module, place.device)
    if place.train:
        return torch_runner(make_step(module, module, inputs, place.precision), module, place)
    return torch_runner(lambda: module(*inputs), module, place)
