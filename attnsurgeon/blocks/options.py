"""The options of a block: the keyword-only arguments of its constructor, read from text or JSON."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Collection
from typing import Any

from attnsurgeon.errors import BadOption


def option_types(build: Callable[..., Any], leave_out: Collection[str]) -> dict[str, Any]:
    """Return option -> annotated type of the keyword-only arguments, but for those left out.

    One without an annotation is of its default's type, or text.

    Raises:
        BadOption: an annotation names what does not exist.
    """
    try:
        hints = typing.get_type_hints(build)
    except NameError as error:
        raise BadOption(f"an annotation of its constructor cannot be read: {error}") from error
    return {
        parameter.name: hints.get(parameter.name, _like_default(parameter))
        for parameter in inspect.signature(build).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in leave_out
    }


def _like_default(parameter: inspect.Parameter) -> type:
    return str if parameter.default in (None, parameter.empty) else type(parameter.default)


def read_option(option: str, kind: Any, value: Any) -> Any:
    """Return a value (text from a command line, or JSON) as the annotated type of an option.

    Raises:
        BadOption: it cannot be read as that.
    """
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
        origin = typing.get_origin(kind)
    if origin is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        element = typing.get_args(kind)[0]
        return tuple(read_option(option, element, _stripped(part)) for part in parts)
    if kind is bool:
        return _read_bool(option, value)
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise ValueError
        return _read_fraction(value) if kind is float else kind(value)
    except (TypeError, ValueError, ZeroDivisionError):
        raise BadOption(f"{option} takes {kind.__name__}, not {value!r}") from None


def _stripped(part: Any) -> Any:
    return part.strip() if isinstance(part, str) else part


def _read_fraction(value: Any) -> float:
    """Read 0.25 or 1/4."""
    over, slash, under = str(value).partition("/")
    return float(over) / float(under) if slash else float(over)


def _read_bool(option: str, value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    text = str(value).lower()
    if text not in words:
        raise BadOption(f"{option} takes true or false, not {value!r}")
    return words[text]
