"""What can run a network: a new engine is one new function here, registered under its name."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnsurgeon.bench.exported import session_for
from attnsurgeon.bench.targets import Target
from attnsurgeon.bench.timing import Call, Runner
from attnsurgeon.errors import EngineUnavailable
from attnsurgeon.export.onnx import write_onnx
from attnsurgeon.export.torchscript import make_torchscript
from attnsurgeon.registry import Registry


@dataclass(frozen=True)
class Place:
    """Where a comparison runs.

    Attributes:
        device: cpu or one CUDA device.
        threads: CPU threads of every engine.
        folder: for files that live as long as the comparison.
    """

    device: torch.device
    threads: int
    folder: Path


Inputs = tuple[Any, ...]
Prepare = Callable[[Target, Inputs, Place], Runner]


@dataclass(frozen=True)
class Engine:
    """A way to run a network.

    Attributes:
        prepare: makes a target ready for inputs, which lie on the place's device.
        check: refuses a device that the engine cannot use, before anything is loaded.
    """

    prepare: Prepare
    check: Callable[[torch.device], None]


_registry: Registry[Engine] = Registry("engine")


def register(
    name: str, check: Callable[[torch.device], None] = lambda device: None
) -> Callable[[Prepare], Prepare]:
    """Return a decorator that enters an engine under the name that users type."""

    def enter(prepare: Prepare) -> Prepare:
        _registry.register(name)(Engine(prepare, check))
        return prepare

    return enter


def names() -> list[str]:
    """Return the names of all engines, sorted."""
    return _registry.names()


def get(name: str) -> Engine:
    """Return the engine of that name.

    Raises:
        UnknownName: there is none; the message gives the nearest.
    """
    return _registry.get(name)


@register("eager")
def run_eager(target: Target, inputs: Inputs, place: Place) -> Runner:
    """Call the module as it is."""
    module = _on_device(target.module, place.device)
    return _torch_runner(lambda: module(*inputs), module, place)


@register("torchscript")
def run_torchscript(target: Target, inputs: Inputs, place: Place) -> Runner:
    """Run the network as it would be exported to .pt, not frozen; a .pt file as it is."""
    module = _on_device(target.module, place.device)
    if not isinstance(module, torch.jit.ScriptModule):
        module = make_torchscript(module, inputs)
    return _torch_runner(lambda: module(*inputs), module, place)


@register("compile")
def run_compiled(target: Target, inputs: Inputs, place: Place) -> Runner:
    """Run what torch.compile makes of the network for this very input shape.

    Raises:
        EngineUnavailable: torch.compile cannot run here, or left the network uncompiled.
    """
    from torch._dynamo.utils import counters

    module = _on_device(target.module, place.device)

    def forward(*inputs: Any) -> Any:
        return module(*inputs)

    # Compiled code is kept by the function's code object: one of its own for each runner keeps
    # them from counting against each other's limit of recompilations.
    own = types.FunctionType(
        forward.__code__.replace(), forward.__globals__, closure=forward.__closure__
    )
    compiled = torch.compile(own, dynamic=False)
    graphs = counters["stats"]["unique_graphs"]
    try:
        with torch.inference_mode():
            compiled(*inputs)
    except Exception as error:  # of a dozen classes, private to the compilers
        raise _uncompiled(target, error) from error
    if counters["stats"]["unique_graphs"] == graphs:
        raise EngineUnavailable(
            f"torch.compile left {target.name} uncompiled; leave this engine out"
        )
    return _torch_runner(lambda: compiled(*inputs), module, place)


def _uncompiled(target: Target, error: Exception) -> EngineUnavailable:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    if "InvalidCxxCompiler" in repr(error) or "C++ compiler" in str(error):
        return EngineUnavailable(
            "torch.compile needs a C++ compiler: install g++ (apt install g++), "
            "or leave the engine compile out"
        )
    if "Triton" in str(error):
        return EngineUnavailable(
            "torch.compile needs Triton on CUDA: pip install triton, or leave compile out"
        )
    return EngineUnavailable(f"torch.compile cannot take {target.name}: {reason}")


def check_onnxruntime(device: torch.device) -> None:
    """Refuse a CUDA device that the installed ONNX Runtime knows nothing of.

    Raises:
        EngineUnavailable: it was built without its CUDA provider.
    """
    import onnxruntime

    provider = _provider(device)
    if provider not in onnxruntime.get_available_providers():
        raise EngineUnavailable(
            f"the installed onnxruntime has no {provider}: pip install onnxruntime-gpu, "
            "or give --device cpu"
        )


@register("onnxruntime", check=check_onnxruntime)
def run_onnxruntime(target: Target, inputs: Inputs, place: Place) -> Runner:
    """Run the network as it would be exported to .onnx; an .onnx file as it is.

    Raises:
        EngineUnavailable: the session fell back to another provider than the device's, or the
            network takes bfloat16.
    """
    provider = _provider(place.device)
    if any(isinstance(part, Tensor) and part.dtype == torch.bfloat16 for part in inputs):
        raise EngineUnavailable(
            f"onnxruntime takes no bfloat16 from Python: leave {target.name} or onnxruntime out"
        )
    path = target.file if target.model is None else _exported(target, inputs, place.folder)
    assert path is not None  # a target without a module is a file
    session = session_for(path, threads=place.threads, provider=provider)
    if session.get_providers()[0] != provider:
        raise EngineUnavailable(
            f"onnxruntime fell back to {session.get_providers()[0]}: {provider} could not be "
            "loaded; check the CUDA and cuDNN libraries, or give --device cpu"
        )
    held = [_bound(session, inputs, place.device)]

    def move() -> None:
        # A session cannot be moved. The old one goes only after the new one has its memory.
        again = session_for(path, threads=place.threads, provider=provider)
        held[0] = _bound(again, inputs, place.device)

    return Runner(call=lambda: held[0](), move=move, provider=provider)


def _provider(device: torch.device) -> str:
    return "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"


def _exported(target: Target, inputs: Inputs, folder: Path) -> Path:
    """Write the network once for all batches, with free axes."""
    path = folder / f"{id(target.module)}.onnx"
    if not path.exists():
        # Two images: an exporter takes a batch of one for a constant.
        pair = tuple(_two_rows(part.cpu()) if isinstance(part, Tensor) else part for part in inputs)
        write_onnx(target.module, pair, path)
    return path


def _two_rows(part: Tensor) -> Tensor:
    return torch.cat([part[:1], part[:1]])


def _bound(session: Any, inputs: Sequence[Any], device: torch.device) -> Call:
    """Return what runs a session on the inputs, where they lie."""
    names = [node.name for node in session.get_inputs()]
    if device.type == "cpu":
        feed = {name: part.numpy() for name, part in zip(names, inputs, strict=True)}
        return lambda: session.run(None, feed)
    binding = session.io_binding()
    for name, part in zip(names, inputs, strict=True):
        kind = torch.empty(0, dtype=part.dtype).numpy().dtype
        binding.bind_input(
            name, "cuda", device.index or 0, kind, tuple(part.shape), part.data_ptr()
        )
    for node in session.get_outputs():
        binding.bind_output(node.name, "cuda", device.index or 0)
    torch.cuda.synchronize(device)

    def call() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()  # the wall clock sees the whole run

    return call


def _on_device(module: nn.Module, device: torch.device) -> nn.Module:
    """Return the module itself on the CPU, else a copy on the device."""
    return module if device.type == "cpu" else copy.deepcopy(module).to(device)


def _torch_runner(call: Call, module: nn.Module, place: Place) -> Runner:
    def move() -> None:
        # Those of before are held until all have moved: nothing gets its own place back.
        before = []
        for tensor in (*module.parameters(), *module.buffers()):
            before.append(tensor.data)
            tensor.data = tensor.data.clone()

    events = place.device if place.device.type == "cuda" else None
    return Runner(call=call, move=move, events=events)
