"""AOTInductor: the network compiled to a library of its own, without Python."""

from __future__ import annotations

import secrets
from typing import Any

import torch

from attnsurgeon.bench.engines.compiled import refusal
from attnsurgeon.bench.engines.engine import Inputs, Place, on_device, register, torch_runner
from attnsurgeon.bench.memory import is_out_of_memory
from attnsurgeon.bench.targets import Target
from attnsurgeon.bench.timing import Runner


@register("aotinductor")
def run_ahead_of_time(target: Target, inputs: Inputs, place: Place) -> Runner:
    """Run what AOTInductor makes of the network for this very input shape.

    Raises:
        EngineUnavailable: there is no C++ compiler, or it cannot take the network.
    """
    inductor: Any = torch._inductor
    module = on_device(target.module, place.device)
    file = place.folder / f"{secrets.token_hex(8)}.pt2"
    try:
        with torch.no_grad():
            exported = torch.export.export(module, inputs)
            package = inductor.aoti_compile_and_package(exported, package_path=str(file))
        held = [inductor.aoti_load_package(package)]
    except Exception as error:  # of a dozen classes, private to the compilers
        if is_out_of_memory(error):
            raise
        raise refusal("AOTInductor", target.name, error) from error

    def move() -> None:
        # The old one goes only after the new one has its memory.
        held[0] = inductor.aoti_load_package(package)

    return torch_runner(lambda: held[0](*inputs), module, place, move=move, is_copied=True)
