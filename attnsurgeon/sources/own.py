"""Networks of the user's own: `path/to/file.py:factory` or `package.module:factory`.

Their code is run because the user names it on the command line or in a call; never because a
file of weights or a recipe does.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from attnsurgeon.card import HostCard, give_card
from attnsurgeon.checkpoint import check_readable
from attnsurgeon.errors import AttnSurgeonError, BadOption, HostUnusable, UnknownName, first_line
from attnsurgeon.example import default_example

Factory = Callable[..., Any]


def knows(name: str) -> bool:
    """Tell whether a MODEL argument names code: FILE.py:NAME or MODULE:NAME, or a .py file."""
    return ":" in name or name.endswith(".py")


def check(name: str, weights: str) -> None:
    """Refuse what can be seen before any code is run.

    Raises:
        BadOption: no factory is named, or weights, which the factory alone knows of.
        BadFile: there is no such file.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        file = name.removesuffix(":")
        raise BadOption(f"name what in {file!r} makes the network, as {file}:build")
    if place.endswith(".py"):
        check_readable(Path(place))
    if weights not in ("DEFAULT", "none"):
        raise BadOption(
            f"{name} takes no --weights {weights}: it brings its own, or give --checkpoint FILE"
        )


def make(name: str, weights: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Run the factory of that name; with whatever weights it gives.

    Raises:
        BadOption, BadFile, UnknownName: see check and find_factory.
        HostUnusable: see call_factory.
    """
    check(name, weights)
    model = call_factory(find_factory(name), arguments, name)
    place, _, attribute = name.rpartition(":")
    give_card(
        model,
        HostCard(
            name=None,
            class_name=type(model).__name__,
            arguments=dict(arguments),
            input_shapes=(tuple(default_example(model).shape),),
            factory=f"{Path(place).name}:{attribute}",  # no path of this machine into a file
        ),
    )
    return model


def takes(name: str, argument: str) -> bool:
    """Tell whether the factory has a parameter of that name."""
    factory = find_factory(name)
    with suppress(TypeError, ValueError):
        return argument in inspect.signature(factory).parameters
    return False


def find_factory(name: str) -> Any:
    """Import what a name says and return the factory, class or network in it.

    Raises:
        HostUnusable: the code raises while it is imported.
        UnknownName: it has nothing of that name.
    """
    place, _, attribute = name.rpartition(":")
    module = _from_file(Path(place)) if place.endswith(".py") else _from_module(place)
    thing: Any = module
    for part in attribute.split("."):
        if not hasattr(thing, part):
            known = [key for key, value in vars(module).items() if _is_offered(key, value)]
            raise UnknownName(f"factory in {place!r}", attribute, known)
        thing = getattr(thing, part)
    return thing


def _is_offered(name: str, value: Any) -> bool:
    return name[:1] != "_" and (callable(value) or isinstance(value, nn.Module))


def _from_file(file: Path) -> ModuleType:
    """Import a file, once as long as it stays as it is: its classes are the same each time."""
    check_readable(file)
    whole = file.resolve()
    digest = hashlib.sha256(str(whole).encode()).hexdigest()[:8]
    name, content = f"{file.stem}_{digest}", whole.read_bytes()
    known = sys.modules.get(name)
    if known is not None and known.__dict__.get("_attnsurgeon_read") == content:
        return known
    spec = importlib.util.spec_from_file_location(name, whole)
    assert spec is not None  # a .py file has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        with _as_a_script(whole.parent):
            spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name)
        if not isinstance(error, Exception | SystemExit):
            raise
        raise _raised(f"importing {str(file)!r}", error, whole) from error
    module.__dict__["_attnsurgeon_read"] = content
    return module


def _from_module(place: str) -> ModuleType:
    try:
        with _as_a_script(Path.cwd()):
            return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{place}.".startswith(f"{error.name}."):
            file = Path(f"{place.replace('.', '/')}.py")
            hint = f"; did you mean {file}:NAME?" if file.is_file() else ""
            raise UnknownName("module", place, (), hint) from error
        raise _raised(f"importing {place!r}", error) from error
    except (Exception, SystemExit) as error:
        raise _raised(f"importing {place!r}", error) from error


@contextmanager
def _as_a_script(folder: Path) -> Iterator[None]:
    """Let code import its neighbours, as `python FILE` would; leave no files, say nothing."""
    wrote, text = sys.dont_write_bytecode, str(folder)
    sys.path.insert(0, text)
    sys.dont_write_bytecode = True
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.dont_write_bytecode = wrote
        if text in sys.path:
            sys.path.remove(text)


def call_factory(factory: Any, arguments: Mapping[str, Any], name: str) -> nn.Module:
    """Return the network that a factory makes, or a copy of it where it is one already.

    Args:
        factory: a function or class that returns a network, or a network.
        arguments: of the factory, by keyword.
        name: of the factory, for errors.

    Raises:
        BadOption: it needs other arguments.
        HostUnusable: it raises, or returns something else.
    """
    if isinstance(factory, nn.Module):
        if arguments:
            raise BadOption(f"{name} is a network already and takes no --model-arg")
        return copy.deepcopy(factory)
    _check_arguments(factory, arguments, name)
    file = Path(getattr(getattr(factory, "__code__", None), "co_filename", "") or _file_of(factory))
    try:
        with _as_a_script(file.parent):
            made = factory(**arguments)
    except (Exception, SystemExit) as error:
        told = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise _raised(f"{name}({told})", error, file) from error
    if inspect.iscoroutine(made):
        made.close()  # or Python would warn that nobody awaited it
        raise HostUnusable(f"{name} is async, and nothing awaits it here; write it without async")
    if not isinstance(made, nn.Module):
        kind = type(made).__name__
        raise HostUnusable(
            f"{name} returned {kind}, no torch.nn.Module; have it return the network alone"
        )
    return made


def _file_of(factory: Any) -> str:
    with suppress(TypeError, OSError):
        return inspect.getsourcefile(factory) or ""
    return ""


def _check_arguments(factory: Any, arguments: Mapping[str, Any], name: str) -> None:
    if not callable(factory):
        raise BadOption(f"{name} is {type(factory).__name__}, nothing that makes a network")
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # of a callable that does not tell: calling it will
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise BadOption(
            f"{name}{signature} cannot be called: {error}; give each argument as "
            "--model-arg NAME=VALUE"
        ) from error


def _raised(doing: str, error: BaseException, file: Path | None = None) -> AttnSurgeonError:
    """Return the refusal of code that raised, with the line of its own file."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if file and frame.filename == str(file)]
    where = f" (line {lines[-1]} of {file.name})" if file and lines else ""
    said = first_line(error)
    kind = type(error).__name__
    what = kind if said == kind else f"{kind}: {said}"
    return HostUnusable(f"{doing} raised {what}{where}; put that right and try again")
