"""Watch one forward pass: which module adds what, which convolves, with which shapes.

The pass runs on meta tensors (no memory, no arithmetic) with stand-ins for the model's
tensors, which are given back; a model that cannot run there runs for real, once. What
attention already inserted does is left out: an operated network looks like its host.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from attnsurgeon.blocks.block import AttentionBlock
from attnsurgeon.borrow import borrowed_buffers, borrowed_modes, borrowed_randomness, on_meta
from attnsurgeon.errors import HostUnusable

Shape = tuple[int, ...]
_ADDS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@dataclass(frozen=True)
class Addition:
    """Two activations of one shape, added in the own forward of the module at `path`."""

    path: str
    shape: Shape


@dataclass(frozen=True)
class Convolution:
    """A 2-D convolution as it ran: measured, not read from attributes."""

    path: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    in_shape: Shape
    out_shape: Shape


@dataclass
class Visits:
    """How often a module ran, and the shapes that its first run saw."""

    count: int = 0
    in_shape: Shape | None = None
    out_shape: Shape | None = None
    in_version: int = 0
    passed_through: bool = False


@dataclass
class Observation:
    """What one forward pass in eval mode showed, in the order of execution."""

    additions: list[Addition] = field(default_factory=list)
    convolutions: list[Convolution] = field(default_factory=list)
    visits: dict[str, Visits] = field(default_factory=lambda: defaultdict(Visits))


class _Watch(TorchDispatchMode):
    """Record operations under the module that runs them."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated in torch
        self.model = model
        self.inputs = inputs
        self.seen = Observation()
        self.stack: list[tuple[str, nn.Module]] = []
        # Everything computed from the input is kept alive, so that no id is used twice.
        self.flowing = {id(leaf): leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        before = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        shapes = [tuple(tensor.shape) for tensor in before]
        out = func(*args, **(kwargs or {}))
        if any(id(tensor) in self.flowing for tensor in before):
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.flowing[id(leaf)] = leaf
            if not any(isinstance(module, AttentionBlock) for _, module in self.stack):
                self._record(func, args, before, shapes, out)
        return out

    def _record(
        self, func: Any, args: tuple[Any, ...], before: list[Tensor], shapes: list[Shape], out: Any
    ) -> None:
        path = self.stack[-1][0] if self.stack else ""
        if func in _ADDS and len(before) == 2 and shapes[0] == shapes[1] and len(shapes[0]) > 2:
            if all(id(tensor) in self.flowing for tensor in before):
                self.seen.additions.append(Addition(path, shapes[0]))
        elif func is torch.ops.aten.convolution.default and len(shapes[0]) == 4 and not args[6]:
            weight = shapes[1]
            self.seen.convolutions.append(
                Convolution(
                    path=path,
                    in_channels=shapes[0][1],
                    out_channels=weight[0],
                    kernel=(weight[2], weight[3]),
                    stride=_pair(args[3]),
                    padding=_pair(args[4]),
                    dilation=_pair(args[5]),
                    in_shape=shapes[0],
                    out_shape=tuple(out.shape),
                )
            )

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Follow which module runs; the hooks are taken off again whatever happens."""
        handles = []
        try:
            for path, module in self.model.named_modules():
                handles.append(module.register_forward_pre_hook(self._enter(path)))
                handles.append(module.register_forward_hook(self._leave(path)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.stack.append((path, module))
            visit = self.seen.visits[path]
            visit.count += 1
            if visit.count == 1 and args and isinstance(args[0], Tensor):
                visit.in_shape = tuple(args[0].shape)
                visit.in_version = args[0]._version

        return hook

    def _leave(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            self.stack.pop()
            visit = self.seen.visits[path]
            if visit.count == 1 and isinstance(out, Tensor):
                visit.out_shape = tuple(out.shape)
                # In-place activations return their input too, but leave a mark on it.
                same = bool(args) and out is args[0] and out._version == visit.in_version
                visit.passed_through = same and not list(module.children())

        return hook


def _pair(value: list[int]) -> tuple[int, int]:
    return (value[0], value[-1])


def observe(model: nn.Module, inputs: tuple[Any, ...]) -> Observation:
    """Run the model once in eval mode on inputs of these shapes and return what was seen.

    Nothing of the model changes: parameters, buffers, modes, hooks and random state are as before.

    Raises:
        HostUnusable: the forward pass fails with this input.
    """
    with borrowed_modes(model), borrowed_randomness(0), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a host's own warnings belong to the host's own runs
        model.eval()
        try:
            return _watch_on_meta(model, inputs)
        except Exception:  # whatever cannot be done on meta tensors is tried for real
            with borrowed_buffers(model):
                return _watch_for_real(model, inputs)


def _watch_on_meta(model: nn.Module, inputs: tuple[Any, ...]) -> Observation:
    watch = _Watch(model, stand_ins(inputs))
    with watch.hooks(), on_meta(model), watch:
        model(*watch.inputs)
    return watch.seen


def stand_ins(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return inputs of the same shapes without memory."""
    found: tuple[Any, ...] = tree_map_only(
        Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), inputs
    )
    return found


def _watch_for_real(model: nn.Module, inputs: tuple[Any, ...]) -> Observation:
    watch = _Watch(model, inputs)
    try:
        with watch.hooks(), watch:
            model(*inputs)
    except Exception as error:
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HostUnusable(
            f"{type(model).__name__} does not run on inputs of shape {shapes}: {first}; "
            "give it an input it takes"
        ) from error
    return watch.seen


def runs_on(model: nn.Module, inputs: tuple[Any, ...], *, train: bool = False) -> bool:
    """Tell whether the model takes inputs of these shapes in eval mode, and in train mode if asked.

    In eval mode nothing is computed, unless the model makes tensors of its own, which need real
    ones beside. Train mode runs for real: its norms are taken apart on meta tensors, which takes
    longer than small inputs do.
    """
    return why_it_fails(model, inputs, train=train) is None


def why_it_fails(
    model: nn.Module, inputs: tuple[Any, ...], *, train: bool = False
) -> Exception | None:
    """Return what the model raises on inputs of these shapes, or None if it runs. See runs_on."""
    with borrowed_modes(model), borrowed_randomness(0), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.eval()
        with on_meta(model):
            error = _error_of(model, stand_ins(inputs))
        with borrowed_buffers(model):
            if error is not None:
                error = _error_of(model, inputs)
            if error is None and train:
                model.train()
                error = _error_of(model, inputs)
    return error


def _error_of(model: nn.Module, inputs: tuple[Any, ...]) -> Exception | None:
    try:
        model(*inputs)
    except Exception as error:  # of the user's network: it may be anything
        return error
    return None
