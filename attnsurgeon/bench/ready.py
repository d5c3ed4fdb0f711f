"""Make a target ready for an engine, and note what that takes: time, memory, and a first look."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from attnsurgeon.bench.cost import fixed_batch
from attnsurgeon.bench.doubts import folded_doubt
from attnsurgeon.bench.engines import Engine, Place
from attnsurgeon.bench.exported import session_for
from attnsurgeon.bench.inputs import cast_inputs, images_in
from attnsurgeon.bench.memory import Peak, is_out_of_memory
from attnsurgeon.bench.targets import Inputs, Target
from attnsurgeon.bench.timing import Runner
from attnsurgeon.borrow import borrowed_buffers, borrowed_modes, borrowed_values
from attnsurgeon.errors import (
    AttnSurgeonError,
    EngineUnavailable,
    HostUnusable,
    first_line,
    is_interrupt,
)
from attnsurgeon.export.inputs import on_cpu
from attnsurgeon.export.onnx_file import Patch

_REFUSALS = RuntimeError, ValueError, AssertionError
"""Of torch and torchvision, where a network cannot be trained so."""

Leaves = list[Tensor]


@dataclass(frozen=True)
class Ready:
    """A target that has run once on an engine.

    Attributes:
        runner: to be timed.
        output: what the first run returned.
        load_s: of reading the target and making it ready.
        first_run_ms: of the first call.
        peak_host_bytes: of a later call, weights included; None where the system does not tell.
        peak_device_bytes: the same on the device; None on the CPU.
    """

    runner: Runner
    output: Leaves
    load_s: float
    first_run_ms: float
    peak_host_bytes: int | None
    peak_device_bytes: int | None


def make_ready(engine: Engine, name: str, target: Target, inputs: Inputs, place: Place) -> Ready:
    """Prepare a target and run it twice: once for the first time, once for its memory.

    Args:
        engine: what is to run it.
        name: of the engine.
        target: in the precision and layout that is timed.
        inputs: on the place's device.
        place: where.

    Raises:
        EngineUnavailable: the engine cannot run this precision here; and see the engine.
        HostUnusable: a file or a network does not take this batch, or no step of training.
    """
    try:
        return _make_ready(engine, target, inputs, place)
    except Exception as error:
        if isinstance(error, AttnSurgeonError) or is_out_of_memory(error) or is_interrupt(error):
            raise
        refusal = _refusal(error, name, target, inputs, place)
        if refusal is None:
            raise
        raise refusal from error


def _refusal(
    error: Exception, name: str, target: Target, inputs: Inputs, place: Place
) -> AttnSurgeonError | None:
    """Return what the user can put right; None where it is a mistake of ours or of the engine."""
    why = first_line(error)
    batch = f"{target.name} does not run on a batch of {images_in(inputs)}: {why}"
    if (
        target.file is not None
        and target.only
        and isinstance(error, RuntimeError)
        and not isinstance(error, NotImplementedError)
    ):
        # It ran when it was tried; what an exporter fixed without a word is the batch.
        return HostUnusable(f"{batch}; give the --batch that it was exported with")
    if "not implemented for" in str(error):
        return EngineUnavailable(
            f"{name} cannot run {target.name} in {place.precision} on {place.device}: {why}; "
            "leave one of them out"
        )
    if place.train and isinstance(error, _REFUSALS):
        # It ran when it was tried, in eval mode: a batch norm wants more values, or a loss is
        # not to be had.
        return HostUnusable(
            f"{target.name} does not run a step of training on a batch of {images_in(inputs)}: "
            f"{why}; give a larger --batch, or leave --train out"
        )
    if _fails_itself(target, inputs):
        return HostUnusable(f"{batch}; give a --batch that it takes")
    return None


def _fails_itself(target: Target, inputs: Inputs) -> bool:
    """Tell whether the network does not take these inputs, whatever runs it."""
    if not isinstance(target.model, nn.Module) or target.only:
        return False
    try:
        _outputs(target.model, on_cpu(inputs))
    except Exception as error:  # of the user's network: it may be any
        return not (is_out_of_memory(error) or is_interrupt(error))
    return False


def _make_ready(engine: Engine, target: Target, inputs: Inputs, place: Place) -> Ready:
    peak = Peak(place.device)
    start = time.perf_counter()
    runner = engine.prepare(target, inputs, place)
    loaded = time.perf_counter()
    with torch.inference_mode(mode=not place.train):
        output = (runner.first or runner.call)()
        _wait(place.device)
        done = time.perf_counter()
        leaves = [leaf.detach().cpu() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        del output
        peak.restart()
        runner.call()
        _wait(place.device)
    return Ready(
        runner=runner,
        output=leaves,
        load_s=target.read_s + loaded - start,
        first_run_ms=1e3 * (done - loaded),
        peak_host_bytes=peak.host_bytes(runner.held_bytes),
        peak_device_bytes=peak.device_bytes(is_torch=runner.provider is None),
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gates_doubt(target: Target, inputs: Inputs, found: Sequence[Tensor]) -> str | None:
    """Doubt an engine that leaves the attention of a target out.

    Args:
        target: as it was read, on the CPU, gates open.
        inputs: a batch on the CPU.
        found: what the engine returned for it.
    """
    if not target.is_opened or not (target.gates or target.patches):
        return None
    batch = images_in(inputs)
    if any(leaf.ndim == 0 or leaf.shape[0] != batch for leaf in found):
        return None  # no rows that belong to one image each
    one = cast_inputs(tuple(p[:1] if isinstance(p, Tensor | list) else p for p in inputs), target)
    if target.model is None:
        whole = inputs if fixed_batch(target) else one
        shut = [(start, bytes(len(raw))) for start, raw in target.patches]  # a zero is zero bytes
        sides = [_outputs_of_file(target, whole, patches) for patches in (target.patches, shut)]
        opened, closed = ([leaf[:1] for leaf in leaves] for leaves in sides)
    else:
        opened, closed = _outputs(target.model, one), _outputs_closed(target.model, target, one)
    return folded_doubt([leaf[:1] for leaf in found], opened, closed)


def _outputs_of_file(target: Target, inputs: Inputs, patches: Sequence[Patch]) -> Leaves:
    """Return what an .onnx file computes as it is written, where nothing can be folded."""
    assert target.file is not None  # a target without a module is a file
    session = session_for(target.file, is_optimised=False, patches=patches)
    names = [node.name for node in session.get_inputs()]
    feed = {name: part.numpy() for name, part in zip(names, inputs, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, feed)]


def _outputs_closed(model: nn.Module, target: Target, inputs: Inputs) -> Leaves:
    held = dict(model.named_parameters())
    gates = [held[name] for name in target.gates if name in held]
    with borrowed_values(gates):
        with torch.no_grad():
            for gate in gates:
                gate.zero_()
        return _outputs(model, inputs)


def _outputs(model: Any, inputs: Inputs) -> Leaves:
    with torch.no_grad(), borrowed_modes(model), borrowed_buffers(model):
        model.eval()
        return [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]
