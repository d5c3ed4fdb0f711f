"""The shell around every command: lists of values, one line per error, exit codes, two streams."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from attnsurgeon.errors import AttnSurgeonError

# Typer's own usage errors (an unknown flag, a missing argument) are not public by name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Group(TyperGroup):
    """Shows what a user can put right as one line on stderr; a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command and turn our own errors into exit codes."""
        try:
            return super().invoke(ctx)
        except AttnSurgeonError as error:
            complain(str(error))
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            complain("interrupted; no partial file was left")
            raise typer.Exit(130) from None

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Parse and run; usage errors are one line too."""
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except _UsageError as error:
            command = getattr(getattr(error, "ctx", None), "command_path", "attnsurgeon")
            complain(f"{_usage(error).rstrip('.')}; see {command} --help")
            code = 2
        if not standalone_mode:
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
    return word.lstrip("-").isdigit()


def is_assignment(word: str) -> bool:
    """Tell whether a word is meant as one more key=value."""
    return "=" in word


def list_command(arguments: int, **lists: Callable[[str], bool] | None) -> type[TyperCommand]:
    """Return a command class whose named options take several values (None: patterns)."""
    options = {f"--{name.replace('_', '-')}": looks for name, looks in lists.items()}
    return type("Command", (ListCommand,), {"lists": options, "arguments": arguments})


def complain(text: str) -> None:
    """Print one line on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"[bold red]error:[/] {_plain(' '.join(text.split()))}"
    )


def tell(text: str) -> None:
    """Print one line of progress or notice on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[dim]{_plain(text)}[/]")


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def say(*things: Any) -> None:
    """Print results on stdout: in colour only on a terminal, and wide where there is none."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)
    console.print(*things)


def say_json(thing: Any) -> None:
    """Print one JSON value on stdout and nothing else."""
    sys.stdout.write(json.dumps(thing, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


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
    if not 1 <= len(parts) <= 2 or not all(part.strip().isdigit() for part in parts):
        raise BadOption(f"--input-size takes H or H,W in pixels, not {text!r}")
    return int(parts[0]), int(parts[-1])
