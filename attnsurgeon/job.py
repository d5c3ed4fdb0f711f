"""One `insert` from a model's name to a written file: the command line's work, callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnsurgeon.cost import multiply_adds
from attnsurgeon.errors import BadOption, IdentityBroken
from attnsurgeon.export import Artifact, export_model, export_suffixes
from attnsurgeon.export.format import format_for
from attnsurgeon.host import DEFAULT_WEIGHTS, NO_WEIGHTS, check_host, load_host
from attnsurgeon.operation import operate
from attnsurgeon.origin import sha256_of
from attnsurgeon.outputs import check_output
from attnsurgeon.plan import Cut, Plan, check_request, make_plan
from attnsurgeon.sites import as_inputs, find_sites
from attnsurgeon.store import is_model_file, load_model, save_model
from attnsurgeon.surgery import attention_paths, build_attention, count_parameters, is_new_key
from attnsurgeon.training.trained import load_trained
from attnsurgeon.verify import Liveness, Verdict

SAVED = ".safetensors"


@dataclass(frozen=True)
class InsertJob:
    """What is asked for; the fields are the flags of `attnsurgeon insert`."""

    model: str
    block: str
    output: Path | None = None
    at: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    stages: tuple[int, ...] = ()
    every: int = 1
    placement: str = "post"
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: str = DEFAULT_WEIGHTS
    checkpoint: Path | None = None
    num_classes: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    stack: bool = False
    dry_run: bool = False
    force: bool = False


@dataclass(frozen=True)
class CutCost:
    """What one cut adds: parameters without gates, and multiply-adds for one input."""

    cut: Cut
    parameters: int
    gates: int
    macs: int


@dataclass(frozen=True)
class Insertion:
    """What was done, or in a dry run would be."""

    model: str
    output: str | None
    block: str
    placement: str
    costs: tuple[CutCost, ...]
    parameters: Mapping[str, int]
    tensors: Mapping[str, int]
    skipped: Mapping[str, str]
    verdict: Verdict | None = None
    liveness: Liveness | None = None
    artifact: Artifact | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `identity` and `liveness` are null in a dry run."""
        return {
            "model": self.model,
            "output": self.output,
            "block": self.block,
            "placement": self.placement,
            "sites": [
                {
                    "path": cost.cut.path,
                    "channels": cost.cut.place.channels,
                    "shape": list(cost.cut.shape),
                    "parameters": cost.parameters,
                    "macs": cost.macs,
                }
                for cost in self.costs
            ],
            "skipped": dict(self.skipped),
            "parameters": dict(self.parameters),
            "tensors": dict(self.tensors),
            "identity": self.verdict
            and {"exact": self.verdict.exact, "inputs": list(self.verdict.inputs)},
            "liveness": self.liveness
            and {"gates": self.liveness.gates, "live": self.liveness.live},
        }


def open_model(
    model: str,
    *,
    weights: str = DEFAULT_WEIGHTS,
    checkpoint: Path | None = None,
    num_classes: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return what a MODEL argument names: a file of attnsurgeon, or a host with its weights.

    Raises:
        AttnSurgeonError: see load_model and load_host.
        BadOption: an argument that a file cannot take.
    """
    if is_model_file(model):
        if num_classes is not None or arguments or weights not in (DEFAULT_WEIGHTS, NO_WEIGHTS):
            raise BadOption(
                f"{model!r} is a file with a network of its own: of --weights, --num-classes and "
                "--model-arg it takes none; give --checkpoint for other weights"
            )
        loaded = load_model(model)
        if checkpoint is not None:
            load_trained(loaded, checkpoint)
        return loaded
    return load_host(
        model,
        weights=weights,
        checkpoint=checkpoint,
        num_classes=num_classes,
        arguments=arguments,
    )


def run_insert(job: InsertJob, progress: Callable[[str], None] = lambda text: None) -> Insertion:
    """Load, plan, operate, prove, write; in a dry run load and plan only.

    Raises:
        AttnSurgeonError: see open_model, make_plan, operate, save_model and export_model.
    """
    check_request(job.block, placement=job.placement, every=job.every, options=job.options)
    if not is_model_file(job.model):
        check_host(
            job.model,
            weights=job.weights,
            checkpoint=job.checkpoint,
            num_classes=job.num_classes,
        )
    output = _output(job)
    if not job.dry_run:
        check_output(output, force=job.force)
    progress(f"loading {job.model}")
    fetches = not job.dry_run or job.checkpoint is not None or is_model_file(job.model)
    model = open_model(
        job.model,
        weights=job.weights if fetches else NO_WEIGHTS,
        checkpoint=job.checkpoint,
        num_classes=job.num_classes,
        arguments=job.arguments,
    )
    example = as_inputs(model, None)
    plan = make_plan(
        model,
        find_sites(model, example),
        job.block,
        at=job.at,
        exclude=job.exclude,
        stages=job.stages,
        every=job.every,
        placement=job.placement,
        options=job.options,
        seed=job.seed,
        stack=job.stack,
    )
    if job.dry_run:
        return _preview(job, model, plan)
    return _carry_out(job, output, model, plan, example, progress)


def _output(job: InsertJob) -> Path:
    """Return where to write.

    Raises:
        UnknownName: the suffix is of no format.
    """
    name = Path(job.model).stem if is_model_file(job.model) else job.model
    output = job.output or Path(f"{name}_{job.block}{SAVED}")
    if output.suffix.lower() != SAVED:
        format_for(output) if output.suffix.lower() in export_suffixes() else _refuse(output)
    return output


def _refuse(output: Path) -> None:
    raise BadOption(
        f"{output.name!r} has no suffix that can be written; "
        f"end it in {', '.join((SAVED, *export_suffixes()))}"
    )


def _preview(job: InsertJob, model: nn.Module, plan: Plan) -> Insertion:
    costs = _costs(model, plan)
    before = count_parameters(model)
    added, gates = sum(c.parameters for c in costs), sum(c.gates for c in costs)
    originals = _hashable_keys(model)
    return Insertion(
        model=job.model,
        output=None,
        block=job.block,
        placement=job.placement,
        costs=costs,
        parameters={
            "before": before["after"],
            "added": added,
            "gates": gates,
            "after": before["after"] + added + gates,
        },
        tensors={
            "original": len(originals),
            "kept": len(originals),
            "new": _count_new(model, plan),
        },
        skipped=plan.skipped,
    )


def _count_new(model: nn.Module, plan: Plan) -> int:
    return sum(len(build_attention(model, cut).state_dict()) for cut in plan.cuts)


def _costs(model: nn.Module, plan: Plan) -> tuple[CutCost, ...]:
    costs = []
    for cut in plan.cuts:
        attention = build_attention(model, cut)
        total = sum(p.numel() for p in attention.parameters())
        gates = sum(p.numel() for n, p in attention.named_parameters() if n.endswith("openness"))
        macs = multiply_adds(attention, _reads(cut, next(attention.parameters()).dtype))
        costs.append(CutCost(cut, total - gates, gates, macs))
    return tuple(costs)


def _reads(cut: Cut, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return stand-ins for what the attention of a cut reads."""
    out = torch.empty(cut.shape, dtype=dtype, device="meta")
    if cut.place.in_channels is None:
        return (out,)
    batch, _, height, width = cut.shape
    down, across = cut.place.stride
    wide = out.new_empty(batch, cut.place.in_channels, height * down, width * across)
    return wide, out


def _hashable_keys(model: nn.Module) -> list[str]:
    paths = attention_paths(model)
    return [key for key in model.state_dict() if not is_new_key(key, paths)]


def _carry_out(
    job: InsertJob,
    output: Path,
    model: nn.Module,
    plan: Plan,
    example: tuple[Any, ...],
    progress: Callable[[str], None],
) -> Insertion:
    state = model.state_dict()
    before = {key: sha256_of(tensor) for key, tensor in state.items()}
    originals = _hashable_keys(model)
    held = count_parameters(model)["after"]
    costs = _costs(model, plan)
    progress(f"inserting {job.block} at {len(plan.cuts)} places, and checking that nothing changed")
    verdict, liveness = operate(model, plan, example)
    after = model.state_dict()
    kept = [key for key in before if key in after and sha256_of(after[key]) == before[key]]
    if len(kept) != len(before):
        raise IdentityBroken(f"only {len(kept)} of {len(before)} tensors are what they were")
    progress(f"writing {output}")
    artifact = None
    if output.suffix.lower() == SAVED:
        save_model(model, output, force=job.force)
    else:
        artifact = export_model(model, output, force=job.force, progress=progress)
        for notice in artifact.notices:
            progress(notice)
    counts = count_parameters(model)
    gates = sum(cost.gates for cost in costs)
    return Insertion(
        model=job.model,
        output=str(output),
        block=job.block,
        placement=job.placement,
        costs=costs,
        parameters={
            "before": held,
            "added": counts["after"] - held - gates,
            "gates": gates,
            "after": counts["after"],
        },
        tensors={
            "original": len(originals),
            "kept": len([key for key in originals if key in kept]),
            "new": len(after) - len(before),
        },
        skipped=plan.skipped,
        verdict=verdict,
        liveness=liveness,
        artifact=artifact,
    )
