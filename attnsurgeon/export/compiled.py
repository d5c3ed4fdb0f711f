"""A program of torch.export compiled to machine code beforehand, by AOTInductor.

It is a .pt2 file as well, for torch._inductor.aoti_load_package and for C++. Its gates stay
constants that are exchanged by name, so that they are opened in the shipped bytes.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnsurgeon.errors import ExportRefused, MissingPackage, first_line
from attnsurgeon.export.program import logs_held_back
from attnsurgeon.export.worker import input_shapes

if TYPE_CHECKING:
    from torch.export import ExportedProgram  # 0.1 s that only an export need wait for

NAME = "aotinductor"
Axes = tuple[list[int | None], torch.dtype]
NOTICE = (
    "the package holds machine code: it runs on processors like this one, with this version of "
    "torch"
)
INPUTS_KEY = "inputs"
"""Metadata: for each input its axes, null where one is free, and its dtype, as JSON."""

CONSTANTS_KEY = "constants"
"""Metadata: name of a gate -> the names that its constant may have, and its axes, as JSON."""

# A gate is one number, and two passes write small numbers into the code: the folding of uniform
# values in the joint graph does so before the constants are even named.
_SETTINGS = {
    "always_keep_tensor_constants": True,
    "joint_graph_constant_folding": False,
    "aot_inductor.check_lowerbound": False,  # 1 image is as good as the 2 that it was made with
    "aot_inductor.enable_line_tables": False,  # of generated code that nobody has
    "aot_inductor.precompile_headers": False,  # 280 MB that pay off at the fourth network only
    "cpp.dynamic_threads": True,  # as many as there are where it runs, not where it was made
}
_PYTHON = (sys.prefix, sys.base_prefix)


def check_compiler() -> None:
    """Refuse to compile where nothing can.

    Raises:
        MissingPackage: there is no C++ compiler.
    """
    try:
        with logs_held_back():  # of how torch looks for CUDA, when this is imported
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
    except (RuntimeError, OSError) as error:
        raise MissingPackage(
            "--compile needs a C++ compiler and none was found: install g++ (apt install g++), "
            "name one in the environment variable CXX, or leave --compile out"
        ) from error


def check_device(model: nn.Module) -> None:
    """Refuse a network that does not lie where its code would run and be checked.

    Raises:
        ExportRefused: it is on another device than the CPU.
    """
    device = next((p.device for p in model.parameters() if p.device.type != "cpu"), None)
    if device is not None:
        raise ExportRefused(
            f"--compile makes machine code for the CPU, and this {type(model).__name__} is on "
            f"{device}; give model.cpu(), or leave --compile out"
        )


def compile_program(
    program: ExportedProgram, path: Path, gates: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write the package that AOTInductor makes of a program.

    Args:
        program: with its weights on the CPU.
        path: where to.
        gates: what is to stay exchangeable, by its names in the model.
        metadata: is kept in the package.

    Raises:
        ExportRefused: AOTInductor cannot take the network.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.utils import fresh_cache

    notes = {**metadata, **_signature(program, gates)}
    package = io.BytesIO()  # by name, only one that ends in .pt2 is taken
    try:
        with logs_held_back():  # this compiles, and remembers in the cache of the machine
            pick_vec_isa()
        # Without a cache of its own, a copy of all weights stayed behind in that one as well.
        with (
            tempfile.TemporaryDirectory(prefix="attnsurgeon-") as folder,
            logs_held_back(),
            redirect_stdout(io.StringIO()),
            fresh_cache(dir=folder),
        ):
            aoti_compile_and_package(
                program,
                package_path=package,
                inductor_configs={**_SETTINGS, "aot_inductor.metadata": notes},
            )
    except Exception as error:  # of a dozen unrelated classes
        raise ExportRefused(
            f"AOTInductor cannot compile the network: {first_line(error)}; leave --compile out"
        ) from error
    _write_without_folders(package, path, (folder, str(Path(torch.__file__).parents[1])))


def _write_without_folders(package: io.BytesIO, path: Path, folders: tuple[str, ...]) -> None:
    """Write a package that does not tell where things lie on this machine, as compilers do."""
    with zipfile.ZipFile(package) as made, zipfile.ZipFile(path, "w") as written:
        for name in made.namelist():
            content = made.read(name)
            is_text = name.endswith(".cpp")  # in weights, a short name may stand by chance
            # Of the same length, so that nothing moves in machine code.
            for folder in (*folders, *_PYTHON) if is_text else folders:
                content = content.replace(folder.encode(), b"." * len(folder.encode()))
            written.writestr(name, content)


def _signature(program: ExportedProgram, gates: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what tells inputs and gates of a package."""
    held = program.state_dict
    constants = {  # of a module in two places, the package knows one of them
        name: [[other for other in held if held[other] is held[name]], list(value.shape)]
        for name, value in gates.items()
    }
    inputs = {
        name: [axes, str(dtype).removeprefix("torch.")]
        for name, (axes, dtype) in inputs_of(program).items()
    }
    return {INPUTS_KEY: json.dumps(inputs), CONSTANTS_KEY: json.dumps(constants)}


def inputs_of(program: ExportedProgram) -> dict[str, Axes]:
    """Return name of each input of a program -> its axes, None where one is free, and its dtype."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    return {name: (axes, values[name].dtype) for name, axes in input_shapes(program).items()}


def axes_of(notes: Mapping[str, str]) -> dict[str, Axes]:
    """Return name of each input of a package -> its axes, None where one is free, and its dtype."""
    return {
        name: (axes, getattr(torch, dtype))
        for name, (axes, dtype) in json.loads(notes.get(INPUTS_KEY, "{}")).items()
    }


def gates_of(notes: Mapping[str, str]) -> dict[str, tuple[list[str], list[int]]]:
    """Return name of each gate -> the names that the package may have for it, and its axes."""
    named = json.loads(notes.get(CONSTANTS_KEY, "{}"))
    return {name: (constants, shape) for name, (constants, shape) in named.items()}


def is_compiled(path: Path) -> bool:
    """Tell whether a .pt2 file holds machine code."""
    try:
        with zipfile.ZipFile(path) as package:
            return any("/aotinductor/" in name for name in package.namelist())
    except (OSError, zipfile.BadZipFile):  # what is no file of ours is told by who opens it
        return False


def notes_of(path: Path) -> dict[str, Any]:
    """Return the metadata of a package, without running anything of it; {} where it has none."""
    with zipfile.ZipFile(path) as package:
        for name in package.namelist():
            if "/aotinductor/" in name and name.endswith("_metadata.json"):
                notes: dict[str, Any] = json.loads(package.read(name))
                return notes
    return {}
