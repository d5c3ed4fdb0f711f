"""Attention as published, one file each; a new block is one new file in this folder."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from attnsurgeon.blocks.block import AttentionBlock, Place
from attnsurgeon.errors import BadOption, UnknownName
from attnsurgeon.registry import Registry

BlockType = TypeVar("BlockType", bound=type[AttentionBlock])

_registry: Registry[type[AttentionBlock]] = Registry("block")


def register(name: str) -> Callable[[BlockType], BlockType]:
    """Return a decorator that enters a block under the name the command line uses."""
    return typing.cast("Callable[[BlockType], BlockType]", _registry.register(name))


def names() -> list[str]:
    """Return the names of all blocks, sorted."""
    return _registry.names()


def get(name: str) -> type[AttentionBlock]:
    """Return the block of that name.

    Raises:
        UnknownName: there is none; the message gives the nearest.
    """
    return _registry.get(name)


def option_types(name: str) -> dict[str, Any]:
    """Return option -> annotated type of a block: the keyword-only arguments a user may set."""
    block = get(name)
    hints = typing.get_type_hints(block.__init__)
    measured = block.measured(Place(1, dims=3))
    return {
        parameter.name: hints[parameter.name]
        for parameter in inspect.signature(block).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in measured
    }


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a block with text read as the annotated type.

    Raises:
        UnknownName: the block has no such option.
        BadOption: a value cannot be read as the option's type.
    """
    known = option_types(name)
    for option in options:
        if option not in known:
            raise UnknownName(f"option of {name}", option, known)
    return {option: _read(option, known[option], value) for option, value in options.items()}


def _read(option: str, kind: Any, value: Any) -> Any:
    """Read a value (text from a command line, or JSON) as the annotated type of an option."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
        origin = typing.get_origin(kind)
    if origin is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(str(part).strip() for part in parts)
    if kind is bool:
        return _read_bool(option, value)
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise ValueError
        return _read_fraction(value) if kind is float else kind(value)
    except (TypeError, ValueError, ZeroDivisionError):
        raise BadOption(f"{option} takes {kind.__name__}, not {value!r}") from None


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


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
