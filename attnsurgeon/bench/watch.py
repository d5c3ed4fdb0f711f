"""What else happened on the machine while something was timed: other load, throttled clocks."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch

CPUS = Path("/sys/devices/system/cpu")
_STAT = Path("/proc/stat")
_GROUP = Path("/sys/fs/cgroup/cpu.stat")
SLOWED = 0x08 | 0x20 | 0x40 | 0x80
"""Bits of NVML's clock event reasons: slowed by hardware, by heat (twice), by the power brake."""


@dataclass(frozen=True)
class Noticed:
    """What a watch saw.

    Attributes:
        other_cores: cores that others kept busy, on the average; None where nobody tells.
        throttled: who slowed the clocks down: `CPU`, `GPU`, `CPU quota`.
    """

    other_cores: float | None
    throttled: tuple[str, ...]


class Watch:
    """Looks at the machine's counters at its making and again at `look`."""

    def __init__(self, device: torch.device) -> None:
        """Note the counters."""
        self.device = device
        self.wall, self.own, self.busy = time.monotonic(), time.process_time(), _busy_s()
        self.slowdowns, self.waits = _slowdowns(), _quota_waits()

    def look(self) -> Noticed:
        """Return what happened since."""
        wall = max(1e-9, time.monotonic() - self.wall)
        busy = _busy_s()
        other = None
        if busy is not None and self.busy is not None:
            own = time.process_time() - self.own
            other = max(0.0, (busy - self.busy - own) / wall)
        told = {
            "CPU": _slowdowns() > self.slowdowns,
            "CPU quota": _quota_waits() > self.waits,
            "GPU": self.device.type == "cuda" and _gpu_is_slowed(self.device),
        }
        return Noticed(other, tuple(name for name, is_so in told.items() if is_so))


def _busy_s() -> float | None:
    """Return the seconds that all cores were busy since the system started."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        parts = _STAT.read_text(encoding="ascii").split("\n", 1)[0].split()
        user, nice, system, _, _, irq, softirq = (int(part) for part in parts[1:8])
        return (user + nice + system + irq + softirq) / float(os.sysconf("SC_CLK_TCK"))
    return None


def _slowdowns() -> int:
    """Return how often the cores were slowed down by heat."""
    total = 0
    for counter in CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"):
        with contextlib.suppress(OSError, ValueError):
            total += int(counter.read_text(encoding="ascii"))
    return total


def _quota_waits() -> int:
    """Return how often the control group had used up its share of the CPU."""
    with contextlib.suppress(OSError, ValueError):
        for line in _GROUP.read_text(encoding="ascii").splitlines():
            name, _, number = line.partition(" ")
            if name == "nr_throttled":
                return int(number)
    return 0


def governor() -> str | None:
    """Return how the system chooses the clock of the first core."""
    with contextlib.suppress(OSError):
        return (CPUS / "cpu0/cpufreq/scaling_governor").read_text(encoding="ascii").strip()
    return None


def ask_nvidia(device: torch.device, *fields: str) -> list[str] | None:
    """Return what nvidia-smi says of a device; None where it says nothing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)  # its own numbers are others
    query = [
        program,
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader",
        f"--id=GPU-{uuid}",
    ]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        return [part.strip() for part in told.stdout.strip().split(",")]
    return None


def _gpu_is_slowed(device: torch.device) -> bool:
    told = ask_nvidia(device, "clocks_throttle_reasons.active")
    try:
        return bool(told) and bool(int(told[0], 16) & SLOWED)  # type: ignore[index]
    except ValueError:
        return False
