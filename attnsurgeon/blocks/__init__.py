"""Attention as published, one file each; a new block is one new file in this folder."""

from __future__ import annotations

import importlib
import pkgutil
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from attnsurgeon.blocks import own
from attnsurgeon.blocks.block import DIMS, AttentionBlock, Place
from attnsurgeon.blocks.options import read_option
from attnsurgeon.blocks.timm_attention import PREFIX, timm_block
from attnsurgeon.errors import BadOption, UnknownName
from attnsurgeon.gate import DEFAULT_FORM, form_named, give_form
from attnsurgeon.registry import Registry

BlockType = TypeVar("BlockType", bound=type[AttentionBlock])

_registry: Registry[type[AttentionBlock]] = Registry("block")


def register(name: str) -> Callable[[BlockType], BlockType]:
    """Return a decorator that enters a block under the name the command line uses."""
    return typing.cast("Callable[[BlockType], BlockType]", _registry.register(name))


def names() -> list[str]:
    """Return the names of all registered blocks, sorted."""
    return _registry.names()


def get(name: str) -> type[AttentionBlock]:
    """Return the block of that name: one of `names()`, of timm, of a package, or learnt before.

    Raises:
        UnknownName: there is none; the message gives the nearest.
        BadOption: a class in a file that was not learnt, or no attention.
        MissingPackage: its package is not installed or cannot be imported.
    """
    if name in _registry:
        return _registry.get(name)
    if own.is_in_file(name):
        return own.from_file(name)
    if name.startswith(PREFIX):
        return timm_block(name)
    return own.load_announced(name, _registry)


def learn(text: str) -> str:
    """Return the name that stands for attention in plans and recipes; run a file that is named.

    `se` is `se`; path/to/mine.py:MyAttention loads that class, and is `mine.py:MyAttention`.

    Raises:
        BadFile, BadOption, UnknownName: see own.load_file.
    """
    return own.load_file(text) if own.is_in_file(text) else text


def label(name: str) -> str:
    """Return the name of a block as a part of a file's name: `mine.py:Mine` is `mine`."""
    last = name.rpartition(":")[2] if own.is_in_file(name) else name
    return re.sub(r"[^0-9a-z]+", "_", last.lower()).strip("_") or "attention"


def option_types(name: str) -> dict[str, Any]:
    """Return option -> annotated type of a block: the keyword-only arguments a user may set."""
    return get(name).option_types()


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
    return {option: read_option(option, known[option], value) for option, value in options.items()}


def check_form(name: str, form: str, options: Mapping[str, Any]) -> None:
    """Refuse a form of gate that a block cannot have, before any network is at hand.

    Raises:
        UnknownName: no form is called so.
        BadOption: the block cannot have it with these options.
    """
    form_named(form)
    if form == DEFAULT_FORM or name not in _registry:  # another's constructor may ask for anything
        return
    kind = get(name)
    with torch.device("meta"):
        attention = kind.build(Place(64, dims=DIMS[kind.layouts[0]]), **options)
    try:
        give_form(attention, form)
    except BadOption as error:
        raise BadOption(f"{name}: {error}") from None


def try_out(name: str, attention: AttentionBlock, place: Place, sizes: tuple[int, ...]) -> None:
    """Run attention once on a map of zeros, unless it is one of `names()`.

    Raises:
        BadOption: it fails, or returns another shape.
    """
    if name not in _registry:
        own.try_out(name, attention, place, sizes)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
