"""How long the threads of this process waited for a core: Linux keeps account, thread by thread."""

from __future__ import annotations

import contextlib
from pathlib import Path

_TASKS = Path("/proc/self/task")


def waited_ns() -> int:
    """Return for how long threads that could run had to wait so far, all of them together.

    Of threads that have ended nothing is told any more. Where no account is kept it is 0.
    """
    found = 0
    with contextlib.suppress(OSError):
        for thread in _TASKS.iterdir():
            # Time on a core, time of waiting for one, and how often it ran.
            with contextlib.suppress(OSError, IndexError, ValueError):
                found += int((thread / "schedstat").read_bytes().split()[1])
    return found
