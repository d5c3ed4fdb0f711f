"""The network of the study: a slim RegNet of torchvision, six residual blocks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models import RegNet
from torchvision.models.regnet import BlockParams

from examples.study.data import CLEAN, Data

STEPS, BATCH, RATE = 400, 64, 0.1


def build() -> nn.Module:
    """Return it with random weights, channels last: with so few of them a fifth less time."""
    widths = [12, 24, 48]
    stages = BlockParams([2, 2, 2], widths, widths, [1.0] * 3, [1, 2, 2])
    network: nn.Module = RegNet(stages, num_classes=10, stem_width=12)
    return network.to(memory_format=torch.channels_last)


def trained(data: Data, seed: int) -> nn.Module:
    """Train it on clean digits; it has never seen what it will be fine-tuned on."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = build()
    optimizer = torch.optim.SGD(network.parameters(), RATE, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
    images, labels = data.host
    for _ in range(STEPS):
        batch = torch.randint(len(labels), (BATCH,), generator=generator)
        loss = cross_entropy(network(CLEAN.change(images[batch], generator)), labels[batch])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return network.eval()
