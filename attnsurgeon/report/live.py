"""Progress while something is measured: one live line on a terminal, few plain ones elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

Tell = Callable[[str, float], None]


@contextmanager
def live_progress(say: Callable[[str], None], console: Console | None = None) -> Iterator[Tell]:
    """Yield what takes a text and the share that is done; the ratio so far is in the text.

    Args:
        say: prints a line, where there is no terminal to redraw one on.
        console: of stderr by default.
    """
    console = console or Console(file=sys.stderr, highlight=False)
    if not console.is_terminal:
        yield _plain(say)
        return
    columns = (BarColumn(20), TaskProgressColumn(), TimeElapsedColumn())
    # Redrawn only when told: a thread of its own would disturb what is timed.
    with Progress(
        *columns, TextColumn("{task.description}"), console=console, transient=True,
        auto_refresh=False,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=1.0)

        def tell(text: str, share: float) -> None:
            progress.update(task, description=text, completed=share, refresh=True)

        yield tell


def _plain(say: Callable[[str], None]) -> Tell:
    """Return what prints a line for every step, not for every round of a step."""
    said: list[str] = []

    def tell(text: str, share: float) -> None:
        step = text.partition(": measuring:")[0] + (": measuring" if ": measuring:" in text else "")
        if said[-1:] != [step]:
            said.append(step)
            say(f"{share:4.0%} {step}")

    return tell
