"""Read plain values, as JSON gives them, as an annotated type; nothing is converted by guessing."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any


def read_as(kind: Any, value: Any, name: str) -> Any:
    """Return `value` as `kind`: a plain type, a union, a tuple, a mapping or a dataclass of these.

    Lists become tuples and mappings dataclasses, down to any depth. `name` stands in errors.

    Raises:
        ValueError: the value, or one inside it, is of another kind; a field is missing or unknown.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _read_union(parts, value, name)
    if origin is tuple:
        return _read_tuple(parts, value, name)
    if origin is not None and issubclass(origin, Mapping):
        held = _expect(dict, value, name)
        return {key: read_as(parts[1], item, f"{name}[{key!r}]") for key, item in held.items()}
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, name)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return _expect(kind, value, name)


def _expect(kind: Any, value: Any, name: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is {type(value).__name__}, not {kind.__name__}")
    return value


def _read_union(parts: tuple[Any, ...], value: Any, name: str) -> Any:
    if value is None and type(None) in parts:
        return None
    (kind,) = (part for part in parts if part is not type(None))  # X | None is all there is
    return read_as(kind, value, name)


def _read_tuple(parts: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} is {type(value).__name__}, not list")
    kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
    if len(kinds) != len(value):
        raise ValueError(f"{name} has {len(value)} values, not {len(kinds)}")
    return tuple(
        read_as(kind, item, f"{name}[{i}]")
        for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _read_dataclass(kind: Any, value: Any, name: str) -> Any:
    held = _expect(dict, value, name)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in held:
        if key not in fields:
            raise ValueError(f"{name}.{key} is unknown")
    for key, field in fields.items():
        bare = field.default is field.default_factory is dataclasses.MISSING
        if bare and key not in held:
            raise ValueError(f"{name}.{key} is missing")
    return kind(**{key: read_as(hints[key], item, f"{name}.{key}") for key, item in held.items()})
