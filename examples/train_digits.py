"""Train the small digits network that attnsurgeon ships.

Run it from a checkout, with attnsurgeon and scikit-learn installed:

    python examples/train_digits.py

It trains a narrow MobileNetV2 on scikit-learn's 8x8 handwritten digits in a few minutes on
two CPU cores and writes ``digits.safetensors`` and ``held_out.safetensors``, by default over
those in the package (``--output`` names another folder). Progress goes to stderr, the final
accuracy to stdout.

A quarter of the images is held out: it is neither trained on nor used to pick a checkpoint,
which is always the last one. To try other settings without looking at it, pass
``--validate``: a quarter of the training images is then set aside to measure on instead, and
nothing is written. The held-out images do not depend on ``--seed``.

The same seed, thread count, machine and PyTorch release give the same weights.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn.functional import cross_entropy
from torchvision.models import get_model
from torchvision.transforms import v2

from attnsurgeon import digits

if TYPE_CHECKING:
    from torch import Tensor, nn

MODEL = "mobilenet_v2"
ARGUMENTS: dict[str, Any] = {
    "width_mult": 0.25,
    "num_classes": 10,
    # Expansion, channels before width_mult, blocks and stride of each stage.
    "inverted_residual_setting": [
        [1, 32, 1, 1],
        [6, 64, 2, 1],
        [6, 96, 3, 2],
        [6, 128, 3, 2],
        [6, 160, 2, 2],
    ],
}
HELD_OUT_IMAGES = 450
SPLIT_SEED = 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the digits network.")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="its peak")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--validate", action="store_true", help="measure only, write nothing")
    parser.add_argument("--output", type=Path, default=digits.FOLDER, metavar="FOLDER")
    return parser.parse_args()


def load_images() -> tuple[Tensor, Tensor]:
    """Load all images, as uint8 of shape (N, 8, 8), and their labels."""
    data = load_digits()
    images = torch.from_numpy(data.images).to(torch.uint8)
    return images, torch.from_numpy(data.target).to(torch.int64)


def split(
    images: Tensor, labels: Tensor, size: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Set ``size`` images aside, with the classes in equal shares on both sides."""
    rest, aside = train_test_split(
        range(len(labels)), test_size=size, random_state=SPLIT_SEED, stratify=labels.numpy()
    )
    return (images[rest], labels[rest]), (images[aside], labels[aside])


def make_augmentation() -> v2.Transform:
    """Make the random change that each training image undergoes in each epoch."""
    black = [-mean / std for mean, std in zip(digits.MEAN, digits.STD, strict=True)]
    return v2.RandomAffine(
        degrees=12,
        translate=(0.08, 0.08),
        scale=(0.88, 1.12),
        shear=(-8, 8),
        interpolation=v2.InterpolationMode.BILINEAR,
        fill=black,
    )


def train_epoch(
    network: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """Train for one epoch, and return the mean loss."""
    augment = make_augmentation()
    network.train()
    losses = []
    for batch in torch.randperm(len(labels)).tensor_split(len(labels) // batch_size):
        augmented = torch.stack([augment(inputs[index]) for index in batch.tolist()])
        loss = cross_entropy(network(augmented), labels[batch], label_smoothing=0.05)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def train(images: Tensor, labels: Tensor, options: argparse.Namespace) -> nn.Module:
    """Train the network from scratch, and return it as it is after the last epoch."""
    network: nn.Module = get_model(MODEL, weights=None, **ARGUMENTS)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=options.learning_rate,
        epochs=options.epochs,
        steps_per_epoch=len(labels) // options.batch_size,
        pct_start=0.1,
    )
    inputs = digits.prepare(images)
    start = time.monotonic()
    for epoch in range(1, options.epochs + 1):
        loss = train_epoch(network, inputs, labels, options.batch_size, optimizer, schedule)
        seconds = time.monotonic() - start
        print(f"epoch {epoch}/{options.epochs}: loss {loss:.4f}, {seconds:.0f} s", file=sys.stderr)
    return network.eval()


@torch.inference_mode()
def count_right(network: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Count the images that the network classifies rightly."""
    return int((network(digits.prepare(images)).argmax(1) == labels).sum())


def write(
    folder: Path, network: nn.Module, images: Tensor, labels: Tensor, accuracy: float
) -> None:
    """Write the network with its card, and the held-out images."""
    host = {
        "model": MODEL,
        "arguments": ARGUMENTS,
        "input_size": digits.INPUT_SIZE,
        "mean": digits.MEAN,
        "std": digits.STD,
        "categories": [str(digit) for digit in range(10)],
        "accuracy": accuracy,
        "images": len(labels),
    }
    weights = save(network.state_dict(), metadata={"host": json.dumps(host)})
    held_out = save({"images": images, "labels": labels})
    folder.mkdir(parents=True, exist_ok=True)
    # Not save_file: its files are readable by their owner only, whatever the umask.
    (folder / digits.WEIGHTS_FILE.name).write_bytes(weights)
    (folder / digits.HELD_OUT_FILE.name).write_bytes(held_out)


def main() -> None:
    """Train the network, measure it and write it."""
    options = parse_arguments()
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(options.threads)
    training, measured = split(*load_images(), HELD_OUT_IMAGES)
    if options.validate:
        training, measured = split(*training, len(training[1]) // 4)
    network = train(*training, options)
    right, total = count_right(network, *measured), len(measured[1])
    if not options.validate:
        write(options.output, network, *measured, right / total)
    kind = "validation" if options.validate else "held-out"
    print(f"accuracy {right / total:.4f} ({right} of {total} {kind} images)")


if __name__ == "__main__":
    main()
