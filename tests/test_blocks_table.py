"""What `attnsurgeon blocks` and the README say of each block is what the block is."""

import re
from pathlib import Path

import pytest

from attnsurgeon import blocks
from attnsurgeon.blocks.block import EVERYWHERE, IMAGES, MAPS
from attnsurgeon.report.blocks import blocks_to_json

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
ENTRIES = {entry["name"]: entry for entry in blocks_to_json()}
SERVED = {EVERYWHERE: "all", MAPS: "images, volumes", IMAGES: "images"}


def readme_row(name):
    """Return the README's row for a block, as it should be."""
    entry = ENTRIES[name]
    count = f"{entry['parameters']:,}"
    served = SERVED[tuple(entry["layouts"])]
    return f"| `{name}` {entry['title']} | {entry['paper']} | {count} | {served} |"


@pytest.mark.parametrize("name", blocks.names())
def test_the_readme_has_its_row(name):
    assert readme_row(name) in README.splitlines()


def test_the_readme_has_no_other_row():
    served = "|".join(map(re.escape, SERVED.values()))
    row = rf"^\| `(\w+)` [^|`]+ \| [^|]+ \| [^|]+ \| (?:{served}) \|$"
    rows = re.findall(row, README, re.M)
    assert sorted(rows) == blocks.names()


def test_the_table_shows_all_of_it(run):
    table = run("blocks").out
    assert "…" not in table
    places = [re.search(rf"^  {name} ", table, re.M).start() for name in ENTRIES]
    for entry, start, end in zip(ENTRIES.values(), places, [*places[1:], None], strict=True):
        words = table[start:end].split()
        told = [entry["paper"], *entry["title"].split(), *entry["formula"].split()]
        told += [f"{entry['parameters']:,}", *entry["layouts"], *entry["placements"]]
        missing = [word for text in told for word in text.split() if word not in words]
        assert not missing, (entry["name"], missing)
        assert all(any(w.startswith(f"{option}=") for w in words) for option in entry["options"])


def test_the_keys_stay():
    keys = {"name", "title", "paper", "formula", "parameters", "gates", "layouts", "placements"}
    assert all(keys | {"forms", "options"} <= entry.keys() for entry in ENTRIES.values())
