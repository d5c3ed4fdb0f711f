"""Draw the README's picture of the terminal: real commands, their real output, as an SVG.

Run it from the repository's root, in an environment where attnsurgeon is installed:

    python examples/terminal_picture.py
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 96
COMMANDS = (
    "attnsurgeon insert digits --block cbam",
    "attnsurgeon export digits_cbam.safetensors -o digits_cbam.onnx",
)


def run(command: str, folder: Path) -> str:
    """Run a command as on a terminal of WIDTH columns and return what it prints on stdout."""
    program = Path(sys.executable).with_name("attnsurgeon")
    environment = {
        **os.environ,
        "COLUMNS": str(WIDTH),
        "FORCE_COLOR": "1",
        "TERM": "xterm-256color",
    }
    words = [str(program), *command.split()[1:]]
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def main() -> None:
    """Run the commands in a folder of their own and write the picture."""
    target = Path(__file__).with_name("terminal.svg")
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory() as folder:
        for command in COMMANDS:
            console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
            console.print(Text.from_ansi(run(command, Path(folder))))
            console.print()
    svg = console.export_svg(title="attnsurgeon")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # nothing to be fetched
    target.write_text(
        "\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8"
    )
    print(f"wrote {target}")  # noqa: T201


if __name__ == "__main__":
    main()
