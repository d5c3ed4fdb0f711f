"""Take attention out of a saved network, and tell how far what is left is from the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from attnsurgeon.errors import BadOption, PatternUnmatched
from attnsurgeon.origin import fingerprints, origin_of
from attnsurgeon.outputs import atomic_output, check_output
from attnsurgeon.plan import Cut
from attnsurgeon.store import load_model, save_model
from attnsurgeon.surgery import cuts_at, cuts_of, without_cuts
from attnsurgeon.training.images import sample_inputs
from attnsurgeon.training.openings import Change, check_gates, compare_outputs, run

SAVED = ".safetensors"


@dataclass(frozen=True)
class RemovalJob:
    """What is asked for; the fields are the flags of `attnsurgeon remove`."""

    file: Path
    host: str | None = None
    at: tuple[str, ...] = ()
    below: float | None = None
    output: Path | None = None
    images: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class Removal:
    """What was taken out, and what that changed.

    Attributes:
        file: what it was taken out of.
        output: what was written: a file of attnsurgeon, or without any attention left the plain
            host's weights.
        removed: the attention that is gone.
        kept: the attention that is left.
        original: number of the host's tensors.
        matching: how many of them are by their SHA-256 what they were before the insertion.
        change: of the outputs, from before the removal to after it.
        source: what the change was measured on.
    """

    file: str
    output: str
    removed: tuple[Cut, ...]
    kept: tuple[Cut, ...]
    original: int
    matching: int
    change: Change
    source: str

    @property
    def restored(self) -> bool:
        """Whether what was written is the original host, byte for byte."""
        return not self.kept and self.matching == self.original

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "file": self.file,
            "output": self.output,
            "removed": [_name(cut) for cut in self.removed],
            "kept": [_name(cut) for cut in self.kept],
            "tensors": {"original": self.original, "matching": self.matching},
            "restored": self.restored,
            "images": self.source,
            "change": asdict(self.change),
        }


def _name(cut: Cut) -> dict[str, str]:
    return {"path": cut.path, "block": cut.block, "placement": cut.placement}


def run_removal(job: RemovalJob, progress: Callable[[str], None] = lambda text: None) -> Removal:
    """Load a file, take attention out, measure what that changed, and write what is left.

    Raises:
        BadOption: both of `at` and `below`, or a limit that is negative.
        PatternUnmatched: nothing is selected.
        AttnSurgeonError: see load_model, sample_inputs and save_model.
    """
    if job.at and job.below is not None:
        raise BadOption("give --at or --below, not both")
    if job.below is not None and not job.below >= 0:
        raise BadOption(f"--below must be at least 0, not {job.below}")
    if job.output is not None:
        _check_target(job.output, job.force)
    progress(f"loading {job.file}")
    model = load_model(job.file, job.host)
    chosen = _choose(model, job)
    bare = without_cuts(model, chosen)
    kept = cuts_of(bare)
    output = job.output or _default_output(job.file, bool(kept))
    _check_target(output, job.force)
    sample = sample_inputs(model, job.images)
    progress(f"checking {len(chosen)} removals on {sample.source}")
    change = compare_outputs(run(model, sample), run(bare, sample))
    origin, now = origin_of(model) or {}, fingerprints(bare)
    progress(f"writing {output}")
    _write(bare, output, job.force)
    return Removal(
        file=str(job.file),
        output=str(output),
        removed=tuple(chosen),
        kept=kept,
        original=len(origin),
        matching=sum(now.get(key) == digest for key, digest in origin.items()),
        change=change,
        source=sample.source,
    )


def _check_target(output: Path, force: bool) -> None:
    if output.suffix.lower() != SAVED:
        raise BadOption(f"{output.name!r} cannot be written; end it in {SAVED}")
    check_output(output, force=force)


def _default_output(file: Path, any_left: bool) -> Path:
    return Path(f"{file.stem}_{'pruned' if any_left else 'plain'}{SAVED}")


def _choose(model: nn.Module, job: RemovalJob) -> list[Cut]:
    if job.below is None:
        return cuts_at(model, job.at or "*")
    opened = {child: max(map(abs, gates.values())) for child, gates in check_gates(model).items()}
    chosen = [cut for cut in cuts_of(model) if opened.get(cut.child, 1.0) < job.below]
    if not chosen:
        child = min(opened, key=opened.__getitem__)
        raise PatternUnmatched(
            f"no gate is below {job.below:g}; the least open is {child} at {opened[child]:.4g}"
        )
    return chosen


def _write(bare: nn.Module, output: Path, force: bool) -> None:
    if cuts_of(bare):
        save_model(bare, output, force=force)
        return
    state = {key: tensor.detach().clone() for key, tensor in bare.state_dict().items()}
    with atomic_output(output, force=force) as part:
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, part)
