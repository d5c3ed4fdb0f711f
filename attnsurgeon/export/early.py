"""Let attention read the map before the last 1x1 convolution instead of its result.

A 1x1 convolution `y = W z + b` treats every position alike, so it commutes with a mean over
positions, and with any other sum of them whose weights add up to 1, as those of a softmax do. What
a second 1x1 convolution `R` makes of such a summary of y, or of y itself, is therefore
`(R W) summary(z) + (R b + r)`: in a bottleneck, z is a quarter of y. The product `R W` has fewer
numbers than `R`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from attnsurgeon.export.fold import names_in_state
from attnsurgeon.export.scales import is_written_between

if TYPE_CHECKING:
    from torch.export import ExportedProgram  # 0.1 s that only an export need wait for

_ATEN = torch.ops.aten
_CONV = _ATEN.conv2d.default
_WEIGHT, _BIAS = 1, 2
"""Places of the arguments of a convolution."""


def read_early(program: ExportedProgram, kept: Collection[str] = ()) -> int:
    """Rewire every reader of a widening 1x1 convolution's result that can be; return how many.

    The program's own tensors change; those of the model that it was made from do not. Tensors of
    the names in `kept` stay as they are: a gate is found by its name, and in its shape.
    """
    names = names_in_state(program)
    folded = {node: path for node, path in names.items() if path not in kept}
    count = 0
    for conv in [node for node in program.graph.nodes if _widens(node, folded, program)]:
        for user in list(conv.users):
            path = _path_to_reader(user, conv)
            if not path or len(conv.users) < 2 or is_written_between(conv, path[-1]):
                continue  # what the convolution read may be another map by then
            if _owns_weights(path[-1], folded):
                _rewire(program, conv, path, names)
                count += 1
    program.graph_module.recompile()
    return count


def _widens(node: Node, names: dict[str, str], program: ExportedProgram) -> bool:
    """Tell whether the node is a 1x1 convolution by weights of the program, to more channels."""
    if not _is_pointwise(node, names):
        return False
    weight = program.state_dict[names[_argument(node, _WEIGHT).name]]
    return bool(weight.shape[0] > weight.shape[1])


def _is_pointwise(node: Any, names: dict[str, str]) -> bool:
    """Tell whether this is a dense 1x1 convolution of stride 1, by weights of the program."""
    if not isinstance(node, Node) or node.target is not _CONV or node.kwargs:
        return False
    weight, bias = _argument(node, _WEIGHT), _argument(node, _BIAS)
    if weight.name not in names or (bias is not None and bias.name not in names):
        return False
    held = [*node.args[3:], *([1], [0], [1], 1)[len(node.args[3:]) :]]
    *axes, groups = held
    plain = [[1, 1], [0, 0], [1, 1]]
    same = [list(axis) * (2 // len(axis)) for axis in cast("list[list[int]]", axes)] == plain
    return same and bool(groups == 1) and tuple(weight.meta["val"].shape[2:]) == (1, 1)


def _owns_weights(reader: Node, names: dict[str, str]) -> bool:
    """Tell whether a reader has a weight and a bias that nothing else reads."""
    if not _is_pointwise(reader, names):
        return False
    held = [_argument(reader, _WEIGHT), _argument(reader, _BIAS)]
    return all(node is not None and len(node.users) == 1 for node in held)


def _argument(node: Node, place: int) -> Any:
    return node.args[place] if len(node.args) > place else None


def _path_to_reader(user: Node, conv: Node) -> list[Node]:
    """Return the nodes from one that reads a convolution's result to a next one; or none."""
    if user.target is _CONV and user.args[0] is conv:
        return [user]
    if user.target is _ATEN.mean.dim and _is_over_positions(user):
        return _alone(user, _CONV)
    if user.target is _ATEN.flatten.using_ints and user.args[1:] == (2,):
        start = _alone(user, _ATEN.matmul.default)
        if start and start[-1].args[0] is user and _adds_up_to_one(start[-1].args[1]):
            rest = _alone(start[-1], _ATEN.unsqueeze.default)
            last = _alone(rest[-1], _CONV) if rest and rest[-1].args[1] == 3 else []
            return [user, *rest, last[-1]] if last else []
    return []


def _alone(node: Node, wanted: Any) -> list[Node]:
    """Return the node and the one that reads it, if that is all and it is of the wanted kind."""
    users = list(node.users)
    is_fit = len(users) == 1 and users[0].target is wanted and users[0].args[0] is node
    return [node, users[0]] if is_fit else []


def _is_over_positions(mean: Node) -> bool:
    axes = {axis % 4 for axis in cast("list[int]", mean.args[1])}
    return axes == {2, 3} and mean.args[2:] == (True,) and not mean.kwargs


def _adds_up_to_one(weights: Any) -> bool:
    """Tell whether these are the weights of a softmax over positions, as a column."""
    if not isinstance(weights, Node) or weights.target is not _ATEN.transpose.int:
        return False
    source: Any = weights.args[0]
    is_softmax = isinstance(source, Node) and source.target is _ATEN.softmax.int
    return is_softmax and set(weights.args[1:]) == {1, 2} and source.args[1] in (2, -1)


def _rewire(program: ExportedProgram, conv: Node, path: list[Node], names: dict[str, str]) -> None:
    """Let the first of a path read what the convolution reads, and fold it into the last."""
    state = program.state_dict
    reader = path[-1]
    weight = state[names[_argument(conv, _WEIGHT).name]].double().flatten(1)
    own = _argument(conv, _BIAS)
    shift = torch.zeros(len(weight)).to(weight) if own is None else state[names[own.name]].double()
    held = [_argument(reader, place) for place in (_WEIGHT, _BIAS)]
    filters, bias = (state[names[node.name]].double() for node in held)
    values = ((filters.flatten(1) @ weight)[:, :, None, None], filters.flatten(1) @ shift + bias)
    for node, value in zip(held, values, strict=True):
        _replace(state, names[node.name], value)
        node.meta["val"] = node.meta["val"].new_empty(value.shape)
    path[0].replace_input_with(conv, cast("Node", conv.args[0]))
    for node in path[:-1]:  # what is said of their shapes goes into the file
        arguments = map_arg(node.args, lambda argument: argument.meta["val"])
        node.meta["val"] = cast("Any", node.target)(*arguments)


def _replace(state: dict[str, Any], name: str, value: Tensor) -> None:
    state[name] = nn.Parameter(value.detach().to(state[name].dtype), requires_grad=False)
