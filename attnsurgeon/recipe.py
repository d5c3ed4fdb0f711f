"""The recipe of an operated network: all that a file needs beside its tensors, as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from attnsurgeon import gate
from attnsurgeon.card import HostCard
from attnsurgeon.errors import AttnSurgeonError, BadFile
from attnsurgeon.operation import Certificate
from attnsurgeon.plan import Cut
from attnsurgeon.schema import read_as

FORMAT = 1
"""Version of the file format; a newer one is refused, older ones are read for good."""


@dataclass(frozen=True)
class Recipe:
    """Host, cuts, certificate and hashes.

    Attributes:
        host: how the plain network is made.
        cuts: the attention, in the order of insertion.
        certificate: what was shown at insertion (operation.Certificate as JSON), or None.
        sha256: original key -> SHA-256 of the tensor's bytes, as saved.
        gate: name of the gate's form.
        versions: of the packages that made the file.
    """

    host: HostCard
    cuts: tuple[Cut, ...]
    certificate: Mapping[str, Any] | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    gate: str = gate.FORM
    versions: Mapping[str, str] = field(default_factory=lambda: package_versions())

    def dumps(self) -> str:
        """Return the recipe as JSON; the same recipe gives the same text."""
        return json.dumps(
            {
                "format": FORMAT,
                "host": self.host.to_json(),
                "cuts": [cut.to_json() for cut in self.cuts],
                "gate": self.gate,
                "certificate": self.certificate,
                "sha256": dict(self.sha256),
                "versions": dict(self.versions),
            },
            sort_keys=True,
            ensure_ascii=False,
        )

    @classmethod
    def loads(cls, text: str, source: str) -> Recipe:
        """Read what `dumps` wrote.

        Raises:
            BadFile: not JSON, of a newer format, or with a field that no insertion writes.
        """
        try:
            data = read_as(Mapping[str, Any], json.loads(text), "recipe")
            made_by = read_as(int, data.pop("format", None), "format")
            if made_by > FORMAT:
                raise BadFile(
                    f"it is of format {made_by}, newer than this attnsurgeon reads ({FORMAT}); "
                    "update it: pip install -U attnsurgeon"
                )
            written: _Written = read_as(_Written, data, "recipe")
            if written.gate != gate.FORM:
                raise BadFile(f"its gates are of the unknown form {written.gate!r}")
            cuts = tuple(Cut.from_json(cut) for cut in written.cuts)
            if not cuts or len({cut.child for cut in cuts}) != len(cuts):
                raise BadFile("it has no cuts, or two at the very same place")
            shown = written.certificate
            return cls(
                host=HostCard.from_json(written.host),
                cuts=cuts,
                certificate=shown.to_json() if shown is not None else None,
                sha256=written.sha256,
                versions=written.versions,
            )
        except (AttnSurgeonError, ValueError, RecursionError) as error:
            raise BadFile(f"the recipe of {source} cannot be read: {error}") from error


@dataclass(frozen=True)
class _Written:
    """The fields of a recipe as JSON gives them, beside its format."""

    host: Mapping[str, Any]
    cuts: tuple[Mapping[str, Any], ...]
    gate: str
    certificate: Certificate | None
    sha256: Mapping[str, str]
    versions: Mapping[str, str]


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that decide what is computed."""
    return {name: version(name) for name in ("attnsurgeon", "torch", "torchvision")}


def sha256_of(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's elements in row-major order."""
    plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(memoryview(plain.numpy())).hexdigest()  # type: ignore[arg-type]
