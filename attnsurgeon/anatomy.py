"""Read the own forward of a residual block: trace it, and find branch, shortcut and convolution."""

from __future__ import annotations

import copy
import math
import operator
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attnsurgeon.blocks.block import AttentionBlock
from attnsurgeon.borrow import borrowed_buffers
from attnsurgeon.errors import PlacementUnavailable, first_line

_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_ADD_METHODS = ("add", "add_")
_ACTIVATIONS = (F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.leaky_relu, F.elu, torch.relu)
_ACTIVATION_METHODS = ("relu", "relu_")


class _Tracer(fx.Tracer):
    """Trace a block's own forward; step only into the children on the way to one convolution."""

    def __init__(self, open_paths: Iterable[str] = (), wrapped: tuple[Any, ...] = ()) -> None:
        super().__init__(autowrap_modules=wrapped)
        self.open_paths = set(open_paths)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.open_paths


def own_class(block: nn.Module) -> type[nn.Module]:
    """Return the class of a block as its author wrote it."""
    return cast("type[nn.Module]", getattr(type(block), "_host_class", type(block)))


def trace_own_forward(block: nn.Module, convs: Iterable[str] = ()) -> fx.Graph:
    """Return the graph of the block's own forward, as its author wrote it.

    The forward runs on copies of the block's own buffers and collections, so that the block and
    the random generators are as before.

    Raises:
        PlacementUnavailable: it cannot be traced, or a trace would not be all that it does: it
            differs between train and eval mode, draws random numbers, keeps or makes tensors.
    """
    codes = []
    for training in (not block.training, block.training):
        graph = _trace(block, training, _ancestors(convs))
        codes.append(graph.python_code("self").src)
    if codes[0] != codes[1]:
        raise PlacementUnavailable(f"{_the_forward(block)} is not the same in train and eval mode")
    return graph


def _trace(block: nn.Module, training: bool, open_paths: set[str]) -> fx.Graph:
    try:
        return _trace_once(block, training, open_paths)
    except PlacementUnavailable:
        # Wrapping all of math takes longer than the rest of a trace, and hardly any needs it.
        return _trace_once(block, training, open_paths, (math,))


def _trace_once(
    block: nn.Module, training: bool, open_paths: set[str], wrapped: tuple[Any, ...] = ()
) -> fx.Graph:
    probe, copies = _probe(block, training)
    before = torch.get_rng_state(), random.getstate()
    try:
        with borrowed_buffers(block):
            graph = _Tracer(open_paths, wrapped).trace(probe)
        drew = not torch.equal(before[0], torch.get_rng_state()) or before[1] != random.getstate()
    except Exception as error:
        raise PlacementUnavailable(
            f"{_the_forward(block)} cannot be traced: {first_line(error)}"
        ) from error
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
    if drew:
        raise PlacementUnavailable(f"{_the_forward(block)} draws random numbers")
    if any(not _unchanged(copied, block.__dict__[name]) for name, copied in copies.items()):
        raise PlacementUnavailable(f"{_the_forward(block)} changes what the block holds")
    if any("_tensor_constant" in str(node.target) for node in graph.nodes):
        raise PlacementUnavailable(f"{_the_forward(block)} makes tensors of its own")
    return graph


def _the_forward(block: nn.Module) -> str:
    return f"the forward of {own_class(block).__name__}"


def _probe(block: nn.Module, training: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Return the block under its author's class, and copies of what its forward could change."""
    host = own_class(block)
    probe = host.__new__(host)
    copies = {
        name: copy.copy(value)
        for name, value in block.__dict__.items()
        if isinstance(value, list | dict | set) and (name == "_buffers" or name[:1] != "_")
    }
    copies["_buffers"] = {
        name: None if buffer is None else buffer.clone() for name, buffer in block._buffers.items()
    }
    children = {n: m for n, m in block._modules.items() if not isinstance(m, AttentionBlock)}
    probe.__dict__ = {**block.__dict__, **copies, "_modules": children, "training": training}
    return probe, copies


def _unchanged(copied: Any, held: Any) -> bool:
    """Compare a collection with its copy; tensors by value, all else by being the same thing."""
    if len(copied) != len(held):
        return False
    if isinstance(held, set):
        return bool(copied == held)
    keys = list(held) if isinstance(held, dict) else range(len(held))
    if isinstance(held, dict) and list(copied) != keys:
        return False
    return all(
        torch.equal(copied[key], held[key])
        if isinstance(held[key], Tensor) and isinstance(copied[key], Tensor)
        else copied[key] is held[key]
        for key in keys
    )


def _ancestors(convs: Iterable[str]) -> set[str]:
    parts = [path.split(".") for path in convs]
    return {".".join(names[:i]) for names in parts for i in range(1, len(names))}


@dataclass(frozen=True)
class Anatomy:
    """The parts of a residual block's graph: the addition, its operands, what feeds both."""

    addition: fx.Node
    branch: fx.Node
    shortcut: fx.Node
    source: fx.Node


def dissect(block: nn.Module, graph: fx.Graph, passed: Iterable[str]) -> Anatomy | None:
    """Find the last addition of two paths from one input; the branch computes more.

    `passed` names the children that hand their input through in eval mode: the end of the branch
    is before them. Returns None where there is no such addition.
    """
    for node in reversed(list(graph.nodes)):
        operands = _operands(node)
        if operands is None:
            continue
        roots = [ancestry(operand) for operand in operands]
        shared = [n for n in graph.nodes if _is_input(n) and n in roots[0] and n in roots[1]]
        if not shared:
            continue
        work = [_work(block, ancestry) for ancestry in roots]
        first_is_branch = work[0] >= work[1]
        branch, shortcut = operands if first_is_branch else operands[::-1]
        while (
            branch.op == "call_module" and branch.target in set(passed) and len(branch.users) == 1
        ):
            branch = branch.all_input_nodes[0]
        # A second addition in one block has its own branch, which starts where the first one ends.
        source = shortcut if shortcut in ancestry(branch) else shared[0]
        return Anatomy(node, branch, shortcut, source)
    return None


def _is_input(node: fx.Node) -> bool:
    return node.op == "placeholder" and not str(node.target).startswith("*")


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    function = node.op == "call_function" and node.target in _ADD_FUNCTIONS
    method = node.op == "call_method" and node.target in _ADD_METHODS
    if (function or method) and len(node.args) == 2 and set(node.kwargs) <= {"alpha"}:
        left, right = node.args
        if isinstance(left, fx.Node) and isinstance(right, fx.Node) and left is not right:
            return left, right
    return None


def ancestry(node: fx.Node) -> set[fx.Node]:
    """Return the node and everything it is computed from."""
    seen = {node}
    todo = [node]
    while todo:
        for parent in todo.pop().all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                todo.append(parent)
    return seen


def _work(block: nn.Module, ancestry: set[fx.Node]) -> tuple[int, int]:
    """Count the weight matrices and kernels on a path, then their numbers: a branch has more."""
    weights = [
        parameter.numel()
        for node in ancestry
        if node.op == "call_module"
        for parameter in block.get_submodule(str(node.target)).parameters()
        if parameter.ndim > 1
    ]
    return len(weights), sum(weights)


def branch_heads(anatomy: Anatomy) -> list[fx.Node]:
    """Return the nodes that take the block's input on the branch and not on the shortcut."""
    branch = ancestry(anatomy.branch)
    shortcut = ancestry(anatomy.shortcut)
    return [
        user
        for user in anatomy.source.users
        if user in branch and user not in shortcut and user is not anatomy.addition
    ]


def find_conv(graph: fx.Graph, conv: str) -> fx.Node | None:
    """Return the one call of a child in the graph, or None if there is none or more than one."""
    calls = [n for n in graph.nodes if n.op == "call_module" and n.target == conv]
    return calls[0] if len(calls) == 1 else None


def find_tail(
    block: nn.Module, node: fx.Node, same_shape: Callable[[str], bool]
) -> tuple[fx.Node, int]:
    """Follow a convolution through its norm and activation; return the last node and the steps."""
    steps = 0
    for is_part in (_is_norm, _is_activation):
        user = next(iter(node.users)) if len(node.users) == 1 else None
        if user is not None and is_part(block, user, same_shape):
            node, steps = user, steps + 1
    return node, steps


def _is_norm(block: nn.Module, node: fx.Node, same_shape: Callable[[str], bool]) -> bool:
    if node.op != "call_module" or not same_shape(str(node.target)):
        return False
    parameters = list(block.get_submodule(str(node.target)).parameters())
    return bool(parameters) and all(parameter.ndim == 1 for parameter in parameters)


def _is_activation(block: nn.Module, node: fx.Node, same_shape: Callable[[str], bool]) -> bool:
    if node.op == "call_module":
        module = block.get_submodule(str(node.target))
        return same_shape(str(node.target)) and not list(module.parameters())
    if node.op == "call_function":
        return node.target in _ACTIVATIONS
    return node.op == "call_method" and node.target in _ACTIVATION_METHODS
