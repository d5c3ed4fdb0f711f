"""Several attentions in one go: the steps of a plan, as `insert --dry-run --json` prints them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from attnsurgeon import blocks
from attnsurgeon.checkpoint import check_readable
from attnsurgeon.errors import AttnSurgeonError, BadFile, BadOption, UnknownName
from attnsurgeon.gate import DEFAULT_FORM
from attnsurgeon.plan import Cut, Plan, check_request, make_plan
from attnsurgeon.schema import read_as
from attnsurgeon.selection import named_layers
from attnsurgeon.sites import Site, find_sites

REPORTED = (
    *("model", "output", "block", "placement", "sites", "skipped", "attended"),
    *("parameters", "tensors", "checkpoint", "identity", "liveness", "lent"),
)
"""What a dry run prints beside its plan; it is left alone when that is read back."""
MEASURED = ("channels", "shape", "parameters", "macs")
"""What a dry run prints of one site beside what a step says; it is measured anew."""


@dataclass(frozen=True)
class Step:
    """One attention and where it goes; the fields are those of make_plan."""

    block: str
    at: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    stage: tuple[int, ...] = ()
    every: int = 1
    kind: str | None = None
    placement: str = "post"
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    stack: bool = False
    gate: str = DEFAULT_FORM

    def to_json(self) -> dict[str, Any]:
        """Return plain values that `read_steps` reads; what chooses nothing is left out."""
        plain = {**asdict(self), "at": list(self.at), "options": dict(self.options)}
        for name in ("exclude", "stage"):
            if not plain[name]:
                del plain[name]
            else:
                plain[name] = list(plain[name])
        if self.every == 1:
            del plain["every"]
        if self.kind is None:
            del plain["kind"]
        if not self.stack:
            del plain["stack"]
        if self.gate == DEFAULT_FORM:
            del plain["gate"]
        return plain

    def checked(self) -> Step:
        """Return the step with its options as the block takes them; a class in a file is loaded.

        Raises:
            BadFile: the file of a block cannot be run.
            UnknownName, BadOption, PlacementUnavailable: no network could satisfy it; see
                make_plan.
        """
        block = blocks.learn(self.block)
        options = check_request(
            block,
            placement=self.placement,
            every=self.every,
            kind=self.kind,
            options=self.options,
            gate=self.gate,
        )
        return replace(self, block=block, options=options)


def load_steps(path: str | os.PathLike[str], seed: int = 0) -> tuple[Step, ...]:
    """Read a plan from a JSON file.

    Args:
        path: what `attnsurgeon insert --dry-run --json` printed, perhaps edited, or a list of
            steps alone.
        seed: of the steps that name none.

    Raises:
        BadFile: missing, empty or no JSON.
        AttnSurgeonError: see read_steps.
    """
    file = Path(path)
    check_readable(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
        values = json.loads(text, object_pairs_hook=_each_key_once)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{str(file)!r} is no JSON: {error}; print a plan by --dry-run --json") from (
            error
        )
    return read_steps(values, seed, repr(str(file)))


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    held = dict(pairs)
    if len(held) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(k for k in keys if keys.count(k) > 1)!r} is there twice")
    return held


def read_steps(values: Any, seed: int = 0, source: str = "the plan") -> tuple[Step, ...]:
    """Read a plan from plain values: a list of steps, or a mapping that has one as `plan`.

    A step is a mapping: `block`, and if wanted `at` (a pattern or several), `exclude`, `stage`,
    `every`, `kind`, `placement`, `options`, `seed`, `stack`, `gate`; or `path` in the place
    of `at`, for one site.

    Args:
        values: see above.
        seed: of the steps that name none.
        source: what errors call it.

    Raises:
        BadOption: empty, containing itself, or of another form.
        UnknownName: a key, block, placement or option that there is not.
        PlacementUnavailable: a block that cannot be put at a placement.
    """
    try:
        plain = json.loads(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        reason = "it contains itself" if "ircular" in str(error) else str(error)
        raise BadOption(f"{source} cannot be read: {reason}; it is a list of steps") from error
    if isinstance(plain, dict):
        _check_keys(plain, ("plan", *REPORTED), source)
        plain = plain.get("plan")
    if not isinstance(plain, list):
        raise BadOption(f"{source} holds no list of steps, nor one under 'plan'")
    if not plain:
        raise BadOption(f"{source} is empty: give it a step, as {_example()}")
    return tuple(_read_step(step, seed, f"step {i} of {source}") for i, step in enumerate(plain, 1))


def _example() -> str:
    return json.dumps([{"at": "layer3.*", "block": "se", "placement": "standard"}])


def _check_keys(held: Mapping[str, Any], known: Sequence[str], source: str) -> None:
    for key in held:
        if key not in known:
            raise UnknownName(f"key of {source}", key, known)


def _read_step(held: Any, seed: int, source: str) -> Step:
    if not isinstance(held, dict):
        raise BadOption(f"{source} is {type(held).__name__}, no mapping; as {_example()}")
    known = [item.name for item in fields(Step)]
    per_site = "path" in held
    _check_keys(held, [*known, "path", *(MEASURED if per_site else ())], source)
    if per_site and "at" in held:
        raise BadOption(f"{source} has both 'at' and 'path'; leave one of them out")
    if "block" not in held:
        raise BadOption(f"{source} names no 'block'")
    values = {"seed": seed, **{key: held[key] for key in known if key in held}}
    if per_site:
        values["at"] = [held["path"]]
    for key in ("at", "exclude", "stage"):
        if key in values and not isinstance(values[key], list):
            values[key] = [values[key]]
    if values.get("at") == []:
        raise BadOption(f"{source} has an empty 'at'; leave it out for every site")
    try:
        step: Step = read_as(Step, values, source)
        return step.checked()
    except AttnSurgeonError as error:
        # Said of the step, but of the same kind; UnknownName takes other arguments.
        error.args = (f"{source}: {error}",)
        raise
    except ValueError as error:
        raise BadOption(str(error)) from error


def plan_steps(model: nn.Module, inputs: tuple[Any, ...], steps: Iterable[Step]) -> Plan:
    """Plan the steps one after the other; attention at one place stacks in their order.

    It is what running `insert` step by step on each other's results would plan.

    Raises:
        AttnSurgeonError: see find_sites and make_plan.
    """
    sites: dict[tuple[str, ...], list[Site]] = {}
    cuts: list[Cut] = []
    skipped: dict[str, str] = {}
    attended: dict[str, None] = {}
    for step in steps:
        # Each step sees the sites that it would see alone: modules named elsewhere are none.
        named = tuple(named_layers(step.at, step.kind))
        if named not in sites:
            sites[named] = find_sites(model, inputs, named=named)
        plan = make_plan(
            model,
            sites[named],
            step.block,
            at=step.at,
            exclude=step.exclude,
            stages=step.stage,
            every=step.every,
            kind=step.kind,
            placement=step.placement,
            options=step.options,
            seed=step.seed,
            before=cuts,
            stack=step.stack,
            gate=step.gate,
        )
        cuts += plan.cuts
        attended.update(dict.fromkeys(plan.attended))
        for path, reason in plan.skipped.items():
            skipped[path] = f"{skipped[path]}; {reason}" if path in skipped else reason
    return Plan(tuple(cuts), skipped, tuple(attended))
