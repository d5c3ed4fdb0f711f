"""The options of all commands that open a network: what it is made with, and takes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer

from attnsurgeon.cli.shell import read_assignments

ModelArguments = Annotated[
    list[str] | None,
    typer.Option("--model-arg", help="Arguments of the network's builder, as key=value."),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help="Shape of an input, as 1,3,32,32 or 1,16:int64; once for each. Of an image in a "
        "detector's list: 3,64,64.",
    ),
]
OwnHost = Annotated[
    str | None,
    typer.Option(
        "--host", help="For a file made from your own network: FILE.py:FACTORY or MODULE:FACTORY."
    ),
]
CheckpointKey = Annotated[
    str | None,
    typer.Option(help="Where in the checkpoint the weights are, as model_ema or state_dict.net."),
]


def is_shape(word: str) -> bool:
    """Tell whether a word is meant as one more --input: 1,3,32,32 or 1,16:int64."""
    return word[:1].isdigit() and "," in word and not word.endswith((".py", ".safetensors"))


def read_arguments(texts: Sequence[str] | None) -> dict[str, Any]:
    """Return --model-arg values read as JSON or Python (numbers, lists, true, None), else text.

    All of them can stand in a recipe. The `none` of --weights is None where weights are named.

    Raises:
        BadOption: a text that is no key=value.
    """
    import ast
    import json

    from attnsurgeon.card import WEIGHT_ARGUMENTS

    written = read_assignments(texts or (), "--model-arg")
    values: dict[str, Any] = dict(written)
    for key, text in written.items():
        if text == "none" and key in WEIGHT_ARGUMENTS:
            values[key] = None
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                values[key] = json.loads(json.dumps(read(text), allow_nan=False))
                break
    return values
