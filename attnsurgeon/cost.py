"""What a module costs on paper: multiply-adds and traffic, counted on meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from attnsurgeon.borrow import borrowed_modes, borrowed_randomness, on_meta


@dataclass(frozen=True)
class Count:
    """What one call costs.

    Attributes:
        macs: multiply-adds, as torch.utils.flop_counter counts them, halved: convolutions and
            matrix products.
        uncounted: names of the operators that compute something it does not count, sorted.
        weight_bytes: of parameters and buffers, read once.
        map_bytes: that operators read and write beside them, if each ran on its own and nothing
            stayed in a cache.
    """

    macs: int
    uncounted: tuple[str, ...]
    weight_bytes: int
    map_bytes: int


class _Ledger(TorchDispatchMode):
    """Notes every operator that is run, and the bytes it touches."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self.read: dict[int, int] = {}
        self.map_bytes = 0
        self.uncounted: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if not _is_view(func):
            self._enter(func, tree_leaves((args, kwargs)), tree_leaves(output))
        return output

    def _enter(self, func: Any, before: list[Any], after: list[Any]) -> None:
        touched = [leaf for leaf in (*before, *after) if isinstance(leaf, Tensor)]
        if not any(isinstance(leaf, Tensor) for leaf in before):
            return  # it makes a tensor out of nothing
        for tensor in touched:
            size = tensor.numel() * tensor.element_size()
            place = tensor.untyped_storage()._cdata
            if place in self.weights:
                self.read[place] = size
            else:
                self.map_bytes += size
        if func.overloadpacket not in flop_registry:
            self.uncounted.add(func.overloadpacket.__name__)


def _is_view(func: Any) -> bool:
    """Tell whether an operator only looks at a tensor otherwise: no byte is moved."""
    if func.namespace != "aten":
        return False
    returns = func._schema.returns
    aliases = [r.alias_info for r in returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def count_call(call: Callable[[], Any], weights: Iterable[Tensor]) -> tuple[Any, Count]:
    """Return what a call returns and what it costs; `weights` are the tensors to tell apart."""
    counter = FlopCounterMode(display=False)
    ledger = _Ledger(weights)
    with torch.no_grad(), ledger, counter:
        output = call()
    return output, Count(
        macs=int(counter.get_total_flops()) // 2,
        uncounted=tuple(sorted(ledger.uncounted)),
        weight_bytes=sum(ledger.read.values()),
        map_bytes=ledger.map_bytes,
    )


def multiply_adds(module: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Return the multiply-adds of one eval pass, as torch.utils.flop_counter counts them, halved.

    Convolutions and matrix products count; elementwise operations and pooling do not. Nothing is
    computed and the module is left as it was.
    """
    counter = FlopCounterMode(display=False)
    shapes = tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), inputs)
    with borrowed_modes(module), borrowed_randomness(0), on_meta(module), torch.no_grad(), counter:
        module.eval()
        module(*shapes)
    return int(counter.get_total_flops()) // 2
