"""Run a written file in a fresh process: nothing that exporting left behind can help it."""

from __future__ import annotations

import inspect
import itertools
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from attnsurgeon.errors import BadFile
from attnsurgeon.export import worker
from attnsurgeon.export.format import RunFailed

_numbers = itertools.count()
_ready: list[_Process] = []


class _Process:
    """An interpreter that holds opened files."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", inspect.getsource(worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._unread = 0
        self.forgotten: list[int] = []

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def tell(self, *question: Any) -> None:
        """Ask what need not be waited for."""
        assert self._process.stdin is not None
        pickle.dump(question, self._process.stdin)
        self._process.stdin.flush()
        self._unread += 1

    def ask(self, *question: Any) -> Any:
        """Return the answer.

        Raises:
            RunFailed: it has none, or the process ended.
        """
        assert self._process.stdout is not None
        try:
            while self.forgotten:
                self.tell("close", self.forgotten.pop())
            self.tell(*question)
            for _ in range(self._unread):
                done, answer = pickle.load(self._process.stdout)
                self._unread -= 1
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            self.close()
            raise RunFailed(f"its process ended ({self._process.returncode})") from error
        if not done:
            raise RunFailed(" ".join(str(answer).split())[:300])
        return answer

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if stream is not None:
                    stream.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@contextmanager
def ready_process(module: str) -> Iterator[None]:
    """Start a process that imports a module while others work, and open files in it meanwhile.

    Inside another such block the process of that one serves.
    """
    if _ready and _ready[-1].is_alive:
        yield
        return
    process = _Process()
    process.tell("import", 0, module)
    _ready.append(process)
    try:
        yield
    finally:
        _ready.remove(process)
        process.close()


class FreshProcess:
    """A process that has opened one file and runs it on what it is asked."""

    def __init__(self, name: str, opener: str, *arguments: Any) -> None:
        """Start it, unless one is ready, and wait until it has opened the file.

        Raises:
            BadFile: it cannot be opened.
        """
        ready = [process for process in _ready if process.is_alive]
        self._is_shared = bool(ready)
        self._process = ready[-1] if ready else _Process()
        self._number = next(_numbers)
        try:
            self.told = self._process.ask("open", self._number, opener, *arguments)
        except RunFailed as error:
            self.close()
            raise BadFile(f"{name} cannot be run: {error}") from error

    def __call__(self, inputs: Any) -> Any:
        """Return what the file computes.

        Raises:
            RunFailed: it does not run on this.
        """
        return self._process.ask("run", self._number, inputs)

    def close(self) -> None:
        """End the process, or have a shared one forget the file."""
        if not self._is_shared:
            self._process.close()
        else:  # told with the next question: this may run while another is being written
            self._process.forgotten.append(self._number)

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            self.close()
