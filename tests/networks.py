"""Networks that are soon translated, compiled and timed."""

import gc
import json

import torch
from torch import nn

QUICK = {"seconds": 0.1, "threads": 1, "device": "cpu"}
IMAGE = torch.zeros(1, 3, 32, 32)
SIZES = json.dumps([20, 24])


class Tiny(nn.Module):
    """A residual network that is soon translated; `work` repeats its middle."""

    def __init__(self, channels: int = 3, classes: int = 4, work: int = 1):
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, classes)
        self.work = work

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for _ in range(self.work):
            x = torch.relu(self.middle(x) + x)
        return self.head(x.mean((2, 3)))


class Spy(nn.Module):
    """Notes what a forward pass sees."""

    seen: list

    def __init__(self):
        super().__init__()
        self.net = Tiny()

    def forward(self, x):
        torch.rand(1)  # a network may draw: the caller's random state is not its
        Spy.seen.append(
            {
                "shape": tuple(x.shape),
                "threads": torch.get_num_threads(),
                "grad": torch.is_grad_enabled(),
                "collector": gc.isenabled(),
                "training": self.training,
            }
        )
        return self.net(x)


class Residual(nn.Module):
    """The smallest host that is not torchvision's."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return self.conv(x) + x

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.block = self.Block()

    def forward(self, x):
        return self.block(self.stem(x)).mean((2, 3))
