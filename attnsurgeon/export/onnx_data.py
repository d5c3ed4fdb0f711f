"""The second file of an ONNX model, for weights that one message cannot hold.

Where tensors are in it, what it is called, and the SHA-1 of all of it stand in the first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnsurgeon.errors import BadFile

if TYPE_CHECKING:
    import onnx

SMALL_BYTES = 1024
"""Tensors up to this stay in the first file."""
ALIGNMENT = 4096
"""Where tensors begin in the second: at a page, so that runtimes can map them."""
DATA = ".data"
"""What its name ends in, after that of the first."""

_LOCATION, _OFFSET, _LENGTH, _CHECKSUM = "location", "offset", "length", "checksum"
_AT_ONCE = 2**20
_REMEDY = "the two are copied and moved only together"


def placed_outside(tensors: Mapping[str, Any], location: str) -> dict[str, onnx.TensorProto]:
    """Return, for each tensor that goes to the second file, the message that tells where it is."""
    import onnx

    found, offset = {}, 0
    for name, value in tensors.items():
        tensor = value.const_value
        if tensor.nbytes <= SMALL_BYTES:
            continue
        proto = onnx.TensorProto(
            name=name, data_type=tensor.dtype.value, dims=list(tensor.shape.numpy())
        )
        proto.data_location = onnx.TensorProto.EXTERNAL
        _tell(proto, {_LOCATION: location, _OFFSET: str(offset), _LENGTH: str(tensor.nbytes)})
        found[name] = proto
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return found


def write_data(path: Path, outside: Iterable[str], tensors: Mapping[str, Any]) -> str:
    """Write the values of these tensors one after the other; return the SHA-1 of the file."""
    digest = hashlib.sha1(usedforsecurity=False)
    with path.open("wb") as stream:
        for name in outside:
            raw = tensors[name].const_value.tobytes()
            for part in (raw, bytes(-len(raw) % ALIGNMENT)):
                stream.write(part)
                digest.update(part)
    return digest.hexdigest()


def sign(outside: Iterable[onnx.TensorProto], checksum: str) -> None:
    """Enter the SHA-1 of the second file wherever the first tells of it."""
    for proto in outside:
        _tell(proto, {_CHECKSUM: checksum})


def check_data(path: Path, beside: Iterable[Mapping[str, str]]) -> None:
    """Refuse a first file whose second is missing, cut off or another.

    Args:
        path: of the first.
        beside: what it tells of each tensor outside.

    Raises:
        BadFile: it is; a changed one is known where the first tells its SHA-1.
    """
    ends: dict[tuple[str, str], int] = {}
    for told in beside:
        file = told.get(_LOCATION, ""), told.get(_CHECKSUM, "")
        ends[file] = max(ends.get(file, 0), _end_of(path, told))
    for (location, checksum), end in ends.items():
        second = path.parent / location
        if not second.is_file():
            raise BadFile(
                f"the weights of {path.name} are in {location!r}, which is not beside it; {_REMEDY}"
            )
        size = second.stat().st_size
        if size < end:
            raise BadFile(
                f"{location!r} has {size} bytes, and {path.name} needs {end}: it was cut off, or "
                f"is of another file; {_REMEDY}"
            )
        if checksum and _checksum_of(second) != checksum.lower():
            raise BadFile(
                f"{location!r} is not what {path.name} was written with (its SHA-1 is another): it "
                f"was changed, or is of another file; {_REMEDY}"
            )


def _end_of(path: Path, told: Mapping[str, str]) -> int:
    """Return where in the second file a tensor ends."""
    try:
        return int(told.get(_OFFSET, "0")) + int(told.get(_LENGTH, "0"))
    except ValueError as error:
        raise BadFile(f"{path.name} does not tell where its weights are: {error}") from error


def _checksum_of(path: Path) -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    with path.open("rb") as stream:
        while part := stream.read(_AT_ONCE):
            digest.update(part)
    return digest.hexdigest()


def _tell(proto: onnx.TensorProto, told: Mapping[str, str]) -> None:
    for key, text in told.items():
        proto.external_data.add(key=key, value=text)


def refer_to(path: Path, location: str) -> None:
    """Have a first file look for the second under another name."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:  # it refers to nothing
        return
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == _LOCATION:
                entry.value = location
    onnx.save(model, path)
