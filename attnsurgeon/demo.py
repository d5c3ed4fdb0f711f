"""The whole path on the shipped digits network: insert, prove, fine-tune, export, run, measure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attnsurgeon import digits
from attnsurgeon.bench import compare_speed
from attnsurgeon.bench.quiet import borrowed_threads
from attnsurgeon.bench.results import Report
from attnsurgeon.borrow import borrowed_randomness
from attnsurgeon.errors import ExportDiffers, IdentityBroken, OutputRefused
from attnsurgeon.export import export_model
from attnsurgeon.export.format import format_for
from attnsurgeon.gate import named_gates
from attnsurgeon.insertion import Insertion
from attnsurgeon.job import InsertJob, run_insert
from attnsurgeon.outputs import atomic_output
from attnsurgeon.store import load_model, load_plain, save_model
from attnsurgeon.training import GateSchedule, parameter_groups

BLOCK = "cbam"
EXPORTS = (".onnx", ".pt")
BENCH_SECONDS = 3.0
LESSONS = 150
"""Held-out digits that fine-tuning sees; the accuracy after it is measured on the others."""
STEPS, BATCH, RATE = 40, 32, 0.02
NOISE = 1.5
"""What makes the digits hard again for a network that reads them; the ink goes from 0 to 3."""


@dataclass(frozen=True)
class Lesson:
    """A few seconds of fine-tuning on noisy digits.

    Attributes:
        file: the network after it.
        images: digits that it saw, with new noise at each step.
        tested_on: other digits that the accuracies are of, with noise of their own.
        steps: of the optimiser.
        noise: its standard deviation, in units of the network's input.
        accuracy: `before` and `after`.
        gates: path -> the gate after it.
    """

    file: str
    images: int
    tested_on: int
    steps: int
    noise: float
    accuracy: dict[str, float]
    gates: dict[str, float]


@dataclass(frozen=True)
class Demo:
    """What the demo did, with the digits read right before, after and by each file."""

    folder: str
    images: int
    accuracy: dict[str, float]
    insertion: Insertion
    lesson: Lesson
    speed: Report
    files: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "folder": self.folder,
            "images": self.images,
            "accuracy": self.accuracy,
            "insertion": self.insertion.to_json(),
            "training": asdict(self.lesson),
            "comparisons": self.speed.to_json()["comparisons"],
            "files": list(self.files),
        }


def run_demo(
    folder: Path | None = None, progress: Callable[[str], None] = lambda text: None
) -> Demo:
    """Insert CBAM into `digits`, show that nothing changed, train it, and leave the files.

    Args:
        folder: a new or empty folder; `attnsurgeon-demo`, or with a number, by default.
        progress: is told what is being done.

    Raises:
        OutputRefused: the folder cannot be made or is not empty.
        IdentityBroken: a logit on a real digit changed.
        ExportDiffers: an exported file reads a digit otherwise than the network.
    """
    target = _folder(folder)
    images, labels = digits.held_out()
    saved = target / f"digits_{BLOCK}.safetensors"
    with borrowed_threads(1):  # so small a network makes several wait for each other
        insertion = run_insert(InsertJob("digits", BLOCK, output=saved), progress)
        operated = load_model(saved)
        before, after = _logits(load_plain(saved), images), _logits(operated, images)
        if not torch.equal(before, after):
            raise IdentityBroken("a logit on the held-out digits changed")
        accuracy = {"before": _accuracy(before, labels), "after": _accuracy(after, labels)}
        lesson = fine_tune(load_model(saved), saved.with_stem(f"{saved.stem}_trained"), progress)
        for suffix in EXPORTS:
            path = saved.with_suffix(suffix)
            export_model(operated, path, progress=progress)
            read = format_for(path).open(path)((images,))[0]
            accuracy[path.name] = _accuracy(read, labels)
            if not torch.equal(read.argmax(1), after.argmax(1)):
                raise ExportDiffers(f"{path} reads some digits otherwise than the network")
    progress("measuring what the attention costs")
    speed = _measure(str(saved), str(saved.with_suffix(".onnx")))
    results = target / "bench.json"
    with atomic_output(results) as part:
        part.write_text(json.dumps(speed.to_json(), indent=2) + "\n", encoding="utf-8")
    files = tuple(sorted(str(path) for path in target.iterdir()))
    return Demo(str(target), len(labels), accuracy, insertion, lesson, speed, files)


def fine_tune(model: nn.Module, file: Path, progress: Callable[[str], None]) -> Lesson:
    """Train this very model on noisy digits, keep it in a file, and read others before and after.

    Raises:
        GateLost: a gate is no number any more.
    """
    progress(f"fine-tuning on {LESSONS} noisy digits, {STEPS} steps")
    images, labels = digits.held_out()
    lessons, tests = slice(0, LESSONS), slice(LESSONS, None)
    with borrowed_randomness(0):
        noisy = images[tests] + NOISE * torch.randn_like(images[tests])
        before = _accuracy(_logits(model.eval(), noisy), labels[tests])
        optimizer = torch.optim.SGD(
            parameter_groups(model, lr=RATE, attention_lr=10 * RATE), momentum=0.9
        )
        schedule = GateSchedule(model)
        model.train()
        for _ in range(STEPS):
            batch = torch.randperm(LESSONS)[:BATCH]
            shown = images[lessons][batch]
            output = model(shown + NOISE * torch.randn_like(shown))
            optimizer.zero_grad()
            torch.autograd.backward(cross_entropy(output, labels[lessons][batch]))
            optimizer.step()
            schedule.step()
    schedule.check()
    after = _accuracy(_logits(model.eval(), noisy), labels[tests])
    save_model(model, file)
    return Lesson(
        file=str(file),
        images=LESSONS,
        tested_on=len(noisy),
        steps=STEPS,
        noise=NOISE,
        accuracy={"before": before, "after": after},
        gates={name: gate.item() for name, gate in named_gates(model).items()},
    )


def _measure(saved: str, exported: str) -> Report:
    """Time the network in eager mode, and its ONNX file as it is, which is not made once more."""
    eager = compare_speed([saved], engines=("eager",), seconds=BENCH_SECONDS)
    onnx = compare_speed(["digits", exported], engines=("onnxruntime",), seconds=BENCH_SECONDS)
    return replace(
        eager, runs=eager.runs + onnx.runs, comparisons=eager.comparisons + onnx.comparisons
    )


def _folder(folder: Path | None) -> Path:
    if folder is None:
        folder, number = Path("attnsurgeon-demo"), 1
        while folder.exists():
            number += 1
            folder = Path(f"attnsurgeon-demo-{number}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputRefused(f"{str(folder)!r} is there and not an empty folder; name a new one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputRefused(f"cannot make the folder {str(folder)!r}: {error.strerror}") from error
    return folder


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(images)
    return logits


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()
