"""What is operated on: a torchvision name or the shipped `digits`, built with its weights."""

from __future__ import annotations

import inspect
import math
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models import (
    WeightsEnum,
    get_model_builder,
    get_model_weights,
    list_models,
)

from attnsurgeon import digits
from attnsurgeon.checkpoint import load_state, read_checkpoint, why_unreadable
from attnsurgeon.errors import (
    AttnSurgeonError,
    BadFile,
    BadOption,
    HostUnusable,
    UnknownName,
    WeightsUnavailable,
    first_line,
)
from attnsurgeon.schema import read_as
from attnsurgeon.sites import default_example

DIGITS = "digits"
DEFAULT_WEIGHTS = "DEFAULT"
NO_WEIGHTS = "none"
_FORBIDDEN = ("weights", "weights_backbone", "pretrained", "pretrained_backbone", "progress")
_MOST_NUMBERS = 2**28
"""In one input that a file asks for: a gigabyte of float32."""


@dataclass(frozen=True)
class HostCard:
    """How a host is made again, and what its inputs and outputs mean; it stands in every recipe.

    `name` is None for a network of the user's own: it must be given again at loading.
    """

    name: str | None
    class_name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    input_shapes: tuple[tuple[int, ...], ...] = ((1, 3, 224, 224),)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    categories: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HostCard:
        """Read what `to_json` wrote.

        Raises:
            BadFile: a field is missing, unknown, of the wrong kind or out of range.
        """
        try:
            card: HostCard = read_as(cls, data, "host")
            if set(card.arguments) & set(_FORBIDDEN):
                raise ValueError("the host's arguments name weights")
            if not card.input_shapes or not all(map(_is_small_shape, card.input_shapes)):
                raise ValueError(f"no network takes inputs of shape {card.input_shapes}")
        except ValueError as error:
            raise BadFile(str(error)) from error
        return card

    def example(self, like: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return zeros of the input's shapes, with the device and dtype of `like`."""
        like = torch.empty(0) if like is None else like
        return tuple(
            torch.zeros(*shape, device=like.device, dtype=like.dtype) for shape in self.input_shapes
        )


def _is_small_shape(shape: tuple[int, ...]) -> bool:
    return bool(shape) and min(shape) >= 1 and math.prod(shape) <= _MOST_NUMBERS


def host_names() -> list[str]:
    """Return every name that can be operated on: torchvision's, and `digits`."""
    return [*list_models(), DIGITS]


def load_host(
    name: str,
    *,
    weights: str = DEFAULT_WEIGHTS,
    checkpoint: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a network by name, with its weights, in eval mode; its card goes with it (card_of).

    Args:
        name: a name of torchvision's registry, or `digits`.
        weights: DEFAULT, the name of one of the model's weights, or none (random).
        checkpoint: a file of weights instead.
        num_classes: of the classifier, where it is not the default.
        arguments: keyword arguments of the builder.

    Raises:
        UnknownName: no such model or weights.
        BadOption: an argument that the builder does not take.
        WeightsUnavailable: the weights could not be fetched.
        BadFile, CheckpointMismatch: the checkpoint cannot be read or does not fit.
    """
    check_host(name, weights=weights, checkpoint=checkpoint, num_classes=num_classes)
    extra = dict(arguments or {})
    for key in _FORBIDDEN:
        if key in extra:
            raise BadOption(f"{key} is no --model-arg; use --weights")
    if num_classes is not None:
        extra["num_classes"] = num_classes
    if name == DIGITS:
        model = _load_digits(weights, checkpoint, extra)
    else:
        model = _load_registered(name, weights, checkpoint, extra)
    if checkpoint is not None:
        load_state(model, read_checkpoint(checkpoint), repr(str(checkpoint)))
    return model.eval()


def check_host(
    name: str,
    *,
    weights: str = DEFAULT_WEIGHTS,
    checkpoint: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
) -> None:
    """Refuse what load_host would refuse before it builds or fetches anything.

    Raises:
        UnknownName: no such model or weights.
        BadOption: weights and a checkpoint at once, or fewer than one class.
    """
    if name not in host_names():
        raise UnknownName("model", name, host_names(), "; `attnsurgeon models` lists all")
    if weights not in (DEFAULT_WEIGHTS, NO_WEIGHTS):
        if name == DIGITS:
            raise UnknownName("weight of digits", weights, [DEFAULT_WEIGHTS, NO_WEIGHTS])
        _find_weights(name, get_model_weights(name), weights)
        if checkpoint is not None:
            raise BadOption(f"give --weights {weights} or --checkpoint, not both")
    if num_classes is not None and num_classes < 1:
        raise BadOption(f"--num-classes must be at least 1, not {num_classes}")


def card_of(model: nn.Module) -> HostCard | None:
    """Return the card that a host was loaded with, or None."""
    card: HostCard | None = model.__dict__.get("_attnsurgeon_card")
    return card


def give_card(model: nn.Module, card: HostCard) -> None:
    """Let the card travel with the model, through copies and pickles."""
    model.__dict__["_attnsurgeon_card"] = card


def _load_digits(
    weights: str, checkpoint: str | os.PathLike[str] | None, extra: dict[str, Any]
) -> nn.Module:
    card = digits.read_card()
    shipped = weights == DEFAULT_WEIGHTS and checkpoint is None
    if shipped and extra:
        raise BadOption("the shipped digits weights take no model arguments; give --weights none")
    model = _build(card.model, {**card.arguments, **extra})
    if shipped:
        model.load_state_dict(digits.read_weights())
    give_card(
        model,
        HostCard(
            name=DIGITS,
            class_name=type(model).__name__,
            arguments=extra,
            weights=DEFAULT_WEIGHTS if shipped else None,
            input_shapes=((1, 3, *card.input_size),),
            mean=tuple(card.mean),
            std=tuple(card.std),
            categories=tuple(card.categories) if "num_classes" not in extra else None,
        ),
    )
    return model


def _load_registered(
    name: str, weights: str, checkpoint: str | os.PathLike[str] | None, extra: dict[str, Any]
) -> nn.Module:
    known = get_model_weights(name)
    chosen = None
    if checkpoint is None and weights != NO_WEIGHTS:
        chosen = _find_weights(name, known, weights)
    described = chosen or next(iter(known), None)
    model = _build(name, extra, chosen)
    give_card(model, _describe(name, model, extra, chosen, described))
    return model


def _find_weights(name: str, known: Any, weights: str) -> WeightsEnum:
    members: dict[str, WeightsEnum] = dict(known.__members__)
    in_full = {f"{known.__name__}.{short}": member for short, member in members.items()}
    if weights not in members and weights not in in_full:
        raise UnknownName(
            f"weight of {name}", weights, [*members, "none"], "; or give --weights none"
        )
    return {**members, **in_full}[weights]


def _describe(
    name: str,
    model: nn.Module,
    extra: dict[str, Any],
    chosen: WeightsEnum | None,
    described: WeightsEnum | None,
) -> HostCard:
    """Write the card: the published input size, the classes and norms of the weights."""
    preset = described.transforms() if described is not None else None
    crop = getattr(preset, "crop_size", [224])
    side = int(crop[0] if isinstance(crop, list | tuple) else crop)
    channels = default_example(model, (1, 1)).shape[1]
    trained = preset if chosen is not None else None
    return HostCard(
        name=name,
        class_name=type(model).__name__,
        arguments=extra,
        weights=str(chosen) if chosen is not None else None,
        input_shapes=((1, channels, side, side),),
        mean=tuple(getattr(trained, "mean", None) or ()) or None,
        std=tuple(getattr(trained, "std", None) or ()) or None,
        categories=tuple(chosen.meta["categories"])
        if chosen and "categories" in chosen.meta
        else None,
    )


def _build(name: str, extra: Mapping[str, Any], weights: WeightsEnum | None = None) -> nn.Module:
    """Build a registered network; without weights nothing is fetched for a part of it either.

    Raises:
        BadOption: arguments that the builder, the weights or the memory cannot take.
        WeightsUnavailable: the weights could not be fetched.
    """
    try:
        with _tensors_only():
            return _construct(name, extra, weights)
    except Exception as error:  # builders and a damaged download raise whatever they run into
        if _was_fetching(error):
            raise _unfetched(name, weights, error) from error
        if extra:
            raise _misfit(name, extra, weights, error) from error
        if weights is not None:  # a file under the right name that is of something else
            raise _unfetched(name, weights, error) from error
        raise


def _construct(name: str, extra: Mapping[str, Any], weights: WeightsEnum | None) -> nn.Module:
    builder = get_model_builder(name)
    partly = weights is None and "weights_backbone" in inspect.signature(builder).parameters
    backbone = {"weights_backbone": None} if partly else {}
    with _nothing_said():
        model: nn.Module = builder(weights=weights, progress=True, **backbone, **extra)
    return model


@contextmanager
def _nothing_said() -> Iterator[None]:
    """Keep a builder's warnings to itself, and torch.hub's lines off stdout, which is ours."""
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def _was_fetching(error: Exception) -> bool:
    """Tell whether an error came out of torchvision's fetching, not out of building."""
    fetching = WeightsEnum.get_state_dict.__code__
    return any(frame.f_code is fetching for frame, _ in traceback.walk_tb(error.__traceback__))


def _unfetched(name: str, weights: WeightsEnum | None, error: Exception) -> AttnSurgeonError:
    inside = getattr(error, "reason", None)  # of a URLError: what went wrong, without the wrapping
    reason = why_unreadable(inside if isinstance(inside, Exception) else error)
    return WeightsUnavailable(
        f"the weights {weights} of {name} could not be fetched: {reason}; give "
        "--checkpoint FILE with weights you have, or --weights none for a random network"
    )


def _misfit(
    name: str, extra: Mapping[str, Any], weights: WeightsEnum | None, error: Exception
) -> AttnSurgeonError:
    told = ", ".join(f"{key}={value!r}" for key, value in extra.items())
    remedy = ""
    if weights is not None and "num_classes" in extra:
        remedy = f"; {weights} has its own classes: give --checkpoint FILE, or --weights none"
    return BadOption(f"{name} cannot be built with {told}: {first_line(error)}{remedy}")


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Have torchvision read downloaded weights as tensors alone; by itself it does not."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def rebuild_host(card: HostCard, *, weightless: bool = False) -> nn.Module:
    """Build the plain network of a card with random weights, or without memory for weights.

    Raises:
        HostUnusable: the card is of a network of the user's own.
        BadFile: the card names a network that cannot be built.
    """
    if card.name is None:
        raise HostUnusable(
            f"the file was made from your own {card.class_name}: load it with "
            "load_model(path, host=your_network)"
        )
    name, arguments = card.name, dict(card.arguments)
    if name == DIGITS:
        shipped = digits.read_card()
        name, arguments = shipped.model, {**shipped.arguments, **arguments}
    elif name not in list_models():
        raise BadFile(f"the recipe's host {name!r} is no torchvision model")
    try:
        with weights_on_meta() if weightless else nullcontext():
            model = _build(name, arguments)
    except AttnSurgeonError as error:
        raise BadFile(f"the recipe's host cannot be built: {error}") from error
    give_card(model, card)
    return model.eval()


class _EmptyOnMeta(TorchFunctionMode):
    """Have torch.empty, which weights begin with, ask for no memory: they may be of any size."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run any other function as it is."""
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def weights_on_meta() -> Iterator[None]:
    """Put every parameter that is made inside on the meta device.

    `torch.device("meta")` would do so with everything, and some networks compute with small
    tensors while they are built.
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None:
            self._parameters[name] = nn.Parameter(param.to("meta"), param.requires_grad)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def recognise(model: nn.Module) -> HostCard | None:
    """Return the card of the torchvision builder that makes exactly this network, or None.

    A builder makes it if a network it builds without memory prints the same modules with the
    same settings and has the same keys and shapes.
    """
    if not type(model).__module__.startswith("torchvision.models."):
        return None
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    tries: list[dict[str, Any]] = [{}]
    if linear:
        tries.append({"num_classes": linear[-1].out_features})
    names = [n for n in list_models() if not n.startswith("quantized")]
    module = Path(type(model).__module__.replace(".", "/")).name
    names.sort(key=lambda n: module not in n)  # those of the class's own file first
    wanted = repr(model)
    keys = {key: tensor.shape for key, tensor in model.state_dict().items()}
    for arguments in tries:
        for name in names:
            card = _if_same(name, arguments, type(model), wanted, keys)
            if card is not None:
                return card
    return None


def _if_same(
    name: str, arguments: dict[str, Any], kind: type, wanted: str, keys: Mapping[str, torch.Size]
) -> HostCard | None:
    from torchvision.models import get_model_builder

    if get_model_builder(name).__module__ != kind.__module__:
        return None
    try:
        with weights_on_meta():
            candidate = _construct(name, arguments, None)
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        return None
    same = type(candidate) is kind and repr(candidate) == wanted
    if not same or {k: t.shape for k, t in candidate.state_dict().items()} != keys:
        return None
    described = next(iter(get_model_weights(name)), None)
    return _describe(name, candidate, arguments, None, described)
