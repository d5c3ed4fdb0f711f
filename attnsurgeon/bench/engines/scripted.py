"""TorchScript: as it is exported, and frozen."""

from __future__ import annotations

from typing import Any

import torch

from attnsurgeon.bench.engines.engine import (
    Inputs,
    Place,
    on_device,
    register,
    renew_memory,
    torch_runner,
)
from attnsurgeon.bench.exported import PROFILED_CALLS
from attnsurgeon.bench.targets import Target
from attnsurgeon.bench.timing import Runner
from attnsurgeon.export.torchscript import freeze_torchscript, make_torchscript


@register("torchscript")
def run_torchscript(target: Target, inputs: Inputs, place: Place) -> Runner:
    """Run the network as it would be exported to .pt, not frozen; a .pt file as it is."""
    module = _scripted(target, inputs, place)
    return torch_runner(lambda: module(*inputs), module, place)


@register("torchscript-frozen")
def run_frozen(target: Target, inputs: Inputs, place: Place) -> Runner:
    """Run it with its weights made constants and optimised for inference on this device."""
    module = _scripted(target, inputs, place)
    held = [freeze_torchscript(module)]

    def move() -> None:
        renew_memory(module)
        held[0] = freeze_torchscript(module)  # its constants are other tensors than the weights
        with torch.inference_mode():
            for _ in range(PROFILED_CALLS):
                call()

    def call() -> Any:
        return held[0](*inputs)

    return torch_runner(call, module, place, move=move)


def _scripted(target: Target, inputs: Inputs, place: Place) -> torch.jit.ScriptModule:
    module = on_device(target.module, place.device)
    if isinstance(module, torch.jit.ScriptModule):
        return module
    return make_torchscript(module, inputs)
