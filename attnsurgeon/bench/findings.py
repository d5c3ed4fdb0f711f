"""What a comparison finds beside times and ratios: failures, profiles, the cost of each site."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from attnsurgeon.bench.interval import Estimate
from attnsurgeon.bench.profiling import Operator


@dataclass(frozen=True)
class Job:
    """One engine in one precision at one batch size.

    Attributes:
        engine: its name.
        device: cpu, or cuda:N.
        batch: number of images per call.
        precision: fp32, tf32, bf16, fp16.
        channels_last: whether maps lie in memory with the channels last.
        train: whether a call is a whole step of training.
    """

    engine: str
    device: str
    batch: int
    precision: str = "fp32"
    channels_last: bool = False
    train: bool = False

    def __str__(self) -> str:
        """Say it in a few words."""
        extras = [self.precision] if self.precision != "fp32" else []
        extras += ["channels last"] if self.channels_last else []
        extras += ["training"] if self.train else []
        return ", ".join([self.engine, f"batch {self.batch}", *extras])


@dataclass(frozen=True)
class Failure:
    """A job that did not fit into memory; the others went on.

    Attributes:
        job: what was tried.
        reason: one line.
    """

    job: Job
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self.job), "reason": self.reason}


@dataclass(frozen=True)
class Profile:
    """The engine's own per-operator table of one target.

    Attributes:
        job: what ran it.
        target: as the user typed it.
        operators: the costliest first.
    """

    job: Job
    target: str
    operators: tuple[Operator, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        rows = [operator.to_json() for operator in self.operators]
        return {**asdict(self.job), "target": self.target, "operators": rows}


@dataclass(frozen=True)
class SiteCost:
    """What the attention at one site costs.

    Attributes:
        path: of the block in the network.
        placement: where in the block.
        block: which attention.
        shape: of the features it reads, for one image.
        alone_in: the host with this attention alone, over the host.
        alone_out: all attention, over all but this.
    """

    path: str
    placement: str
    block: str
    shape: tuple[int, ...]
    alone_in: Estimate
    alone_out: Estimate

    def to_json(self) -> dict[str, Any]:
        """Return plain values; ratios to a hundredth of a percent."""
        return {
            "path": self.path,
            "placement": self.placement,
            "block": self.block,
            "shape": list(self.shape),
            "alone_in": _ratio(self.alone_in),
            "alone_out": _ratio(self.alone_out),
        }


def _ratio(found: Estimate) -> dict[str, Any]:
    return {
        "ratio": round(found.ratio, 4),
        "interval95": [round(found.low, 4), round(found.high, 4)],
    }


@dataclass(frozen=True)
class SiteCosts:
    """What the attention at each site costs on one engine at one batch size.

    Attributes:
        job: what ran it.
        target: as the user typed it.
        sites: in the order of the network.
        sum_alone_in: sum over the sites of what each costs alone, as a share of the host's time.
        whole: what all of them cost together, as a share of the host's time.
        whole95: 95 % interval of it.
        doubts: reasons not to trust them.
    """

    job: Job
    target: str
    sites: tuple[SiteCost, ...]
    sum_alone_in: float
    whole: float
    whole95: tuple[float, float]
    doubts: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            **asdict(self.job),
            "target": self.target,
            "sites": [site.to_json() for site in self.sites],
            "sum_alone_in": round(self.sum_alone_in, 4),
            "whole": round(self.whole, 4),
            "whole95": [round(bound, 4) for bound in self.whole95],
            "doubts": list(self.doubts),
        }
