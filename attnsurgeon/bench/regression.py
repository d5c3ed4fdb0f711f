"""Results of two days against each other: by ratios, since machines and moods differ."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from attnsurgeon.bench.interval import Estimate, verdict
from attnsurgeon.bench.schema import VERSION, misfit
from attnsurgeon.checkpoint import check_readable
from attnsurgeon.errors import BadFile, BadOption, TooSlow

MACHINE = ("cpu", "gpu", "threads")
"""Absolute times are compared only where these are the same."""
LEAST, MOST = 1e-60, 1e60
"""No ratio, and no time in ms, lies beyond these; quotients of quotients of them are finite."""
JOB = ("engine", "device", "batch", "precision", "channels_last", "train")


@dataclass(frozen=True)
class Change:
    """How one figure changed between two files.

    Attributes:
        what: the target, its baseline and the job.
        old: the old ratio, or median in ms, with its interval.
        new: the new one.
        change: new over old; above 1 is slower than before.
    """

    what: str
    old: Estimate
    new: Estimate
    change: Estimate

    @property
    def verdict(self) -> str:
        """The change in words, to the digits that its interval supports."""
        return verdict(self.change)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "what": self.what,
            "old": self.old.ratio,
            "new": self.new.ratio,
            "change": round(self.change.ratio, 4),
            "interval95": [round(self.change.low, 4), round(self.change.high, 4)],
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Regression:
    """All that two files have in common, and what only one has."""

    changes: tuple[Change, ...]
    unmatched: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "changes": [change.to_json() for change in self.changes],
            "unmatched": list(self.unmatched),
            "notes": list(self.notes),
        }

    def check(self, most: float) -> None:
        """Refuse what became slower by more than a share, as far as the intervals can tell.

        Raises:
            TooSlow: at least one did.
        """
        slower = [c for c in self.changes if c.change.ratio > 1 + most and c.change.low > 1]
        if slower:
            worst = max(slower, key=lambda change: change.change.ratio)
            others = f", and {len(slower) - 1} more" if len(slower) > 1 else ""
            raise TooSlow(
                f"{worst.what} became slower by more than {100 * most:g} %: {worst.verdict}{others}"
            )


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the results of a .json file that bench wrote.

    Raises:
        BadFile: it is none, or of another schema.
    """
    file = Path(path)
    name = repr(str(file))
    check_readable(file)
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadFile(
            f"{name} is no JSON: give a file that `bench -o results.json` wrote"
        ) from error
    if not isinstance(results, dict) or "runs" not in results:
        raise BadFile(f"{name} holds no results: give a file that `bench -o results.json` wrote")
    version = results.get("schema")
    if version != VERSION:
        told = "no schema" if version is None else f"schema {version!r}"
        raise BadFile(
            f"{name} has {told}, and this attnsurgeon reads schema {VERSION}: measure again, or "
            "use the attnsurgeon that wrote it"
        )
    wrong = misfit(results) or _unsound(results)
    if wrong:
        raise BadFile(f"{name} is damaged: {wrong}")
    return results


def _unsound(results: Mapping[str, Any]) -> str | None:
    """Return which figure that is compared is no positive number inside its interval."""
    for kind, name, ends in (
        ("comparisons", "ratio", "interval95"),
        ("runs", "median_ms", "median95_ms"),
    ):
        for i, found in enumerate(results[kind]):
            interval = found[ends]
            if interval is None:
                interval = [found["p5_ms"], found["p95_ms"]]
            in_order = [LEAST, *interval[:1], found[name], *interval[1:], MOST]
            is_rising = all(one <= other for one, other in pairwise(in_order))
            if len(interval) != 2 or not is_rising:
                return f"results.{kind}[{i}].{name} is {found[name]} in {interval}"
    return None


def compare_results(old: Mapping[str, Any], new: Mapping[str, Any]) -> Regression:
    """Return how the ratios of the old results changed; of lone targets, their medians.

    Raises:
        BadOption: they have nothing in common, or lone targets were timed on two machines.
    """
    if old["comparisons"] and new["comparisons"]:
        return _matched(_ratios(old), _ratios(new), ())
    machines = [[results["environment"].get(key) for key in MACHINE] for results in (old, new)]
    if machines[0] != machines[1]:
        raise BadOption(
            f"times of two machines cannot be compared ({machines[0]} and {machines[1]}), only "
            "ratios: bench both against the same baseline"
        )
    note = "times themselves are compared: another load of the machine is in them"
    return _matched(_medians(old), _medians(new), (note,))


def _matched(
    old: dict[str, Estimate], new: dict[str, Estimate], notes: tuple[str, ...]
) -> Regression:
    both = [what for what in old if what in new]
    if not both:
        raise BadOption("the files have no run in common: other targets, engines or batches")
    changes = [Change(w, old[w], new[w], _quotient(new[w], old[w])) for w in both]
    left = [f"{what}: old only" for what in old if what not in new]
    left += [f"{what}: new only" for what in new if what not in old]
    return Regression(tuple(changes), tuple(left), notes)


def _ratios(results: Mapping[str, Any]) -> dict[str, Estimate]:
    return _numbered(
        (
            f"{_name(c['target'])} against {_name(c['baseline'])}, {_job(c)}",
            Estimate(c["ratio"], *c["interval95"]),
        )
        for c in results["comparisons"]
    )


def _medians(results: Mapping[str, Any]) -> dict[str, Estimate]:
    return _numbered(
        (
            f"{_name(run['target'])}, {_job(run)}",
            Estimate(run["median_ms"], *(run["median95_ms"] or (run["p5_ms"], run["p95_ms"]))),
        )
        for run in results["runs"]
    )


def _numbered(pairs: Iterable[tuple[str, Estimate]]) -> dict[str, Estimate]:
    """Return all by name; of two files of one name in two folders, or one twice, none is lost."""
    found: dict[str, Estimate] = {}
    for name, estimate in pairs:
        number, free = 1, name
        while free in found:
            number += 1
            free = f"{name} ({number})"
        found[free] = estimate
    return found


def _name(target: str) -> str:
    """Return a target's name without the folder, which may be another one on another day."""
    return Path(target).name


def _job(run: Mapping[str, Any]) -> str:
    extras = [name.replace("_", " ") for name in ("channels_last", "train") if run[name]]
    return ", ".join(
        [run["engine"], run["device"], f"batch {run['batch']}", run["precision"], *extras]
    )


def _quotient(new: Estimate, old: Estimate) -> Estimate:
    """Return new over old; two independent intervals add up as squares do, on the log scale."""
    middle = math.log(new.ratio / old.ratio)
    up = math.hypot(math.log(new.high / new.ratio), math.log(old.ratio / old.low))
    down = math.hypot(math.log(new.ratio / new.low), math.log(old.high / old.ratio))
    return Estimate(math.exp(middle), math.exp(middle - down), math.exp(middle + up))
