"""Read the graph of a residual block's own forward: find branch, shortcut and convolution."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import fx, nn

_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_ADD_METHODS = ("add", "add_")
_ACTIVATIONS = (F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.leaky_relu, F.elu, torch.relu)
_ACTIVATION_METHODS = ("relu", "relu_")


def own_class(block: nn.Module) -> type[nn.Module]:
    """Return the class of a block as its author wrote it."""
    return cast("type[nn.Module]", getattr(type(block), "_host_class", type(block)))


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
