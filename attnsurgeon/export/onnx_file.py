"""An ONNX file on disk: written tensor by tensor, read with its weights left where they are.

An ONNX file is one protobuf message. Made as a whole, its weights stand in memory four times; here
they pass through one at a time. The wire format: a message is a row of fields, each a key (number
and kind), and, for those of bytes, a length before them. Field numbers are those of onnx.proto.

A message has less than 2 GiB. Where the weights need more, they lie in a second file beside it, of
which the message tells; small tensors stay in the message, gates of any size too.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from attnsurgeon.errors import BadFile
from attnsurgeon.export.inputs import free_axes
from attnsurgeon.export.onnx_data import DATA, placed_outside, sign, write_data

if TYPE_CHECKING:
    import onnx

_GRAPH, _INITIALIZER = 7, 5
_TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_BESIDE = 2, 8, 9, 13

MOST_BYTES = 2**31 - 1
"""The largest message that protobuf reads."""

_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5

_FLOATS = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}
"""By the numbers of onnx.proto."""

Patch = tuple[int, bytes]
"""Where in a file other bytes go, and these bytes."""


def write_file(model: Any, path: Path, inside: Collection[str] = ()) -> None:
    """Write an onnx_ir.Model to one file, or two where one cannot hold it; it stays as it is.

    Args:
        model: to be written.
        path: of the file; a second one lies beside it.
        inside: names of tensors that stay in the first one, whatever their size.
    """
    import onnx_ir

    tensors = dict(model.graph.initializers)
    model.graph.initializers.clear()
    try:
        rest = onnx_ir.serde.serialize_model(model)
    finally:
        model.graph.initializers.update(tensors)
    graph = rest.graph.SerializeToString()
    rest.ClearField("graph")
    values = [value.const_value for value in tensors.values()]
    heads = sum(len(name) + 64 for name in tensors)
    held = len(graph) + heads + sum(value.nbytes for value in values)
    large = {name: value for name, value in tensors.items() if name not in inside}
    outside = placed_outside(large, path.name + DATA) if held > MOST_BYTES else {}
    if outside:
        sign(outside.values(), write_data(path.with_name(path.name + DATA), outside, tensors))
    messages = [
        outside[name].SerializeToString() if name in outside else _head_of(value, name)
        for name, value in zip(tensors, values, strict=True)
    ]
    kept = [0 if name in outside else v.nbytes for name, v in zip(tensors, values, strict=True)]
    sizes = [len(message) + size for message, size in zip(messages, kept, strict=True)]
    framed = [_key(_INITIALIZER) + _varint(size) for size in sizes]
    with path.open("wb") as stream:
        stream.write(rest.SerializeToString())
        stream.write(_key(_GRAPH) + _varint(len(graph) + sum(map(len, framed)) + sum(sizes)))
        stream.write(graph)
        for frame, message, size, value in zip(framed, messages, kept, values, strict=True):
            stream.write(frame)
            stream.write(message)
            if size:
                stream.write(value.tobytes())


def _head_of(tensor: Any, name: str) -> bytes:
    """Return what stands before the bytes of a tensor in its message."""
    import onnx

    proto = onnx.TensorProto(
        name=name, data_type=tensor.dtype.value, dims=list(tensor.shape.numpy())
    )
    head: bytes = proto.SerializeToString()
    return head + _key(_TENSOR_RAW) + _varint(tensor.nbytes)


@dataclass(frozen=True)
class OnnxFile:
    """What a file says without its weights, and where their bytes are.

    Attributes:
        path: of the file.
        header: the message without the tensors of its graph.
        spots: name of a tensor -> first and last byte of its values in the file; none where they
            lie in a second one.
        kinds: name of a tensor -> number of its ONNX data type.
        beside: name of a tensor in a second file -> what is told of where it is.
    """

    path: Path
    header: onnx.ModelProto
    spots: Mapping[str, tuple[int, int]]
    kinds: Mapping[str, int]
    beside: Mapping[str, Mapping[str, str]]

    @property
    def opset(self) -> int | None:
        """Return the version of the default operator set."""
        sets = self.header.opset_import
        return next((each.version for each in sets if each.domain in ("", "ai.onnx")), None)

    @property
    def notes(self) -> dict[str, str]:
        """Return what the file says about itself beside the graph."""
        return {each.key: each.value for each in self.header.metadata_props}

    @property
    def fixed_axes(self) -> list[str]:
        """Return the image axes of the inputs that the file fixes to a number."""
        return [
            f"{node.name}.{axis}"
            for node in self.header.graph.input
            for dims in [node.type.tensor_type.shape.dim]
            for i, axis in free_axes(len(dims)).items()
            if dims[i].HasField("dim_value")
        ]

    def values(self, name: str) -> Tensor:
        """Return a copy of the values of a tensor of floats, in one row.

        Raises:
            BadFile: it is of another type, or its values do not stand in the file.
        """
        start, end = self.spots[name]
        kind = _FLOATS.get(self.kinds[name])
        if kind is None or start == end:
            raise BadFile(f"{self.path.name} has no floats of its own in {name!r}")
        with self.path.open("rb") as stream:
            stream.seek(start)
            return torch.frombuffer(bytearray(stream.read(end - start)), dtype=kind)

    def patches(self, values: Mapping[str, Tensor]) -> list[Patch]:
        """Return where in the file other values of some tensors go, and their bytes.

        Raises:
            BadFile: it has no tensor of such a name and size.
        """
        found = []
        for name, value in values.items():
            raw = _bytes_of(value)
            start, end = self.spots.get(name, (0, 0))
            if end - start != len(raw):
                raise BadFile(f"{self.path.name} has no tensor {name!r} of {len(raw)} bytes")
            found.append((start, raw))
        return found

    def holds(self, values: Mapping[str, Tensor]) -> set[str]:
        """Return which of these tensors the file has, by their names and byte for byte."""
        with self.path.open("rb") as stream:
            return {name for name in values if self._bytes(stream, name) == _bytes_of(values[name])}

    def _bytes(self, stream: BinaryIO, name: str) -> bytes:
        start, end = self.spots.get(name, (0, 0))
        stream.seek(start)
        return stream.read(end - start)


def patched(path: Path, patches: Iterable[Patch]) -> bytes:
    """Return the bytes of a file with some of them exchanged."""
    data = bytearray(path.read_bytes())
    for start, raw in patches:
        data[start : start + len(raw)] = raw
    return bytes(data)


def read_file(path: Path) -> OnnxFile:
    """Read all but the weights.

    Raises:
        BadFile: it is empty or no protobuf message of a model.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    spots: dict[str, tuple[int, int]] = {}
    kinds: dict[str, int] = {}
    beside: dict[str, dict[str, str]] = {}
    outside, inside = bytearray(), bytearray()
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as m:
            for number, key, start, end in _fields(m, 0, len(m)):
                if number != _GRAPH:
                    outside += m[key:end]
                    continue
                for inner, inner_key, first, last in _fields(m, start, end):
                    if inner != _INITIALIZER:
                        inside += m[inner_key:last]
                        continue
                    name, spot, kind, told = _read_tensor(m, first, last)
                    spots[name], kinds[name] = spot, kind
                    if told:
                        beside[name] = told
        whole = bytes(outside) + _key(_GRAPH) + _varint(len(inside)) + bytes(inside)
        header = onnx.ModelProto.FromString(whole)
    except (ValueError, IndexError, DecodeError) as error:
        raise BadFile(f"{path.name} is no ONNX file: {error}") from error
    return OnnxFile(path, header, spots, kinds, beside)


def _bytes_of(value: Tensor) -> bytes:
    raw: bytes = value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes()
    return raw


def _read_tensor(
    data: mmap.mmap, start: int, end: int
) -> tuple[str, tuple[int, int], int, dict[str, str]]:
    """Return a tensor's name, where its values are, their type, and what tells of another file."""
    import onnx

    name, spot, kind = "", (0, 0), 0
    told: dict[str, str] = {}
    for number, _, first, last in _fields(data, start, end):
        if number == _TENSOR_NAME:
            name = data[first:last].decode()
        elif number == _TENSOR_RAW:
            spot = (first, last)
        elif number == _TENSOR_TYPE:
            kind = _read_varint(data, first)[0]
        elif number == _TENSOR_BESIDE:
            entry = onnx.StringStringEntryProto.FromString(data[first:last])
            told[entry.key] = entry.value
    return name, spot, kind, told


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield each field of a message: number, where it begins, where its content begins and ends.

    Raises:
        ValueError: this is no message.
    """
    while start < end:
        key, content = _read_varint(data, start)
        number, kind = key >> 3, key & 7
        if kind == _BYTES:
            length, content = _read_varint(data, content)
            last = content + length
        elif kind == _VARINT:
            last = _read_varint(data, content)[1]
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            last = content + (8 if kind == _EIGHT_BYTES else 4)
        else:
            raise ValueError(f"a field of kind {kind}")
        if last > end:
            raise ValueError("a field ends beyond its message")
        yield number, start, content, last
        start = last


def _read_varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """Return a number written seven bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _key(number: int) -> bytes:
    return _varint(number << 3 | _BYTES)
