"""What an export format is: a draft made once, written with any gates, and read back to be run."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from attnsurgeon.errors import ExportRefused, UnknownName
from attnsurgeon.export.inputs import AXES, Inputs
from attnsurgeon.registry import Registry

Runner = Callable[[Inputs], list[Tensor]]
"""Runs a written file: inputs -> the leaves of its outputs, on the CPU; may raise RunFailed."""


class RunFailed(Exception):
    """A written file loads but does not run on an input that the model runs on."""


@dataclass(frozen=True)
class Opened:
    """A written file, read from disk; calling it runs it.

    Attributes:
        run: runs it.
        opset: the opset that the file asks for, if the format has such a thing.
        fixed_axes: the input axes that the file fixes, as far as it says.
        holds: tells which of these tensors the file has, by their names and byte for byte.
        precision: that of its numbers, by what it says itself.
    """

    run: Runner
    opset: int | None = None
    fixed_axes: tuple[str, ...] = ()
    holds: Callable[[Mapping[str, Tensor]], set[str]] = lambda tensors: set()
    precision: str = "fp32"

    def __call__(self, inputs: Inputs) -> list[Tensor]:
        """Run the file."""
        return self.run(inputs)


Reader = Callable[[Path, "Mapping[str, Tensor] | None"], Opened]
"""Opens a written file, with other values for its gates."""


@dataclass(frozen=True)
class Settings:
    """What the user may choose; a format that has no such choice refuses it.

    `fixed` is no choice: the axes of which the network takes no other size.
    """

    opset: int | None = None
    dynamic: bool = True
    exporter: str = "auto"
    optimize: bool = False
    precision: str | None = None
    images: Path | None = None
    strip: bool = False
    compile: bool = False
    fixed: frozenset[str] = frozenset()

    @property
    def free(self) -> tuple[str, ...]:
        """Return the image axes that stay free."""
        return tuple(axis for axis in AXES if self.dynamic and axis not in self.fixed)


def refuse_onnx_settings(settings: Settings, suffix: str) -> None:
    """Refuse what only an ONNX file has.

    Raises:
        ExportRefused: an opset or an exporter was asked for.
    """
    if settings.opset is not None:
        raise ExportRefused(f"--opset is for .onnx; a {suffix} file has none")
    if settings.exporter != "auto":
        raise ExportRefused(f"--exporter is for .onnx; a {suffix} file has one way only")


def refuse_optimize(settings: Settings, suffix: str) -> None:
    """Refuse to freeze what is not TorchScript.

    Raises:
        ExportRefused: freezing was asked for.
    """
    if settings.optimize:
        raise ExportRefused(f"--optimize freezes TorchScript; a {suffix} file cannot be frozen")


def refuse_compile(settings: Settings, suffix: str) -> None:
    """Refuse to make machine code of what is not a program of torch.export.

    Raises:
        ExportRefused: that was asked for.
    """
    if settings.compile:
        raise ExportRefused(f"--compile is for .pt2; a {suffix} file is not compiled beforehand")


class Draft(ABC):
    """A network translated once, which can be written with its gates at any values."""

    notices: tuple[str, ...] = ()
    folds_gates: bool = False
    """Whether the gates of a written file are out of reach; a twin then proves what is behind."""
    reader: Reader | None = None
    """Opens what was written, where the file alone does not hold all of the network."""

    @abstractmethod
    def write(self, path: Path, gates: Mapping[str, Tensor]) -> None:
        """Write the network with these gate values (by dotted path)."""


class Format(ABC):
    """One export format; a subclass per file in this folder, registered under its suffix."""

    name: ClassVar[str]
    needs: ClassVar[str | None] = None
    """A module that takes long to import for whoever runs the file: it is imported meanwhile."""

    @abstractmethod
    def check(self, settings: Settings) -> None:
        """Refuse what cannot be written, before anything is loaded or translated.

        Raises:
            BadOption, ExportRefused: a setting is not one for this format.
            MissingPackage: what writes the format is missing or known to be wrong.
        """

    @abstractmethod
    def draft(
        self, model: nn.Module, inputs: Inputs, settings: Settings, metadata: Mapping[str, str]
    ) -> Draft:
        """Translate a network in eval mode.

        Raises:
            ExportRefused: the network is not one for this format.
        """

    @abstractmethod
    def open(self, path: Path, gates: Mapping[str, Tensor] | None = None) -> Opened:
        """Read a written file from disk.

        Args:
            path: the file, which is left as it is.
            gates: values for its gates in place of its own, unless the draft folded them.

        Raises:
            BadFile: it cannot be run, or has no such gates.
        """

    def reader_for(self, model: nn.Module) -> Reader:
        """Return what opens a file that is held against this model."""
        return self.open

    def name_of(self, path: Path) -> str:
        """Return what to call a written file, where one suffix stands for several kinds."""
        return self.name

    def has_gates(self, path: Path, gates: Collection[str]) -> bool:
        """Tell whether these gates of a written file can be set when it is opened."""
        return True

    def refer(self, path: Path, suffix: str) -> None:  # noqa: B027 (most refer to none)
        """Have a file that refers to others beside it do so by their names with a suffix."""


formats: Registry[Format] = Registry("export format")


def register(suffix: str) -> Callable[[type[Format]], type[Format]]:
    """Return a decorator that enters a format under the suffix of its files."""

    def enter(kind: type[Format]) -> type[Format]:
        formats.register(suffix)(kind())
        return kind

    return enter


def format_for(path: str | os.PathLike[str]) -> Format:
    """Return the format that a file's suffix names.

    Raises:
        UnknownName: no format has that suffix.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in formats:
        raise UnknownName("export format", suffix or str(path), formats.names())
    return formats.get(suffix)


def leaves(output: Any) -> list[Tensor]:
    """Return the tensors of any output structure."""
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def leaves_on_cpu(output: Any) -> list[Tensor]:
    """Return the tensors of any output structure, on the CPU."""
    return [leaf.detach().cpu() for leaf in leaves(output)]
