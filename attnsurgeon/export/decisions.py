"""Decisions that a network takes by the values of its inputs: a trace keeps how they went.

`if x.abs().max() > 50` is a constant in a traced file, and no comparison on inputs like those that
it was traced with would ever show it. So the network is run once more and watched: whoever reads a
number that was computed from an input decides by it.
"""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from attnsurgeon.borrow import borrowed_buffers, borrowed_modes, borrowed_numerics
from attnsurgeon.export.inputs import Inputs

NOTICE = (
    "{} decides by values of its inputs, at {}: the traced file decides as for the example, "
    "whatever it is given"
)
_READ = "_local_scalar_dense"
"""The operator by which a tensor becomes a number of Python's, in bool(), int() and item()."""
_TAKES_SHAPES = ("new_", "_like", "sym_")
"""In the names of operators of whose operand only the shape, the device and the dtype count."""
_TORCH = str(Path(torch.__file__).parent) + os.sep
_COMPILED = str(Path(torch.jit.__file__).parent) + os.sep


def decisions_notice(model: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """Return what to tell of a traced network that decides by values of its inputs, if it does."""
    with _Watch(part for part in tree_leaves(inputs) if isinstance(part, Tensor)) as watch:
        _run_traced(model, inputs)
    places = list(dict.fromkeys(watch.places))
    if not places:
        return ()
    more = f" and {len(places) - 1} more places" if len(places) > 1 else ""
    return (NOTICE.format(type(model).__name__, f"{places[0]}{more}"),)


def _run_traced(model: nn.Module, inputs: Inputs) -> None:
    """Run the network as it runs while it is traced: torchvision's detectors go other ways then."""
    with (
        borrowed_modes(model),
        borrowed_buffers(model),
        borrowed_numerics(),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # its doubts are what is looked for here
        model.eval()
        torch.jit.trace(_Alone(model), inputs, check_trace=False, strict=False)


class _Alone(nn.Module):
    """A network without its outputs: a trace does not take those of every network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Any) -> Tensor:
        """Return a constant."""
        self.net(*inputs)
        return torch.zeros(1)


class _Watch(TorchDispatchMode):
    """While entered, notes where a number is read that was computed from some tensors."""

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated in torch
        self.computed = WeakIdKeyDictionary(dict.fromkeys(inputs))
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
        found = func(*args, **kwargs)
        if not any(part in self.computed for part in given):
            return found
        name = func._schema.name.partition("::")[2]
        if name == _READ:
            self.places += _places()
        elif not any(word in name for word in _TAKES_SHAPES):
            written = given if func._schema.is_mutable else []
            whole = [part._base for part in written]  # what a view was written into
            for part in (*written, *whole, *tree_leaves(found)):
                if isinstance(part, Tensor):
                    self.computed[part] = None
        return found


def _places() -> list[str]:
    """Return the innermost line of code that is not torch's, as file and line.

    There is none where compiled code reads: a trace holds that with its decisions.
    """
    calls = [call for call in traceback.extract_stack() if call.filename != __file__]
    own = max(i for i, call in enumerate(calls) if not call.filename.startswith(_TORCH))
    if any(call.filename.startswith(_COMPILED) for call in calls[own:]):
        return []
    return [f"{Path(calls[own].filename).name}:{calls[own].lineno}"]
