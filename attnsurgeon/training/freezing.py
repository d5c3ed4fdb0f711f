"""Freeze the host, so that only what was inserted learns; `.train()` does not undo it."""

from __future__ import annotations

from typing import Any

from torch import nn

from attnsurgeon.arguments import typed
from attnsurgeon.training.groups import NORMS, check_operated, inserted_modules


class _KeepsNormsInEval:
    """Stands in the place of a model's `train`; copied and pickled along with the model.

    It looks for the norms when it is called, so that norms which were exchanged since (as by
    convert_sync_batchnorm) are held as well.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, mode: bool = True) -> nn.Module:
        """Set the mode of everything but the host's norms, which stay in eval mode."""
        type(self.model).train(self.model, mode)
        for norm in _host_norms(self.model):
            norm.training = False
        return self.model


@typed
def freeze_host(model: nn.Module, norms: bool = True) -> nn.Module:
    """Let only the attention and its gates learn, in this very model; it is returned.

    Args:
        model: an operated network.
        norms: keep the host's norms in eval mode as well, through any later `.train()` of the
            model or of what wraps it, so that their running statistics do not move. With False
            they go on being updated, and belong to what training changed.

    Raises:
        HostUnusable: the model was not operated on.
    """
    check_operated(model)
    for parameter in _host_parameters(model):
        parameter.requires_grad_(False)
    model.__dict__.pop("train", None)
    if norms:
        # An attribute of the instance is found before the method of its class, by the loop of
        # an outer module's `train` too; a subclass would change the printed architecture.
        model.__dict__["train"] = _KeepsNormsInEval(model)
        for norm in _host_norms(model):
            norm.training = False
    return model


@typed
def unfreeze_host(model: nn.Module) -> nn.Module:
    """Let everything learn again, as after a warm-up of the attention; the model is returned."""
    for parameter in _host_parameters(model):
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    if isinstance(model.__dict__.get("train"), _KeepsNormsInEval):
        del model.__dict__["train"]
        for norm in _host_norms(model):
            norm.training = model.training
    return model


def _host_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [
        p for module in _host_modules(model) for p in module._parameters.values() if p is not None
    ]


def _host_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in _host_modules(model) if isinstance(module, NORMS)]


def _host_modules(model: nn.Module) -> list[Any]:
    inserted = inserted_modules(model)
    return [module for module in model.modules() if id(module) not in inserted]
