"""Any of timm's attention layers behind a gate: `timm:<name>`.

Of a foreign layer only the output can be seen, so its features are mixed and not its map:
x + g * (f(x) - x). At g = 0 that is x for every finite f(x); at g = 1 it is f(x) but for rounding,
so it is exact at 0 only. A layer that starts as the identity (its last weights zero) is started
at its ordinary values instead: the gate already is the zero.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import typing
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from attnsurgeon.blocks.block import AttentionBlock, Place
from attnsurgeon.errors import BadOption, MissingPackage, UnknownName, first_line
from attnsurgeon.gate import Gate

PREFIX = "timm:"
NAMES = (
    *("se", "ese", "eca", "ecam", "ceca", "ge", "gc", "gca", "cbam", "lcbam"),
    *("coord", "scoord", "ela", "strip", "sk", "splat"),
    *("lambda", "bottleneck", "halo", "nl", "bat"),
)
"""What timm's own factory of attention layers knows."""
_PLAIN = (int, float, bool, str)


class TimmAttention(AttentionBlock):
    """Mix features with what a layer of timm makes of them. (N, C, H, W) -> the same.

    Args:
        channels: C, the width of the feature map.
        layer: the name in timm.
        **options: those of the layer.

    Raises:
        UnknownName: timm has no such layer.
        BadOption: the layer cannot be built so.
        MissingPackage: timm is not installed.
    """

    title = "a layer of timm"
    paper = ""
    formula = ""
    layer_name: ClassVar[str] = ""

    def __init__(self, channels: int, layer: str, **options: Any) -> None:
        super().__init__()
        try:
            self.layer = awake(find_layer(layer)(channels, **options))
        except (TypeError, ValueError, AssertionError, ArithmeticError) as error:
            raise BadOption(
                f"{PREFIX}{layer} cannot be built for {channels} channels: {first_line(error)}; "
                "change its options by --set, or choose sites of another width by --at or --stage"
            ) from error
        self.gate = Gate()

    @classmethod
    def build(cls, place: Place, **options: Any) -> AttentionBlock:
        """Construct the layer for a place in a network."""
        return TimmAttention(place.channels, cls.layer_name, **options)

    @classmethod
    def option_types(cls) -> dict[str, Any]:
        """Return the arguments of the layer that are plain values."""
        layer = find_layer(cls.layer_name)
        kind = getattr(layer, "func", layer)
        hints = typing.get_type_hints(kind.__init__)
        known = list(inspect.signature(layer).parameters.items())[1:]
        types = {name: _plain(hints.get(name, type(held.default))) for name, held in known}
        return {name: kind for name, kind in types.items() if kind is not None}

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus the admitted share of what the layer changes."""
        return x + self.gate.admit(self.layer(x) - x, x)


def _plain(hint: Any) -> Any:
    """Return the first plain type of an annotation, or a tuple of them; None if it has none."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return hint if parts and parts[0] in _PLAIN else None
    if parts:
        return next((kind for kind in map(_plain, parts) if kind is not None), None)
    return hint if hint in _PLAIN else None


@functools.cache
def timm_block(name: str) -> type[TimmAttention]:
    """Return the block that `timm:<name>` names.

    Raises:
        UnknownName: timm has no such layer.
        MissingPackage: timm is not installed.
    """
    layer = name.removeprefix(PREFIX)
    find_layer(layer)
    return type("TimmAttention", (TimmAttention,), {"layer_name": layer})


def find_layer(name: str) -> Callable[..., nn.Module]:
    """Return a layer by the name of timm's factory, or of its class in timm.layers.

    Raises:
        UnknownName: neither has it; the message gives the nearest.
        MissingPackage: timm is not installed.
    """
    try:
        layers = importlib.import_module("timm.layers")
    except ImportError as error:
        raise MissingPackage(
            f"{PREFIX}{name} needs timm ({first_line(error)}); type: pip install timm"
        ) from error
    found = layers.get_attn(name) if name in NAMES else getattr(layers, name, None)
    is_layer = name in NAMES or (isinstance(found, type) and issubclass(found, nn.Module))
    if not is_layer:
        raise UnknownName("attention layer of timm", name, NAMES)
    return typing.cast("Callable[..., nn.Module]", found)


def awake(layer: nn.Module) -> nn.Module:
    """Start parts whose weights are all zero anew: two zeros in series would never learn."""
    for module in layer.modules():
        weight: Any = getattr(module, "weight", None)
        reset: Any = getattr(module, "reset_parameters", None)
        if isinstance(weight, nn.Parameter) and reset and not (weight.is_meta or weight.any()):
            reset()
    return layer
