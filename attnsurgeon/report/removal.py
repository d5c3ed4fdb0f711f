"""What `remove` took out and what that changed, in a few lines."""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text

from attnsurgeon.removal import Removal


def show_removal(done: Removal) -> RenderableType:
    """Return what is gone, what is left, and how far that is from before."""
    paths = ", ".join(f"{cut.path} {cut.block}" for cut in done.removed)
    top1 = done.change.top1
    lines = [
        f"removed           {len(done.removed)} of {len(done.removed) + len(done.kept)}: {paths}",
        f"original tensors  {done.matching}/{done.original} are what they were before the "
        "insertion (SHA-256)",
        f"outputs           move by {done.change.relative:.3%} of their length"
        f"{'' if top1 is None else f', {top1:.1%} of the images are read otherwise'}"
        f" ({done.source})",
    ]
    if done.restored:
        lines.append("host              the original, byte for byte")
    elif not done.kept:
        lines.append("host              not the original: it was trained with the attention")
    return Text("\n".join([*lines, f"written           {done.output}"]))
