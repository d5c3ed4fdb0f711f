"""A small trained network for handwritten digits, and the images it was tested on.

The network comes from torchvision's model registry and was trained by
``examples/train_digits.py`` on scikit-learn's 8x8 digits. It is small enough to ship, so that
a trained host network is at hand without a download:

    from torchvision.models import get_model

    from attnsurgeon import digits

    card = digits.read_card()
    network = get_model(card.model, weights=None, **card.arguments)
    network.load_state_dict(digits.read_weights())
    images, labels = digits.held_out()
    accuracy = (network.eval()(images).argmax(1) == labels).float().mean()

The held-out images took no part in training, but the same people wrote both parts: expect
less on a stranger's hand. The digits are the test set of "Optical Recognition of Handwritten
Digits" by E. Alpaydin and C. Kaynak, from the UCI Machine Learning Repository
(https://doi.org/10.24432/C50P49), licensed under CC BY 4.0; a part of them is shipped here,
with its values unchanged.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["DigitsCard", "held_out", "prepare", "read_card", "read_weights"]

FOLDER = Path(__file__).parent
WEIGHTS_FILE = FOLDER / "digits.safetensors"
HELD_OUT_FILE = FOLDER / "held_out.safetensors"

INPUT_SIZE = (32, 32)
MEAN = (0.3, 0.3, 0.3)
STD = (0.35, 0.35, 0.35)
BRIGHTEST = 16


@dataclass(frozen=True)
class DigitsCard:
    """What is known of the shipped network.

    Attributes:
        model: The network's name in torchvision's model registry.
        arguments: Keyword arguments that ``torchvision.models.get_model`` takes besides.
        input_size: Height and width of the network's input.
        mean: What is subtracted from each channel of the input.
        std: What each channel of the input is divided by, after the subtraction.
        categories: The name of each class, in the order of the network's outputs.
        accuracy: The share of the held-out images that the network classifies rightly.
        images: The number of held-out images.
    """

    model: str
    arguments: dict[str, Any]
    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    categories: tuple[str, ...]
    accuracy: float
    images: int


def read_card() -> DigitsCard:
    """Read the card of the shipped network.

    Returns:
        The card, from the metadata of the weights file.
    """
    from safetensors import safe_open

    with safe_open(WEIGHTS_FILE, framework="pt") as file:
        host = json.loads(file.metadata()["host"])
    height, width = host["input_size"]
    return DigitsCard(
        model=host["model"],
        arguments=host["arguments"],
        input_size=(height, width),
        mean=tuple(host["mean"]),
        std=tuple(host["std"]),
        categories=tuple(host["categories"]),
        accuracy=host["accuracy"],
        images=host["images"],
    )


def read_weights() -> dict[str, torch.Tensor]:
    """Read the weights of the shipped network.

    Returns:
        The network's state dict, on the CPU.
    """
    from safetensors.torch import load_file

    return load_file(WEIGHTS_FILE)


def prepare(images: Tensor) -> Tensor:
    """Turn digit images into the network's input.

    Args:
        images: Images of shape (N, 8, 8), uint8, with values from 0 to 16.

    Returns:
        Images of shape (N, 3, H, W), float32: scaled to 0..1, enlarged bilinearly,
        repeated over three channels and normalised.
    """
    import torch
    from torch.nn.functional import interpolate

    grey = images.to(torch.float32).div(BRIGHTEST).unsqueeze(1)
    enlarged = interpolate(grey, size=INPUT_SIZE, mode="bilinear", align_corners=False)
    mean = enlarged.new_tensor(MEAN).view(-1, 1, 1)
    std = enlarged.new_tensor(STD).view(-1, 1, 1)
    return (enlarged - mean) / std


def held_out() -> tuple[Tensor, Tensor]:
    """Read the images that took no part in training.

    Returns:
        The prepared images, of shape (N, 3, H, W), and their labels, int64 of shape (N,).
    """
    from safetensors.torch import load_file

    tensors = load_file(HELD_OUT_FILE)
    return prepare(tensors["images"]), tensors["labels"]
