"""What a target costs on paper, and the shapes it returns, before anything is timed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from attnsurgeon.bench.exported import is_of_onnxruntime, session_for
from attnsurgeon.bench.inputs import cast_inputs
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
        parameters: gates included; None for a file that another runtime holds, such as .onnx,
            whose constants are not told apart.
        macs: multiply-adds for one image of the compared size; None for such a file.
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
        BadOption: a file fixes an axis at another size.
        HostUnusable: the target does not run on such inputs.
    """
    own = cast_inputs(inputs, target)
    check_axes(target, own)
    try:
        if target.model is None:
            return Cost(None, None, _bytes_of(target.file), _run_file(target, own))
        outputs, count = _count(target.model, own)
    except Exception as error:
        if target.model is None and not _is_foreign(error):
            raise
        shapes = [tuple(part.shape) for part in own if isinstance(part, Tensor)]
        raise HostUnusable(
            f"{target.name} does not run on inputs of shape {shapes}: {first_line(error)}; "
            "give another --input-size"
        ) from error
    batch = next((part.shape[0] for part in own if isinstance(part, Tensor)), 1)
    parameters = sum(parameter.numel() for parameter in target.model.parameters())
    return Cost(
        parameters,
        count.macs // batch,
        _bytes_of(target.file),
        outputs,
        count.uncounted,
        count.weight_bytes,
        count.map_bytes // batch,
    )


def check_axes(target: Target, inputs: Inputs) -> None:
    """Refuse a shape that an exported file cannot take.

    Raises:
        BadOption: an axis is fixed at another size.
    """
    for part, fixed in zip(inputs, target.fixed, strict=False):
        if any(own not in (None, size) for own, size in zip(fixed, part.shape, strict=False)):
            takes = "x".join("N" if axis is None else str(axis) for axis in fixed)
            given = "x".join(str(axis) for axis in part.shape)
            raise BadOption(
                f"{target.name} takes inputs of {takes} only, not {given}; give --batch and "
                "--input-size that fit, or export it without --static"
            )


def _count(model: nn.Module, inputs: Inputs) -> tuple[tuple[Shape, ...], Count]:
    if not isinstance(model, torch.jit.ScriptModule):
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
        weights = [*model.parameters(), *model.buffers()]
        output, count = count_call(lambda: model(*inputs), weights)
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return tuple(tuple(leaf.shape) for leaf in leaves), count


def _is_foreign(error: Exception) -> bool:
    """Tell whether a runtime raised this, and not a mistake of ours."""
    return is_of_onnxruntime(error) or type(error) is RuntimeError


def _run_file(target: Target, inputs: Inputs) -> tuple[Shape, ...]:
    assert target.file is not None  # a target without a module is a file
    if target.file.suffix.lower() == ".pt2":
        outputs = tree_leaves(load_package(target.file, {})(*inputs))
        return tuple(tuple(leaf.shape) for leaf in outputs if isinstance(leaf, Tensor))
    session = session_for(target.file, is_optimised=False)
    names = [node.name for node in session.get_inputs()]
    feed = {name: part.numpy() for name, part in zip(names, inputs, strict=True)}
    return tuple(tuple(array.shape) for array in session.run(None, feed))


def _bytes_of(file: Path | None) -> int | None:
    if file is None:
        return None
    size = file.stat().st_size
    if file.suffix.lower() == ".onnx":
        import onnx

        graph = onnx.load(str(file), load_external_data=False).graph
        beside = {
            entry.value
            for tensor in graph.initializer
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
