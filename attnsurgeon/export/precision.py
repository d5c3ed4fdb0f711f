"""In which numbers a file computes, how far from the model that may take it, and the model cast.

fp16 and bf16 files hold every weight in that number and take and return it; an int8 file takes and
returns float32, as the model does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from attnsurgeon.borrow import borrowed_buffers
from attnsurgeon.errors import BadOption, ExportRefused, UnknownName, first_line
from attnsurgeon.export.format import Settings
from attnsurgeon.export.images import image_files
from attnsurgeon.export.inputs import Inputs


@dataclass(frozen=True)
class Precision:
    """A kind of numbers, and what it may cost.

    Attributes:
        name: as `--precision` has it.
        dtype: of the weights, and of what the file takes and returns.
        max_rel: largest difference of an output element, over the model's largest.
        min_cosine: least cosine between the outputs of model and file.
    """

    name: str
    dtype: torch.dtype
    max_rel: float
    min_cosine: float

    def allows(self, max_rel: float, cosine: float) -> bool:
        """Tell whether a file may differ so much from its model."""
        return max_rel <= self.max_rel and cosine >= self.min_cosine

    def cast(self, inputs: Inputs) -> Inputs:
        """Return inputs as a file of this precision takes them; whole numbers stay."""
        taken: Inputs = tree_map_only(Tensor, self._cast, inputs)
        return taken

    def cast_gates(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return gate values as a file of this precision holds them."""
        return {name: self._cast(value) for name, value in gates.items()}

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def to_json(self) -> dict[str, float]:
        """Return the tolerances."""
        return {"max_rel": self.max_rel, "min_cosine": self.min_cosine}


# Another engine sums in another order: in float32 that moves the largest output by some 1e-6 of
# itself, where a wrong constant, axis or gate moves it by 1e-2 and more. Half precision holds 3
# (float16) or 2 (bfloat16) digits per operation: small networks with opened gates came out up to
# 3e-3 and 7e-2 away. Eight bits hold 256 steps between the extremes of a whole map: some 3e-2, and
# 1e-1 in networks of depthwise convolutions.
PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp64", torch.float64, 1e-6, 0.9999),
        Precision("fp32", torch.float32, 1e-4, 0.9999),
        Precision("fp16", torch.float16, 1e-2, 0.9999),
        Precision("bf16", torch.bfloat16, 1e-1, 0.999),
        Precision("int8", torch.float32, 2e-1, 0.99),
    )
}
UNROUNDED = Precision("int8", torch.float32, 1e-1, 0.99)
"""Of an int8 file whose maps are left unrounded: its weights alone came out 1e-2 to 6e-2 away."""
OFFERED = ("fp32", "fp16", "bf16", "int8")
HALVES = ("fp16", "bf16")


def refuse_precision(settings: Settings, suffix: str, written: tuple[str, ...]) -> None:
    """Refuse a precision that there is not, or that files of this suffix cannot have.

    Raises:
        UnknownName: there is none of that name.
        ExportRefused: the format does not hold such numbers.
        BadOption: int8 without images to calibrate on, a folder without any, or images without
            int8.
    """
    wanted = settings.precision
    if wanted is not None and wanted not in OFFERED:
        raise UnknownName("precision", wanted, OFFERED)
    if wanted is not None and wanted not in written:
        raise ExportRefused(
            f"--precision {wanted} is not for a {suffix} file, which can be in "
            f"{', '.join(written)}{_REMEDIES.get((wanted, suffix), '')}"
        )
    if wanted == "int8" and settings.images is None:
        raise BadOption(
            "--precision int8 is calibrated on images as the network will see; give --images DIR"
        )
    if wanted != "int8" and settings.images is not None:
        raise BadOption("--images is what --precision int8 is calibrated on; give both, or none")
    if settings.images is not None:
        image_files(settings.images)


_REMEDIES = {
    ("bf16", ".onnx"): "; ONNX Runtime does not compute with bfloat16 on the CPU, where files are "
    "checked: export it to .pt or .pt2",
    ("int8", ".pt"): "; export it to .onnx",
    ("int8", ".pt2"): "; export it to .onnx",
}


def precision_of(model: nn.Module, wanted: str | None) -> Precision:
    """Return the precision asked for, by default that of the model itself.

    Raises:
        BadOption: another one of a network that is not in float32, with which all are compared.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    own = next((p for p in PRECISIONS.values() if p.dtype == dtype), PRECISIONS["fp32"])
    if wanted not in (None, own.name) and own.name != "fp32":
        raise BadOption(
            f"{type(model).__name__} is in {own.name}, and --precision {wanted} is for networks in "
            "fp32: give model.float()"
        )
    return own if wanted is None else PRECISIONS[wanted]


def lowered(model: nn.Module, precision: Precision, inputs: Inputs) -> nn.Module:
    """Return a copy of the model in eval mode with its numbers cast; it is left as it is.

    The copy is made of the cast tensors at once: a whole second one in float32 is never there.

    Raises:
        ExportRefused: it does not run in that precision here.
    """
    cast: dict[int, Any] = {}
    for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        value = precision._cast(tensor.detach()).clone()
        is_weight = isinstance(tensor, nn.Parameter)
        cast[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if is_weight else value
    made = copy.deepcopy(model, cast).eval()
    try:
        with torch.no_grad(), borrowed_buffers(made):
            made(*precision.cast(inputs))
    except Exception as error:  # of the network's own code, or of a kernel that there is not
        raise ExportRefused(
            f"{type(model).__name__} does not run in {precision.name} here: {first_line(error)}; "
            "give --precision fp32"
        ) from error
    return made
