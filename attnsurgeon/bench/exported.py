"""Exported files as they lie on the disk: what input an .onnx or a TorchScript .pt file takes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnsurgeon.errors import BadFile, HostUnusable, first_line
from attnsurgeon.export.onnx_data import check_data
from attnsurgeon.export.onnx_file import Patch, patched, read_file
from attnsurgeon.export.torchscript import load_torchscript

Fixed = tuple[int | None, ...]
"""The axes of an input; None for one that is free."""

SIZE_KEY = "input_size"
"""Metadata that export_model writes: height and width as JSON."""

RECIPE_KEY = "attnsurgeon"
"""Metadata that export_model writes where the network holds attention."""

GATE_NAME = "openness"
"""Last part of the name of a gate's number, which scripts and traces keep."""

GATES_KEY = "gates"
"""Metadata that export_model writes where gates are layers: the names of their tensors as JSON."""

DEFAULT_SIZE = (224, 224)
PROFILED_CALLS = 3
"""TorchScript watches the first calls of a new graph and compiles it then."""
_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(uint8)": torch.uint8,
}


@dataclass(frozen=True)
class OnnxFile:
    """What an .onnx file takes, and where its gates are.

    Attributes:
        example: its inputs for one image.
        fixed: for each of them, the axes that the file fixes.
        is_sized: whether it told its height and width.
        gates: name of each gate -> its values.
    """

    example: tuple[Tensor, ...]
    fixed: tuple[Fixed, ...]
    is_sized: bool
    gates: Mapping[str, Tensor]


@dataclass(frozen=True)
class ScriptFile:
    """A TorchScript network, an input for one image, whether the file told its size, its gates."""

    module: torch.jit.ScriptModule
    example: tuple[Tensor, ...]
    is_sized: bool
    gates: Mapping[str, Tensor]


def session_for(
    path: Path,
    *,
    threads: int = 1,
    provider: str = "CPUExecutionProvider",
    device: int = 0,
    allow_tf32: bool = False,
    is_optimised: bool = True,
    profile_to: Path | None = None,
    patches: Sequence[Patch] = (),
) -> Any:
    """Open an .onnx file in ONNX Runtime.

    Args:
        path: the file.
        threads: of the CPU.
        provider: that runs it; see check_assigned for what was made of it.
        device: number of the CUDA device.
        allow_tf32: whether float32 products may be rounded to TF32 on CUDA.
        is_optimised: whether its graph is rewritten for speed.
        profile_to: beginning of the name of a file for ONNX Runtime's own profile.
        patches: other bytes for places in the file, which stays as it is on the disk.

    Raises:
        BadFile: it is no ONNX file, or one that the installed runtime cannot read.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings of its optimizer are no business of the user's
    options.intra_op_num_threads = threads
    # Idle workers spin on after a run and take the cores from whoever runs next: interleaved
    # sessions slow each other down by 40 % that way. With this they spin during a run, as in any
    # deployment, and stop when it ends. "session.intra_op.allow_spinning" = "0" keeps sessions
    # apart as well, but makes the runs themselves up to 15 % slower than a deployed one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if profile_to is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_to)
    if patches:  # bytes do not know where the file's outer data lies
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.resolve().parent)
        )
    if not is_optimised:
        # Weights that are laid out anew vanish from what the profiler tells of their nodes.
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(
            patched(path, patches) if patches else str(path),
            options,
            providers=_providers(provider, device, allow_tf32),
        )
    except Exception as error:
        if not is_of_onnxruntime(error):
            raise
        raise BadFile(f"onnxruntime cannot read {str(path)!r}: {first_line(error)}") from error


def _providers(provider: str, device: int, allow_tf32: bool) -> list[Any]:
    """Return the provider with its options; TensorRT leaves what it cannot take to CUDA."""
    if provider == "CPUExecutionProvider":
        return [provider]
    cuda = ("CUDAExecutionProvider", {"device_id": device, "use_tf32": str(int(allow_tf32))})
    if provider == "CUDAExecutionProvider":
        return [cuda]
    return [(provider, {"device_id": device}), cuda]


def is_of_onnxruntime(error: Exception) -> bool:
    """Tell whether ONNX Runtime raised this: its errors share no base class but their module."""
    return type(error).__module__.startswith("onnxruntime")


def read_onnx(path: Path) -> OnnxFile:
    """Return the inputs that an .onnx file takes, free axes as its metadata says.

    Raises:
        BadFile: it is no ONNX file, or one that the installed runtime cannot read, or its weights
            lie in a second file that is not its own.
        HostUnusable: it takes inputs of a dtype or rank that cannot be made up.
    """
    check_data(path, read_file(path).beside.values())
    session = session_for(path, is_optimised=False)
    told = read_size(session.get_modelmeta().custom_metadata_map.get(SIZE_KEY, ""))
    example, fixed, is_sized = [], [], True
    for node in session.get_inputs():
        axes: Fixed = tuple(axis if isinstance(axis, int) else None for axis in node.shape)
        shape = one_image(axes, told or DEFAULT_SIZE)
        if shape is None or node.type not in _DTYPES:
            raise HostUnusable(
                f"no input can be made up for {str(path)!r}: {node.name} is {node.type}{node.shape}"
            )
        example.append(torch.zeros(shape, dtype=_DTYPES[node.type]))
        fixed.append(axes)
        is_sized = is_sized and (told is not None or None not in axes[1:])
    return OnnxFile(tuple(example), tuple(fixed), is_sized, _gates_in(path))


def _gates_in(path: Path) -> dict[str, Tensor]:
    """Return the gates that export_model left in the file by name."""
    file = read_file(path)
    # Names mean nothing in a file that is not of export_model: it has another author.
    if RECIPE_KEY not in file.notes:
        return {}
    layers = read_names(file.notes.get(GATES_KEY, ""))
    return {name: file.values(name) for name in file.spots if is_gate(name, layers)}


def one_image(axes: Fixed, size: tuple[int, int]) -> tuple[int, ...] | None:
    """Return the axes with a batch of 1 and free ones filled in, if it is known what they are."""
    rest = axes[1:]
    if len(axes) == 4:
        rest = tuple(
            known if axis is None else axis for axis, known in zip(rest, (3, *size), strict=True)
        )
    known = tuple(axis for axis in rest if axis is not None)
    return (1, *known) if axes and len(known) == len(rest) else None


def read_torchscript(path: Path) -> ScriptFile:
    """Load a TorchScript file; its channels are those of its first convolution.

    Raises:
        BadFile: it is not TorchScript.
    """
    module, notes = load_torchscript(path, [SIZE_KEY, RECIPE_KEY, GATES_KEY])
    told = read_size(notes[SIZE_KEY])
    channels, dtype = _entrance([*module.parameters(), *_kernels(module)])
    example = torch.zeros(1, channels, *(told or DEFAULT_SIZE), dtype=dtype)
    # Names mean nothing in a file that is not of export_model: it has another author.
    layers = read_names(notes[GATES_KEY])
    gates = {
        name: parameter
        for name, parameter in module.named_parameters()
        if notes[RECIPE_KEY] and is_gate(name, layers)
    }
    return ScriptFile(module, (example,), told is not None, gates)


def script_constants(module: nn.Module) -> list[Tensor]:
    """Return the floats that a frozen TorchScript network holds as constants of its graph."""
    if not isinstance(module, torch.jit.ScriptModule) or any(True for _ in module.parameters()):
        return []
    graph: Any = module.inlined_graph
    values = [
        node.t("value")
        for node in graph.findAllNodes("prim::Constant")
        if node.hasAttribute("value") and node.kindOf("value") == "t"
    ]
    return [value for value in values if value.is_floating_point()]


def _kernels(module: torch.jit.ScriptModule) -> Iterator[Tensor]:
    """Yield the weights of the convolutions of a frozen network, the first one first."""
    for node in module.inlined_graph.nodes():
        if node.kind() in ("aten::conv2d", "aten::_convolution"):
            weight = list(node.inputs())[1].node()
            if weight.kind() == "prim::Constant":
                yield weight.t("value")


def _entrance(parameters: Sequence[Tensor]) -> tuple[int, torch.dtype]:
    for parameter in parameters:
        if parameter.ndim == 4:
            return parameter.shape[1], parameter.dtype
    return 3, torch.float32


def is_gate(name: str, layers: Sequence[str]) -> bool:
    """Tell whether a tensor of a file is a gate; `layers` are those told by their names."""
    return name.rpartition(".")[2] == GATE_NAME or name in layers


def read_names(text: str) -> list[str]:
    """Return the names in a file's metadata."""
    try:
        names = json.loads(text)
    except ValueError:
        return []
    return names if isinstance(names, list) else []


def read_size(text: str) -> tuple[int, int] | None:
    """Return the height and width in a file's metadata, if it tells them."""
    try:
        height, width = json.loads(text)
        return int(height), int(width)
    except (ValueError, TypeError):
        return None
