"""Notice sequences that others take apart: where attention would be one module too many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_ASKING = ("__iter__", "__len__", "__getitem__")


@contextmanager
def noticing_walks(tell: Callable[[nn.Module], None]) -> Iterator[None]:
    """Tell of each nn.Sequential that is walked, counted, sliced or indexed from its end."""
    held = {name: getattr(nn.Sequential, name) for name in _ASKING}
    try:
        for name, method in held.items():
            setattr(nn.Sequential, name, _telling(method, tell))
        yield
    finally:
        for name, method in held.items():
            setattr(nn.Sequential, name, method)


def _telling(method: Callable[..., Any], tell: Callable[[nn.Module], None]) -> Callable[..., Any]:
    def told(self: nn.Sequential, *args: Any) -> Any:
        children = list(self._modules.values())
        if args and isinstance(args[0], int) and 0 <= args[0] < len(children):
            return children[args[0]]  # one more at the end would change nothing there
        tell(self)
        return method(self, *args)

    return told
