"""Fold norms into the convolutions before them, in a program of torch.export.

In eval mode a batch norm is `(y - mean) * scale + shift` with `scale = weight / sqrt(var + eps)`,
channel by channel; after a convolution it is the same convolution with the weight times `scale` and
the bias `(bias - mean) * scale + shift`. A third of the nodes of a residual network go that way
before they are translated.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Node

if TYPE_CHECKING:
    from torch.export import ExportedProgram  # 0.1 s that only an export need wait for

_CONVOLUTIONS = (
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.conv2d.padding,
    torch.ops.aten.conv3d.default,
)
_AT_ONCE = 2**20
"""Numbers of a weight that stand in memory in float64: large ones have 50 times as many."""
_NORM = torch.ops.aten.batch_norm.default


def fold_norms(program: ExportedProgram, kept: Collection[str] = ()) -> int:
    """Fold each norm that alone reads a convolution with weights of its own; return how many.

    The program's own tensors change; those of the model that it was made from do not. Tensors of
    the names in `kept` stay as they are: a norm can be a gate, which is found by its name.
    """
    graph = program.graph
    names = names_in_state(program)
    free = {node: path for node, path in names.items() if path not in kept}
    norms = [node for node in graph.nodes if node.target is _NORM and _can_fold(node, free)]
    read = {node.name for node in graph.nodes if node.name in names and node.users}
    for norm in norms:
        _fold(program, norm, names)
    # What nothing read before stays: the second name of a module that stands in two places.
    unread = {node.name for node in graph.nodes if node.name in read and not node.users}
    for node in [node for node in graph.nodes if node.name in unread]:
        graph.erase_node(node)
    signature = program.graph_signature
    signature.input_specs = [s for s in signature.input_specs if s.arg.name not in unread]
    for name in unread:  # else they would stay in a file of the program
        program.state_dict.pop(names[name])
    program.graph_module.recompile()
    return len(norms)


def names_in_state(program: ExportedProgram) -> dict[str, str]:
    """Return node -> path of what the state dict holds; buffers that are not saved are not."""
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {node: path for node, path in named.items() if path in program.state_dict}


def _can_fold(norm: Node, names: dict[str, str]) -> bool:
    """Tell whether the norm is in eval mode, and nothing else reads what folding changes."""
    conv, *tensors = norm.args[:5]
    if norm.args[5] or not isinstance(conv, Node) or conv.target not in _CONVOLUTIONS:
        return False
    bias = conv.args[2] if len(conv.args) > 2 else None
    held: list[Any] = [conv.args[1], *tensors, *([] if bias is None else [bias])]
    are_own = all(isinstance(t, Node) and t.name in names and len(t.users) == 1 for t in held)
    # Norms that were kept in float32 would give the convolution a bias that it cannot add.
    return (
        are_own
        and len({tensor.meta["val"].dtype for tensor in held}) == 1
        and len(conv.users) == 1
        and not conv.kwargs
    )


def _fold(program: ExportedProgram, norm: Node, names: dict[str, str]) -> None:
    conv: Any = norm.args[0]
    tensors: Any = norm.args[1:5]
    eps: Any = norm.args[7]
    state = program.state_dict
    weight, shift, mean, var = (state[names[node.name]].double() for node in tensors)
    scale = weight / (var + eps).sqrt()
    filters = names[conv.args[1].name]
    old = conv.args[2] if len(conv.args) > 2 else None
    bias = 0.0 if old is None else state[names[old.name]].double()
    _replace(state, filters, _scaled(state[filters], scale))
    # The norm's shift is where the bias of the folded convolution goes: it may have had none.
    _replace(state, names[tensors[1].name], (bias - mean) * scale + shift)
    conv.args = (*conv.args[:2], tensors[1], *conv.args[3:])
    norm.replace_all_uses_with(conv)
    norm.graph.erase_node(norm)


@torch.no_grad()
def _scaled(filters: Tensor, scale: Tensor) -> Tensor:
    """Return filters, each times its scale in float64, some of them at a time."""
    scaled = torch.empty_like(filters)
    count = max(1, _AT_ONCE // filters[0].numel())
    per_filter = scale.reshape(-1, *[1] * (filters.ndim - 1))
    parts = (tensor.split(count) for tensor in (scaled, filters, per_filter))
    for whole, part, factors in zip(*parts, strict=True):
        whole.copy_(part.double() * factors)
    return scaled


def _replace(state: dict[str, Any], name: str, value: Tensor) -> None:
    state[name] = nn.Parameter(value.detach().to(state[name].dtype), requires_grad=False)
