"""The second file of an ONNX model, for weights that one message cannot hold.

Where tensors are in it, and what it is called, stands in the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

SMALL_BYTES = 1024
"""Tensors up to this stay in the first file."""
ALIGNMENT = 4096
"""Where tensors begin in the second: at a page, so that runtimes can map them."""
DATA = ".data"
"""What its name ends in, after that of the first."""

_LOCATION = "location"


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
        where = {_LOCATION: location, "offset": str(offset), "length": str(tensor.nbytes)}
        for key, text in where.items():
            proto.external_data.add(key=key, value=text)
        found[name] = proto
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return found


def write_data(path: Path, outside: Iterable[str], tensors: Mapping[str, Any]) -> None:
    """Write the values of these tensors one after the other."""
    with path.open("wb") as stream:
        for name in outside:
            raw = tensors[name].const_value.tobytes()
            stream.write(raw)
            stream.write(bytes(-len(raw) % ALIGNMENT))


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
