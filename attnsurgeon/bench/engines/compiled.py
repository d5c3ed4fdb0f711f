"""What torch.compile makes of a network, for the very shapes that are timed."""

from __future__ import annotations

import types
from typing import Any

import torch

from attnsurgeon.bench.engines.engine import (
    Inputs,
    Place,
    check_cuda,
    on_device,
    register,
    torch_runner,
)
from attnsurgeon.bench.memory import is_out_of_memory
from attnsurgeon.bench.targets import Target
from attnsurgeon.bench.timing import Call, Runner
from attnsurgeon.bench.training import make_step
from attnsurgeon.errors import EngineUnavailable, first_line


@register("compile", can_train=True)
def run_compiled(target: Target, inputs: Inputs, place: Place) -> Runner:
    """Run what torch.compile makes of the network.

    Raises:
        EngineUnavailable: at the first call: torch.compile cannot run here, or left the network
            uncompiled.
    """
    return _compiled(target, inputs, place, None)


@register("compile-max-autotune", can_train=True)
def run_autotuned(target: Target, inputs: Inputs, place: Place) -> Runner:
    """Run what torch.compile makes of it with the fastest of many kernels, in CUDA graphs.

    Raises:
        EngineUnavailable: see run_compiled.
    """
    return _compiled(target, inputs, place, "max-autotune")


@register("compile-cudagraphs", check_cuda("compile-cudagraphs"), can_train=True)
def run_compiled_graphs(target: Target, inputs: Inputs, place: Place) -> Runner:
    """Run what torch.compile makes of it, in CUDA graphs.

    Raises:
        EngineUnavailable: see run_compiled.
    """
    return _compiled(target, inputs, place, "reduce-overhead")


def _compiled(target: Target, inputs: Inputs, place: Place, mode: str | None) -> Runner:
    from torch._dynamo.utils import counters

    module = on_device(target.module, place.device)

    def forward(*inputs: Any) -> Any:
        return module(*inputs)

    # Compiled code is kept by the function's code object: one of its own for each runner keeps
    # them from counting against each other's limit of recompilations.
    own = types.FunctionType(
        forward.__code__.replace(), forward.__globals__, closure=forward.__closure__
    )
    compiled = torch.compile(own, dynamic=False, mode=mode)
    call: Call = (
        make_step(module, compiled, inputs, place.precision)
        if place.train
        else lambda: compiled(*inputs)
    )

    def first() -> Any:
        graphs = counters["stats"]["unique_graphs"]
        try:
            output = call()
        except Exception as error:  # of a dozen classes, private to the compilers
            raise _uncompiled(target, error) from error
        if counters["stats"]["unique_graphs"] == graphs:
            raise EngineUnavailable(
                f"torch.compile left {target.name} uncompiled; leave this engine out"
            )
        return output

    return torch_runner(call, module, place, first=first)


def _uncompiled(target: Target, error: Exception) -> Exception:
    if is_out_of_memory(error):
        return error
    return refusal("torch.compile", target.name, error)


def refusal(compiler: str, name: str, error: Exception) -> EngineUnavailable:
    """Return what to tell of a compiler's failure: what it lacks, or why it cannot take this."""
    if "InvalidCxxCompiler" in repr(error) or "C++ compiler" in str(error):
        return EngineUnavailable(
            f"{compiler} needs a C++ compiler: install g++ (apt install g++), "
            "or leave this engine out"
        )
    if "Triton" in str(error):
        return EngineUnavailable(
            f"{compiler} needs Triton on CUDA: pip install triton, or leave this engine out"
        )
    return EngineUnavailable(f"{compiler} cannot take {name}: {first_line(error)}")
