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
import operator
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
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


_TO_CHANNELS_SECOND = {"NHWC": (0, 3, 1, 2), "NDHWC": (0, 4, 1, 2, 3), "NLC": (0, 2, 1)}
_AND_BACK = {"NHWC": (0, 2, 3, 1), "NDHWC": (0, 2, 3, 4, 1), "NLC": (0, 2, 1)}
"""Orders of the axes for permute; other layouts have their channels second already."""


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


def check_follows(module: nn.Module, splice: Splice, *, whole: bool) -> None:
    """Refuse a module that runs all of its children in order, where attention cannot be one more.

    Args:
        module: that attention is to follow.
        splice: how.
        whole: whether nobody else asks it for its children.

    Raises:
        PlacementUnavailable: it is a sequence on maps whose channels are not second, or one that
            the network takes apart as well.
    """
    if _is_sequence(module) and not whole:
        raise PlacementUnavailable(
            "it is a sequence whose modules the network counts, slices or runs one by one as "
            "well; name its last module instead"
        )
    if _is_sequence(module) and splice.layout in _TO_CHANNELS_SECOND:
        raise PlacementUnavailable(
            f"it is a sequence, and its map is {splice.layout}; name its last module instead"
        )


def _is_sequence(module: nn.Module) -> bool:
    """Tell whether a module does nothing but run its children one after the other."""
    return isinstance(module, nn.Sequential) and own_class(module).forward is nn.Sequential.forward


def wire(block: nn.Module, wanted: tuple[Splice, ...]) -> None:
    """Give the block a forward in which the attention children of `wanted` are called, in order.

    The children themselves must already be there. An empty `wanted` hands the class back.

    Raises:
        PlacementUnavailable: the forward has no such place.
    """
    host = own_class(block)
    if not wanted:
        object.__setattr__(block, "__class__", host)
        block.__dict__.pop("_splices", None)
        return
    members = {
        **_forwards(block, wanted),
        **_without_attention(block),
        "_host_class": host,
        "__deepcopy__": _deepcopy,
        "__reduce_ex__": _reduce,
        "__module__": host.__module__,
        "__qualname__": host.__qualname__,
        "__doc__": host.__doc__,
    }
    with _unannounced(host):
        spliced = type(host.__name__, (host,), members)
    object.__setattr__(block, "__class__", spliced)
    block.__dict__["_splices"] = wanted


@contextmanager
def _unannounced(host: type[nn.Module]) -> Iterator[None]:
    """Keep a new class from classes that list their subclasses, or ask something of them."""
    name = "__init_subclass__"
    held = [(kind, kind.__dict__[name]) for kind in host.__mro__[:-1] if name in kind.__dict__]
    try:
        for kind, _ in held:
            setattr(kind, name, classmethod(lambda cls, **settings: None))
        yield
    finally:
        for kind, told in held:
            setattr(kind, name, told)


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
    if _is_sequence(block):
        return {}  # its last child is what follows it
    inside = tuple(splice for splice in wanted if splice.placement != "post")
    after = [splice for splice in wanted if splice.placement == "post"]
    own = _spliced_forward(block, inside) if inside else own_class(block).forward
    if not after:
        return {"forward": own}
    # TorchScript names a method by its function, and there must be one `forward`.
    renamed = types.FunctionType(
        own.__code__, own.__globals__, "_own_forward", own.__defaults__, own.__closure__
    )
    renamed.__kwdefaults__ = own.__kwdefaults__
    return {"_own_forward": renamed, "forward": _following_forward(own, after, block)}


_CONTAINERS = {
    nn.Sequential: ("__iter__", "__len__", "__getitem__"),
    nn.ModuleList: ("__iter__", "__len__", "__getitem__"),
    nn.ModuleDict: ("__iter__", "__len__", "__getitem__", "keys", "values", "items"),
}
"""What a forward walks its own children by."""


def _without_attention(block: nn.Module) -> dict[str, Callable[..., Any]]:
    """Return the methods that hide attention from a container whose forward walks its children."""
    if _is_sequence(block):
        return {}  # attention is one more of the children that it runs
    host = own_class(block)

    def hiding(name: str) -> Callable[..., Any]:
        def method(self: nn.Module, *args: Any) -> Any:
            return getattr(_as_written(self, host), name)(*args)

        return method

    kinds = [kind for kind in _CONTAINERS if isinstance(block, kind)]
    return {name: hiding(name) for kind in kinds for name in _CONTAINERS[kind]}


def _as_written(block: nn.Module, host: type[nn.Module]) -> nn.Module:
    """Return a container as its author wrote it, with the children that it had."""
    wired = {splice.child for splice in splices(block)}
    bare = host.__new__(host)
    children = {name: child for name, child in block._modules.items() if name not in wired}
    bare.__dict__ = {**block.__dict__, "_modules": children}
    return bare


def _following_forward(
    own: Callable[..., Any], after: list[Splice], block: nn.Module
) -> Callable[..., Any]:
    """Return a forward that runs the block's own, then attention; with its plain parameters."""
    parameters = list(inspect.signature(own).parameters.values())[1:]
    plain = all(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in parameters)
    names = ", ".join(p.name for p in parameters) if plain else "*args, **kwargs"
    lines = [f"def forward(self, {names}):", f"    out = self._own_forward({names})"]
    lines += [f"    out = {_call_in_layout(splice)}" for splice in after]
    source = "\n".join([*lines, "    return out", ""])
    return _compile(source, {"torch": torch}, own_class(block).__name__)


def _call_in_layout(splice: Splice) -> str:
    """Return the expression that runs attention on `out`, channels second."""
    if splice.layout not in _TO_CHANNELS_SECOND:
        return f"self.{splice.child}(out)"
    there = ", ".join(map(str, _TO_CHANNELS_SECOND[splice.layout]))
    back = ", ".join(map(str, _AND_BACK[splice.layout]))
    cut = f"[:, {splice.tokens}:]" if splice.tokens else ""
    call = f"self.{splice.child}(out{cut}.permute({there})).permute({back})"
    return f"torch.cat((out[:, :{splice.tokens}], {call}), 1)" if splice.tokens else call


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
            attended = _emit(graph, splice, current, edge.beside)
        for end in edge.ends:
            end.replace_input_with(current, attended)
        reached[key] = attended
    code = graph.python_code("self")
    return _compile(code.src, code.globals, own_class(block).__name__)


def _emit(graph: fx.Graph, splice: Splice, value: fx.Node, beside: fx.Node | None) -> fx.Node:
    """Add the call of one attention to the graph, channels second; return what comes out."""
    if beside is not None:
        return graph.call_module(splice.child, (beside, value))
    if splice.layout not in _TO_CHANNELS_SECOND:
        return graph.call_module(splice.child, (value,))
    tokens = None
    if splice.tokens:
        parts = graph.call_method("tensor_split", (value, [splice.tokens], 1))
        tokens, value = (graph.call_function(operator.getitem, (parts, i)) for i in (0, 1))
    seen = graph.call_method("permute", (value, *_TO_CHANNELS_SECOND[splice.layout]))
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


_sources = itertools.count()


def _compile(source: str, scope: Mapping[str, Any], name: str) -> Callable[..., Any]:
    """Return the function whose source this is, where TorchScript and debuggers can read it."""
    filename = f"<attention wired into {name} {next(_sources)}>"
    members = dict(scope)
    exec(compile(source, filename, "exec"), members)  # the source comes from the block itself
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    return cast("Callable[..., Any]", members["forward"])
