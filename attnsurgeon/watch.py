"""Record what a pass does, operator by operator, under the modules that run them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnsurgeon.blocks.block import AttentionBlock
from attnsurgeon.observation import Convolution, Join, Observation, Shape
from attnsurgeon.tracks import Tracks, name_of, tensors_given
from attnsurgeon.walks import noticing_walks


class _Frame(NamedTuple):
    """A module that is running, the tensors it was given, and whether it is (in) attention."""

    path: str
    module: nn.Module
    sources: frozenset[int]
    is_attention: bool


class Watch(TorchDispatchMode):
    """Record operations under the module that runs them."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated in torch
        self.model = model
        self.inputs = inputs
        self.seen = Observation()
        self.stack: list[_Frame] = []
        self.tracks = Tracks(inputs)
        self.joined: dict[str, Join] = {}
        self.sequences: dict[str, Tensor] = {}
        self.returned: dict[str, set[int]] = defaultdict(set)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        read = tensors_given(args, kwargs)
        flowing = [tensor for tensor in read if self.tracks.holds(tensor)]
        if not flowing:
            return func(*args, **(kwargs or {}))
        name = name_of(func)
        is_own = bool(self.stack) and not self.stack[-1].is_attention
        join = self._join(name, args, read, flowing) if is_own and len(flowing) > 1 else None
        out = func(*args, **(kwargs or {}))
        self.tracks.follow(name, args, flowing, out)
        if is_own:
            self._record(name, args, read, out)
            if join is not None:
                self._record_join(join, out)
        return out

    def _join(
        self, name: str, args: tuple[Any, ...], read: list[Tensor], flowing: list[Tensor]
    ) -> str | None:
        """Tell what kind of join an operator is about to make, if any."""
        frame = self.stack[-1]
        if not frame.path or len(flowing) != len(read):
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
        path, shape = self.stack[-1].path, tuple(out.shape)
        if layout is not None:
            self.joined[path] = Join(path, kind, shape, layout)
            self.seen.joins.append(self.joined[path])
        else:
            self.seen.unplaced[path] = shape

    def _record(self, name: str, args: tuple[Any, ...], read: list[Tensor], out: Any) -> None:
        path = self.stack[-1].path
        self.seen.visits[path].operators.add(name)
        if name in ("mul", "mul_") and len(read) == 2 and self._is_scaling(read):
            self.seen.scalings.append(path)
        elif name == "convolution" and read[0].ndim in (4, 5) and not args[6]:
            dims = read[0].ndim - 2
            in_shape, weight = tuple(read[0].shape), tuple(read[1].shape)
            self.seen.convolutions.append(
                Convolution(
                    path=path,
                    in_channels=in_shape[1],
                    out_channels=weight[0],
                    kernel=weight[2:],
                    stride=_per_axis(args[3], dims),
                    padding=_per_axis(args[4], dims),
                    dilation=_per_axis(args[5], dims),
                    in_shape=in_shape,
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
        ends = [id(leaf) for leaf in _tensors_in(output)]
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
            first = args[0] if args else None
            is_one = len(args) == 1 and not kwargs and isinstance(first, Tensor)
            sources = frozenset(map(id, (first,) if is_one else _tensors_in((args, kwargs))))
            is_attention = isinstance(module, AttentionBlock)
            is_attention = is_attention or (bool(self.stack) and self.stack[-1].is_attention)
            self.stack.append(_Frame(path, module, sources, is_attention))
            visit = self.seen.visits[path]
            visit.count += 1
            if visit.count == 1 and isinstance(first, Tensor):
                visit.in_shape = tuple(first.shape)
                visit.in_layout = self.tracks.layout(first)
                visit.in_version = first._version

        return hook

    def _leave(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            self.stack.pop()
            visit = self.seen.visits[path]
            if visit.count == 1:
                main = out if isinstance(out, Tensor) else next(iter(_tensors_in(out)), None)
                if main is not None and self.tracks.layout(main) == "NLC":
                    self.sequences[path] = main
            if not isinstance(out, Tensor):
                return
            self.returned[path].add(id(out))
            axis = self.tracks.axis(out)
            join = self.joined.get(path)
            if join is not None and axis is None and out.shape == join.shape:
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


def _tensors_in(things: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(things) if isinstance(leaf, Tensor)]


def _is_transparent(output: Any) -> bool:
    """Tell whether every tensor of an output can be seen: none is inside of something opaque."""
    plain = (Tensor, str, int, float, type(None))
    return all(isinstance(leaf, plain) for leaf in tree_leaves(output))


def _per_axis(value: list[int], dims: int) -> Shape:
    return tuple(value) if len(value) == dims else (value[0],) * dims
