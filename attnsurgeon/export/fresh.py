"""Run a written file in a fresh process: nothing that exporting left behind can help it."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from contextlib import suppress
from typing import Any

from attnsurgeon.errors import BadFile
from attnsurgeon.export import worker
from attnsurgeon.export.format import RunFailed


class FreshProcess:
    """A process that has opened one file and runs it on what it is asked."""

    def __init__(self, name: str, opener: str, *arguments: Any) -> None:
        """Start it and wait until it has opened the file.

        Raises:
            BadFile: it cannot be opened.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-c", inspect.getsource(worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._ask((opener, *arguments))
        except RunFailed as error:
            self.close()
            raise BadFile(f"{name} cannot be run: {error}") from error

    def __call__(self, inputs: Any) -> Any:
        """Return what the file computes.

        Raises:
            RunFailed: it does not run on this.
        """
        return self._ask(inputs)

    def _ask(self, question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(question, self._process.stdin)
            self._process.stdin.flush()
            done, answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise RunFailed(f"its process ended ({self._process.poll()})") from error
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

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self.close()
