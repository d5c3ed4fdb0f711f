"""The recipe of an operated network: all that a file needs beside its tensors, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from attnsurgeon.card import HostCard
from attnsurgeon.errors import AttnSurgeonError, BadFile
from attnsurgeon.gate import DEFAULT_FORM
from attnsurgeon.operation import Certificate
from attnsurgeon.plan import Cut
from attnsurgeon.schema import read_as

KEY = "attnsurgeon"
"""The one metadata key of a file; with two, their order in it would be left to chance."""
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
        origin: original key -> SHA-256 before training, of the tensors that changed since.
        only: "attention" where the file holds just what was inserted and what moved.
        stripped: paths of the attention whose gates were taken out at 1.
        versions: of the packages that made the file.
    """

    host: HostCard
    cuts: tuple[Cut, ...]
    certificate: Mapping[str, Any] | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: package_versions())
    origin: Mapping[str, str] = field(default_factory=dict)
    only: str | None = None
    stripped: tuple[str, ...] = ()

    @property
    def gate(self) -> str:
        """The forms of its gates, each once, joined by a plus."""
        return "+".join(dict.fromkeys(cut.gate for cut in self.cuts))

    def dumps(self) -> str:
        """Return the recipe as JSON; the same recipe gives the same text."""
        later = {"origin": dict(self.origin), "only": self.only, "stripped": self.stripped}
        return json.dumps(
            {
                "format": FORMAT,
                "host": self.host.to_json(),
                "cuts": [cut.to_json() for cut in self.cuts],
                "gate": self.gate,
                "certificate": self.certificate,
                "sha256": dict(self.sha256),
                "versions": dict(self.versions),
                **{name: value for name, value in later.items() if value},
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
            cuts = tuple(Cut.from_json(cut) for cut in written.cuts)
            if not cuts or len({cut.child for cut in cuts}) != len(cuts):
                raise BadFile("it has no cuts, or two at the very same place")
            shown = written.certificate
            recipe = cls(
                host=HostCard.from_json(written.host),
                cuts=cuts,
                certificate=shown.to_json() if shown is not None else None,
                sha256=written.sha256,
                versions=written.versions,
                origin=written.origin,
                only=written.only,
                stripped=written.stripped,
            )
            if written.gate != recipe.gate:
                raise BadFile(
                    f"its gates are of the unknown form {written.gate!r}, its cuts of "
                    f"{recipe.gate!r}"
                )
            return recipe
        except (AttnSurgeonError, ValueError, RecursionError) as error:
            raise BadFile(f"the recipe of {source} cannot be read: {error}") from error


@dataclass(frozen=True)
class _Written:
    """The fields of a recipe as JSON gives them, beside its format."""

    host: Mapping[str, Any]
    cuts: tuple[Mapping[str, Any], ...]
    certificate: Certificate | None
    sha256: Mapping[str, str]
    versions: Mapping[str, str]
    gate: str = DEFAULT_FORM
    origin: Mapping[str, str] = field(default_factory=dict)
    only: str | None = None
    stripped: tuple[str, ...] = ()


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that decide what is computed."""
    return {name: version(name) for name in ("attnsurgeon", "torch", "torchvision")}
