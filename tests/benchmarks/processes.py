"""Time whole processes against each other, in turn, and print medians and their ratio."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Measured = tuple[float, float]
"""Wall-clock seconds and peak resident memory in MiB of one process."""


def measure(command: Sequence[str], folder: Path) -> Measured:
    """Run a command to its end in a folder; its output is thrown away.

    Raises:
        RuntimeError: it fails.
    """
    start = time.perf_counter()
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as child:
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}")
    return seconds, usage.ru_maxrss / 1024


def compare(
    ours: Sequence[str], plain: str, folder: Path, runs: int, clean: Callable[[], None]
) -> tuple[float, float]:
    """Run our command and a plain script in turn; print and return the ratios of the medians.

    Returns:
        Ratio of wall-clock time, ratio of peak memory.
    """
    script = folder / "plain.py"
    script.write_text(plain, encoding="utf-8")
    figures: dict[str, list[Measured]] = {"ours": [], "plain": []}
    for run in range(runs + 1):
        for side, command in (("ours", ours), ("plain", [sys.executable, str(script)])):
            clean()
            measured = measure(command, folder)
            if run:  # the first of each warms the file cache
                figures[side].append(measured)
    seconds = {side: statistics.median(t for t, _ in all_) for side, all_ in figures.items()}
    memory = {side: statistics.median(m for _, m in all_) for side, all_ in figures.items()}
    ratios = seconds["ours"] / seconds["plain"], memory["ours"] / memory["plain"]
    print(  # noqa: T201
        f"time    {seconds['ours']:.2f} s against {seconds['plain']:.2f} s: {ratios[0]:.2f} x\n"
        f"memory  {memory['ours']:.0f} MiB against {memory['plain']:.0f} MiB: {ratios[1]:.2f} x"
    )
    return ratios


def program() -> str:
    """Return the installed command."""
    return str(Path(sys.executable).with_name("attnsurgeon"))
