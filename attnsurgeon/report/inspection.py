"""What `verify` found, in four lines."""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text

from attnsurgeon.inspection import Inspection


def show_inspection(found: Inspection) -> RenderableType:
    """Return hashes, gates, identity and liveness."""
    runs = len(found.verdict.inputs)
    gates = "closed, as inserted" if found.closed else "open: trained since"
    return Text(
        f"{found.file}\n"
        f"original tensors  {found.matching}/{found.original} are the recorded ones (SHA-256)\n"
        f"gates             {gates}\n"
        f"identity          exact with closed gates: {runs} of {runs} runs bitwise equal\n"
        f"liveness          {found.liveness.live}/{found.liveness.gates} gates can learn"
    )
