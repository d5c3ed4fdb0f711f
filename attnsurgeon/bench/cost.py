"""What a target costs on paper, and the shapes it returns, before anything is timed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from attnsurgeon.bench.exported import PROFILED_CALLS, is_of_onnxruntime, script_constants
from attnsurgeon.bench.inputs import cast_inputs, images_in
from attnsurgeon.bench.onnx_cost import count_onnx, numbers_in
from attnsurgeon.bench.packages import load_package
from attnsurgeon.bench.targets import Inputs, Target
from attnsurgeon.borrow import on_meta
from attnsurgeon.cost import Count, count_call
from attnsurgeon.errors import BadOption, HostUnusable, first_line

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """What one target costs, whatever runs it.

    Attributes:
        parameters: gates included; of an .onnx or a frozen file all numbers that it holds, and
            None of a compiled one, which does not tell them.
        macs: multiply-adds for one image of the compared size; None for a compiled file.
        file_bytes: of the target's file, with the data beside it; None where there is none.
        outputs: shapes of what it returns for the inputs it was tried on.
        uncounted: operators that compute something besides the multiply-adds.
        weight_bytes: read once in each call, whatever the batch.
        map_bytes: read and written for one image if every operator ran on its own.
    """

    parameters: int | None
    macs: int | None
    file_bytes: int | None
    outputs: tuple[Shape, ...]
    uncounted: tuple[str, ...] = ()
    weight_bytes: int | None = None
    map_bytes: int | None = None


def count_cost(target: Target, inputs: Inputs) -> Cost:
    """Try a target once on inputs, without arithmetic where possible, and count.

    Raises:
        BadOption: an .onnx file fixes an axis at another size.
        HostUnusable: the target does not run on such inputs.
    """
    own = cast_inputs(inputs, target)
    check_axes(target, own)
    try:
        if target.model is None:
            assert target.file is not None  # a target without a module is a file
            if target.file.suffix.lower() == ".pt2":
                shapes_out = _run_package(target.file, own)
                return Cost(None, None, _bytes_of(target.file), shapes_out)
            outputs, count = count_onnx(target.file, own)
        else:
            outputs, count = _count(target.model, own)
    except Exception as error:
        if target.model is None and not _is_foreign(error):
            raise
        shapes = [tuple(part.shape) for part in own if isinstance(part, Tensor)]
        raise HostUnusable(
            f"{target.name} does not run on inputs of shape {shapes}: {first_line(error)}; "
            "give another --input-size"
        ) from error
    batch = images_in(own)
    return Cost(
        _numbers_of(target),
        count.macs // batch,
        _bytes_of(target.file),
        outputs,
        count.uncounted,
        count.weight_bytes,
        count.map_bytes // batch,
    )


def check_axes(target: Target, inputs: Inputs) -> None:
    """Refuse a shape that a file cannot take.

    Raises:
        BadOption: an axis is fixed at another size.
    """
    for part, fixed in zip(inputs, target.fixed, strict=False):
        if any(own not in (None, size) for own, size in zip(fixed, part.shape, strict=False)):
            takes = "x".join("N" if axis is None else str(axis) for axis in fixed)
            given = "x".join(str(axis) for axis in part.shape)
            raise BadOption(
                f"{target.name} takes inputs of {takes} only, not {given}; give an "
                "--input-size that fits, or export it without --static"
            )


def fixed_batch(target: Target) -> int | None:
    """Return the number of images that a file takes in each call, where it fixes that."""
    return next((axes[0] for axes in target.fixed if axes and axes[0] is not None), None)


def check_batch(target: Target, batch: int | str) -> None:
    """Refuse a batch that a file cannot take.

    Raises:
        BadOption: it fixes another one.
    """
    own = fixed_batch(target)
    if own not in (None, batch):
        raise BadOption(
            f"{target.name} takes batches of {own} only, not {batch}; give --batch {own}, or "
            "export it without --static"
        )


def _count(model: nn.Module, inputs: Inputs) -> tuple[tuple[Shape, ...], Count]:
    if isinstance(model, torch.jit.ScriptModule):
        with torch.no_grad():
            for _ in range(PROFILED_CALLS):
                model(*inputs)
    else:
        shapes = tree_map_only(Tensor, lambda part: torch.empty_like(part, device="meta"), inputs)
        try:
            with on_meta(model):
                return _counted(model, shapes)
        except Exception:  # whatever cannot be done on meta tensors is tried for real
            pass
    return _counted(model, inputs)


def _counted(model: nn.Module, inputs: Inputs) -> tuple[tuple[Shape, ...], Count]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a network's own warnings belong to its own runs
        weights = [*model.parameters(), *model.buffers(), *script_constants(model)]
        output, count = count_call(lambda: model(*inputs), weights)
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return tuple(tuple(leaf.shape) for leaf in leaves), count


def _is_foreign(error: Exception) -> bool:
    """Tell whether a runtime raised this, and not a mistake of ours."""
    return is_of_onnxruntime(error) or type(error) is RuntimeError


def _run_package(file: Path, inputs: Inputs) -> tuple[Shape, ...]:
    outputs = tree_leaves(load_package(file, {})(*inputs))
    return tuple(tuple(leaf.shape) for leaf in outputs if isinstance(leaf, Tensor))


def _numbers_of(target: Target) -> int:
    if target.model is None:
        return numbers_in(_graph_of(target.file))
    own = sum(parameter.numel() for parameter in target.model.parameters())
    return own or sum(constant.numel() for constant in script_constants(target.model))


def _graph_of(file: Path | None) -> Any:
    import onnx

    return onnx.load(str(file), load_external_data=False).graph


def _bytes_of(file: Path | None) -> int | None:
    if file is None:
        return None
    size = file.stat().st_size
    if file.suffix.lower() == ".onnx":
        beside = {
            entry.value
            for tensor in _graph_of(file).initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        size += sum((file.parent / name).stat().st_size for name in beside)
    return size


def check_comparable(targets: Sequence[Target], costs: Sequence[Cost]) -> None:
    """Refuse targets that return something else than the first.

    Raises:
        BadOption: other shapes, such as another number of classes.
    """
    for target, cost in zip(targets, costs, strict=True):
        if cost.outputs != costs[0].outputs:
            raise BadOption(
                f"{target.name} returns {_list(cost.outputs)}, {targets[0].name} returns "
                f"{_list(costs[0].outputs)}: they cannot be compared"
            )


def _list(shapes: tuple[Shape, ...]) -> str:
    return " and ".join("x".join(map(str, shape)) for shape in shapes) or "no tensor"
