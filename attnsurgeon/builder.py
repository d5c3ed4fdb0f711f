"""Build a network of torchvision's registry, with weights, without, or without memory for them."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models import WeightsEnum, get_model_builder

from attnsurgeon.borrow import borrowed_randomness
from attnsurgeon.checkpoint import why_unreadable
from attnsurgeon.errors import AttnSurgeonError, BadOption, WeightsUnavailable, first_line


def build_network(
    name: str, extra: Mapping[str, Any], weights: WeightsEnum | None = None
) -> nn.Module:
    """Build a registered network; without weights nothing is fetched for a part of it either.

    Raises:
        BadOption: arguments that the builder, the weights or the memory cannot take.
        WeightsUnavailable: the weights could not be fetched.
    """
    try:
        with borrowed_building():
            return _construct(name, extra, weights)
    except Exception as error:  # builders and a damaged download raise whatever they run into
        if came_out_of(error, WeightsEnum.get_state_dict):
            raise unfetched(f"{weights} of {name}", error) from error
        if extra:
            raise misfit(name, extra, error, weights) from error
        if weights is not None:  # a file under the right name that is of something else
            raise unfetched(f"{weights} of {name}", error) from error
        raise


def _construct(name: str, extra: Mapping[str, Any], weights: WeightsEnum | None) -> nn.Module:
    builder = get_model_builder(name)
    partly = weights is None and "weights_backbone" in inspect.signature(builder).parameters
    backbone = {"weights_backbone": None} if partly else {}
    model: nn.Module = builder(weights=weights, progress=True, **backbone, **extra)
    return model


@contextmanager
def borrowed_building() -> Iterator[None]:
    """Keep a builder's warnings to itself, its lines off stdout, and code out of what it reads."""
    with _tensors_only(), warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def came_out_of(error: Exception, function: Callable[..., Any]) -> bool:
    """Tell whether an error was raised inside a function, as one that fetches, or below it."""
    code = inspect.unwrap(function).__code__
    return any(frame.f_code is code for frame, _ in traceback.walk_tb(error.__traceback__))


def unfetched(weights: str, error: Exception) -> AttnSurgeonError:
    """Return the refusal of weights that could not be fetched or read."""
    inside = getattr(error, "reason", None)  # of a URLError: what went wrong, without the wrapping
    reason = why_unreadable(inside if isinstance(inside, Exception) else error)
    return WeightsUnavailable(
        f"the weights {weights} could not be fetched: {reason}; give "
        "--checkpoint FILE with weights you have, or --weights none for a random network"
    )


def misfit(
    name: str, extra: Mapping[str, Any], error: Exception, weights: WeightsEnum | None = None
) -> AttnSurgeonError:
    """Return the refusal of arguments that a builder, or its weights, cannot take."""
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


def without_memory(build: Callable[[], nn.Module]) -> nn.Module:
    """Return what `build` makes, its weights on meta; a network that reads them meanwhile has them.

    Some compute with their weights while they are built: those are built again, at random.
    """
    try:
        with weights_on_meta():
            return build()
    except (RuntimeError, BadOption) as error:
        if "meta" not in str(error):
            raise
    with borrowed_randomness(0):
        return build()
