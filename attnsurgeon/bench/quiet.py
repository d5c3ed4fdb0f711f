"""What is lent for a measurement and given back: the thread count and the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def borrowed_threads(threads: int) -> Iterator[None]:
    """Compute with this many CPU threads; give the caller's number back."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def paused_collector() -> Iterator[None]:
    """Keep Python's garbage collector from running in the middle of a block."""
    was_enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if was_enabled:
            gc.enable()
