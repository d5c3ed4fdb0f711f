"""A model.py: plain torch and torchvision code that builds the network without this package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from attnsurgeon.card import card_of
from attnsurgeon.errors import BadFile, ExportRefused
from attnsurgeon.export.format import (
    Draft,
    Format,
    Opened,
    Reader,
    Settings,
    refuse_compile,
    refuse_onnx_settings,
    refuse_optimize,
    register,
)
from attnsurgeon.export.fresh import FreshProcess
from attnsurgeon.export.inputs import Inputs, on_cpu
from attnsurgeon.export.precision import refuse_precision
from attnsurgeon.export.source import write_source
from attnsurgeon.store import make_recipe
from attnsurgeon.surgery import cuts_of
from attnsurgeon.training.stripping import ungated

_WEIGHTS = "model.safetensors"
NOTICE = (
    "the file holds the code and no weights: load(path) reads them from the .safetensors file, or "
    "from a checkpoint of the operated network"
)


class _SourceDraft(Draft):
    notices = (NOTICE,)

    def __init__(self, text: str, state: dict[str, Tensor]) -> None:
        self.text = text
        self.reader = _reader_with(state)

    def write(self, path: Path, gates: Mapping[str, Tensor]) -> None:
        path.write_text(self.text, encoding="utf-8")


def _reader_with(state: Mapping[str, Tensor]) -> Reader:
    """Return what runs a file in a process of its own, with these weights."""

    def read(path: Path, gates: Mapping[str, Tensor] | None = None) -> Opened:
        values = {name: tensor.detach().cpu() for name, tensor in state.items()}
        process = FreshProcess(
            path.name, "open_python", str(path.absolute()), {**values, **(gates or {})}
        )
        return Opened(lambda inputs: list(process(on_cpu(inputs))))

    return read


@register(".py")
class Standalone(Format):
    """Code that nobody is locked into: torch, torchvision and the weights file are enough."""

    name = "python"

    def check(self, settings: Settings) -> None:
        """Refuse settings of other formats.

        Raises:
            ExportRefused: an opset, an exporter, freezing, machine code, stripping or a precision
                was asked for.
        """
        refuse_onnx_settings(settings, ".py")
        refuse_optimize(settings, ".py")
        refuse_compile(settings, ".py")
        refuse_precision(settings, ".py", ("fp32",))
        if settings.strip:
            raise ExportRefused("--strip is not for a .py file, which reads weights with all gates")

    def draft(
        self, model: nn.Module, inputs: Inputs, settings: Settings, metadata: Mapping[str, str]
    ) -> Draft:
        """Write out the recipe.

        Raises:
            ExportRefused: the host is no network of torchvision, or was stripped of its gates.
        """
        self.check(settings)
        if ungated(model):
            raise ExportRefused(
                f"this {type(model).__name__} was stripped of its gates, which a .py file has; "
                "export it to .onnx, .pt or .pt2"
            )
        cuts = cuts_of(model)
        card = make_recipe(model).host if cuts else card_of(model)
        if card is None:
            raise ExportRefused(
                f"it is not known how {type(model).__name__} is built; load it by load_host"
            )
        return _SourceDraft(write_source(model, card, cuts, _WEIGHTS), model.state_dict())

    def open(self, path: Path, gates: Mapping[str, Tensor] | None = None) -> Opened:
        """Refuse: the code alone holds no weights.

        Raises:
            BadFile: always; a draft has the weights.
        """
        raise BadFile(f"{path.name} holds no weights: load(path) of its own reads them")

    def reader_for(self, model: nn.Module) -> Reader:
        """Return what runs the code with the weights of this model."""
        return _reader_with(model.state_dict())
