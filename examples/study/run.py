"""Fine-tune one arm with one seed."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import attnsurgeon
from attnsurgeon.blocks.block import AttentionBlock
from attnsurgeon.errors import GateLost
from attnsurgeon.gate import gate_numbers
from examples.study.arms import OPTIONS, Arm
from examples.study.data import SIZE, Data, lessons

STEPS, BATCH, RATE, DECAY = 160, 48, 0.02, 1e-4
MEASURED = (0, 5, 20, 40, 80, 120, 160)
"""Steps after which the held-out images are read; for the second half, start and end alone."""


def make(arm: Arm, host: nn.Module, seed: int) -> nn.Module:
    """Return a copy of the host with the attention of an arm; the plain one is a copy alone."""
    if arm.block is None:
        return copy.deepcopy(host)
    model = copy.deepcopy(_operated(host, arm.block, arm.gate, seed))
    for block in (m for m in model.modules() if isinstance(m, AttentionBlock)):
        _change(block, arm)
    if arm.ungated:
        for gate in gate_numbers(model).values():
            nn.init.ones_(gate)
        model = attnsurgeon.strip_gates(model)
    return model


@functools.lru_cache(maxsize=16)
def _operated(host: nn.Module, block: str, gate: str, seed: int) -> nn.Module:
    """Insert and prove once what several arms of a seed begin with."""
    model = attnsurgeon.insert_attention(
        host,
        block,
        placement="standard",
        gate=gate,
        seed=seed,
        example=torch.zeros(1, 3, SIZE, SIZE),
        **OPTIONS[block],
    )
    return model.to(memory_format=torch.channels_last)


@torch.no_grad()
def _change(block: Any, arm: Arm) -> None:
    """Change how the attention of one site starts, and what of it may learn."""
    if arm.per_channel:
        block.gate.openness = nn.Parameter(torch.zeros(1, block.excite.out_channels, 1, 1))
    if arm.gain != 1:
        block.excite.weight.mul_(arm.gain)
    if arm.control:  # the last layer says the same whatever it reads
        block.excite.weight.zero_()
        block.excite.bias.zero_()
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(name in (f"gate.{arm.control}", f"excite.{arm.control}"))


def fine_tune(arm: Arm, host: nn.Module, data: Data, seed: int) -> tuple[list[float], nn.Module]:
    """Return the accuracy after each of the measured steps, and the network at the end.

    Every arm sees the same batches. One whose gates are lost reads what chance reads from there.
    """
    model = make(arm, host, seed)
    groups: list[Any] = [{"params": list(model.parameters()), "lr": RATE, "weight_decay": DECAY}]
    schedule = None
    if arm.block is not None:
        groups = attnsurgeon.parameter_groups(
            model,
            lr=RATE,
            attention_lr=arm.rate * RATE,
            gate_lr=arm.gate_rate and arm.gate_rate * RATE,
            weight_decay=DECAY,
        )
        if attnsurgeon.gates(model):
            schedule = attnsurgeon.GateSchedule(model, anneal=arm.anneal or None, check_every=1)
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, fused=True)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    measured = MEASURED if arm.half == 1 else (0, STEPS)
    read = [accuracy(model, data)]
    if arm.warm_up:
        attnsurgeon.freeze_host(model)
    model.train()
    for step, (images, labels) in enumerate(lessons(data, seed, STEPS, BATCH), 1):
        if arm.warm_up and step == arm.warm_up + 1:
            attnsurgeon.unfreeze_host(model)
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        rates.step()
        try:
            if schedule is not None:
                schedule.step()
        except GateLost:
            return read + [0.1] * (len(measured) - len(read)), model
        if step in measured:
            read.append(accuracy(model, data))
            model.train()
    return read, model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, data: Data) -> float:
    """Return the share of the held-out images that are read rightly."""
    images, labels = data.held_out
    right: Tensor = model.eval()(images).argmax(1) == labels
    return right.double().mean().item()
