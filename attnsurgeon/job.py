"""One `insert` from a model's name to a written file: the command line's work, callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from attnsurgeon import blocks
from attnsurgeon.errors import BadOption, IdentityBroken
from attnsurgeon.example import as_inputs
from attnsurgeon.export import export_model, export_suffixes
from attnsurgeon.export.format import format_for
from attnsurgeon.gate import DEFAULT_FORM
from attnsurgeon.host import (
    DEFAULT_WEIGHTS,
    NO_WEIGHTS,
    Host,
    check_host,
)
from attnsurgeon.insertion import Insertion, count_new, cut_costs
from attnsurgeon.network import check_has_numbers
from attnsurgeon.opening import open_target
from attnsurgeon.operation import operate
from attnsurgeon.origin import sha256_of
from attnsurgeon.outputs import check_output
from attnsurgeon.plan import Plan
from attnsurgeon.steps import Step, load_steps, plan_steps
from attnsurgeon.store import check_storable, is_model_file, save_model
from attnsurgeon.surgery import attention_paths, count_parameters, is_new_key

SAVED = ".safetensors"
_OF_A_STEP = (
    *("block", "at", "exclude", "stages", "every", "kind", "placement", "options", "stack"),
    "gate",
)


@dataclass(frozen=True)
class InsertJob:
    """What is asked for; the fields are the flags of `attnsurgeon insert`."""

    model: str
    block: str | None = None
    output: Path | None = None
    at: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    stages: tuple[int, ...] = ()
    every: int = 1
    kind: str | None = None
    placement: str = "post"
    options: Mapping[str, Any] = field(default_factory=dict)
    plan: Path | None = None
    weights: str = DEFAULT_WEIGHTS
    checkpoint: Path | None = None
    checkpoint_key: str | None = None
    num_classes: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    host: str | None = None
    seed: int = 0
    stack: bool = False
    gate: str = DEFAULT_FORM
    dry_run: bool = False
    force: bool = False

    def steps(self) -> tuple[Step, ...]:
        """Return what goes where: of the plan's file, or the one step that the flags tell.

        Raises:
            BadOption: both, or neither.
            AttnSurgeonError: see load_steps and make_plan.
        """
        if self.plan is not None:
            usual = {item.name: item.default for item in fields(self)} | {"options": {}}
            told = [name for name in _OF_A_STEP if getattr(self, name) != usual[name]]
            if told:
                flag = {"stages": "stage", "options": "set"}.get(told[0], told[0])
                raise BadOption(f"--plan says what goes where; leave --{flag} out, or --plan")
            return load_steps(self.plan, self.seed)
        if self.block is None:
            raise BadOption("say what to insert: --block NAME, or several in one go by --plan FILE")
        step = Step(
            self.block,
            at=self.at,
            exclude=self.exclude,
            stage=self.stages,
            every=self.every,
            kind=self.kind,
            placement=self.placement,
            options=self.options,
            seed=self.seed,
            stack=self.stack,
            gate=self.gate,
        )
        return (step.checked(),)


def run_insert(job: InsertJob, progress: Callable[[str], None] = lambda text: None) -> Insertion:
    """Load, plan, operate, prove, write; in a dry run load and plan only.

    Raises:
        AttnSurgeonError: see open_target, make_plan, operate, save_model and export_model.
    """
    steps = job.steps()
    if not is_model_file(job.model):
        check_host(
            job.model,
            weights=job.weights,
            checkpoint=job.checkpoint,
            num_classes=job.num_classes,
        )
    output = _output(job, steps)
    if not job.dry_run:
        check_output(output, force=job.force)
    progress(f"loading {job.model}")
    host = _open(job)
    for notice in host.notices:
        progress(notice)
    check_storable(host.model)
    example = as_inputs(host.model, None)
    plan = plan_steps(host.model, example, steps)
    work = _Work(job, steps, host, plan)
    if job.dry_run:
        return work.preview()
    return work.carry_out(output, example, progress)


def _open(job: InsertJob) -> Host:
    fetches = not job.dry_run or job.checkpoint is not None or is_model_file(job.model)
    wanted: dict[str, Any] = {
        "weights": job.weights if fetches else NO_WEIGHTS,
        "checkpoint": job.checkpoint,
        "checkpoint_key": job.checkpoint_key,
        "num_classes": job.num_classes,
        "arguments": job.arguments,
        "inputs": job.inputs,
        "host": job.host,
    }
    return open_target(job.model, **wanted)


def _output(job: InsertJob, steps: Sequence[Step]) -> Path:
    """Return where to write.

    Raises:
        UnknownName: the suffix is of no format.
    """
    labels = "_".join(dict.fromkeys(blocks.label(step.block) for step in steps))
    output = job.output or Path(f"{_short_name(job.model)}_{labels}{SAVED}")
    if output.suffix.lower() != SAVED:
        format_for(output) if output.suffix.lower() in export_suffixes() else _refuse(output)
    return output


def _short_name(model: str) -> str:
    """Return what a file made from this MODEL is called after: path/net.py:make gives net."""
    if is_model_file(model):
        return Path(model).stem
    place, colon, name = model.rpartition(":")
    if not colon or place == "timm":
        return name
    return Path(place).stem if place.endswith(".py") else place.rpartition(".")[2]


def _refuse(output: Path) -> None:
    raise BadOption(
        f"{output.name!r} has no suffix that can be written; "
        f"end it in {', '.join((SAVED, *export_suffixes()))}"
    )


@dataclass(frozen=True)
class _Work:
    """A job whose network is loaded and whose cuts are planned."""

    job: InsertJob
    steps: tuple[Step, ...]
    host: Host
    plan: Plan

    def preview(self) -> Insertion:
        """Return what would be done."""
        model = self.host.model
        costs = cut_costs(model, self.plan)
        held = count_parameters(model)["after"]
        added, gates = sum(c.parameters for c in costs), sum(c.gates for c in costs)
        originals = len(_original_keys(model))
        return Insertion(
            model=self.job.model,
            output=None,
            steps=self.steps,
            costs=costs,
            parameters={
                "before": held,
                "added": added,
                "gates": gates,
                "after": held + added + gates,
            },
            tensors={
                "original": originals,
                "kept": originals,
                "new": count_new(model, self.plan),
            },
            skipped=self.plan.skipped,
            attended=self.plan.attended,
            checkpoint=self.host.fit,
        )

    def carry_out(
        self, output: Path, example: tuple[Any, ...], progress: Callable[[str], None]
    ) -> Insertion:
        """Operate, prove and write."""
        model = self.host.model
        check_has_numbers(model)
        before = {key: sha256_of(tensor) for key, tensor in model.state_dict().items()}
        originals = _original_keys(model)
        held = count_parameters(model)["after"]
        costs = cut_costs(model, self.plan)
        blocks = " and ".join(dict.fromkeys(step.block for step in self.steps))
        places = len(self.plan.cuts)
        progress(f"inserting {blocks} at {places} places, and checking that nothing changed")
        verdict, liveness = operate(model, self.plan, example)
        after = model.state_dict()
        kept = [key for key in before if key in after and sha256_of(after[key]) == before[key]]
        if len(kept) != len(before):
            raise IdentityBroken(f"only {len(kept)} of {len(before)} tensors are what they were")
        progress(f"writing {output}")
        artifact = None
        if output.suffix.lower() == SAVED:
            save_model(model, output, force=self.job.force)
        else:
            artifact = export_model(model, output, force=self.job.force, progress=progress)
            for notice in artifact.notices:
                progress(notice)
        total, gates = count_parameters(model)["after"], sum(cost.gates for cost in costs)
        return Insertion(
            model=self.job.model,
            output=str(output),
            steps=self.steps,
            costs=costs,
            parameters={
                "before": held,
                "added": total - held - gates,
                "gates": gates,
                "after": total,
            },
            tensors={
                "original": len(originals),
                "kept": len([key for key in originals if key in kept]),
                "new": len(after) - len(before),
            },
            skipped=self.plan.skipped,
            attended=self.plan.attended,
            checkpoint=self.host.fit,
            verdict=verdict,
            liveness=liveness,
            artifact=artifact,
        )


def _original_keys(model: nn.Module) -> list[str]:
    paths = attention_paths(model)
    return [key for key in model.state_dict() if not is_new_key(key, paths)]
