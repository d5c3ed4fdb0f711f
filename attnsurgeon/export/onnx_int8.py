"""Give an ONNX file eight-bit weights and feature maps, by ONNX Runtime's static quantization.

What costs time is quantized: convolutions and matrix products, with a ReLU or clip behind them. Not
what a softmax reads, which magnifies the steps of eight bits: logits of attention stay in float32.
Gates and what they multiply stay in float32, each gate under its name. Weights are signed, channel
by channel, and of seven bits: with eight, two products of a processor without VNNI overflow 16
bits, and the file would compute another result there than it was proven with. Maps are unsigned,
which is three times as fast as signed on x86.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from attnsurgeon.errors import ExportRefused, first_line
from attnsurgeon.export.format import Draft
from attnsurgeon.export.onnx_file import read_file
from attnsurgeon.export.onnx_unrounded import note_clamps
from attnsurgeon.export.program import logs_held_back

_MOVING = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Mul", "Div", "MatMul")
"""What stands between a layer and the softmax that reads it."""
QUANTIZED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Relu", "Clip")


class Int8Draft(Draft):
    """A draft whose files are quantized when they are written.

    Opened gates change every map behind them: a file with other gates is calibrated anew.
    """

    folds_gates = True

    def __init__(self, draft: Draft, images: list[Tensor]) -> None:
        self.draft = draft
        self.images = images
        self.notices = draft.notices

    def write(self, path: Path, gates: Mapping[str, Tensor]) -> None:
        """Write it in float32 beside, and quantize that."""
        with tempfile.TemporaryDirectory(prefix="attnsurgeon-") as folder:
            plain = Path(folder) / "float.onnx"
            self.draft.write(plain, gates)
            quantize(plain, path, self.images)
            note_clamps(plain, path)


def quantize(plain: Path, target: Path, images: list[Tensor]) -> None:
    """Write an ONNX file of one input with its heavy operators in int8, calibrated on images.

    Raises:
        ExportRefused: ONNX Runtime cannot quantize the network.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    reader = _reader(images)
    try:
        with logs_held_back():
            quantize_static(
                str(plain),
                str(target),
                reader,
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(QUANTIZED),
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=read_by_softmax(plain),
                extra_options={"MatMulConstBOnly": True},  # a product of two maps is of logits
            )
    except OSError:
        raise  # of the disk
    except Exception as error:  # its passes raise what they like
        raise ExportRefused(
            f"ONNX Runtime cannot quantize this network: {first_line(error)}; give --precision fp16"
        ) from error


def read_by_softmax(path: Path) -> list[str]:
    """Return the names of the layers whose outputs a softmax reads, at once or rearranged."""
    nodes = read_file(path).header.graph.node
    makers = {output: node for node in nodes for output in node.output}
    wanted = [name for node in nodes if node.op_type == "Softmax" for name in node.input]
    found: set[str] = set()
    while wanted:
        node = makers.pop(wanted.pop(), None)
        if node is not None and node.op_type in _MOVING:
            wanted += node.input
        if node is not None and node.op_type in QUANTIZED:
            found.add(node.name)
    return sorted(found)


def _reader(images: list[Tensor]) -> object:
    from onnxruntime.quantization import CalibrationDataReader

    class Images(CalibrationDataReader):  # type: ignore[misc]
        """Hands out one image after the other."""

        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, object] | None:
            image = next(self.left, None)
            return None if image is None else {"input": image.cpu().numpy()}

    return Images()
