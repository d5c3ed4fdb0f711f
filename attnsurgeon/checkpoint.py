"""Read the tensors of a checkpoint, without running code from it, and fit them to a network."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from attnsurgeon.errors import BadFile, CheckpointMismatch

NESTS = ("state_dict", "model", "model_state_dict", "model_ema", "ema")
"""Where training scripts keep the state dict inside what they save."""


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a `.safetensors` file or a `torch.save` file, on the CPU.

    Raises:
        BadFile: missing, empty, damaged, would run code when loaded, or holds no state dict.
    """
    file = Path(path)
    check_readable(file)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BadFile(
            f"{str(file)!r} holds more than tensors and would run code when loaded; save "
            "model.state_dict() alone, or as .safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadFile(f"{str(file)!r} cannot be read as a checkpoint: {first}") from error
    return _unwrap(loaded, file)


def check_readable(file: Path) -> None:
    """Refuse what is no file with content.

    Raises:
        BadFile: missing, a folder, not readable, or empty.
    """
    if not file.exists():
        raise BadFile(f"there is no file {str(file)!r}")
    if file.is_dir():
        raise BadFile(f"{str(file)!r} is a folder, not a file")
    if not os.access(file, os.R_OK):
        raise BadFile(f"{str(file)!r} cannot be read: permission denied")
    if file.stat().st_size == 0:
        raise BadFile(f"{str(file)!r} is empty")


def _unwrap(loaded: Any, file: Path) -> dict[str, Tensor]:
    for nest in NESTS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(nest), Mapping):
            loaded = loaded[nest]
            break
    tensors = isinstance(loaded, Mapping) and all(isinstance(v, Tensor) for v in loaded.values())
    if not tensors or not loaded:
        raise BadFile(f"{str(file)!r} holds no state dict: no plain mapping of names to tensors")
    return dict(loaded)


def fit_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Refuse a state that is not exactly the model's: every key, every shape.

    Raises:
        CheckpointMismatch: the first few named, counts for all.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    misfit = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    parts = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in (
            ("missing", missing),
            ("unexpected", extra),
            ("of another shape", misfit),
        )
        if keys
    ]
    if parts:
        fitting = len(own) - len(missing) - len(misfit)
        raise CheckpointMismatch(
            f"{source} does not fit {type(model).__name__}: {fitting} of {len(own)} tensors fit; "
            f"{'; '.join(parts)}{_hint(misfit)}"
        )


def _hint(misfit: list[str]) -> str:
    heads = ("fc.", "classifier.", "head.", "heads.", "module.fc.")
    if misfit and all(text.startswith(heads) for text in misfit):
        return "; is it of another number of classes? then give --num-classes"
    return ""


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Give the model exactly these tensors, in the dtype they have.

    Raises:
        CheckpointMismatch: see fit_state.
    """
    fit_state(model, state, source)
    with torch.no_grad():
        for name, own in (*model.named_parameters(), *model.named_buffers()):
            if name in state and own.dtype != state[name].dtype:
                own.data = own.data.to(state[name].dtype)
    # Copied, not assigned: a tensor that lies in a file at an odd address sends some kernels down
    # another path, and the last bit of the output with it.
    model.load_state_dict(dict(state), strict=True)
