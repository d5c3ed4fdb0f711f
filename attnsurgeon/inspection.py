"""Hold a saved file to its own recipe: hashes, identity with the gates closed, liveness."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from attnsurgeon.errors import HostUnusable, IdentityBroken
from attnsurgeon.export.proof import gate_values, gates_at
from attnsurgeon.host import Given
from attnsurgeon.liveness import Liveness, check_liveness
from attnsurgeon.origin import sha256_of
from attnsurgeon.probes import probe_inputs
from attnsurgeon.store import load_model, load_plain, read_recipe
from attnsurgeon.verify import Verdict, compare, record


@dataclass(frozen=True)
class Inspection:
    """What a file was found to be.

    Attributes:
        file: its path.
        original: number of original tensors by the recipe.
        matching: how many of them have the recorded SHA-256.
        closed: whether every gate is at 0, as after insertion.
        verdict: the operated network with its gates closed against its host.
        liveness: of the gates.
    """

    file: str
    original: int
    matching: int
    closed: bool
    verdict: Verdict
    liveness: Liveness

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "file": self.file,
            "tensors": {"original": self.original, "matching": self.matching},
            "gates_closed": self.closed,
            "identity": {"exact": self.verdict.exact, "inputs": list(self.verdict.inputs)},
            "liveness": {"gates": self.liveness.gates, "live": self.liveness.live},
        }


def inspect_file(path: str | os.PathLike[str], host: Given | None = None) -> Inspection:
    """Load a file and its untouched host, and compare them with the gates closed.

    A trained file passes too: whatever its tensors are now, with closed gates it must compute
    what its host computes with the same original tensors.

    Args:
        path: a file of save_model.
        host: see load_model.

    Raises:
        BadFile, HostUnusable, MissingPackage: see load_model; or its gates were stripped.
        IdentityBroken: a tensor is not the recorded one, an output differs, or a gate is dead.
    """
    recipe = read_recipe(path)
    if recipe.stripped:
        raise HostUnusable(
            f"{str(path)!r} was stripped of its gates: nothing can be closed and "
            "held to its host; verify the file it was stripped from"
        )
    operated, plain = load_model(path, host), load_plain(path, host)
    state = operated.state_dict()
    wrong = [k for k, digest in recipe.sha256.items() if sha256_of(state[k]) != digest]
    if wrong:
        raise IdentityBroken(
            f"{len(wrong)} of {len(recipe.sha256)} original tensors in {str(path)!r} are not the "
            f"recorded ones, the first {wrong[0]}"
        )
    inputs = probe_inputs(plain, recipe.host.example(next(plain.parameters(), None)))
    own = gate_values(operated)
    closed = {name: torch.zeros_like(value) for name, value in own.items()}
    with gates_at(operated, closed):
        verdict = compare(record(plain, inputs), operated)
        liveness = check_liveness(operated, inputs[0])
    if not verdict.exact:
        raise IdentityBroken(
            f"with its gates closed {str(path)!r} differs from its host: {verdict.differences[0]}"
        )
    if liveness.dead:
        raise IdentityBroken(f"{len(liveness.dead)} gates are dead, the first {liveness.dead[0]}")
    return Inspection(
        file=str(path),
        original=len(recipe.sha256),
        matching=len(recipe.sha256) - len(wrong),
        closed=not any(bool(value.any()) for value in own.values()),
        verdict=verdict,
        liveness=liveness,
    )
