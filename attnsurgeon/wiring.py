"""Wire attention into the forward of one residual block, and take it out again.

The block keeps its object, its attributes, its children and so all its keys; only its class is
exchanged for a subclass whose forward is the block's own, traced symbolically with every child
as a leaf (so that train and eval stay the children's business), with calls of the attention
spliced into it. `isinstance` holds, names are natural everywhere (state dicts, named_parameters,
distributed checkpoints), and unwiring is handing the class back. A block's forward that cannot be
traced can still be followed by attention (`post`).
"""

from __future__ import annotations

import copy
import itertools
import linecache
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attnsurgeon.errors import PlacementUnavailable

_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_ADD_METHODS = ("add", "add_")
_ACTIVATIONS = (F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.leaky_relu, F.elu, torch.relu)
_ACTIVATION_METHODS = ("relu", "relu_")


@dataclass(frozen=True)
class Splice:
    """One attention in a block: the child's name, where it goes, and for `conv` the convolution.

    `conv` is the dotted path of the convolution relative to the block, `tail` how many of the
    steps after it (norm, activation) belong to it. `passed` names the children that hand their
    input through in eval mode (stochastic depth): attention on the branch belongs before them.
    """

    child: str
    placement: str
    conv: str | None = None
    tail: int = 0
    passed: tuple[str, ...] = ()


class _Tracer(fx.Tracer):
    """Trace a block's own forward; step only into the children on the way to one convolution."""

    def __init__(self, open_paths: Iterable[str] = ()) -> None:
        super().__init__()
        self.open_paths = set(open_paths)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.open_paths


def own_class(block: nn.Module) -> type[nn.Module]:
    """Return the class of a block as its author wrote it."""
    return cast("type[nn.Module]", getattr(type(block), "_host_class", type(block)))


def splices(block: nn.Module) -> tuple[Splice, ...]:
    """Return the attention wired into this very block, in the order of insertion."""
    return cast("tuple[Splice, ...]", block.__dict__.get("_splices", ()))


def trace_own_forward(block: nn.Module, convs: Iterable[str] = ()) -> fx.Graph:
    """Return the graph of the block's own forward, as its author wrote it.

    Raises:
        PlacementUnavailable: it cannot be traced, or differs between train and eval mode.
    """
    host = own_class(block)
    probe = host.__new__(host)
    probe.__dict__ = dict(block.__dict__)  # the same children under the author's class
    codes = []
    for training in (not block.training, block.training):
        probe.__dict__["training"] = training
        try:
            graph = _Tracer(_ancestors(convs)).trace(probe)
        except Exception as error:
            first = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            raise PlacementUnavailable(
                f"the forward of {host.__name__} cannot be traced: {first}"
            ) from error
        codes.append(graph.python_code("self").src)
    if codes[0] != codes[1]:
        raise PlacementUnavailable(
            f"the forward of {host.__name__} is not the same in train and eval mode"
        )
    return graph


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
        shared = [
            n for n in graph.nodes if n.op == "placeholder" and n in roots[0] and n in roots[1]
        ]
        if not shared:
            continue
        work = [_work(block, ancestry) for ancestry in roots]
        first_is_branch = work[0] >= work[1]
        branch, shortcut = operands if first_is_branch else operands[::-1]
        while (
            branch.op == "call_module" and branch.target in set(passed) and len(branch.users) == 1
        ):
            branch = branch.all_input_nodes[0]
        return Anatomy(node, branch, shortcut, shared[0])
    return None


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    function = node.op == "call_function" and node.target in _ADD_FUNCTIONS
    method = node.op == "call_method" and node.target in _ADD_METHODS
    if (function or method) and len(node.args) == 2 and not node.kwargs:
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


@dataclass(frozen=True)
class _Edge:
    """From one node to some of its consumers; `beside` is a second input of what is spliced in."""

    start: fx.Node
    ends: tuple[fx.Node, ...]
    beside: fx.Node | None = None


def check_place(block: nn.Module, splice: Splice) -> None:
    """Refuse a place that the block's forward does not have.

    Raises:
        PlacementUnavailable: with the reason.
    """
    if splice.placement != "post":
        graph = trace_own_forward(block, [splice.conv] if splice.conv else [])
        _edge(graph, dissect(block, graph, splice.passed), splice)


def wire(block: nn.Module, wanted: tuple[Splice, ...]) -> None:
    """Give the block a forward in which the attention children of `wanted` are called, in order.

    The children themselves must already be there. An empty `wanted` hands the class back.

    Raises:
        PlacementUnavailable: the forward has no such place.
    """
    host = own_class(block)
    if not wanted:
        block.__class__ = host
        block.__dict__.pop("_splices", None)
        return
    forward = _forward(block, wanted)
    members = {
        "forward": forward,
        "_host_class": host,
        "__deepcopy__": _deepcopy,
        "__reduce_ex__": _reduce,
        "__module__": host.__module__,
        "__qualname__": host.__qualname__,
        "__doc__": host.__doc__,
    }
    block.__class__ = type(host.__name__, (host,), members)
    block.__dict__["_splices"] = wanted


def _deepcopy(block: nn.Module, memo: dict[int, Any]) -> nn.Module:
    twin = type(block).__new__(type(block))
    memo[id(block)] = twin
    twin.__dict__.update(copy.deepcopy(block.__dict__, memo))
    return twin


def _reduce(block: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickle as the author's class, the wiring and the state; the forward is traced anew."""
    return _revive, (own_class(block), dict(block.__dict__))


def _revive(host: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    block = host.__new__(host)
    block.__setstate__(state)
    wire(block, splices(block))
    return block


def _forward(block: nn.Module, wanted: tuple[Splice, ...]) -> Callable[..., Any]:
    try:
        return _spliced_forward(block, wanted)
    except PlacementUnavailable:
        if any(splice.placement != "post" for splice in wanted):
            raise
        return _followed_forward(own_class(block), [splice.child for splice in wanted])


def _followed_forward(host: type[nn.Module], children: list[str]) -> Callable[..., Any]:
    """Return a forward that runs a block nobody can trace, then its attention."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = host.forward(self, *args, **kwargs)
        for child in children:
            out = getattr(self, child)(out)
        return out

    return forward


def _spliced_forward(block: nn.Module, wanted: tuple[Splice, ...]) -> Callable[..., Any]:
    graph = trace_own_forward(block, [splice.conv for splice in wanted if splice.conv])
    anatomies = {names: dissect(block, graph, names) for names in {s.passed for s in wanted}}
    # Every place is found in the block as it was written before the first is filled.
    edges = [_edge(graph, anatomies[splice.passed], splice) for splice in wanted]
    order = {node: i for i, node in enumerate(graph.nodes)}
    reached: dict[tuple[fx.Node, tuple[fx.Node, ...]], fx.Node] = {}
    for splice, edge in zip(wanted, edges, strict=True):
        key = (edge.start, edge.ends)
        current = reached.get(key, edge.start)
        with graph.inserting_before(min(edge.ends, key=order.__getitem__)):
            args = (current,) if edge.beside is None else (edge.beside, current)
            attended = graph.call_module(splice.child, args)
        for end in edge.ends:
            end.replace_input_with(current, attended)
        reached[key] = attended
    return _compile(graph, own_class(block).__name__)


def _edge(graph: fx.Graph, anatomy: Anatomy | None, splice: Splice) -> _Edge:
    """Return the edge of the graph that a placement names."""
    if splice.placement == "post":
        output = next(node for node in graph.nodes if node.op == "output")
        if not isinstance(output.args[0], fx.Node):
            raise PlacementUnavailable("the block does not return one tensor")
        return _Edge(output.args[0], (output,))
    if splice.placement in ("conv", "replace"):
        return _edge_at_conv(graph, splice)
    if anatomy is None:
        raise PlacementUnavailable("the block adds no two paths from one input")
    if splice.placement == "standard":
        way = ancestry(anatomy.addition)
        return _Edge(anatomy.branch, tuple(user for user in anatomy.branch.users if user in way))
    if splice.placement == "identity":
        return _Edge(anatomy.shortcut, (anatomy.addition,))
    heads = branch_heads(anatomy)
    if not heads:
        raise PlacementUnavailable("the branch does not start at the block's input")
    return _Edge(anatomy.source, tuple(heads))


def _edge_at_conv(graph: fx.Graph, splice: Splice) -> _Edge:
    conv = find_conv(graph, splice.conv or "")
    if conv is None:
        raise PlacementUnavailable("the block calls no spatial convolution exactly once")
    tail = conv
    for _ in range(splice.tail):
        tail = next(iter(tail.users))
    beside = conv.all_input_nodes[0] if splice.placement == "replace" else None
    return _Edge(tail, tuple(tail.users), beside)


_sources = itertools.count()


def _compile(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """Return the graph as a function whose source can be read (by TorchScript, by a debugger)."""
    code = graph.python_code("self")
    filename = f"<attention wired into {name} {next(_sources)}>"
    scope = dict(code.globals)
    exec(compile(code.src, filename, "exec"), scope)  # the source comes from the block itself
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(True), filename)
    return cast("Callable[..., Any]", scope["forward"])
