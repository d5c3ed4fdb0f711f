"""AOTInductor: the network compiled to a library of its own, without Python."""

from __future__ import annotations

import secrets
from typing import Any

import torch

from attnsurgeon.bench.engines.compiled import refusal
from attnsurgeon.bench.engines.engine import Inputs, Place, on_device, register, torch_runner
from attnsurgeon.bench.memory import is_out_of_memory
from attnsurgeon.bench.packages import load_package
from attnsurgeon.bench.profiling import Operator, profile_torch
from attnsurgeon.bench.targets import Target
from attnsurgeon.bench.timing import Runner
from attnsurgeon.errors import EngineUnavailable

# Compiled headers are 280 MB in the cache of the machine, and pay off at the fourth network only.
_SETTINGS = {"aot_inductor.precompile_headers": False}


@register("aotinductor")
def run_ahead_of_time(target: Target, inputs: Inputs, place: Place) -> Runner:
    """Run what AOTInductor makes of the network for this very input shape; a package as it is.

    Raises:
        EngineUnavailable: there is no C++ compiler, or it cannot take the network; or a package
            is not made for the device or the layout.
    """
    if target.model is None:
        return _run_package(target, inputs, place)
    inductor: Any = torch._inductor
    module = on_device(target.module, place.device)
    file = place.folder / f"{secrets.token_hex(8)}.pt2"
    try:
        with torch.no_grad():
            exported = torch.export.export(module, inputs)
            package = inductor.aoti_compile_and_package(
                exported, package_path=str(file), inductor_configs=dict(_SETTINGS)
            )
        held = [inductor.aoti_load_package(package)]
    except Exception as error:  # of a dozen classes, private to the compilers
        if is_out_of_memory(error):
            raise
        raise refusal("AOTInductor", target.name, error) from error

    def move() -> None:
        # The old one goes only after the new one has its memory.
        held[0] = inductor.aoti_load_package(package)

    return torch_runner(lambda: held[0](*inputs), module, place, move=move, is_copied=True)


def _run_package(target: Target, inputs: Inputs, place: Place) -> Runner:
    path = target.file
    assert path is not None  # a target without a module is a file
    if place.device.type != "cpu":
        raise EngineUnavailable(f"{target.name} is compiled for the CPU; give --device cpu")
    if not all(part.is_contiguous() for part in inputs):
        raise EngineUnavailable(
            f"{target.name} is compiled for contiguous images; leave --channels-last out"
        )
    held = [load_package(path, target.values)]

    def call() -> Any:
        return held[0](*inputs)

    def move() -> None:
        held[0] = load_package(path, target.values)

    def profile() -> list[Operator]:
        return profile_torch(call, place.device, is_training=False)

    return Runner(call=call, move=move, profile=profile)
