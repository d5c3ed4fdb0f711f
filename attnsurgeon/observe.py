"""Watch one forward pass: which module adds or concatenates what, and convolves, in which shapes.

The pass runs on meta tensors (no memory, no arithmetic) with stand-ins for the model's
tensors, which are given back; a model that cannot run there runs for real, once. What
attention already inserted does is left out: an operated network looks like its host.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnsurgeon.anatomy import own_class
from attnsurgeon.blocks.block import AttentionBlock
from attnsurgeon.borrow import (
    borrowed_buffers,
    borrowed_modes,
    borrowed_randomness,
    on_meta,
    stand_ins,
)
from attnsurgeon.errors import HostUnusable, first_line
from attnsurgeon.network import check_mode
from attnsurgeon.observation import Convolution, Join, Observation, Shape
from attnsurgeon.tracks import Tracks, name_of
from attnsurgeon.walks import noticing_walks


@dataclass(frozen=True)
class _Frame:
    """A module that is running, and the tensors that it was given."""

    path: str
    module: nn.Module
    sources: frozenset[int]


class _Watch(TorchDispatchMode):
    """Record operations under the module that runs them."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated in torch
        self.model = model
        self.inputs = inputs
        self.seen = Observation()
        self.stack: list[_Frame] = []
        self.tracks = Tracks(inputs)
        self.sequences: dict[str, Tensor] = {}
        self.returned: dict[str, set[int]] = defaultdict(set)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        flowing = [tensor for tensor in read if self.tracks.holds(tensor)]
        is_own = not any(isinstance(frame.module, AttentionBlock) for frame in self.stack)
        shapes = [tuple(tensor.shape) for tensor in read]
        join = self._join(name_of(func), args, read, flowing) if is_own and self.stack else None
        out = func(*args, **(kwargs or {}))
        if flowing:
            self.tracks.follow(func, args, read, out)
        if flowing and is_own and self.stack:
            self._record(name_of(func), args, read, shapes, out)
            if join is not None:
                self._record_join(join, out)
        return out

    def _join(
        self, name: str, args: tuple[Any, ...], read: list[Tensor], flowing: list[Tensor]
    ) -> str | None:
        """Tell what kind of join an operator is about to make, if any."""
        frame = self.stack[-1]
        if not frame.path or len(flowing) < 2 or len(flowing) != len(read):
            return None
        if name in ("add", "add_") and len(read) == 2:
            alike = read[0].shape == read[1].shape and read[0].ndim > 2
            # Two products are mixed, as in a gated recurrent unit: neither is a way past the other.
            mixed = all(self.tracks.is_product(tensor) for tensor in read)
            kind = "addition" if alike and not mixed else None
        elif name == "cat":
            axes = {self.tracks.axis(tensor) for tensor in read} - {None}
            dim = args[1] % read[0].ndim if len(args) > 1 else 0
            kind = "concatenation" if axes == {dim} and read[0].ndim > 2 else None
        else:
            return None
        if kind is None:
            return None
        ways = [self.tracks.trace_back(tensor, frame.sources) for tensor in read]
        is_shared = bool(set.intersection(*(reached for reached, _ in ways)))
        is_computed = any(weighted for _, weighted in ways)
        return kind if is_shared and (is_computed or kind == "addition") else None

    def _record_join(self, kind: str, out: Tensor) -> None:
        layout = self.tracks.layout(out)
        if layout is not None:
            self.seen.joins.append(Join(self.stack[-1].path, kind, tuple(out.shape), layout))

    def _record(
        self,
        name: str,
        args: tuple[Any, ...],
        read: list[Tensor],
        shapes: list[Shape],
        out: Any,
    ) -> None:
        path = self.stack[-1].path
        self.seen.visits[path].operators.add(name)
        if name in ("mul", "mul_") and len(read) == 2 and self._is_scaling(read):
            self.seen.scalings.append(path)
        elif name == "convolution" and len(shapes[0]) in (4, 5) and not args[6]:
            dims = len(shapes[0]) - 2
            self.seen.convolutions.append(
                Convolution(
                    path=path,
                    in_channels=shapes[0][1],
                    out_channels=shapes[1][0],
                    kernel=shapes[1][2:],
                    stride=_per_axis(args[3], dims),
                    padding=_per_axis(args[4], dims),
                    dilation=_per_axis(args[5], dims),
                    in_shape=shapes[0],
                    out_shape=tuple(out.shape),
                )
            )

    def _is_scaling(self, read: list[Tensor]) -> bool:
        """Tell whether a map is multiplied by one number per channel or per position."""
        small, large = sorted(read, key=lambda tensor: tensor.numel())
        axis = self.tracks.axis(large)
        if axis is None or small.ndim != large.ndim or small.ndim < 3:
            return False
        if not all(self.tracks.holds(tensor) for tensor in read):
            return False
        narrow = {i for i in range(1, large.ndim) if small.shape[i] != large.shape[i]}
        positions = set(range(1, large.ndim)) - {axis}
        return narrow in ({axis}, positions) and all(small.shape[i] == 1 for i in narrow)

    def finish(self, output: Any) -> Observation:
        """Return what was seen, with what only the end of the pass can tell."""
        self.seen.tokens = self.tracks.tokens
        ends = [id(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        reached = self.tracks.sources_of(ends) if _is_transparent(output) else None
        for path, returned in self.returned.items():
            self.seen.visits[path].is_used = reached is None or bool(returned & reached)
        if self.seen.tokens:
            for path, out in self.sequences.items():
                self.seen.visits[path].is_read = self.tracks.has_readers(out, ends)
        return self.seen

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Follow which module runs; the hooks are taken off again whatever happens."""
        handles = []
        paths = {id(module): path for path, module in self.model.named_modules()}

        def take_apart(sequence: nn.Module) -> None:
            by_itself = self.stack and self.stack[-1].module is sequence
            if not by_itself and id(sequence) in paths:
                self.seen.taken_apart.add(paths[id(sequence)])

        try:
            for path, module in self.model.named_modules():
                enter, leave = self._enter(path), self._leave(path)
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave))
            with noticing_walks(take_apart):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.stack.append(_Frame(path, module, frozenset(id(leaf) for leaf in given)))
            visit = self.seen.visits[path]
            visit.count += 1
            if visit.count == 1 and args and isinstance(args[0], Tensor):
                visit.in_shape = tuple(args[0].shape)
                visit.in_layout = self.tracks.layout(args[0])
                visit.in_version = args[0]._version

        return hook

    def _leave(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            self.stack.pop()
            visit = self.seen.visits[path]
            main = next((leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)), None)
            if visit.count == 1 and main is not None and self.tracks.layout(main) == "NLC":
                self.sequences[path] = main
            if not isinstance(out, Tensor):
                return
            self.returned[path].add(id(out))
            join = next((j for j in reversed(self.seen.joins) if j.path == path), None)
            if join is not None and self.tracks.axis(out) is None and out.shape == join.shape:
                self.tracks.mark(out, join.layout)  # as where channels are shuffled after a join
            axis = self.tracks.axis(out)
            visit.widths.add(out.shape[axis] if axis is not None else 0)
            if visit.count == 1:
                visit.out_shape = tuple(out.shape)
                visit.out_layout = self.tracks.layout(out)
                # In-place activations return their input too, but leave a mark on it.
                same = bool(args) and out is args[0] and out._version == visit.in_version
                visit.passed_through = same and not list(module.children())

        return hook


def _is_transparent(output: Any) -> bool:
    """Tell whether every tensor of an output can be seen: none is inside of something opaque."""
    plain = (Tensor, str, int, float, type(None))
    return all(isinstance(leaf, plain) for leaf in tree_leaves(output))


def _per_axis(value: list[int], dims: int) -> Shape:
    return tuple(value) if len(value) == dims else (value[0],) * dims


def observe(model: nn.Module, inputs: tuple[Any, ...]) -> Observation:
    """Run the model once in eval mode on inputs of these shapes and return what was seen.

    Nothing of the model changes: parameters, buffers, modes, hooks and random state are as before.
    A pass that comes to ask for numbers, which meta tensors do not have, is taken as far as it
    came, unless a module of a kind that joins paths has not run by then: then it runs for real.

    Raises:
        HostUnusable: the forward pass fails with this input, or torch.inference_mode() is on.
    """
    check_mode()
    with borrowed_modes(model), borrowed_randomness(0), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a host's own warnings belong to the host's own runs
        model.eval()
        seen = _watch_on_meta(model, inputs)
        if seen is not None:
            return seen
        with borrowed_buffers(model):
            return _watch_for_real(model, inputs)


def _watch_on_meta(model: nn.Module, inputs: tuple[Any, ...]) -> Observation | None:
    """Return what the pass on meta tensors showed, or None where that is not enough."""
    watch = _Watch(model, stand_ins(inputs))
    try:
        with watch.hooks(), on_meta(model), watch:
            return watch.finish(model(*watch.inputs))
    except (Exception, SystemExit) as error:  # what cannot be done on meta is tried for real
        is_outline = any(parameter.is_meta for parameter in model.parameters())  # has no numbers
        if not _asks_for_numbers(error) or not (
            is_outline or _has_seen_its_kinds(model, watch.seen)
        ):
            return None
    watch.seen.tokens = watch.tracks.tokens
    watch.seen.complete = False
    return watch.seen


def _asks_for_numbers(error: BaseException) -> bool:
    return isinstance(error, NotImplementedError) or "meta tensors" in str(error)


def _has_seen_its_kinds(model: nn.Module, seen: Observation) -> bool:
    """Tell whether every module of a class that joins paths has run."""
    modules = dict(model.named_modules())
    joining = {own_class(modules[join.path]) for join in seen.joins}
    return bool(joining) and all(
        path in seen.visits for path, module in modules.items() if own_class(module) in joining
    )


def _watch_for_real(model: nn.Module, inputs: tuple[Any, ...]) -> Observation:
    watch = _Watch(model, inputs)
    try:
        with watch.hooks(), watch:
            return watch.finish(model(*inputs))
    except (Exception, SystemExit) as error:
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        raise HostUnusable(
            f"{type(model).__name__} does not run on inputs of shape {shapes}: "
            f"{first_line(error)}; give it an input it takes"
        ) from error
