"""Memory: the peak of a run, and an end to it that is an error and not the system's killer."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

import torch

RESERVE = 0.1
"""Of the memory that is free, left to others while a network may take the rest."""
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_TEXTS = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc",
          "failed to allocate memory", "bad allocation")  # fmt: skip


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether an error, or what caused it, is a lack of memory: engines word it otherwise."""
    while error is not None:
        is_type = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if is_type or any(text in str(error).lower() for text in _TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def free_memory() -> int | None:
    """Return the bytes that this process may still take on the host; None if nobody tells."""
    free = []
    table = Path("/proc/meminfo")
    if table.is_file():
        free.append(_kib_of(table, "MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        most = (group / "memory.max").read_text().strip()
        if most != "max":
            free.append(int(most) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no group, or one of the first kind
        pass
    known = [number for number in free if number is not None]
    return max(0, min(known)) if known else None


@contextlib.contextmanager
def bounded_memory(device: torch.device) -> Iterator[None]:
    """Make the allocation that would go beyond free memory fail, on the CPU under Linux.

    Without a bound the system grants it and ends the process when the memory is touched.
    """
    free = free_memory() if device.type == "cpu" else None
    held = _kib_of(_STATUS, "VmData") if free is not None else None
    if free is None or held is None:
        yield
        return
    import resource  # not on Windows, which tells neither

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = held + int(free * (1 - RESERVE))
    if soft != resource.RLIM_INFINITY:
        bound = min(bound, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def release_memory() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """Give the system what was freed and is kept for later."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


class Peak:
    """The memory that something takes at its highest, above what was held before it."""

    def __init__(self, device: torch.device) -> None:
        """Note what is held now."""
        trim_memory()
        self.device = device
        self.before = _kib_of(_STATUS, "VmRSS")
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:
            self.allocated = torch.cuda.memory_allocated(device)
            self.free = torch.cuda.mem_get_info(device)[0]

    def restart(self) -> None:
        """Forget the peak so far: that of a compiler is not that of a run."""
        trim_memory()
        self.warm = _kib_of(_STATUS, "VmRSS")
        self.can_reset = False
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")
            self.can_reset = True
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def host_bytes(self, held: int) -> int | None:
        """Return the host's peak since the restart; None where the system does not tell.

        Args:
            held: bytes of weights that lay there before all. With them, only what the run itself
                takes counts on top; without, all since the beginning, which holds the weights.
        """
        peak = _kib_of(_STATUS, "VmHWM")
        if peak is None or self.before is None or self.warm is None or not self.can_reset:
            return None
        start = min(self.before, self.warm) if held else self.before
        return held + max(0, peak - start)

    def device_bytes(self, *, is_torch: bool) -> int | None:
        """Return the device's peak; of other runtimes than torch, what the device lacks since."""
        if not self.is_cuda:
            return None
        if is_torch:
            return max(0, torch.cuda.max_memory_allocated(self.device) - self.allocated)
        return max(0, self.free - torch.cuda.mem_get_info(self.device)[0])


def _kib_of(table: Path, key: str) -> int | None:
    """Return a line of a table of /proc in bytes."""
    try:
        for line in table.read_text(encoding="ascii", errors="replace").splitlines():
            name, _, rest = line.partition(":")
            if name == key:
                return int(rest.split()[0]) * 1024
    except OSError:
        pass
    return None
