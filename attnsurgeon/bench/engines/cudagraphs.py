"""The module recorded once as a CUDA graph, and replayed."""

from __future__ import annotations

from typing import Any

import torch

from attnsurgeon.bench.engines.engine import (
    Inputs,
    Place,
    check_cuda,
    on_device,
    register,
    renew_memory,
    torch_runner,
)
from attnsurgeon.bench.memory import is_out_of_memory
from attnsurgeon.bench.targets import Target
from attnsurgeon.bench.timing import Call, Runner
from attnsurgeon.bench.training import make_step
from attnsurgeon.errors import EngineUnavailable, first_line

WARM_CALLS = 3
"""Before a recording, on a stream of its own, as libraries allocate in their first calls."""


@register("cudagraphs", check_cuda("cudagraphs"), can_train=True)
def run_recorded(target: Target, inputs: Inputs, place: Place) -> Runner:
    """Replay what the module launched once.

    Raises:
        EngineUnavailable: the network does something that cannot be recorded.
    """
    module = on_device(target.module, place.device)
    plain: Call = (
        make_step(module, module, inputs, place.precision)
        if place.train
        else lambda: module(*inputs)
    )
    held: list[Any] = []

    def record() -> Any:
        held[:] = [*_recorded(plain, target.name, place)]
        return held[1]

    def move() -> None:
        # A recording knows addresses: new memory needs a new one.
        renew_memory(module)
        record()

    def replay() -> None:
        held[0].replay()

    return torch_runner(replay, module, place, move=move, first=record)


def _recorded(plain: Call, name: str, place: Place) -> tuple[Any, Any]:
    """Return the graph and the output that it writes to."""
    apart = torch.cuda.Stream(place.device)
    apart.wait_stream(torch.cuda.current_stream(place.device))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.inference_mode(mode=not place.train), torch.cuda.device(place.device):
            with torch.cuda.stream(apart):
                for _ in range(WARM_CALLS):
                    plain()
            torch.cuda.current_stream(place.device).wait_stream(apart)
            with torch.cuda.graph(graph):
                output = plain()
            graph.replay()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise EngineUnavailable(
            f"{name} cannot be recorded as a CUDA graph: {first_line(error)}; leave cudagraphs out"
        ) from error
    return graph, output
