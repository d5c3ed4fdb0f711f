"""Keep what attention adds, one number per channel, out of the way of a convolution's addition.

Runtimes compute `relu(conv(z) + x)` at once, the addition included; `relu((conv(z) + t) + x)` they
do not. So t, small as it is, joins the shortcut: `conv(z) + (x + t)`. Where t is a gate times a
convolution, the gate goes into its weights, `g (V h + b) = (g V) h + g b`, which a runtime
multiplies once, when it loads the file; the gate keeps its name and may have any value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from attnsurgeon.export.scales import is_written_between

if TYPE_CHECKING:
    from torch.export import ExportedProgram  # 0.1 s that only an export need wait for

_ATEN = torch.ops.aten
_CONV, _ADD, _MUL = _ATEN.conv2d.default, _ATEN.add.Tensor, _ATEN.mul.Tensor


def move_terms(program: ExportedProgram) -> int:
    """Rewrite `(y + t) + x` as `y + (x + t)` where y is of a convolution; return how often."""
    count = sum(_join_shortcut(node) for node in list(program.graph.nodes) if _is_term_added(node))
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return count


def gate_weights(program: ExportedProgram) -> int:
    """Move gates that scale a small convolution's result into its weights; return how many.

    It pays where the product is computed once, when a file is loaded, and not in every run.
    """
    gates = {
        name
        for name, path in program.graph_signature.inputs_to_parameters.items()
        if path.endswith(".openness")
    }
    found = [node for node in program.graph.nodes if _is_gated_convolution(node, gates)]
    for node in found:
        _gate_weights(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return len(found)


def _is_term_added(node: Node) -> bool:
    """Tell whether this adds one number per channel to a convolution's result, for one reader."""
    if node.target is not _ADD or node.kwargs or len(node.users) != 1:
        return False
    first, term = node.args[:2]
    if not isinstance(first, Node) or not isinstance(term, Node) or first.target is not _CONV:
        return False
    shape, whole = term.meta["val"].shape, node.meta["val"].shape
    is_vector = len(shape) == 4 and tuple(shape[2:]) == (1, 1) and shape[1] == whole[1]
    return is_vector and len(first.users) == 1


def _join_shortcut(node: Node) -> bool:
    """Let the term be added to what the sum is added to next, if it is a map of the same shape."""
    after = next(iter(node.users))
    if after.target not in (_ADD, _ATEN.add_.Tensor) or after.kwargs or len(after.args) != 2:
        return False
    # The term is read later then, and a sum in place must write into what nothing else reads.
    if is_written_between(node, after) or (after.target is not _ADD and after.args[0] is not node):
        return False
    shortcut: Any = after.args[1] if after.args[0] is node else after.args[0]
    if not isinstance(shortcut, Node) or shortcut is node:
        return False
    if shortcut.meta["val"].shape != node.meta["val"].shape:
        return False
    branch, term = node.args[:2]
    with after.graph.inserting_before(after):
        moved = after.graph.call_function(_ADD, (shortcut, term))
    moved.meta.update(node.meta)
    after.target, after.args = _ADD, (branch, moved)
    node.graph.erase_node(node)
    return True


def _is_gated_convolution(node: Node, gates: set[str]) -> bool:
    """Tell whether this is a gate times the result of a convolution that nothing else reads."""
    if node.target is not _MUL or node.kwargs:
        return False
    gate, conv = node.args
    if not isinstance(gate, Node) or not isinstance(conv, Node) or gate.name not in gates:
        return False
    # A map of its own size: of a large one, the product with the weights would save nothing.
    is_small = tuple(node.meta["val"].shape[2:]) == (1, 1)
    same = gate.meta["val"].dtype == conv.meta["val"].dtype
    return conv.target is _CONV and len(conv.users) == 1 and is_small and same


def _gate_weights(node: Node) -> None:
    gate, conv = node.args
    assert isinstance(conv, Node)
    with node.graph.inserting_before(conv):
        scaled = []
        for held in conv.args[1:3]:
            if held is not None:
                assert isinstance(gate, Node)
                assert isinstance(held, Node)
                product = node.graph.call_function(_MUL, (gate, held))
                product.meta["val"] = gate.meta["val"] * held.meta["val"]
                held = product
            scaled.append(held)
    conv.args = (conv.args[0], *scaled, *conv.args[3:])
    node.replace_all_uses_with(conv)
    node.graph.erase_node(node)
