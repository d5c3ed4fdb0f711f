"""The largest batch that fits into memory: tried, not guessed."""

from __future__ import annotations

from collections.abc import Callable

from attnsurgeon.bench.memory import is_out_of_memory, release_memory

MOST = 2**20
"""Images per call; where that fits, memory is not what limits."""
FINE = 64
"""The search ends within one part in this many."""


def find_largest(attempt: Callable[[int], None], tell: Callable[[int], None]) -> tuple[int, int]:
    """Return the largest batch that an attempt ran, and the smallest tried that did not fit.

    Batches are doubled until one does not fit, and the gap is halved until it is within one part
    in FINE. The first is 0 where not even one image fits; the second is 2 * MOST where all fit.

    Args:
        attempt: runs a batch; an error that is a lack of memory means that it does not fit.
        tell: is told each batch before it is tried.
    """

    def fits(batch: int) -> bool:
        tell(batch)
        try:
            attempt(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            release_memory()
            return False
        return True

    low, high = 0, 1
    while high <= MOST and fits(high):
        low, high = high, 2 * high
    if high > MOST:
        return low, high
    while high - low > max(1, low // FINE):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, high
