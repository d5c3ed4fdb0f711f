"""Trace the own forward of a block, if a trace is all that it does."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnsurgeon.anatomy import own_class
from attnsurgeon.blocks.block import AttentionBlock
from attnsurgeon.borrow import borrowed_buffers
from attnsurgeon.errors import PlacementUnavailable, first_line

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class _Tracer(fx.Tracer):
    """Trace a block's own forward; step only into the children on the way to one convolution."""

    def __init__(self, open_paths: Iterable[str] = (), wrapped: tuple[Any, ...] = ()) -> None:
        super().__init__(autowrap_modules=wrapped)
        self.open_paths = set(open_paths)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.open_paths


class _Mode:
    """Stands in for `training` of some modules, and notices whether anybody asks for it."""

    def __init__(self, modules: Iterable[nn.Module], training: bool) -> None:
        self.modules = {id(module) for module in modules}
        self.training = training
        self.is_asked = False

    def __get__(self, module: nn.Module | None, kind: type | None = None) -> Any:
        if id(module) in self.modules:
            self.is_asked = True
            return self.training
        if module is None or "training" not in module.__dict__:
            raise AttributeError("training")
        return module.__dict__["training"]

    def __set__(self, module: nn.Module, training: bool) -> None:
        self.is_asked = self.is_asked or id(module) in self.modules
        module.__dict__["training"] = training


@contextmanager
def _one_mode(modules: Iterable[nn.Module], training: bool) -> Iterator[_Mode]:
    """Have these modules say that they are all in one mode."""
    mode = _Mode(modules, training)
    held = {name: thing for name, thing in vars(nn.Module).items() if name == "training"}
    try:
        nn.Module.training = mode  # type: ignore[assignment]
        yield mode
    finally:
        del nn.Module.training
        for name, thing in held.items():
            setattr(nn.Module, name, thing)


def trace_own_forward(
    block: nn.Module,
    convs: Iterable[str] = (),
    closed: Callable[[], fx.Graph] | None = None,
) -> fx.Graph:
    """Return the graph of the block's own forward, as its author wrote it.

    The forward runs on copies of the block's own buffers and collections, so that the block and
    the random generators are as before.

    Args:
        block: its children are leaves of the graph.
        convs: paths in it whose parents are opened: they are no leaves.
        closed: returns the graph without `convs`, where it is at hand already.

    Raises:
        PlacementUnavailable: it cannot be traced, or a trace would not be all that it does: it
            differs between train and eval mode, draws random numbers, keeps or makes tensors.
    """
    open_paths = _ancestors(convs)
    if open_paths and _are_sequences(block, open_paths):
        return _opened(block, closed() if closed else trace_own_forward(block), open_paths)
    if not hasattr(own_class(block), "training"):  # which would be asked in the place of the block
        with suppress(PlacementUnavailable):
            graph, is_asked = _trace_once(block, block.training, open_paths, is_held=False)
            if not is_asked:
                return graph
    codes = []
    for training in (not block.training, block.training):
        graph = _trace(block, training, open_paths)
        codes.append(graph.python_code("self").src)
    if codes[0] != codes[1]:
        raise PlacementUnavailable(f"{_the_forward(block)} is not the same in train and eval mode")
    return graph


def _trace(block: nn.Module, training: bool, open_paths: set[str]) -> fx.Graph:
    try:
        return _trace_once(block, training, open_paths)[0]
    except PlacementUnavailable:
        # Wrapping all of math takes longer than the rest of a trace, and hardly any needs it.
        return _trace_once(block, training, open_paths, (math,))[0]


def _trace_once(
    block: nn.Module,
    training: bool,
    open_paths: set[str],
    wrapped: tuple[Any, ...] = (),
    *,
    is_held: bool = True,
) -> tuple[fx.Graph, bool]:
    """Trace in one mode, and tell whether anybody asked for it.

    Unless the mode `is_held` by the block itself as well, no other way than to ask leads to it.
    """
    probe, copies = _probe(block)
    if is_held:
        probe.__dict__["training"] = training
    before = torch.get_rng_state(), random.getstate()
    try:
        with borrowed_buffers(block), _one_mode([probe, *block.modules()], training) as mode:
            graph = _Tracer(open_paths, wrapped).trace(probe)
        drew = not torch.equal(before[0], torch.get_rng_state()) or before[1] != random.getstate()
    except Exception as error:
        raise PlacementUnavailable(
            f"{_the_forward(block)} cannot be traced: {first_line(error)}"
        ) from error
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
    if drew:
        raise PlacementUnavailable(f"{_the_forward(block)} draws random numbers")
    if any(not _unchanged(copied, block.__dict__[name]) for name, copied in copies.items()):
        raise PlacementUnavailable(f"{_the_forward(block)} changes what the block holds")
    if any("_tensor_constant" in str(node.target) for node in graph.nodes):
        raise PlacementUnavailable(f"{_the_forward(block)} makes tensors of its own")
    return graph, mode.is_asked


def _the_forward(block: nn.Module) -> str:
    return f"the forward of {own_class(block).__name__}"


def _probe(block: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """Return the block under its author's class, in no mode, and copies of what it could change."""
    host = own_class(block)
    probe = host.__new__(host)
    copies = {
        name: copy.copy(value)
        for name, value in block.__dict__.items()
        if isinstance(value, list | dict | set) and (name == "_buffers" or name[:1] != "_")
    }
    copies["_buffers"] = {
        name: None if buffer is None else buffer.clone() for name, buffer in block._buffers.items()
    }
    children = {n: m for n, m in block._modules.items() if not isinstance(m, AttentionBlock)}
    probe.__dict__ = {**block.__dict__, **copies, "_modules": children}
    probe.__dict__.pop("training", None)
    return probe, copies


def _unchanged(copied: Any, held: Any) -> bool:
    """Compare a collection with its copy; tensors by value, all else by being the same thing."""
    if len(copied) != len(held):
        return False
    if isinstance(held, set):
        return bool(copied == held)
    keys = list(held) if isinstance(held, dict) else range(len(held))
    if isinstance(held, dict) and list(copied) != keys:
        return False
    return all(
        torch.equal(copied[key], held[key])
        if isinstance(held[key], Tensor) and isinstance(copied[key], Tensor)
        else copied[key] is held[key]
        for key in keys
    )


def _ancestors(convs: Iterable[str]) -> set[str]:
    parts = [path.split(".") for path in convs]
    return {".".join(names[:i]) for names in parts for i in range(1, len(names))}


def _are_sequences(block: nn.Module, paths: Iterable[str]) -> bool:
    """Tell whether modules in a block only run their children, and none is there twice."""
    opened = [block.get_submodule(path) for path in paths]
    everywhere = [id(module) for _, module in block.named_modules(remove_duplicate=False)]
    return len(set(everywhere)) == len(everywhere) and all(map(_is_plain_sequence, opened))


def _is_plain_sequence(module: nn.Module) -> bool:
    if not isinstance(module, nn.Sequential):
        return False
    kind = type(module)
    return (
        own_class(module).forward is nn.Sequential.forward
        and kind.__iter__ is nn.Sequential.__iter__
        and kind.__call__ is nn.Module.__call__
        and "forward" not in module.__dict__
        and None not in module._modules.values()
        and not any(getattr(module, hooks) for hooks in _HOOKS)
    )


def _opened(block: nn.Module, closed: fx.Graph, open_paths: set[str]) -> fx.Graph:
    """Return the graph in which the children of some sequences stand in the place of these."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}

    def run(path: str, value: Any) -> Any:
        if path not in open_paths:
            return graph.call_module(path, (value,))
        for name in block.get_submodule(path)._modules:
            value = run(f"{path}.{name}", value)
        return value

    for node in closed.nodes:
        if node.op == "call_module" and node.target in open_paths:
            given = node.args[0] if node.args else node.kwargs["input"]
            values[node] = run(str(node.target), fx.node.map_arg(given, values.__getitem__))
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
    return graph
