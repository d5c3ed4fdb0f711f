"""Attention of your own: a class in a file, or one that an installed package announces.

Only `load_file` runs a file, when a person names it. A recipe keeps `file.py:Class`, without the
folder, and is never a reason to run anything: whoever loads it names the file again.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import re
import sys
import types
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch

from attnsurgeon.blocks.block import AROUND, DIMS, AttentionBlock, Place
from attnsurgeon.borrow import borrowed_modes, borrowed_randomness
from attnsurgeon.errors import (
    AttnSurgeonError,
    BadFile,
    BadOption,
    MissingPackage,
    UnknownName,
    first_line,
)
from attnsurgeon.gate import Gate, LayerGate

GROUP = "attnsurgeon.blocks"
"""Entry point group by which a package announces blocks."""
PLACEMENTS = (*AROUND, "replace")

_from_files: dict[str, type[AttentionBlock]] = {}


def is_in_file(name: str) -> bool:
    """Tell whether a name is that of a class in a file: path/to/file.py:Class."""
    return name.rpartition(":")[0].endswith(".py")


def load_file(text: str) -> str:
    """Run the file of path/to/file.py:Class and return the name of its class in recipes.

    The same file is run once; of two files of one name, the last that was named counts. A name
    without a folder, as plans and recipes have it, stands for the class that was loaded under it
    where no such file lies in the current folder.

    Raises:
        BadFile: there is no such file, or it raises.
        UnknownName: it has no such class.
        BadOption: the class is no attention.
    """
    path, _, class_name = text.rpartition(":")
    file = Path(path)
    if text in _from_files and not file.exists():
        return text
    module = _run(file)
    thing = getattr(module, class_name, None)
    if thing is None:
        known = [name for name, held in vars(module).items() if is_attention(held)]
        raise UnknownName(f"class of {file.name}", class_name, known)
    name = f"{file.name}:{class_name}"
    _from_files[name] = checked(thing, text)
    return name


def from_file(name: str) -> type[AttentionBlock]:
    """Return a class that was loaded before.

    Raises:
        BadOption: it was not; the message says how to name it again.
    """
    if name not in _from_files:
        raise BadOption(
            f"{name!r} is attention of your own, and no file is run because another names it; "
            f"name it again: attnsurgeon --own-block path/to/{name} ..., or in Python "
            f'attnsurgeon.blocks.learn("path/to/{name}")'
        )
    return _from_files[name]


def _run(file: Path) -> types.ModuleType:
    """Return the module of a file, which can be found again by pickles; no bytecode is left."""
    try:
        source = file.read_bytes()
    except FileNotFoundError as error:
        raise BadFile(f"there is no file {str(file)!r}; give path/to/file.py:Class") from error
    except OSError as error:
        raise BadFile(f"cannot read {str(file)!r}: {error.strerror}") from error
    digest = hashlib.sha256(str(file.resolve()).encode() + source).hexdigest()[:12]
    name = f"own_attention_{re.sub(r'[^0-9a-zA-Z]', '_', file.stem)}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    module = types.ModuleType(name)
    module.__file__ = str(file.resolve())
    sys.modules[name] = module
    try:
        exec(compile(source, module.__file__, "exec"), vars(module))
    except BaseException as error:  # it is the user's file: any failure is its own
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise BadFile(f"{str(file)!r} cannot be run: {_told(error)}") from error
    return module


def _told(error: BaseException) -> str:
    """Return the kind of a foreign error and what it says, if it says anything."""
    kind = type(error).__name__
    return kind if first_line(error) == kind else f"{kind}: {first_line(error)}"


def is_attention(thing: Any) -> bool:
    """Tell whether a thing is a class of attention."""
    is_class = isinstance(thing, type) and issubclass(thing, AttentionBlock)
    return is_class and thing is not AttentionBlock


def checked(thing: Any, told: str) -> type[AttentionBlock]:
    """Return a class if it can stand where attention stands; `told` names it in errors.

    Raises:
        BadOption: it is no attention, or not built as one.
    """
    if not is_attention(thing):
        raise BadOption(
            f"{told} is no attention; make it a subclass of attnsurgeon.blocks.AttentionBlock"
        )
    block: type[AttentionBlock] = thing
    for kind, values, known in (
        ("placements", block.placements, PLACEMENTS),
        ("layouts", block.layouts, tuple(DIMS)),
    ):
        if not values or not set(values) <= set(known):
            raise BadOption(f"the {kind} of {told} must be some of {', '.join(known)}")
    try:
        inspect.signature(block).bind(64)
        block.option_types()
    except (TypeError, BadOption) as error:
        raise BadOption(
            f"{told} must take the channels, and all else as keywords with defaults: {error}"
        ) from error
    return block


def announced() -> dict[str, EntryPoint]:
    """Return the name of each announced block, and where it is; none is imported."""
    return {point.name: point for point in entry_points(group=GROUP)}


def load_announced(name: str, known: Iterable[str]) -> type[AttentionBlock]:
    """Return the block that an installed package announces under a name.

    Raises:
        UnknownName: none does; the message gives the nearest of all names.
        MissingPackage: its package cannot be imported.
        BadOption: what it announces is no attention.
    """
    points = announced()
    if name not in points:
        names = [*known, *points]
        near = difflib.get_close_matches(name, names, cutoff=0.7)
        hint = "" if near else " (or install the package that brings it)"
        raise UnknownName("block", name, names, hint)
    try:
        thing = points[name].load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of another's package: it may be anything
        raise MissingPackage(
            f"the block {name!r} cannot be imported from {points[name].value}: {_told(error)}"
        ) from error
    return checked(thing, f"{name} ({points[name].value})")


def build(kind: type[AttentionBlock], place: Place, options: Mapping[str, Any]) -> AttentionBlock:
    """Construct attention that is none of ours.

    Raises:
        BadOption: it fails.
    """
    try:
        return kind.build(place, **options)
    except AttnSurgeonError:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of the user's own class: it may be anything
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        told = f" with {given}" if given else ""
        raise BadOption(f"it cannot be built{told}: {_told(error)}") from error


def try_out(name: str, attention: AttentionBlock, place: Place, sizes: tuple[int, ...]) -> None:
    """Run attention that is none of ours once on a map of zeros of its place.

    Raises:
        BadOption: it has no gate, fails, or returns another shape.
    """
    if not any(isinstance(module, Gate | LayerGate) for module in attention.modules()):
        raise BadOption(
            f"{name} has no gate, so nothing shows that it can learn: give it a Gate() of "
            "attnsurgeon.gate and let its forward call it"
        )
    if place.in_channels is not None or any(p.is_meta for p in attention.parameters()):
        return
    like = next(attention.parameters(), torch.empty(0))
    x = like.new_zeros(2, place.channels, *sizes)
    with torch.no_grad(), borrowed_modes(attention), borrowed_randomness(0):
        try:
            out = attention.eval()(x)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # of the user's own class: it may be anything
            raise BadOption(
                f"{name} fails on a map of {tuple(x.shape)}: {_told(error)}; change its options by "
                "--set, or choose other sites by --at or --exclude"
            ) from error
    if getattr(out, "shape", None) != x.shape:
        made = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise BadOption(f"{name} makes {made} of a map of {tuple(x.shape)}, not its like")
