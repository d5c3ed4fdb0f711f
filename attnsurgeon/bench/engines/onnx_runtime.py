"""ONNX Runtime on the provider that the device calls for, with inputs bound where they lie."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from attnsurgeon.bench.engines.engine import Inputs, Place, register
from attnsurgeon.bench.exported import session_for
from attnsurgeon.bench.profiling import Operator, total_operators
from attnsurgeon.bench.targets import Target
from attnsurgeon.bench.timing import Runner
from attnsurgeon.errors import EngineUnavailable
from attnsurgeon.export.onnx import write_onnx

TENSORRT = "TensorrtExecutionProvider"
HEAVY = ("Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul", "NhwcConv")
"""What a network spends its time on: one of these on another provider is a fall-back."""

_EXPORTS: WeakKeyDictionary[nn.Module, Path] = WeakKeyDictionary()
"""What was written for whom, in the folder of one comparison."""


def check_onnxruntime(device: torch.device) -> None:
    """Refuse a device that the installed ONNX Runtime knows nothing of.

    Raises:
        EngineUnavailable: it is not installed, or was built without its CUDA provider.
    """
    _check_provider(_provider(device))


def check_tensorrt(device: torch.device) -> None:
    """Refuse what has no TensorRT.

    Raises:
        EngineUnavailable: the CPU, or an ONNX Runtime built without the provider.
    """
    if device.type != "cuda":
        raise EngineUnavailable(
            "onnxruntime-tensorrt needs a CUDA device: leave it out, or give --device cuda "
            "where there is one"
        )
    _check_provider(TENSORRT)


def _check_provider(provider: str) -> None:
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineUnavailable(
            "onnxruntime is not installed: pip install onnxruntime (onnxruntime-gpu for CUDA)"
        ) from error
    if provider not in onnxruntime.get_available_providers():
        extra = " and pip install tensorrt" if provider == TENSORRT else ""
        raise EngineUnavailable(
            f"the installed onnxruntime has no {provider}: pip install onnxruntime-gpu{extra}, "
            "or give --device cpu"
        )


def _provider(device: torch.device) -> str:
    return "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"


@register("onnxruntime", check_onnxruntime, has_layout=False, lacks=("bf16",))
def run_onnxruntime(target: Target, inputs: Inputs, place: Place) -> Runner:
    """Run the network as it would be exported to .onnx; an .onnx file as it is.

    Raises:
        EngineUnavailable: the session fell back to another provider than the device's, or the
            network takes bfloat16.
    """
    return _runner(target, inputs, place, _provider(place.device))


@register("onnxruntime-tensorrt", check_tensorrt, has_layout=False, lacks=("bf16",))
def run_tensorrt(target: Target, inputs: Inputs, place: Place) -> Runner:
    """Run it on ONNX Runtime's TensorRT provider.

    Raises:
        EngineUnavailable: see run_onnxruntime.
    """
    return _runner(target, inputs, place, TENSORRT)


def _runner(target: Target, inputs: Inputs, place: Place, provider: str) -> Runner:
    if any(isinstance(part, Tensor) and part.dtype == torch.bfloat16 for part in inputs):
        raise EngineUnavailable(
            f"onnxruntime takes no bfloat16 from Python: leave {target.name} or onnxruntime out"
        )
    path = target.file if target.model is None else _exported(target, inputs, place.folder)
    assert path is not None  # a target without a module is a file

    def bound(**extra: Any) -> _Bound:
        session = session_for(
            path,
            threads=place.threads,
            provider=provider,
            device=place.device.index or 0,
            allow_tf32=place.precision == "tf32",
            patches=target.patches,
            **extra,
        )
        check_assigned(session, provider)
        return _Bound(session, inputs, place.device)

    held = [bound()]

    def move() -> None:
        # A session cannot be moved. The old one goes only after the new one has its memory.
        held[0] = bound()

    def profile() -> list[Operator]:
        return _profile(bound(profile_to=place.folder / "onnxruntime"))

    return Runner(
        call=lambda: held[0].call(),
        move=move,
        provider=provider,
        first=lambda: held[0].outputs(),
        profile=profile,
    )


def check_assigned(session: Any, provider: str) -> None:
    """Refuse a session that runs elsewhere than it was told to.

    Raises:
        EngineUnavailable: the provider was not loaded, or the network's products are not its own.
    """
    chosen = session.get_providers()[0]
    if chosen != provider:
        raise EngineUnavailable(
            f"onnxruntime fell back to {chosen}: {provider} could not be loaded; check the CUDA "
            "and cuDNN libraries, or give --device cpu"
        )
    assigned = getattr(session, "get_provider_graph_assignment_info", None)
    for part in assigned() if assigned else ():  # since onnxruntime 1.24
        strays = [node.op_type for node in part.get_nodes() if node.op_type in HEAVY]
        if strays and part.ep_name != provider:
            raise EngineUnavailable(
                f"onnxruntime fell back to {part.ep_name} for {len(strays)} {strays[0]}: "
                f"{provider} cannot take them; leave this engine out"
            )


def _exported(target: Target, inputs: Inputs, folder: Path) -> Path:
    """Write the network once for all batches, with free axes."""
    if target.module not in _EXPORTS or not _EXPORTS[target.module].exists():
        path = folder / f"{secrets.token_hex(8)}.onnx"
        # Two images: an exporter takes a batch of one for a constant.
        pair = tuple(_two_rows(part.cpu()) if isinstance(part, Tensor) else part for part in inputs)
        write_onnx(target.module, pair, path)
        _EXPORTS[target.module] = path
    return _EXPORTS[target.module]


def _two_rows(part: Tensor) -> Tensor:
    return torch.cat([part[:1], part[:1]])


class _Bound:
    """A session with its inputs and outputs bound to the device: no call copies anything."""

    def __init__(self, session: Any, inputs: Inputs, device: torch.device) -> None:
        self.session, self.inputs = session, inputs  # bound by address, so they have to live
        self.binding = session.io_binding()
        self.is_cuda = device.type == "cuda"
        number = device.index or 0
        for node, part in zip(session.get_inputs(), inputs, strict=True):
            kind = torch.empty(0, dtype=part.dtype).numpy().dtype
            self.binding.bind_input(
                node.name, device.type, number, kind, tuple(part.shape), part.data_ptr()
            )
        for node in session.get_outputs():
            self.binding.bind_output(node.name, device.type, number)
        if self.is_cuda:
            torch.cuda.synchronize(device)

    def call(self) -> None:
        self.session.run_with_iobinding(self.binding)
        if self.is_cuda:
            self.binding.synchronize_outputs()  # the wall clock sees the whole run

    def outputs(self) -> list[Tensor]:
        self.call()
        return [torch.from_numpy(array) for array in self.binding.copy_outputs_to_cpu()]


def _profile(bound: _Bound) -> list[Operator]:
    """Return the table of ONNX Runtime's own profiler, of one warm run."""
    bound.call()
    bound.call()
    file = Path(bound.session.end_profiling())
    events = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    last = nodes[len(nodes) // 2 :]
    return total_operators((node["args"]["op_name"], node["dur"] / 1e3) for node in last)
