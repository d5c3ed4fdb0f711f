"""Name -> thing, with a near miss in the error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from attnsurgeon.errors import UnknownName

T = TypeVar("T")


class Registry(Generic[T]):
    """An ordered table of named things that says what was probably meant."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._things: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that enters a thing under `name`; a name is taken once."""

        def enter(thing: T) -> T:
            if name in self._things:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._things[name] = thing
            return thing

        return enter

    def get(self, name: str) -> T:
        """Return the thing of that name.

        Raises:
            UnknownName: nothing is registered under it; the message gives the nearest name.
        """
        if name not in self._things:
            raise UnknownName(self.kind, name, self._things)
        return self._things[name]

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._things)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._things
