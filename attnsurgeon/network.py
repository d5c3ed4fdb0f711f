"""Take off a network what was put around it, where it is safe; else refuse, with the remedy."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from attnsurgeon.errors import HostUnusable

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse")
_FLOAT = {"FloatFunctional", "FXFloatFunctional"}
"""What stands for an operation in networks that can be quantized and are not; by name, since
importing quantization takes longer than needed."""
_HOOKS = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm(module), or use parametrizations.weight_norm",
    "SpectralNorm": (
        "torch.nn.utils.remove_spectral_norm(module), or use parametrizations.spectral_norm"
    ),
    "BasePruningMethod": "torch.nn.utils.prune.remove(module, name)",
}
"""Hooks that compute a weight before each run and leave it on the module, and what ends that."""
_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}
"""By name: to import them takes as long as to build a network."""


def plain_network(model: Any) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the network inside wrappers, and a sentence about each one that was taken off.

    torch.compile's, DataParallel, DistributedDataParallel and AveragedModel run the network they
    hold and nothing else; it is returned itself, not a copy.

    Raises:
        HostUnusable: it is no module, or scripted, quantized, sharded, compiled in a part or in
            place, not initialised, or has weights that a hook computes; the message says what to
            do.
    """
    inner, notices = unwrap(model)
    if not isinstance(inner, nn.Module):
        raise HostUnusable(f"this is {type(inner).__name__}, no torch.nn.Module; pass the network")
    for path, module in inner.named_modules():
        _check_module(path, module)
    return inner, notices


def unwrap(model: Any) -> tuple[Any, tuple[str, ...]]:
    """Return what is inside wrappers, whatever it is, and a sentence about each wrapper."""
    notices = []
    while isinstance(model, nn.Module):
        if isinstance(model, _PARALLEL):
            inside, where = model.module, "module"
        elif _is_compiled(model):
            inside, where = model._orig_mod, "_orig_mod"
        else:
            break
        kind = type(model).__name__
        notices.append(f"the network was taken out of {kind} (.{where}); wrap the result again")
        model = inside
    return model, tuple(notices)


def check_has_numbers(model: nn.Module) -> None:
    """Refuse a network of which some tensors have shapes only.

    Raises:
        HostUnusable: one is on the meta device.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise HostUnusable(
                f"{name} of this {type(model).__name__} is on the meta device: it has a shape and "
                "no numbers; build the network on the CPU"
            )


def check_mode() -> None:
    """Refuse to work in torch.inference_mode(), whose tensors neither tell of changes nor learn.

    Raises:
        HostUnusable: it is on.
    """
    if torch.is_inference_mode_enabled():
        raise HostUnusable(
            "torch.inference_mode() is on, in which nothing can be watched or learn; do this "
            "outside of it (torch.no_grad() does no harm)"
        )


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules


def _check_module(path: str, module: nn.Module) -> None:
    what = f"its {path}" if path else "the network"
    if isinstance(module, torch.jit.ScriptModule):
        raise HostUnusable(f"{what} is TorchScript already; operate on it before scripting")
    if _SHARDED & {kind.__name__ for kind in type(module).__mro__}:
        raise HostUnusable(f"{what} is sharded by FSDP; operate on it before it is sharded")
    if type(module).__module__.startswith(_QUANTIZED) and type(module).__name__ not in _FLOAT:
        raise HostUnusable(
            f"{what} is quantized ({type(module).__name__}); operate on the float network, and "
            "quantize the result"
        )
    if _is_compiled(module) or isinstance(module, _PARALLEL):
        raise HostUnusable(
            f"{what} is wrapped in {type(module).__name__} by itself; wrap it after the operation"
        )
    if module._compiled_call_impl is not None:
        raise HostUnusable(
            f"{what} is compiled in place; pass copy.deepcopy(model), which is not, and compile "
            "the result"
        )
    for hook in module._forward_pre_hooks.values():
        for kind, remedy in _HOOKS.items():
            if kind in {one.__name__ for one in type(hook).__mro__}:
                raise HostUnusable(
                    f"{what} has a weight that a hook computes ({type(hook).__name__}); end that "
                    f"with {remedy}"
                )
    _check_tensors(what, module)


def _check_tensors(what: str, module: nn.Module) -> None:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None:
            continue
        if is_lazy(tensor):
            raise HostUnusable(f"{what} is not initialised; run the network once before")
        if tensor.is_quantized or not _is_plain(tensor):
            raise HostUnusable(
                f"{what} holds {name} as {type(tensor).__name__} of {tensor.dtype}, no plain "
                "tensor; operate on the network as it was before it was quantized or sharded"
            )


def _is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether torch computes with the tensor by itself: no shard, no packed numbers."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
