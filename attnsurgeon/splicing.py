"""Put calls of attention into the graph of one block's own forward."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx, nn

from attnsurgeon.anatomy import Anatomy, ancestry, branch_heads, dissect, find_conv
from attnsurgeon.errors import PlacementUnavailable
from attnsurgeon.tracing import trace_own_forward


@dataclass(frozen=True)
class Splice:
    """One attention in a block: the child's name, where it goes, and for `conv` the convolution.

    `conv` is the dotted path of the convolution relative to the block, `tail` how many of the
    steps after it (norm, activation) belong to it. `passed` names the children that hand their
    input through in eval mode (stochastic depth): attention on the branch belongs before them.
    `layout` is that of the map: attention itself always reads and returns channels second; the
    first `tokens` of an NLC map (class tokens) go past it.
    """

    child: str
    placement: str
    conv: str | None = None
    tail: int = 0
    passed: tuple[str, ...] = ()
    layout: str = "NCHW"
    tokens: int = 0


TO_CHANNELS_SECOND = {"NHWC": (0, 3, 1, 2), "NDHWC": (0, 4, 1, 2, 3), "NLC": (0, 2, 1)}
_AND_BACK = {"NHWC": (0, 2, 3, 1), "NDHWC": (0, 2, 3, 4, 1), "NLC": (0, 2, 1)}
"""Orders of the axes for permute; other layouts have their channels second already."""


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


def call_in_layout(splice: Splice) -> str:
    """Return the expression that runs attention on `out`, channels second."""
    if splice.layout not in TO_CHANNELS_SECOND:
        return f"self.{splice.child}(out)"
    there = ", ".join(map(str, TO_CHANNELS_SECOND[splice.layout]))
    back = ", ".join(map(str, _AND_BACK[splice.layout]))
    cut = f"[:, {splice.tokens}:]" if splice.tokens else ""
    call = f"self.{splice.child}(out{cut}.permute({there})).permute({back})"
    return f"torch.cat((out[:, :{splice.tokens}], {call}), 1)" if splice.tokens else call


def spliced_graph(block: nn.Module, wanted: tuple[Splice, ...]) -> fx.Graph:
    """Return the graph of a block's own forward with the attention of `wanted` in it, in order.

    Raises:
        PlacementUnavailable: the forward cannot be traced, or has no such place.
    """
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
            attended = _emit(graph, splice, current, edge.beside)
        for end in edge.ends:
            end.replace_input_with(current, attended)
        reached[key] = attended
    return graph


def _emit(graph: fx.Graph, splice: Splice, value: fx.Node, beside: fx.Node | None) -> fx.Node:
    """Add the call of one attention to the graph, channels second; return what comes out."""
    if beside is not None:
        return graph.call_module(splice.child, (beside, value))
    if splice.layout not in TO_CHANNELS_SECOND:
        return graph.call_module(splice.child, (value,))
    tokens = None
    if splice.tokens:
        parts = graph.call_method("tensor_split", (value, [splice.tokens], 1))
        tokens, value = (graph.call_function(operator.getitem, (parts, i)) for i in (0, 1))
    seen = graph.call_method("permute", (value, *TO_CHANNELS_SECOND[splice.layout]))
    mapped = graph.call_module(splice.child, (seen,))
    out = graph.call_method("permute", (mapped, *_AND_BACK[splice.layout]))
    return out if tokens is None else graph.call_function(torch.cat, ((tokens, out), 1))


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
