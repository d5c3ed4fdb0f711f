"""Wire attention into the forward of one residual block, and take it out again.

The block keeps its object, its attributes, its children and so all its keys; only its class is
exchanged for a subclass whose forward is the block's own, traced symbolically with every child
as a leaf (so that train and eval stay the children's business), with calls of the attention
spliced into it. `isinstance` holds, names are natural everywhere (state dicts, named_parameters,
distributed checkpoints), and unwiring is handing the class back. Plain attributes that a forward
reads are fixed where it was traced. Attention after the block (`post`) needs no trace at all.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import linecache
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import fx, nn

from attnsurgeon.anatomy import (
    Anatomy,
    ancestry,
    branch_heads,
    dissect,
    find_conv,
    own_class,
    trace_own_forward,
)
from attnsurgeon.errors import PlacementUnavailable


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


def splices(block: nn.Module) -> tuple[Splice, ...]:
    """Return the attention wired into this very block, in the order of insertion."""
    return cast("tuple[Splice, ...]", block.__dict__.get("_splices", ()))


@dataclass(frozen=True)
class _Edge:
    """From one node to some of its consumers; `beside` is a second input of what is spliced in."""

    start: fx.Node
    ends: tuple[fx.Node, ...]
    beside: fx.Node | None = None


def check_place(graph: fx.Graph, anatomy: Anatomy | None, splice: Splice) -> None:
    """Refuse a place inside a block that its graph does not have.

    Raises:
        PlacementUnavailable: with the reason.
    """
    _edge(graph, anatomy, splice)


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
    members = {
        **_forwards(block, wanted),
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


def _forwards(block: nn.Module, wanted: tuple[Splice, ...]) -> dict[str, Callable[..., Any]]:
    """Return the methods that run the block with its attention.

    Attention after the block needs no trace: it follows whatever the author's forward does, which
    goes on to read its attributes, draw its random numbers and keep what it keeps.
    """
    inside = tuple(splice for splice in wanted if splice.placement != "post")
    after = [splice.child for splice in wanted if splice.placement == "post"]
    own = _spliced_forward(block, inside) if inside else own_class(block).forward
    if not after:
        return {"forward": own}
    # TorchScript names a method by its function, and there must be one `forward`.
    renamed = types.FunctionType(
        own.__code__, own.__globals__, "_own_forward", own.__defaults__, own.__closure__
    )
    renamed.__kwdefaults__ = own.__kwdefaults__
    return {"_own_forward": renamed, "forward": _following_forward(own, after, block)}


def _following_forward(
    own: Callable[..., Any], children: list[str], block: nn.Module
) -> Callable[..., Any]:
    """Return a forward that runs the block's own, then attention; with its plain parameters."""
    parameters = list(inspect.signature(own).parameters.values())[1:]
    plain = all(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in parameters)
    names = ", ".join(p.name for p in parameters) if plain else "*args, **kwargs"
    lines = [f"def forward(self, {names}):", f"    out = self._own_forward({names})"]
    lines += [f"    out = self.{child}(out)" for child in children]
    return _compile("\n".join([*lines, "    return out", ""]), {}, own_class(block).__name__)


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
    code = graph.python_code("self")
    return _compile(code.src, code.globals, own_class(block).__name__)


def _edge(graph: fx.Graph, anatomy: Anatomy | None, splice: Splice) -> _Edge:
    """Return the edge of the graph that a placement names."""
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
        if len(tail.users) != 1:
            raise PlacementUnavailable(f"{splice.conv} is not followed by {splice.tail} steps")
        tail = next(iter(tail.users))
    beside = conv.all_input_nodes[0] if splice.placement == "replace" else None
    return _Edge(tail, tuple(tail.users), beside)


_sources = itertools.count()


def _compile(source: str, scope: Mapping[str, Any], name: str) -> Callable[..., Any]:
    """Return the function whose source this is, where TorchScript and debuggers can read it."""
    filename = f"<attention wired into {name} {next(_sources)}>"
    members = dict(scope)
    exec(compile(source, filename, "exec"), members)  # the source comes from the block itself
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    return cast("Callable[..., Any]", members["forward"])
