"""What is known of each tensor of a watched pass: what it came from, and where its channels are."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

LAYOUTS = {(4, 1): "NCHW", (4, 3): "NHWC", (3, 2): "NLC", (5, 1): "NCDHW", (5, 4): "NDHWC"}
"""(number of axes, axis of the channels) -> name."""

_CHANNELS_SECOND = {
    "convolution",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "native_group_norm",
}
_CHANNELS_LAST = {"addmm", "mm", "linear"}
_WEIGHTED = {"convolution", "addmm", "mm", "linear"}
_PER_POSITION = {"native_layer_norm", "add", "add_", "mul", "mul_", "clone", "_to_copy", "slice"}
_BROKEN = -1
"""Stands for the axis where a reshape took the channels apart, as into heads of attention."""
_RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias"}


@functools.cache
def name_of(func: Any) -> str:
    """Return the name of an operator without its overload, such as `add_`."""
    return str(func._overloadpacket.__name__)


def tensors_given(args: Iterable[Any], kwargs: Mapping[str, Any] | None = None) -> list[Tensor]:
    """Return the tensors among the arguments of an operator: alone, or in lists of them.

    It runs for every operator of a pass, and operators nest no deeper than that.
    """
    found = []
    for value in itertools.chain(args, kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


class Tracks:
    """Follow every tensor that is computed from the inputs of a pass.

    Which axis holds the channels is read off the operators that say so (a convolution and a batch
    norm put them second, a linear layer and a layer norm last) and carried through permutations,
    reshapes and whatever keeps the number of axes.
    """

    def __init__(self, inputs: Any) -> None:
        # All are kept alive, so that no id is used twice.
        given = (leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
        self._alive = {id(leaf): leaf for leaf in given}
        self._parents: dict[int, set[int]] = {}
        self._made_by: dict[int, str] = {}
        self._axes: dict[int, int] = {}
        self._weighted: set[int] = set()
        self._written: dict[int, int] = {}
        self._uses: dict[int, list[tuple[str, tuple[Any, ...], list[int]]]] = defaultdict(list)
        self.tokens = 0
        """Tokens in front of the positions that are no positions, such as a class token."""

    def holds(self, tensor: Tensor) -> bool:
        """Tell whether a tensor was computed from the inputs, or written to with what was."""
        if id(tensor) in self._alive:
            return True
        if not self._written or _memory(tensor) not in self._written:
            return False
        self._alive[id(tensor)] = tensor
        self._parents[id(tensor)] = {self._written[_memory(tensor)]}
        return True

    def layout(self, tensor: Tensor) -> str | None:
        """Return what the axes of a tensor are, as far as that is known."""
        axis = self.axis(tensor)
        return None if axis is None else LAYOUTS.get((tensor.ndim, axis))

    def axis(self, tensor: Tensor) -> int | None:
        """Return the axis of a tensor's channels, as far as that is known."""
        axis = self._axes.get(id(tensor), _BROKEN)
        return None if axis == _BROKEN else axis

    def mark(self, tensor: Tensor, layout: str) -> None:
        """Note the layout of a tensor whose track was lost."""
        self._axes[id(tensor)] = layout.index("C")

    def is_product(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is the product of two activations."""
        return self._made_by.get(id(tensor)) == "product"

    def follow(self, name: str, args: tuple[Any, ...], flowing: list[Tensor], out: Any) -> None:
        """Note what an operator made of those of its arguments that are followed."""
        if name.startswith("new_") or name.endswith("_like"):
            return  # only a shape was read
        if name == "cat":
            self._count_tokens(args)
        results = tensors_given((out,) if isinstance(out, Tensor) else out or ())
        made_ids = [id(made) for made in results]
        sources = {id(tensor) for tensor in flowing}
        for tensor in flowing:
            self._uses[id(tensor)].append((name, args, made_ids))
        kind = "product" if name in ("mul", "mul_") and len(flowing) == 2 else name
        for here, made in zip(made_ids, results, strict=True):
            axis = self._axis_after(name, args, flowing, made)
            if name.endswith("_") and here not in self._alive:
                self._written[_memory(made)] = here  # a part of a tensor of which more is read
            self._alive[here] = made
            self._parents.setdefault(here, set()).update(sources)
            self._made_by[here] = kind
            if name in _WEIGHTED:
                self._weighted.add(here)
            if axis is not None:
                self._axes[here] = axis

    def trace_back(self, tensor: Tensor, sources: Iterable[int]) -> tuple[set[int], bool]:
        """Return which of the sources a tensor comes from, and whether weights are on the way."""
        ends = set(sources)
        seen, todo = {id(tensor)}, [id(tensor)]
        reached, is_weighted = set(), False
        while todo:
            here = todo.pop()
            if here in ends:
                reached.add(here)
                continue
            is_weighted = is_weighted or here in self._weighted
            for parent in self._parents.get(here, ()):
                if parent not in seen:
                    seen.add(parent)
                    todo.append(parent)
        return reached, is_weighted

    def sources_of(self, outputs: Iterable[int]) -> set[int] | None:
        """Return all that was computed on the way to some tensors, or None if that is not sure.

        Of what was written to a part of a tensor, only the last is known.
        """
        todo = list(outputs)
        if not todo or self._written or any(end not in self._alive for end in todo):
            return None
        reached = set(todo)
        while todo:
            new = self._parents.get(todo.pop(), set()) - reached
            reached |= new
            todo += new
        return reached

    def has_readers(self, tensor: Tensor, outputs: Iterable[int]) -> bool:
        """Tell whether any position of an NLC map is read, or only the tokens in front of them.

        What works on each position alone is followed; whatever else takes the map reads it.
        """
        ends = set(outputs)
        seen, todo = {id(tensor)}, [id(tensor)]
        while todo:
            here = todo.pop()
            if here in ends:
                return True
            for name, args, results in self._uses[here]:
                if self._picks_tokens(name, args):
                    continue
                if name not in _PER_POSITION:
                    return True
                todo += [result for result in results if result not in seen]
                seen.update(results)
        return False

    def _picks_tokens(self, name: str, args: tuple[Any, ...]) -> bool:
        if name == "select":
            return bool(args[1] == 1 and 0 <= args[2] < self.tokens)
        return bool(
            name == "slice"
            and len(args) > 3
            and args[1] == 1
            and (args[2] or 0) == 0
            and 0 < args[3] <= self.tokens
        )

    def _count_tokens(self, args: tuple[Any, ...]) -> None:
        """Notice a concatenation that puts parameters in front of the positions of an NLC map."""
        parts = args[0]
        dim = args[1] if len(args) > 1 else 0
        is_token = [not self.holds(part) for part in parts]
        rest = next((part for part, alone in zip(parts, is_token, strict=True) if not alone), None)
        if dim == 1 and is_token[0] and rest is not None and self.layout(rest) == "NLC":
            first = is_token.index(False)
            self.tokens = sum(part.shape[1] for part in parts[:first])

    def _axis_after(
        self, name: str, args: tuple[Any, ...], flowing: list[Tensor], made: Tensor
    ) -> int | None:
        if name in _CHANNELS_SECOND:
            return 1
        if name in _CHANNELS_LAST:
            return made.ndim - 1
        if name == "native_layer_norm" and len(args[1]) == 1:  # of a head it norms a part only
            return _BROKEN if self._axes.get(id(flowing[0])) == _BROKEN else made.ndim - 1
        if name in ("permute", "transpose", "t"):
            return self._axis_permuted(name, args, flowing[0])
        if name in _RESHAPES:
            return self._axis_reshaped(flowing[0], made)
        for tensor in flowing:
            if tensor.ndim == made.ndim and id(tensor) in self._axes:
                return self._axes[id(tensor)]
        return None

    def _axis_permuted(self, name: str, args: tuple[Any, ...], tensor: Tensor) -> int | None:
        axis = self._axes.get(id(tensor))
        if axis is None or axis == _BROKEN:
            return axis
        order = list(range(tensor.ndim))
        if name == "permute":
            order = [dim % tensor.ndim for dim in args[1]]
        else:
            one, other = (args[1], args[2]) if name == "transpose" else (0, tensor.ndim - 1)
            order[one], order[other] = order[other], order[one]
        return order.index(axis)

    def _axis_reshaped(self, tensor: Tensor, made: Tensor) -> int | None:
        """Keep the axis where all up to it, or all from it on, kept its size."""
        axis = self._axes.get(id(tensor))
        if axis is None or axis == _BROKEN:
            return axis
        if tensor.shape[: axis + 1] == made.shape[: axis + 1]:
            return axis
        behind = tensor.ndim - axis
        if behind <= made.ndim and tensor.shape[axis:] == made.shape[made.ndim - behind :]:
            return made.ndim - behind
        return _BROKEN


def _memory(tensor: Tensor) -> int:
    """Return what is the same for all views of one piece of memory."""
    return int(tensor.untyped_storage()._cdata)
