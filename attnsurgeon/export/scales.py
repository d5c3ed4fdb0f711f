"""Write what attention multiplies, and what is added to that, as one operator.

`x + y * s` is two passes over maps, `addcmul` is one. Compilers fuse such chains themselves; what
runs a graph as it is written does not. The gate's own `(1 - g) + g * a` has the same form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

if TYPE_CHECKING:
    from torch.export import ExportedProgram  # 0.1 s that only an export need wait for

_ATEN = torch.ops.aten
_ADD, _ADD_IN_PLACE, _MUL = _ATEN.add.Tensor, _ATEN.add_.Tensor, _ATEN.mul.Tensor


def join_scales(program: ExportedProgram) -> int:
    """Rewrite sums of a product that nothing else reads as one operator each; return how many."""
    joined = [node for node in program.graph.nodes if _join(node)]
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return len(joined)


def _join(node: Node) -> bool:
    """Let a sum do the multiplication as well, where it can."""
    if node.kwargs or len(node.args) != 2:
        return False
    # A sum in place must write into the product: into anything else it could be read again.
    orders: dict[Any, Any] = {_ADD: (node.args, node.args[::-1]), _ADD_IN_PLACE: (node.args,)}
    for product, other in orders.get(node.target, ()):
        if _is_own_product(product, node) and isinstance(other, Node):
            factors = product.args
            if len({_dtype(part) for part in (other, *factors)}) == 1:
                node.target, node.args = _ATEN.addcmul.default, (other, *factors)
                return True
    return False


def _is_own_product(product: Any, reader: Node) -> bool:
    """Tell whether this is a product of tensors that can as well be taken where it is read."""
    if not isinstance(product, Node) or product.target is not _MUL or product.kwargs:
        return False
    if len(product.users) > 1 or not all(isinstance(part, Node) for part in product.args):
        return False
    return not is_written_between(product, reader)  # perhaps into one of the factors


def is_written_between(first: Node, last: Node) -> bool:
    """Tell whether anything between two nodes may change a tensor that was there before it."""
    step = first.next
    while step is not last:
        if _writes(step):
            return True
        step = step.next
    return False


def _writes(node: Node) -> bool:
    """Tell whether a node may change a tensor that was there before it."""
    if node.op != "call_function":
        return node.op not in ("placeholder", "get_attr")
    schema = getattr(node.target, "_schema", None)
    return schema is None or bool(schema.is_mutable)


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None
