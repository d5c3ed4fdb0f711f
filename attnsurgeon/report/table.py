"""The one look of all tables."""

from __future__ import annotations

from rich import box
from rich.table import Table


def new_table(title: str) -> Table:
    """Return an empty table with its title above, without vertical lines."""
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
