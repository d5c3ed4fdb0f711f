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
from attnsurgeon.errors import BadFile
from attnsurgeon.host import HostCard
from attnsurgeon.plan import Cut

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
            BadFile: not JSON, of a newer format, or with a field that cannot be read.
        """
        try:
            data = json.loads(text)
            made_by = data["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise BadFile(f"{source} has a recipe that cannot be read: {error}") from error
        if not isinstance(made_by, int) or made_by > FORMAT:
            raise BadFile(
                f"{source} is of format {made_by}, newer than this attnsurgeon reads ({FORMAT}); "
                "update it: pip install -U attnsurgeon"
            )
        if data.get("gate") != gate.FORM:
            raise BadFile(f"{source} has gates of the unknown form {data.get('gate')!r}")
        try:
            return cls(
                host=HostCard.from_json(data["host"]),
                cuts=tuple(Cut.from_json(cut) for cut in data["cuts"]),
                certificate=data["certificate"],
                sha256=dict(data["sha256"]),
                versions=dict(data["versions"]),
            )
        except BadFile as error:
            raise BadFile(f"{source}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise BadFile(f"{source} has a recipe that cannot be read: {error!r}") from error


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that decide what is computed."""
    return {name: version(name) for name in ("attnsurgeon", "torch", "torchvision")}


def sha256_of(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's elements in row-major order."""
    plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(memoryview(plain.numpy())).hexdigest()  # type: ignore[arg-type]
