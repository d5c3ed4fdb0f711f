"""Hold the arguments of public functions to their annotations: one line instead of a traceback.

Annotations of plain types, paths, networks, functions, unions, sequences and tuples are held to;
any other is left to the function itself.
"""

from __future__ import annotations

import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

from torch import nn

from attnsurgeon.errors import BadOption, HostUnusable

P = ParamSpec("P")
R = TypeVar("R")

_WORDS = {
    type(None): "None",
    nn.Module: "a network",
    os.PathLike: "a path",
    Callable: "a function",
}


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function with arguments refused that are not of their annotated types.

    Raises:
        HostUnusable: something else in the place of a network.
        BadOption: another argument of a wrong type; the message says what it takes.
    """
    hints = functools.cache(lambda: typing.get_type_hints(function))
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python says it with the function's name
        for name, value in given.arguments.items():
            if isinstance(value, Iterator):  # to look through it would use it up
                given.arguments[name] = value = list(value)
            if signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD:
                _check(function, name, hints().get(name, Any), value)
        return function(*given.args, **given.kwargs)

    return checked


def _check(function: Callable[..., Any], name: str, hint: Any, value: Any) -> None:
    if _fits(hint, value):
        return
    kind = type(value).__name__
    if hint is nn.Module:
        raise HostUnusable(f"this is {kind}, no torch.nn.Module; pass the network")
    called = function.__qualname__.removesuffix(".__init__")
    told = repr(value) if isinstance(value, str | int | float | None) else kind
    raise BadOption(f"{name} of {called} takes {_in_words(hint)}, not {told}")


def _fits(hint: Any, value: Any) -> bool:
    """Tell whether a value is of an annotated type, as far as that can be told."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(origin):
        return any(_fits(part, value) for part in parts)
    if _is_tuple(origin, parts):
        is_tuple = isinstance(value, list | tuple) and len(value) == len(parts)
        return is_tuple and all(map(_fits, parts, value))
    if _is_many(origin):
        is_many = isinstance(value, origin) and not isinstance(value, str | bytes)
        return is_many and all(_fits(parts[0], item) for item in value)
    kind = origin or hint
    if kind is Any or not isinstance(kind, type):
        return True
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _in_words(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(origin):
        return " or ".join(map(_in_words, parts))
    if _is_tuple(origin, parts):
        return f"({', '.join(map(_in_words, parts))})"
    if _is_many(origin):
        return f"several of {_in_words(parts[0])}"
    kind = origin or hint
    return _WORDS.get(kind) or str(getattr(kind, "__name__", kind))


def _is_union(origin: Any) -> bool:
    return origin in (typing.Union, types.UnionType)


def _is_tuple(origin: Any, parts: tuple[Any, ...]) -> bool:
    """Tell whether it is a tuple of so many, and not of any number."""
    return origin is tuple and Ellipsis not in parts


def _is_many(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Iterable)
