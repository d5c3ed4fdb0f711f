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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from attnsurgeon.anatomy import own_class
from attnsurgeon.errors import PlacementUnavailable
from attnsurgeon.splicing import TO_CHANNELS_SECOND, Splice, call_in_layout, spliced_graph


def splices(block: nn.Module) -> tuple[Splice, ...]:
    """Return the attention wired into this very block, in the order of insertion."""
    return cast("tuple[Splice, ...]", block.__dict__.get("_splices", ()))


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
    if _is_sequence(module) and splice.layout in TO_CHANNELS_SECOND:
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
    own = own_class(block).forward
    if inside:
        code = spliced_graph(block, inside).python_code("self")
        own = _compile(code.src, code.globals, own_class(block).__name__)
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
    lines += [f"    out = {call_in_layout(splice)}" for splice in after]
    source = "\n".join([*lines, "    return out", ""])
    return _compile(source, {"torch": torch}, own_class(block).__name__)


_sources = itertools.count()


def _compile(source: str, scope: Mapping[str, Any], name: str) -> Callable[..., Any]:
    """Return the function whose source this is, where TorchScript and debuggers can read it."""
    filename = f"<attention wired into {name} {next(_sources)}>"
    members = dict(scope)
    exec(compile(source, filename, "exec"), members)  # the source comes from the block itself
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    return cast("Callable[..., Any]", members["forward"])
