"""The code of a network and its attention as one file of plain torch and torchvision.

Blocks are copied as they are written, from the modules that define them and what those import of
this package; forwards with attention spliced in are written out as they were traced.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import linecache
import textwrap
from collections.abc import Iterable, Mapping
from types import FunctionType, ModuleType
from typing import Any

from torch import nn
from torchvision.models import get_model_builder

from attnsurgeon import blocks, digits
from attnsurgeon.anatomy import own_class
from attnsurgeon.card import HostCard
from attnsurgeon.errors import ExportRefused
from attnsurgeon.gate import DEFAULT_FORM
from attnsurgeon.host import DIGITS, host_names
from attnsurgeon.plan import Cut

_PACKAGE = "attnsurgeon"
_LEFT_OUT = {f"{_PACKAGE}.blocks"}  # the registry: blocks are named in full here
_ERRORS = f"{_PACKAGE}.errors"
_KNOWN = ("torch", "torchvision", "builtins", "math", "operator", "typing", "collections")

_HEAD = '''"""{title}: plain torch and torchvision.

Written by attnsurgeon {version}, which it does not need; it needs the weights.

    model = load({weights!r})   # eval mode

{cuts}
"""

from __future__ import annotations

import sys

import torch
import torchvision
{imports}
'''
_FOOT = '''

def build() -> nn.Module:
    """Return the network with its attention and random weights."""
    model = torchvision.models.get_model({name!r}, weights=None{arguments})
{lines}
    return model


def load(path: str) -> nn.Module:
    """Return the network with the weights of a .safetensors file or a checkpoint, in eval mode."""
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    model = build().to(next(t.dtype for t in state.values() if t.is_floating_point()))
    model.load_state_dict(state)
    return model.eval()


if __name__ == "__main__":
    print(load(sys.argv[1]))
'''


def write_source(model: nn.Module, card: HostCard, cuts: Iterable[Cut], weights: str) -> str:
    """Return the text of a file that builds the operated network.

    Args:
        model: the network.
        card: how its host is made.
        cuts: its attention.
        weights: the name of the weights file, for the example in the text.

    Raises:
        ExportRefused: the host is no torchvision network, or a forward calls code of its own.
    """
    if card.name not in host_names():
        raise ExportRefused(
            f"{type(model).__name__} is no network of torchvision: its code is yours; export the "
            "attention with it to .onnx, .pt or .pt2"
        )
    made = list(cuts)
    gathered = _Gathered()
    for cut in made:
        module = inspect.getmodule(blocks.get(cut.block))
        if module is None or not module.__name__.startswith(f"{_PACKAGE}.blocks."):
            raise ExportRefused(
                f"the code of {cut.block} is not of this package and is not written out; export "
                "to .onnx, .pt or .pt2"
            )
        gathered.take(module)
    classes, lines = _wired(model, made, gathered)
    name, arguments = _builder(card)
    head = _HEAD.format(
        title=f"{card.name} with attention" if made else card.name,
        version=importlib.import_module(_PACKAGE).__version__,
        weights=weights,
        cuts="\n".join(f"{cut.block} at {cut.path} ({cut.placement})" for cut in made),
        imports="\n".join(sorted(gathered.imports | {"from torch import nn"})),
    )
    foot = _FOOT.format(
        name=name,
        arguments="".join(f", {key}={value!r}" for key, value in arguments.items()),
        lines=textwrap.indent("\n".join(lines), "    "),
    )
    return "\n\n\n".join([head.rstrip(), *gathered.texts, *classes]) + "\n" + foot


def _builder(card: HostCard) -> tuple[str, dict[str, Any]]:
    """Return the name and arguments that torchvision knows the host by."""
    assert card.name is not None
    name, arguments = card.name, dict(card.arguments)
    if name == DIGITS:
        shipped = digits.read_card()
        name, arguments = shipped.model, {**shipped.arguments, **arguments}
    if "weights_backbone" in inspect.signature(get_model_builder(name)).parameters:
        arguments = {"weights_backbone": None, **arguments}
    return name, arguments


class _Gathered:
    """Texts of modules of this package, each after those it imports, without those imports."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.imports: set[str] = set()
        self.seen: set[str] = set()

    def take(self, module: ModuleType) -> None:
        """Take in a module, unless it is there already."""
        if module.__name__ in self.seen:
            return
        self.seen.add(module.__name__)
        source = inspect.getsource(module)
        parts = []
        for node in ast.parse(source).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._import(node)
            elif not _is_docstring(node):
                parts.append(_without_registration(source, node))
        self.texts.append("\n\n\n".join([f"# {_title(module)}", *parts]))

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        origin = getattr(node, "module", None) or ""
        if origin == "__future__":
            return
        if origin == _ERRORS:
            for alias in node.names:
                self._error(alias.name)
        elif origin.split(".")[0] == _PACKAGE:
            for alias in node.names:
                full = f"{origin}.{alias.name}"
                if full not in _LEFT_OUT:
                    self.take(importlib.import_module(origin))
        else:
            self.imports.add(ast.unparse(node))

    def _error(self, name: str) -> None:
        if name not in self.seen:
            self.seen.add(name)
            self.texts.append(f'class {name}(ValueError):\n    """A value that cannot be taken."""')


def _title(module: ModuleType) -> str:
    return (module.__doc__ or module.__name__).strip().splitlines()[0]


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _without_registration(source: str, node: ast.stmt) -> str:
    """Return the text of a definition with its decorators, but for the one that registers it."""
    lines = source.splitlines()
    start = node.lineno
    kept = []
    for decorator in getattr(node, "decorator_list", []):
        text = ast.unparse(decorator)
        if not text.startswith("blocks.register"):
            kept.append(f"@{text}")
    return "\n".join([*kept, *lines[start - 1 : node.end_lineno]])


def _wired(model: nn.Module, cuts: list[Cut], gathered: _Gathered) -> tuple[list[str], list[str]]:
    """Return the classes of the blocks with attention, and the lines that put it there."""
    classes: dict[str, str] = {}
    lines = []
    for path in dict.fromkeys(cut.path for cut in cuts):
        body = _body_of(model.get_submodule(path), gathered)
        name = classes.setdefault(body, f"Attended{len(classes)}")
        lines.append(f"block = model.get_submodule({path!r})" if path else "block = model")
        for cut in cuts:
            if cut.path == path:
                kind = blocks.get(cut.block).__name__
                options = "".join(f", {key}={value!r}" for key, value in cut.options.items())
                lines.append(f"block.{cut.splice.child} = {kind}.build({cut.place!r}{options})")
                if cut.gate != DEFAULT_FORM:
                    lines.append(f"give_form(block.{cut.splice.child}, {cut.gate!r})")
        lines.append(f"block.__class__ = {name}")
    return [f"class {name}({body}" for body, name in classes.items()], lines


def _body_of(block: nn.Module, gathered: _Gathered) -> str:
    """Return what follows `class Name(` for a block with attention."""
    host = own_class(block)
    members = vars(type(block))
    parts = [f'"""{host.__name__} with attention in its forward."""']
    own = members.get("_own_forward")
    if own is not None and own.__code__ is host.forward.__code__:
        parts.append(f"_own_forward = {_address(host)}.forward")
    elif own is not None:
        parts.append(_text_of(own, gathered).replace("def forward(", "def _own_forward(", 1))
    parts.append(_text_of(members["forward"], gathered))
    return f"{_address(host)}):\n" + textwrap.indent("\n\n".join(parts), "    ")


def _address(host: type[nn.Module]) -> str:
    if host.__module__.split(".")[0] != "torchvision":
        raise ExportRefused(f"{host.__name__} is no class of torchvision: its code is yours")
    return f"{host.__module__}.{host.__qualname__}"


def _text_of(function: FunctionType, gathered: _Gathered) -> str:
    """Return the source of a forward that was written by this package.

    Raises:
        ExportRefused: it calls a function that neither torch nor torchvision has.
    """
    for name, thing in _globals_of(function).items():
        home = thing.__name__ if isinstance(thing, ModuleType) else thing.__module__
        if home.split(".")[0] not in _KNOWN:
            raise ExportRefused(f"a forward calls {home}.{name}, which is code of its own")
        if isinstance(thing, ModuleType):
            gathered.imports.add(f"import {home}" if home == name else f"import {home} as {name}")
        elif home != "builtins":
            gathered.imports.add(f"from {home} import {thing.__qualname__} as {name}")
    return "".join(linecache.getlines(function.__code__.co_filename)).strip()


def _globals_of(function: FunctionType) -> Mapping[str, Any]:
    """Return what the function's code reads of its module."""
    held = function.__globals__
    return {name: held[name] for name in function.__code__.co_names if name in held}
