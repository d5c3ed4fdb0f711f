"""The shell around every command: lists of values, one line per error, exit codes, two streams."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from attnsurgeon.errors import AttnSurgeonError, OutputRefused, is_interrupt

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Typer's own usage errors (an unknown flag, a missing argument) are not public by name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Group(TyperGroup):
    """Shows what a user can put right as one line on stderr; a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command and turn our own errors into exit codes."""
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            if is_interrupt(error):
                complain("interrupted; no partial file was left")
                raise typer.Exit(130) from None
            if not isinstance(error, AttnSurgeonError):
                raise
            complain(str(error))
            raise typer.Exit(error.exit_code) from error

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Parse as ever; nothing at all asks for help."""
        return super().parse_args(ctx, args or ["--help"])

    def main(self, *args: Any, **extra: Any) -> Any:
        """Parse and run; usage errors are one line too."""
        standalone = extra.get("standalone_mode", True)
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except _UsageError as error:
            command = getattr(getattr(error, "ctx", None), "command_path", "attnsurgeon")
            complain(f"{_usage(error).rstrip('.')}; see {command} --help")
            code = 2
        if not standalone:
            return code
        sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Exception) -> str:
    """Return the message of a usage error; what it was about is told by a method of its own."""
    formatted = getattr(error, "format_message", None)
    return str(formatted() if formatted else error)


class ListCommand(TyperCommand):
    """Lets an option of several values take them all at once: `--batch 1 8 32`.

    `--batch 1 --batch 8` works as well. A value is taken as one more only if it looks like one
    (numbers, key=value, known names), or for patterns once all arguments are there.
    """

    lists: ClassVar[dict[str, Callable[[str], bool] | None]] = {}
    arguments: ClassVar[int] = 1

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Spread lists into repeated options, then parse as ever."""
        return super().parse_args(ctx, self._spread(list(args)))

    def _spread(self, args: Sequence[str]) -> list[str]:
        spread: list[str] = []
        positional = 0
        current: str | None = None  # the list option that may take another value
        waiting = False  # the next word is the value of an option
        for i, word in enumerate(args):
            if word == "--":
                return [*spread, *args[i:]]
            if waiting:
                waiting = False
            elif word.startswith("-") and word != "-" and not _is_number(word):
                name = word.partition("=")[0]
                current = name if name in self.lists else None
                waiting = "=" not in word and name not in self._flags()
            elif current is not None and self._one_more(current, word, positional):
                spread.append(current)
            else:
                positional += 1
                current = None
            spread.append(word)
        return spread

    def _one_more(self, option: str, word: str, positional: int) -> bool:
        looks = self.lists[option]
        return positional >= self.arguments if looks is None else looks(word)

    def _flags(self) -> set[str]:
        return {
            name
            for parameter in self.params
            if getattr(parameter, "is_flag", False)
            for name in parameter.opts
        } | {"--help"}


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def is_integer(word: str) -> bool:
    """Tell whether a word is meant as one more whole number."""
    return word.lstrip("-").isdecimal()


def is_assignment(word: str) -> bool:
    """Tell whether a word is meant as one more key=value."""
    return "=" in word


def list_command(arguments: int, **lists: Callable[[str], bool] | None) -> type[TyperCommand]:
    """Return a command class whose named options take several values (None: patterns)."""
    options = {f"--{name.replace('_', '-')}": looks for name, looks in lists.items()}
    return type("Command", (ListCommand,), {"lists": options, "arguments": arguments})


def complain(text: str) -> None:
    """Print one line on stderr."""
    from rich.text import Text

    _log(Text.assemble(("error:", "bold red"), f" {_one_line(text)}"))


def tell(text: str) -> None:
    """Print one line of progress or notice on stderr."""
    from rich.text import Text

    _log(Text(_one_line(text), "dim"))


def _log(line: Text) -> None:
    _console(stderr=True, soft_wrap=True).print(line)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def say(*things: Any) -> None:
    """Print results on stdout: in colour only on a terminal, and wide where there is none."""
    page = io.StringIO()
    console = _console(file=page, force_terminal=sys.stdout.isatty() or None)
    if not console.is_terminal:
        console.width = max(console.width, 140)
    console.print(*things)
    _write(page.getvalue())


def _console(**settings: Any) -> Console:
    from rich.console import Console  # 0.03 s that --help need not wait for

    plain = bool(os.environ.get("NO_COLOR"))  # no bold either, which rich would keep
    return Console(highlight=False, color_system=None if plain else "auto", **settings)


def say_json(thing: Any) -> None:
    """Print one JSON value on stdout and nothing else."""
    _write(json.dumps(thing, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _write(text: str) -> None:
    """Write results to the end; a reader that has seen enough, as `head` has, is no error.

    Raises:
        OutputRefused: stdout takes no more, as on a full disk.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(141) from None  # as a shell tells of SIGPIPE
        raise OutputRefused(f"cannot write the results to stdout: {error.strerror}") from error


def read_assignments(texts: Sequence[str], flag: str) -> dict[str, str]:
    """Return key=value texts as a mapping.

    Raises:
        BadOption: a text without a key or an equals sign, or a key given twice.
    """
    from attnsurgeon.errors import BadOption

    values: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise BadOption(f"{flag} takes key=value, not {text!r}")
        if key in values:
            raise BadOption(f"{flag} {key} is given twice")
        values[key] = value
    return values


def read_size(text: str | None) -> tuple[int, int] | None:
    """Return H or H,W as a pair.

    Raises:
        BadOption: not one or two whole numbers.
    """
    from attnsurgeon.errors import BadOption

    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if not 1 <= len(parts) <= 2 or not all(part.strip().isdecimal() for part in parts):
        raise BadOption(f"--input-size takes H or H,W in pixels, not {text!r}")
    return int(parts[0]), int(parts[-1])
