"""How long it takes to watch every network of torchvision, and the operation in each of them.

Prints the processor seconds that watching takes, for each network and in all; then operates on the
networks that the tests leave out, unless --watch is given. Names choose among these.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from attnsurgeon.host import host_names, load_outline  # noqa: E402
from attnsurgeon.sites import find_sites  # noqa: E402


def watch_all() -> float:
    """Watch every network; return the seconds spent on watching alone."""
    total, slowest = 0.0, ("", 0.0)
    for name in host_names():
        model = load_outline(name)
        start = time.process_time()
        found = find_sites(model)
        spent = time.process_time() - start
        total += spent
        slowest = max(slowest, (name, spent), key=lambda pair: pair[1])
        print(f"{name:40} {len(found):4} sites  {spent:6.2f} s", flush=True)
    print(f"all {total:.1f} s (target 90), the slowest {slowest[0]} {slowest[1]:.2f} s (target 1)")
    return total


def operate_on(names: list[str]) -> None:
    """Insert at every site of some networks; by default of all that the tests leave out."""
    tests: Any = importlib.import_module("tests.test_every_host")
    for name in names or tests.LARGE:
        start = time.process_time()
        tests.operate_everywhere(name)
        spent = time.process_time() - start
        print(f"{name:40} exact, alive, removed again  {spent:6.1f} s", flush=True)


if __name__ == "__main__":
    chosen = [word for word in sys.argv[1:] if not word.startswith("-")]
    if not chosen:
        watch_all()
    if "--watch" not in sys.argv:
        operate_on(chosen)
