"""The kernel's account of how long threads waited for a core."""

import subprocess
import sys
from pathlib import Path

import pytest

from attnsurgeon.bench import waiting

SCRIPT = """
import os, runpy, subprocess, sys, time
waited_ns = runpy.run_path(sys.argv[2])["waited_ns"]  # without torch, which takes seconds to import
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
spin = [sys.executable, "-c", "while True: pass"]
others = [subprocess.Popen(spin) for _ in range(int(sys.argv[1]))]
try:
    before, until = waited_ns(), time.perf_counter() + 0.5
    while time.perf_counter() < until:
        pass
    print((waited_ns() - before) / 0.5e9)
finally:
    for other in others:
        other.kill()
"""


def share_waited(others):
    """Return the share of half a second that a process waited beside others on one core."""
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(others), waiting.__file__],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(told.stdout)


@pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(), reason="this system keeps no account"
)
def test_who_shares_a_core_waits():
    alone, shared = share_waited(0), share_waited(3)
    assert 0 <= alone < shared
    assert shared > 0.4


def test_without_an_account_nobody_waited(monkeypatch, tmp_path):
    monkeypatch.setattr(waiting, "_TASKS", tmp_path / "missing")
    assert waiting.waited_ns() == 0


def test_a_thread_that_ended_meanwhile_is_left_out(monkeypatch, tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "schedstat").write_text("5 700 3")
    monkeypatch.setattr(waiting, "_TASKS", tmp_path)
    assert waiting.waited_ns() == 700
