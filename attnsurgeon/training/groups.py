"""Parameter groups for any optimiser, and whether an optimiser holds what there is to train."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from attnsurgeon.arguments import typed
from attnsurgeon.blocks.block import AttentionBlock
from attnsurgeon.errors import BadOption, HostUnusable, OptimizerMismatch
from attnsurgeon.gate import gate_numbers

NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LocalResponseNorm,
)
"""What torchvision's training recipe counts as a norm."""


@typed
def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    attention_lr: float | None = None,
    gate_lr: float | None = None,
    weight_decay: float = 0.0,
    norm_weight_decay: float | None = None,
    bias_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Return the trainable parameters as plain groups with a name, a rate and a decay each.

    The groups are `base`, `attention` and `gates`, and, where norms or biases are given a decay
    of their own, `base_norms`, `attention_biases` and so on, divided as torchvision's training
    recipe does: every bias is a bias, a norm's too. Empty groups and frozen parameters are left
    out; each parameter stands in exactly one group. Wrapped models (DDP, FSDP2, compiled) can be
    given too.

    Args:
        model: an operated network.
        lr: of the host's parameters.
        attention_lr: of what was inserted; `lr` by default.
        gate_lr: of the gates; `attention_lr` by default. Gates are never decayed. Last layers
            that are gates themselves (the form `layer`) belong to the attention.
        weight_decay: of everything that has none of its own.
        norm_weight_decay: of norms; `weight_decay` by default.
        bias_weight_decay: of biases; `weight_decay` by default.

    Raises:
        HostUnusable: the model was not operated on.
        BadOption: a rate or decay that is negative.

    Example:
        >>> groups = parameter_groups(model, lr=0.01, attention_lr=0.1, weight_decay=1e-4)
        >>> optimizer = torch.optim.SGD(groups, momentum=0.9)
    """
    rates = {"base": lr, "attention": lr if attention_lr is None else attention_lr}
    rates["gates"] = rates["attention"] if gate_lr is None else gate_lr
    decays = {"": weight_decay, "norms": norm_weight_decay, "biases": bias_weight_decay}
    for number in (*rates.values(), *decays.values()):
        if number is not None and not number >= 0:
            raise BadOption(f"a learning rate or weight decay must be at least 0, not {number}")
    check_operated(model)
    members = _assign(model, {kind for kind, decay in decays.items() if decay is not None})
    groups = []
    for name in sorted(members):
        part, _, kind = name.partition("_")
        decay = 0.0 if part == "gates" else decays[kind]
        groups.append(
            {"name": name, "params": members[name], "lr": rates[part], "weight_decay": decay}
        )
    return groups


def check_operated(model: nn.Module) -> None:
    """Refuse a network without attention.

    Raises:
        HostUnusable: it was not operated on.
    """
    if not any(isinstance(module, AttentionBlock) for module in model.modules()):
        raise HostUnusable(
            f"this {type(model).__name__} has no attention of attnsurgeon; insert_attention first"
        )


def _assign(model: nn.Module, kinds: set[str]) -> dict[str, list[nn.Parameter]]:
    """Return group name -> trainable parameters; `kinds` has a decay of its own."""
    gates = {id(gate) for gate in gate_numbers(model).values()}
    inserted = inserted_modules(model)
    members: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for module in model.modules():
        part = "attention" if id(module) in inserted else "base"
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            kind = _kind(module, name, kinds)
            group = "gates" if id(parameter) in gates else f"{part}_{kind}" if kind else part
            members.setdefault(group, []).append(parameter)
    return members


def _kind(module: nn.Module, name: str, kinds: set[str]) -> str:
    if name == "bias" and "biases" in kinds:
        return "biases"
    return "norms" if isinstance(module, NORMS) and "norms" in kinds else ""


def inserted_modules(model: nn.Module) -> set[int]:
    """Return the identities of all modules that stand inside an attention block."""
    return {
        id(inner)
        for module in model.modules()
        if isinstance(module, AttentionBlock)
        for inner in module.modules()
    }


@typed
def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimiser that would not train this model: made before the surgery, say.

    Raises:
        OptimizerMismatch: it lacks trainable parameters of the model, holds parameters that are
            not the model's (insertion returns a copy), or decays a gate.
    """
    groups = optimizer.param_groups
    held = {id(parameter) for group in groups for parameter in group["params"]}
    own = {id(parameter) for parameter in model.parameters()}
    lacking = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    remedy = "make it after the insertion, from parameter_groups(model, lr=...)"
    kind = type(optimizer).__name__
    if lacking:
        total = sum(parameter.requires_grad for parameter in model.parameters())
        raise OptimizerMismatch(
            f"this {kind} does not hold {len(lacking)} of {total} trainable parameters, the first "
            f"{lacking[0]}; {remedy}"
        )
    if held - own:
        raise OptimizerMismatch(
            f"this {kind} holds {len(held - own)} parameters that are not this "
            f"{type(model).__name__}'s; {remedy}"
        )
    decayed = {id(p) for group in groups if group.get("weight_decay") for p in group["params"]}
    gates = [name for name, gate in gate_numbers(model).items() if id(gate) in decayed]
    if gates:
        raise OptimizerMismatch(
            f"this {kind} decays {len(gates)} gates, the first {gates[0]}, which closes what "
            "training opens; make it from parameter_groups(model, lr=...)"
        )
