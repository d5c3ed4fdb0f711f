"""What a user can put right, and the promises that can break.

AttnSurgeonError                  exit 2: one line: what happened, to which thing, what to type next
├── UnknownName (LookupError)     a model, block, weight, option or placement that does not exist
├── BadOption (ValueError)        a value that an option cannot take
├── NoSites (LookupError)         nothing in the network can take the attention asked for
├── PatternUnmatched (LookupError) a pattern or stage that selects nothing
├── PlacementUnavailable (ValueError) a site that does not have the place asked for
├── HostUnusable (ValueError)     a network that cannot be run, or not with this input
├── WeightsUnavailable (OSError)  pretrained weights that could not be fetched
├── CheckpointMismatch (ValueError) a checkpoint that does not fit the network
├── BadFile (ValueError)          a file that is not what it should be
├── OutputRefused (OSError)       an output that cannot or must not be written
├── MissingPackage (ImportError)  an optional or known-bad package
├── OptimizerMismatch (ValueError)  an optimiser that would not train the network it is given
├── GateLost (ArithmeticError)      a gate that became NaN or infinite in training
├── ExportRefused (RuntimeError)  a network that the exporter cannot take
├── EngineUnavailable (RuntimeError) a bench engine or device that is not there, or fell back
├── IdentityBroken (ArithmeticError) exit 3: an output changed, or a gate cannot learn
├── ExportDiffers (ArithmeticError) exit 4: the file does not compute what the model computes
└── TooSlow (RuntimeError)        exit 5: slower than before by more than was allowed
"""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Iterable

_ASSERTED = re.compile(r"(?:assert |(?:torch\.)?_assert\()(.+?)(?:, *(?:''|\"\")\))?")
"""A line of source that asserts something without words, and what."""


class AttnSurgeonError(Exception):
    """Root of all that is shown as one line; other exceptions are bugs and keep a traceback."""

    exit_code = 2

    def __str__(self) -> str:
        """Return the message alone (LookupError and OSError would decorate it)."""
        return " ".join(str(arg) for arg in self.args)


def first_line(error: BaseException) -> str:
    """Return the first line of what a foreign error says, or its type where it says nothing.

    Of an assertion without words it is what should have been true.
    """
    lines = str(error).strip().splitlines()
    if lines:
        return lines[0]
    frames = traceback.extract_tb(error.__traceback__)[-2:]  # torch._assert has one of its own
    asserted = [match for frame in frames if (match := _ASSERTED.fullmatch(frame.line or ""))]
    is_told = isinstance(error, AssertionError) and asserted
    return f"it asserts {asserted[-1][1]}" if is_told else type(error).__name__


def is_interrupt(error: BaseException | None) -> bool:
    """Tell whether an interrupt is at the root; libraries wrap it, as a failed import does."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


class UnknownName(AttnSurgeonError, LookupError):
    """A name that is in no registry; the message gives the nearest one."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        names = list(known)
        suggestion = nearest(name, names)
        if not suggestion and 0 < len(names) <= 12:
            suggestion = f"; there are {', '.join(names)}"
        super().__init__(f"no {kind} is called {name!r}{suggestion}{hint}")


class BadOption(AttnSurgeonError, ValueError):
    """A value that an option cannot take."""


class NoSites(AttnSurgeonError, LookupError):
    """Nothing in the network can take the attention asked for."""


class PatternUnmatched(AttnSurgeonError, LookupError):
    """A pattern or stage that selects nothing."""


class PlacementUnavailable(AttnSurgeonError, ValueError):
    """A site that does not have the place asked for."""


class HostUnusable(AttnSurgeonError, ValueError):
    """A network that cannot be run, or not with this input."""


class WeightsUnavailable(AttnSurgeonError, OSError):
    """Pretrained weights that could not be fetched."""


class CheckpointMismatch(AttnSurgeonError, ValueError):
    """A checkpoint that does not fit the network."""


class BadFile(AttnSurgeonError, ValueError):
    """A file that is not what it should be."""


class OutputRefused(AttnSurgeonError, OSError):
    """An output that cannot or must not be written."""


class MissingPackage(AttnSurgeonError, ImportError):
    """A package that is not installed, or in a version known to be wrong."""


class OptimizerMismatch(AttnSurgeonError, ValueError):
    """An optimiser that would not train the network it is given."""


class GateLost(AttnSurgeonError, ArithmeticError):
    """A gate that became NaN or infinite in training."""


class ExportRefused(AttnSurgeonError, RuntimeError):
    """A network that the exporter cannot take as asked."""


class EngineUnavailable(AttnSurgeonError, RuntimeError):
    """A bench engine or device that is not there, or that silently fell back."""


class IdentityBroken(AttnSurgeonError, ArithmeticError):
    """An output changed, or a gate cannot learn: nothing is kept."""

    exit_code = 3


class ExportDiffers(AttnSurgeonError, ArithmeticError):
    """The written file does not compute what the model computes: it is removed."""

    exit_code = 4


class TooSlow(AttnSurgeonError, RuntimeError):
    """A result became slower than an earlier one by more than was allowed."""

    exit_code = 5
