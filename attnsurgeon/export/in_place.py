"""Scale and add attention within the maps that it changes, where nobody reads what was there.

The system hands out new memory page by page: at batch 8, a new map of 25 MB for every product, sum
and activation costs more than their arithmetic. A frozen TorchScript file may say `add_`, `mul_`
and `relu_`, but where torch optimises the file it makes new maps of these again, so that oneDNN can
take them. What computes the very same under another name stays as it is written: `x - (-1) y`,
`mul` into its own factor, `clamp_min_` at 0. Only TorchScript runs a graph as it is written, one
operator after the other: compilers choose memory themselves.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

if TYPE_CHECKING:
    from torch.export import ExportedProgram  # 0.1 s that only an export need wait for

_ATEN = torch.ops.aten
_CONV, _MUL = _ATEN.conv2d.default, _ATEN.mul.Tensor
_ADD, _ADD_INTO = _ATEN.add.Tensor, _ATEN.add_.Tensor
_ADDCMUL, _RELU, _RELU_INTO = _ATEN.addcmul.default, _ATEN.relu.default, _ATEN.relu_.default

_INTO = {_ATEN.addcmul_.default, _ATEN.sub_.Tensor, _ATEN.mul.out, _ATEN.clamp_min_.default}
"""What is written here: it returns the map that it was given first."""
_NEW = {_CONV, _ATEN.conv3d.default, _MUL, _ADD, _ADDCMUL, _RELU, _ATEN.max_pool2d.default}
"""Operators that return new memory; others may return what they were given, like dropout."""
_READ = {_ATEN.mean.dim, _ATEN.amax.default, _ATEN.adaptive_avg_pool2d.default, _ATEN.cat.default}
_READ |= {_ATEN.matmul.default}
"""More operators that keep no hold on what they read."""
_VIEW = {_ATEN.flatten.using_ints, _ATEN.transpose.int, _ATEN.unsqueeze.default}
"""Operators that return the memory of their first argument, perhaps in another order."""


def reuse_maps(program: ExportedProgram) -> int:
    """Write attention's products and sums, and the activations after, into maps that are free.

    Returns:
        How many operators were exchanged.
    """
    count = sum(_reuse(node) for node in program.graph.nodes)
    program.graph_module.recompile()
    return count


def _reuse(node: Node) -> bool:
    if node.kwargs or not node.args or not isinstance(node.args[0], Node):
        return False
    first: Any = node.args[0]
    if node.target is _ADDCMUL and _is_free(first, node):
        node.target = _ATEN.addcmul_.default
    elif node.target is _MUL and _is_vector(node.args[1], node) and _is_free(first, node):
        node.target, node.kwargs = _ATEN.mul.out, {"out": first}
    elif node.target in (_ADD, _ADD_INTO):
        return _add_into(node)
    elif _is_written(first) and (
        node.target is _RELU_INTO or (node.target is _RELU and _is_free(first, node))
    ):
        node.target, node.args = _ATEN.clamp_min_.default, (first, 0)
    else:
        return False
    return True


def _add_into(node: Node) -> bool:
    """Add into a term that attention has written already, or into the map that a vector joins.

    Two maps of which neither is so are a convolution's and its shortcut's, which oneDNN adds.
    """
    for held, other in (node.args, node.args[::-1]):
        if not isinstance(held, Node) or not isinstance(other, Node):
            return False
        # What a sum in place was to write into is then left as it was.
        if node.target is _ADD_INTO and held is not node.args[0] and not _is_free(other, node):
            continue
        if (_is_written(held) or _is_vector(other, node)) and _is_free(held, node):
            node.target, node.args, node.kwargs = _ATEN.sub_.Tensor, (held, other), {"alpha": -1}
            return True
    return False


def _is_written(node: Node) -> bool:
    return node.target in _INTO


def _is_vector(part: Any, whole: Node) -> bool:
    """Tell whether this is one number for each channel, or for each pixel, of a map."""
    if not isinstance(part, Node):
        return False
    own, other = (node.meta.get("val") for node in (part, whole))
    if not isinstance(own, torch.Tensor) or not isinstance(other, torch.Tensor) or other.ndim != 4:
        return False
    shape = tuple(own.shape)
    return own.ndim == 4 and (shape[2:] == (1, 1) or shape[1] == 1) and shape != tuple(other.shape)


def _is_free(held: Any, writer: Node) -> bool:
    """Tell whether the writer may use this map's memory: it fits, and nobody reads it later."""
    if not isinstance(held, Node) or not _is_alike(held, writer):
        return False
    names = _names_of(held)
    if names[-1].target not in _NEW:
        return False
    views = _views_of(names)
    if views & set(writer.all_input_nodes):  # in another order, it would be read as it changes
        return False
    readers = {reader for name in (*names, *views) for reader in name.users} - {writer, *names}
    known = all(reader.target in _NEW | _READ | _INTO | _VIEW for reader in readers)
    return known and not readers & _after(writer)


def _views_of(names: Collection[Node]) -> set[Node]:
    """Return the other nodes that stand for this memory, also as a network's code wrote into it."""
    found: set[Node] = set()
    ahead = list(names)
    while ahead:
        name = ahead.pop()
        made = {
            reader
            for reader in name.users
            if reader.target in _VIEW | _INTO and _memory_of(reader) is name
        }
        ahead += made - found
        found |= made
    return found - set(names)


def _names_of(held: Node) -> list[Node]:
    """Return all nodes that stand for the same memory, back to the one that made it."""
    names = [held]
    while names[-1].target in {*_INTO, _RELU_INTO, _ADD_INTO}:
        first = _memory_of(names[-1])
        assert isinstance(first, Node)
        names.append(first)
    return names


def _memory_of(node: Node) -> Any:
    """Return what a view is of, or what an operator writes into."""
    return node.kwargs.get("out", node.args[0])


def _after(node: Node) -> set[Node]:
    found = set()
    while (node := node.next).op != "root":
        found.add(node)
    return found


def _is_alike(one: Node, other: Node) -> bool:
    first, second = (node.meta.get("val") for node in (one, other))
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return False
    return first.dtype == second.dtype and str(first.shape) == str(second.shape)
