"""What one pass shows of every registered network: observed, shipped as text, held to by a test.

`python -m attnsurgeon.survey` writes the shipped file anew.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchvision.models import get_model_weights

from attnsurgeon import blocks
from attnsurgeon.card import card_of
from attnsurgeon.host import DIGITS, host_names, load_outline
from attnsurgeon.inputs import CLASSIFICATION, describe_inputs, task_of
from attnsurgeon.schema import read_as
from attnsurgeon.sites import Site, find_sites

SHIPPED = Path(__file__).with_name("survey.jsonl")
"""One JSON object a line, in the order of the names."""


@dataclass(frozen=True)
class Row:
    """One network as it was observed.

    Attributes:
        name: in the registry.
        task: classification, detection, segmentation, video or optical_flow.
        parameters: of the default build, without any attention.
        input: what it was watched with, in words.
        sites: kind -> number of sites.
        places: placement -> layouts that a block must serve there.
        attended: number of sites that have attention of their own.
    """

    name: str
    task: str
    parameters: int
    input: str
    sites: Mapping[str, int]
    places: Mapping[str, tuple[str, ...]]
    attended: int = 0

    def fitting(self) -> list[str]:
        """Return the names of the attention blocks that some site can take."""
        return [name for name in blocks.names() if self._fits(name)]

    def _fits(self, name: str) -> bool:
        block = blocks.get(name)
        return any(
            placement in block.placements and set(layouts) & set(block.layouts)
            for placement, layouts in self.places.items()
        )


def observe_host(name: str) -> Row:
    """Build a network without memory for its weights, and watch it."""
    model = load_outline(name)
    card = card_of(model)
    assert card is not None  # load_outline gives one
    sites = find_sites(model)
    return Row(
        name=name,
        task=CLASSIFICATION if name == DIGITS else task_of(name),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        input=describe_inputs(card),
        sites=dict(Counter(site.kind for site in sites)),
        places=_places(sites),
        attended=sum(bool(site.attention) for site in sites),
    )


def _places(sites: list[Site]) -> dict[str, tuple[str, ...]]:
    found: dict[str, set[str]] = {}
    for site in sites:
        for placement, spot in site.spots.items():
            found.setdefault(placement, set()).add(spot.serves)
    return {placement: tuple(sorted(layouts)) for placement, layouts in found.items()}


def shipped_rows() -> dict[str, Row]:
    """Return the rows that come with the package, by name."""
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
    rows = [read_as(Row, json.loads(line), "row") for line in lines]
    return {row.name: row for row in rows}


def row_of(name: str) -> Row:
    """Return the shipped row of a name; a name that is new since then is observed."""
    known = shipped_rows()
    return known[name] if name in known else observe_host(name)


def weight_names(name: str) -> list[str]:
    """Return the names of the weights there are for a host."""
    if name == DIGITS:
        return ["DEFAULT"]
    return [weight.name for weight in get_model_weights(name)]


def to_line(row: Row) -> str:
    """Return a row as one line of JSON."""
    values: dict[str, Any] = asdict(row)
    return json.dumps(values, ensure_ascii=False)


def write() -> None:
    """Observe every network and write the shipped file."""
    names = sorted(host_names())
    SHIPPED.write_text("".join(f"{to_line(observe_host(n))}\n" for n in names), encoding="utf-8")


if __name__ == "__main__":
    write()
