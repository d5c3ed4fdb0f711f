"""The one look of all tables."""

from __future__ import annotations

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

_SHARE_OF_NAMES = 0.4
"""Of the room, up to which a column of names has each on one line; the others wrap at spaces."""


class NameTable(Table):
    """A table whose columns of overflow `fold` are names to be copied: never cut off."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the table with its names on one line each, where they leave room for the rest."""
        for column in self.columns:
            longest = max((cell_len(str(cell)) for cell in column.cells), default=0)
            fits = longest <= _SHARE_OF_NAMES * options.max_width
            if column.overflow == "fold":
                column.width = max(longest, cell_len(str(column.header))) if fits else None
        yield from super().__rich_console__(console, options)


def new_table(title: str) -> Table:
    """Return an empty table with its title above, without vertical lines."""
    return NameTable(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
