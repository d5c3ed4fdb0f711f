"""Fine-tune a network with inserted attention, in one process or by torchrun in many.

    attnsurgeon insert resnet50 --block cbam -o resnet50_cbam.safetensors
    python examples/finetune.py resnet50_cbam.safetensors --data photos --amp bfloat16
    torchrun --nproc-per-node 8 examples/finetune.py resnet50_cbam.safetensors --data photos

    attnsurgeon insert digits --block se
    python examples/finetune.py digits_se.safetensors --data digits --epochs 2

`photos` holds train/CLASS/*.jpg and val/CLASS/*.jpg. In --output there are then `last.pt`, which
--resume goes on from, and `trained.safetensors`, which attnsurgeon's commands and load_model read
(the averaged weights where --ema is given).
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

import attnsurgeon
from attnsurgeon import digits
from attnsurgeon.card import HostCard, card_of
from attnsurgeon.errors import AttnSurgeonError, BadFile, BadOption, first_line
from attnsurgeon.outputs import atomic_output

AMP = {"off": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune a network with inserted attention.")
    parser.add_argument("file", type=Path, help="what `attnsurgeon insert` wrote")
    parser.add_argument("--data", required=True, help="a folder with train/ and val/, or digits")
    parser.add_argument("--output", type=Path, default=Path("finetuned"), metavar="FOLDER")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, help="of each epoch at most, to try things out")
    parser.add_argument("--batch-size", type=int, default=32, help="of each process")
    parser.add_argument("--lr", type=float, default=0.01, help="of the host")
    parser.add_argument("--attention-lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=1e-4, help="never of gates")
    parser.add_argument("--freeze", action="store_true", help="train the attention only")
    parser.add_argument("--anneal", type=int, metavar="STEPS", help="lead the gates to 1")
    parser.add_argument("--amp", choices=AMP, default="off")
    parser.add_argument("--ema", type=float, metavar="DECAY", help="average the weights, as 0.999")
    parser.add_argument("--resume", action="store_true", help="go on from last.pt in --output")
    parser.add_argument("--stop-after", type=int, metavar="EPOCH", help="to be resumed later")
    parser.add_argument("--tensorboard", action="store_true", help="scalars, gates among them")
    parser.add_argument("--workers", type=int, default=4, help="that read images")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Digits(Dataset[tuple[Tensor, int]]):
    """Scikit-learn's handwritten digits without the held-out ones, or those."""

    def __init__(self, train: bool) -> None:
        self.change: Any = v2.Identity()
        self.images, self.labels = digits.held_out()
        if train:
            from sklearn.datasets import load_digits

            data = load_digits()
            held_out = {image.numpy().tobytes() for image in self.images}
            prepared = digits.prepare(torch.from_numpy(data.images).to(torch.uint8))
            mine = [i for i, x in enumerate(prepared) if x.numpy().tobytes() not in held_out]
            self.images, self.labels = prepared[mine], torch.from_numpy(data.target)[mine]
            black = -digits.MEAN[0] / digits.STD[0]
            self.change = v2.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), fill=black)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.change(self.images[index]), int(self.labels[index])


def read_image(path: str) -> Any:
    """Read an image, and name the file where that fails in the middle of an epoch."""
    try:
        return default_loader(path)
    except (OSError, ValueError, SyntaxError) as error:
        raise BadFile(f"{path!r} cannot be read as an image: {error}") from error


def open_data(data: str, card: HostCard) -> tuple[Any, Any]:
    """Return training and validation images, normed as the network's weights want them."""
    if data == "digits":
        return Digits(train=True), Digits(train=False)
    size = card.input_shapes[0][2:]
    norm = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    norm += [v2.Normalize(card.mean or (0.485, 0.456, 0.406), card.std or (0.229, 0.224, 0.225))]
    change = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *norm])
    keep = v2.Compose([v2.Resize(round(1.15 * max(size))), v2.CenterCrop(size), *norm])
    parts = (("train", change), ("val", keep))
    try:
        return tuple(ImageFolder(Path(data, part), how, loader=read_image) for part, how in parts)
    except FileNotFoundError as error:
        raise BadOption(f"--data: {error}") from error


def check_classes(model: nn.Module, card: HostCard, train: Any) -> None:
    """Refuse a folder with more classes than the network has outputs."""
    wanted = len(getattr(train, "classes", ()))
    with torch.no_grad():
        outputs = model(*card.example(next(model.parameters()))).shape[1]
    if wanted > outputs:
        raise BadOption(
            f"the images have {wanted} classes, the network {outputs} outputs: train the host for "
            "them first, then attnsurgeon insert --checkpoint FILE --num-classes N"
        )


def start_processes() -> tuple[int, int, torch.device]:
    """Return rank, number of processes and device; under torchrun they find each other here."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else "cpu"
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, torch.device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo")
    return dist.get_rank(), dist.get_world_size(), torch.device(device)


class Trainer:
    """All that a run is made of, and all that a resumed one needs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rank, self.world, self.device = start_processes()
        torch.manual_seed(options.seed)
        self.model = attnsurgeon.load_model(options.file).to(self.device)
        if options.freeze:
            attnsurgeon.freeze_host(self.model)
        card = card_of(self.model)
        assert card is not None
        train, val = open_data(options.data, card)
        if len(train) < self.world * options.batch_size:
            raise BadOption(
                f"{len(train)} training images do not fill one batch of {options.batch_size} in "
                f"each of {self.world} processes; lower --batch-size or --nproc-per-node"
            )
        check_classes(self.model, card, train)
        self.sampler: Any = DistributedSampler(train, self.world, self.rank, drop_last=True)
        loading = {"batch_size": options.batch_size, "num_workers": options.workers}
        self.batches: Any = DataLoader(train, sampler=self.sampler, drop_last=True, **loading)
        share = Subset(val, range(self.rank, len(val), self.world))
        self.checks: Any = DataLoader(share, **loading)

        self.parallel: nn.Module = self.model
        if self.world > 1:
            if self.device.type == "cuda":
                self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            self.parallel = DistributedDataParallel(self.model)
        groups = attnsurgeon.parameter_groups(
            self.model,
            lr=options.lr,
            attention_lr=options.attention_lr,
            weight_decay=options.weight_decay,
            norm_weight_decay=0.0,
        )
        self.optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
        self.steps = min(len(self.batches), options.steps or len(self.batches))
        total = options.epochs * self.steps
        self.rates = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, total)
        self.gates = attnsurgeon.GateSchedule(self.model, anneal=options.anneal)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "float16")
        self.averaged = None
        if options.ema is not None:
            average = get_ema_multi_avg_fn(options.ema)
            self.averaged = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self.epoch = 0

    def parts(self) -> dict[str, Any]:
        """Return everything with a state."""
        names = ("model", "optimizer", "rates", "gates", "scaler", "averaged")
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of the same run."""
        try:
            held = torch.load(path, map_location=self.device, weights_only=True)
            for name, part in self.parts().items():
                part.load_state_dict(held[name])
            self.epoch = held["epoch"]
        except FileNotFoundError:
            raise BadOption(f"--resume: there is no {str(path)!r}") from None
        except (RuntimeError, KeyError, ValueError) as error:
            told = f"{str(path)!r} is of another run: {first_line(error)}; leave out --resume"
            raise BadFile(told) from error

    def save(self, folder: Path) -> None:
        """Write the checkpoint and the trained network, each whole or not at all."""
        held = {name: part.state_dict() for name, part in self.parts().items()}
        with atomic_output(folder / "last.pt", force=True) as part:
            torch.save({**held, "epoch": self.epoch}, part)
        trained = self.model if self.averaged is None else self.averaged.module
        attnsurgeon.save_model(trained, folder / "trained.safetensors", force=True)

    def train_epoch(self) -> Iterator[float]:
        """Train for one epoch; yield the loss after each step."""
        torch.manual_seed(self.options.seed + 1000 * self.epoch + self.rank)
        self.sampler.set_epoch(self.epoch)
        self.parallel.train()
        dtype = AMP[self.options.amp]
        for images, labels in itertools.islice(self.batches, self.steps):
            images, labels = images.to(self.device), labels.to(self.device)
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                loss = cross_entropy(self.parallel(images), labels)
            self.optimizer.zero_grad()
            torch.autograd.backward(self.scaler.scale(loss))
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.gates.step()
            self.rates.step()
            if self.averaged is not None:
                self.averaged.update_parameters(self.model)
            yield loss.item()
        self.gates.check()
        self.epoch += 1

    @torch.no_grad()
    def accuracy(self) -> float:
        """Return the share of validation images read rightly, over all processes."""
        model = (self.model if self.averaged is None else self.averaged.module).eval()
        counts = torch.zeros(2, device=self.device)
        for images, labels in self.checks:
            right = model(images.to(self.device)).argmax(1) == labels.to(self.device)
            counts += torch.tensor([right.sum(), len(labels)], device=self.device)
        if self.world > 1:
            dist.all_reduce(counts)
        return (counts[0] / counts[1]).item()


def run(options: argparse.Namespace) -> None:
    """Train from the first epoch, or from the last checkpoint, to the end."""
    trainer = Trainer(options)
    first = trainer.rank == 0  # it alone writes and draws
    if options.resume:
        trainer.resume(options.output / "last.pt")
    options.output.mkdir(parents=True, exist_ok=True)
    writer: Any = None
    if options.tensorboard and first:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(options.output)
    end = min(options.epochs, options.stop_after or options.epochs)
    with Progress(disable=not first) as progress:
        while trainer.epoch < end:
            name = f"epoch {trainer.epoch + 1}/{options.epochs}"
            loss, task = 0.0, progress.add_task(name, total=trainer.steps)
            for loss in trainer.train_epoch():
                progress.update(task, advance=1, description=f"{name} loss {loss:.3f}")
            accuracy = trainer.accuracy()
            if writer is not None:
                writer.add_scalar("loss", loss, trainer.epoch)
                writer.add_scalar("accuracy", accuracy, trainer.epoch)
                for path, gate in attnsurgeon.gates(trainer.model).items():
                    furthest = gate.flatten()[gate.abs().argmax()].item()
                    writer.add_scalar(f"gates/{path}", furthest, trainer.epoch)
            if first:
                progress.print(f"{name}: loss {loss:.4f}, accuracy {accuracy:.4f}")
                trainer.save(options.output)
    if writer is not None:
        writer.close()


def main() -> None:
    """Run, and tell what the user can put right in one line."""
    try:
        run(parse_arguments())
    except AttnSurgeonError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
