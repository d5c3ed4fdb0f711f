"""Read the tensors of a checkpoint, without running code from it, and fit them to a network."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from attnsurgeon.errors import BadFile, CheckpointMismatch, first_line
from attnsurgeon.unwrapping import Checkpoint, bare_checkpoint, unwrap_checkpoint

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What networks compute in; smaller floats are for storage."""
NUMBER_OF_CLASSES = "is it of another number of classes? then give --num-classes"


def read_checkpoint(path: str | os.PathLike[str], key: str | None = None) -> Checkpoint:
    """Return the tensors of a `.safetensors` file or a `torch.save` file, on the CPU.

    Args:
        path: the file; what it holds counts, not what it is called.
        key: where in it the state dict is, as `model_ema` or `state_dict.backbone`: keys of
            mappings, at last perhaps a prefix of names. By default the first of NESTS.

    Raises:
        BadFile: missing, empty, damaged, would run code when loaded, or holds no state dict.
        UnknownName: nothing in it has that key.
    """
    file = Path(path)
    check_readable(file)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # what torch doubts, it tells in the error as well
            metadata: dict[str, str] = {}
            if _is_safetensors(file):
                loaded: Any = load_file(file)
                with safe_open(file, framework="pt") as opened:
                    metadata = opened.metadata() or {}
            else:
                # A Namespace is a bare holder of values; torchvision's training script keeps one.
                loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its opcodes run into
        raise BadFile(
            f"{str(file)!r} cannot be read as a checkpoint: {why_unreadable(error)}; give what "
            "torch.save(model.state_dict(), FILE) wrote, or .safetensors"
        ) from error
    return replace(unwrap_checkpoint(loaded, repr(str(file)), key), metadata=metadata)


def _is_safetensors(file: Path) -> bool:
    """Tell by the first bytes, whatever the file is called: a length, then a JSON object."""
    with file.open("rb") as stream:
        return stream.read(9)[8:] == b"{" or file.suffix == ".safetensors"


def why_unreadable(error: Exception) -> str:
    """Return in a few words why a file of weights could not be read."""
    if isinstance(error, pickle.UnpicklingError):
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is not None:
            return f"it holds more than tensors ({code[1]}) and would run code when loaded"
        return "it is damaged, or holds more than tensors"
    if not isinstance(error, RuntimeError | OSError | SafetensorError):
        return "it is damaged, or no file of weights"
    return first_line(error).partition(". ")[0]  # torch goes on with advice that is not ours


def check_readable(file: Path) -> None:
    """Refuse what is no file with content.

    Raises:
        BadFile: missing, a folder, not readable, or empty.
    """
    try:
        if not file.exists():
            raise BadFile(f"there is no file {str(file)!r}")
        if file.is_dir():
            raise BadFile(f"{str(file)!r} is a folder, not a file")
        if not file.is_file():
            raise BadFile(f"{str(file)!r} is no plain file; save it as one first")
        with file.open("rb") as stream:
            if not stream.read(1):
                raise BadFile(f"{str(file)!r} is empty")
    except OSError as error:
        raise BadFile(f"{str(file)!r} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class Fit:
    """What of a checkpoint went into a network; by strict loading, all of both.

    Attributes:
        checkpoint: unwrapped.
        kept: number of its tensors that the network has now.
        missing: number of tensors that the network has and it does not.
        unexpected: number of tensors that it has and the network does not.
    """

    checkpoint: Checkpoint
    kept: int
    missing: int
    unexpected: int

    def to_json(self, new: int) -> dict[str, Any]:
        """Return plain values; `new` is how many tensors the attention adds."""
        return {
            "kept": self.kept,
            "new": new,
            "missing": self.missing,
            "unexpected": self.unexpected,
            "unwrapped": list(self.checkpoint.unwrapped),
            "dropped": list(self.checkpoint.dropped),
        }


def load_checkpoint(model: nn.Module, held: Checkpoint) -> Fit:
    """Give the model exactly these tensors, in the dtype they have.

    Raises:
        CheckpointMismatch: see fit_state.
    """
    own = model.state_dict().keys()
    bare = bare_checkpoint(held, own)
    try:
        load_state(model, bare.state, bare.source)
    except CheckpointMismatch as error:
        if "; " + NUMBER_OF_CLASSES not in str(error):
            error.args = (f"{error}; {_what_to_give(bare, own)}",)
        raise
    given = bare.state.keys()
    return Fit(bare, len(given & own), len(own - given), len(given - own))


def _what_to_give(held: Checkpoint, own: Collection[str]) -> str:
    """Return what to type for a checkpoint that does not fit: where in it the network may be."""
    key = next(iter(own), "")
    prefixes = (name.removesuffix(f".{key}") for name in held.state if name.endswith(f".{key}"))
    for prefix in prefixes:
        if all(f"{prefix}.{name}" in held.state for name in own):
            place = ".".join((*(part.strip(".") for part in held.unwrapped), prefix))
            return f"the network is in it under {prefix!r}: give --checkpoint-key {place}"
    return (
        "give a checkpoint of this very network, or the MODEL and --model-arg that this one was "
        "trained as"
    )


def fit_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Refuse a state that is not exactly the model's: every key, every shape, plain numbers.

    Raises:
        CheckpointMismatch: the first few named, counts for all.
    """
    own = model.state_dict()
    missing = {key: key for key in own if key not in state}
    extra = {key: key for key in state if key not in own}
    misfit = {
        key: f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    }
    unlike = {
        key: f"{key} {_kind(state[key])} instead of {_name(own[key].dtype)}"
        for key in own
        if key in state and not _is_alike(state[key], own[key])
    }
    parts = [
        f"{len(found)} {kind} ({', '.join([*found.values()][:3])}{', ...' * (len(found) > 3)})"
        for kind, found in (
            ("missing", missing),
            ("unexpected", extra),
            ("of another shape", misfit),
            ("of another kind", unlike),
        )
        if found
    ]
    if parts:
        fitting = len(own) - len({*missing, *misfit, *unlike})
        raise CheckpointMismatch(
            f"{source} does not fit {type(model).__name__}: {fitting} of {len(own)} tensors fit; "
            f"{'; '.join(parts)}{_hint(misfit)}"
        )


def _is_alike(tensor: Tensor, own: Tensor) -> bool:
    """Tell whether a tensor holds numbers that can stand for the model's in a computation."""
    if tensor.is_meta or tensor.layout != own.layout or tensor.is_quantized != own.is_quantized:
        return False
    if own.is_floating_point():
        return tensor.dtype in FLOATS or tensor.dtype == own.dtype
    if tensor.is_floating_point() and own.ndim == 0 and not own.is_complex():
        return bool(
            tensor == tensor.round()
        )  # a counter, in a checkpoint that was halved as a whole
    return tensor.is_complex() == own.is_complex() and not tensor.is_floating_point()


def _kind(tensor: Tensor) -> str:
    form = "meta" if tensor.is_meta else _name(tensor.layout)
    return f"{form} {_name(tensor.dtype)}".removeprefix("strided ")


def _name(thing: torch.dtype | torch.layout) -> str:
    return str(thing).removeprefix("torch.")


def _hint(misfit: Iterable[str]) -> str:
    heads = ("fc.", "classifier.", "head.", "heads.", "module.fc.")
    keys = list(misfit)
    if keys and all(key.startswith(heads) for key in keys):
        return f"; {NUMBER_OF_CLASSES}"
    return ""


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Give the model exactly these tensors, in the dtype they have.

    Raises:
        CheckpointMismatch: see fit_state.
    """
    fit_state(model, state, source)
    with torch.no_grad():
        for name, own in (*model.named_parameters(), *model.named_buffers()):
            if name in state and own.dtype != state[name].dtype and own.is_floating_point():
                own.data = own.data.to(state[name].dtype)
    # Copied, not assigned: a tensor that lies in a file at an odd address sends some kernels down
    # another path, and the last bit of the output with it.
    model.load_state_dict(dict(state), strict=True)


def class_counts(model: nn.Module, state: Mapping[str, Tensor]) -> list[int]:
    """Return the numbers of classes that the state can be of, if it is the model's but for a head.

    All keys are the same, and shapes differ in their first axis alone.
    """
    own = model.state_dict()
    if own.keys() != state.keys():
        return []
    pairs = [(own[key].shape, tensor.shape) for key, tensor in state.items()]
    other = [(mine, given) for mine, given in pairs if mine != given]
    if any(not mine or not given or mine[1:] != given[1:] for mine, given in other):
        return []
    return sorted({given[0] for _, given in other})
