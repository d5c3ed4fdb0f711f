"""What the host's tensors were at the operation, so that later files can tell what moved."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from attnsurgeon.surgery import attention_paths, is_new_key


def sha256_of(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's elements in row-major order."""
    plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(memoryview(plain.numpy())).hexdigest()  # type: ignore[arg-type]


def fingerprints(model: nn.Module) -> dict[str, str]:
    """Return original key -> SHA-256 of each tensor that is not of the attention, as it is now."""
    paths = attention_paths(model)
    return {
        key: sha256_of(tensor)
        for key, tensor in model.state_dict().items()
        if not is_new_key(key, paths)
    }


def origin_of(model: nn.Module) -> Mapping[str, str] | None:
    """Return the fingerprints of the host at its first operation, or None if nobody took them."""
    origin: Mapping[str, str] | None = model.__dict__.get("_attnsurgeon_origin")
    return origin


def give_origin(model: nn.Module, origin: Mapping[str, str]) -> None:
    """Let the fingerprints travel with the model, through copies and pickles."""
    model.__dict__["_attnsurgeon_origin"] = dict(origin)
