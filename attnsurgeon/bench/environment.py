"""Where a comparison ran: machine, versions, threads, device, and what the reader must know."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from attnsurgeon.bench.schema import PACKAGES
from attnsurgeon.bench.targets import GATES, Target
from attnsurgeon.bench.watch import ask_nvidia, governor
from attnsurgeon.errors import BadOption, EngineUnavailable


def find_device(text: str) -> torch.device:
    """Return the device that a user's word stands for; `auto` is CUDA where there is one.

    Raises:
        BadOption: not auto, cpu, cuda or cuda:N.
        EngineUnavailable: a CUDA device that is not there.
    """
    kind, colon, number = text.partition(":")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "cpu" or (text == "auto" and not count):
        return torch.device("cpu")
    if text != "auto" and (kind != "cuda" or bool(colon) != number.isdecimal()):
        raise BadOption(f"--device takes auto, cpu, cuda or cuda:N, not {text!r}")
    if not count:
        raise EngineUnavailable("there is no CUDA device here; give --device cpu")
    index = int(number) if colon else torch.cuda.current_device()
    if index >= count:
        raise EngineUnavailable(
            f"there is no CUDA device {index} here; there are {count}, from cuda:0"
        )
    return torch.device("cuda", index)


def describe(
    request: Any, targets: Sequence[Target], example: Sequence[Any], command: str
) -> dict[str, Any]:
    """Return what the times depend on, as plain values; see schema.py for the keys.

    Args:
        request: the checked options.
        targets: what is timed.
        example: the inputs for one image.
        command: what was typed or called.
    """
    device: torch.device = request.device
    is_cuda = device.type == "cuda"
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    usable = len(affinity(0)) if affinity else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    driver = ask_nvidia(device, "driver_version") if is_cuda else None
    return {
        "command": command,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "governor": governor(),
        "load_average": round(load, 2),
        "threads": request.threads,
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if is_cuda else None,
        "driver": driver[0] if driver else None,
        "cuda": torch.version.cuda if is_cuda else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "seconds": request.seconds,
        "input_shapes": [list(part.shape) for part in example if isinstance(part, torch.Tensor)],
        "gates": f"open at random in {GATES[0]} to {GATES[1]}",
        "ceilings": [],
        "notes": [*_notes(targets), *_doubts(load, usable)],
    }


def _notes(targets: Sequence[Target]) -> list[str]:
    notes = [f"{t.name} has random weights" for t in targets if t.weights == "random"]
    notes += [
        f"{t.name} is timed with its gates, if it has any, as they are in the file"
        for t in targets
        if not t.is_opened
    ]
    return list(dict.fromkeys(notes))


def _doubts(load: float, cores: int) -> list[str]:
    if load <= cores / 2:
        return []
    return [
        f"the machine was busy before the measurement (load {load:.1f} on {cores} cores): "
        "intervals are wider than they need be"
    ]


def cpu_name() -> str:
    """Return the model of the processor, as the system tells it."""
    table = Path("/proc/cpuinfo")
    if table.is_file():
        for line in table.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # onnxruntime comes under other names, such as onnxruntime-gpu
        with contextlib.suppress(ImportError):
            return getattr(importlib.import_module(package), "__version__", None)
        return None
