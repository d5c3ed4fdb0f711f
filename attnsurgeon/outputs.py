"""Write a file whole or not at all, and never over another one unasked."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from attnsurgeon.errors import OutputRefused, first_line


def check_output(path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Return the path if a file can be written there.

    Raises:
        OutputRefused: the folder is missing or read-only, or something is there already.
    """
    target = Path(path)
    try:
        return _check(target, force)
    except OSError as error:
        if isinstance(error, OutputRefused):
            raise
        raise OutputRefused(f"{str(target)!r} cannot be written: {error.strerror}") from error


def _check(target: Path, force: bool) -> Path:
    folder = target.parent
    if not folder.is_dir():
        raise OutputRefused(
            f"there is no folder {str(folder)!r}; make it first, or choose another -o"
        )
    if target.is_dir():
        raise OutputRefused(f"{str(target)!r} is a folder; name a file in it with -o")
    if target.exists() and not target.is_file():
        raise OutputRefused(f"{str(target)!r} is no plain file; choose another -o")
    if os.path.lexists(target) and not force:
        raise OutputRefused(f"{str(target)!r} exists; give --force to replace it, or another -o")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputRefused(f"the folder {str(folder)!r} is read-only; choose another -o")
    return target


@contextmanager
def atomic_output(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Yield a path of the same name in a folder beside the target; whatever is written there moves.

    That is the target, and files beside it whose names begin with its own. The target comes last.
    On any failure, an interrupt included, nothing is left and what was there before still is.

    Raises:
        OutputRefused: see check_output; or the disk is full or the write failed otherwise.
    """
    target = check_output(path, force=force)
    folder = target.with_name(f".attnsurgeon-{secrets.token_hex(8)}.part")
    try:
        folder.mkdir()
        part = folder / target.name
        yield part
        made = [*(file for file in folder.iterdir() if file != part), part]
        for file in made:
            _flush(file)
            check_output(target.with_name(file.name), force=force)  # it may have appeared
        for file in made:
            file.replace(target.with_name(file.name))
    except OutputRefused:
        raise
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and folder.parent.is_dir():
            raise  # a file that somebody else was to make: our bug
        raise _refusal(target, error) from error
    except Exception as error:
        if "(os error " in str(error):  # as safetensors, which is Rust, tells of a failed write
            raise _refusal(target, error) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refusal(target: Path, error: Exception) -> OutputRefused:
    room = ""
    with suppress(OSError):  # the folder may be gone
        room = f" ({shutil.disk_usage(target.parent).free // 2**20} MiB are free there)"
    return OutputRefused(
        f"could not write {str(target)!r}: {first_line(error)}; nothing was kept{room}"
    )


def _flush(part: Path) -> None:
    """Make sure the bytes are on the disk before the name is, readable as any new file would be."""
    mask = os.umask(0)
    os.umask(mask)
    part.chmod(0o666 & ~mask)  # safetensors leaves its files to the owner alone
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
