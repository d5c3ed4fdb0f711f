"""What attention costs in each engine, against timm's block of the same kind at the same places.

    python tests/benchmarks/attention_cost.py --publish      # a quiet machine, half an hour
    python tests/benchmarks/attention_cost.py --block se gc --engine onnxruntime --batch 1
    python tests/benchmarks/attention_cost.py --block se --cpu-time --threads 1   # a busy machine

Each row times three networks in turns: the plain one, ours as `export_model` writes it, gates open,
and timm's as torch's own exporters write it. Target: ours adds at most half of what timm's adds
(`replace`d SK: half in ONNX Runtime, 0.8 elsewhere). The limit is what the passes over memory cost
that are left if all arithmetic between them were free: bytes over the bandwidth of copying maps of
the same sizes in the same run.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cost_table import HEAD, README, Row, table_of, write_readme
from numpy.typing import NDArray
from timm.layers.cbam import CbamModule
from timm.layers.global_context import GlobalContext
from timm.layers.selective_kernel import SelectiveKernel
from timm.layers.squeeze_excite import SEModule
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

import attnsurgeon
from attnsurgeon.bench import engines, timing
from attnsurgeon.bench.engines import Place
from attnsurgeon.bench.interval import FASTER_HALF, RESAMPLES, half_width, trimmed_means
from attnsurgeon.bench.quiet import borrowed_threads
from attnsurgeon.bench.rounds import Race
from attnsurgeon.bench.targets import Target
from attnsurgeon.export.torchscript import load_torchscript, make_torchscript
from attnsurgeon.gate import named_gates
from attnsurgeon.host import load_host

ENGINES = {"onnxruntime": ".onnx", "torchscript-frozen": ".pt", "compile": ".pt2"}
"""Engine of the bench -> suffix of what we export for it."""
PASSES = {"se": 2.25, "gc": 2.5, "cbam": 4.0, "sk": 6.0}
"""Of reading or writing one feature map, beyond those of the plain network.

A convolution writes its own result and cannot scale it by what depends on all of it. SE writes
and reads y, and reads the map before the last 1x1 (a quarter); GC reads that twice; CBAM reads y
once for each maximum as well; SK writes a second branch and the mix, and reads both twice.
"""
SIDES = ("plain", "ours", "timm")


class TimmSelective(Bottleneck):  # type: ignore[misc]
    """A bottleneck whose 3x3, norm and activation timm's selective kernel replaces."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out: Tensor = self.bn3(self.conv3(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))  # type: ignore[no-any-return]


def with_timm(host: nn.Module, block: str) -> nn.Module:
    """Return a copy of the host with timm's block in every residual block."""
    model = copy.deepcopy(host)
    make: dict[str, Any] = {"se": SEModule, "cbam": CbamModule, "gc": add_context}
    for part in [m for m in model.modules() if isinstance(m, Bottleneck)]:
        if block != "sk":
            part.bn3 = nn.Sequential(part.bn3, make[block](part.conv3.out_channels))
            continue
        conv = part.conv2
        part.conv2 = SelectiveKernel(
            conv.in_channels,
            conv.out_channels,
            stride=conv.stride[0],
            groups=conv.groups,
            split_input=False,
        )
        part.bn2 = nn.Identity()
        part.__class__ = TimmSelective
    return model.eval()


def add_context(channels: int) -> nn.Module:
    """Return timm's global context in the paper's form, which adds."""
    return GlobalContext(channels, fuse_add=True, fuse_scale=False)


def networks(block: str) -> dict[str, nn.Module]:
    """Return the plain network, ours with its gates open, and timm's."""
    torch.manual_seed(0)
    host = load_host("resnext50_32x4d" if block == "sk" else "resnet50", weights="none").eval()
    placement = "replace" if block == "sk" else "standard"
    ours = attnsurgeon.insert_attention(host, block, placement=placement)
    with torch.no_grad():
        for gate in named_gates(ours).values():
            gate.uniform_(0.25, 0.75)
    return {"plain": host, "ours": ours.eval(), "timm": with_timm(host, block)}


def target(side: str, model: nn.Module, engine: str, image: Tensor, folder: Path) -> Target:
    """Return what the engine is to run: our export, or what torch makes of the others."""
    path = folder / f"{side}{ENGINES[engine]}"
    if side == "ours":
        is_frozen = engine == "torchscript-frozen"
        attnsurgeon.export_model(model, path, force=True, optimize=is_frozen)
    elif engine == "onnxruntime":
        free = torch.export.Dim.DYNAMIC
        pair = (torch.cat([image[:1]] * 2),)
        axes = ({0: free, 2: free, 3: free},)
        options: dict[str, Any] = {"verbose": False, "external_data": False}
        torch.onnx.export(model, pair, str(path), dynamo=True, dynamic_shapes=axes, **options)
    if engine == "onnxruntime":
        return Target(side, (image,), "random", file=path)
    if engine == "torchscript-frozen":
        script = load_torchscript(path)[0] if side == "ours" else make_torchscript(model, (image,))
        return Target(side, (image,), "random", model=script)
    if side == "ours":
        model = torch.export.load(path).module()
    return Target(side, (image,), "random", model=model)


def judge(race: Race, seed: int = 0) -> tuple[float, float, tuple[float, float, float]]:
    """Return by how much ours and timm's exceed 1, and the quotient with a 95 % interval.

    As the bench does it: the faster half of each one's blocks, whole rounds drawn again.
    """
    count = len(race.rounds)
    round_of = np.repeat(np.arange(count), [len(part) for part in race.rounds])
    logs = [np.concatenate(race.log_blocks(i)) for i in range(3)]

    def overheads(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
        plain, *others = (trimmed_means(own, drawn[:, round_of], FASTER_HALF) for own in logs)
        return np.stack([np.expm1(other - plain) for other in others])

    random = np.random.default_rng(seed)
    drawn = random.multinomial(count, [1 / count] * count, size=RESAMPLES).astype(float)
    ours, timms = (float(found[0]) for found in overheads(np.ones((1, count))))
    some = overheads(drawn)
    half = half_width(float((some[0] / some[1]).std()), count)
    quotient = ours / timms
    return ours, timms, (quotient, quotient - half, quotient + half)


def map_bytes(model: nn.Module, block: str, image: Tensor) -> list[int]:
    """Return the size of the map that attention changes, for every residual block."""
    found: list[int] = []

    def note(_: nn.Module, __: Any, out: Tensor) -> None:
        found.append(out.numel() * out.element_size())

    name = "bn2" if block == "sk" else "bn3"
    hooks = [
        getattr(part, name).register_forward_hook(note)
        for part in model.modules()
        if isinstance(part, Bottleneck)
    ]
    with torch.no_grad():
        model(image)
    for hook in hooks:
        hook.remove()
    return found


def limit_ms(sizes: Sequence[int], passes: float) -> float:
    """Return what so many passes over maps of these sizes in bytes cost, copying at full speed."""
    taken: dict[int, float] = {}
    for size in set(sizes):
        source, target = torch.ones(size // 4), torch.empty(size // 4)
        runner = timing.Runner(lambda t=target, s=source: t.copy_(s), lambda: None)  # type: ignore[misc]
        timing.timed(runner, 3)
        taken[size] = min(timing.timed(runner, 20)) / 2  # it reads and it writes
    return passes * sum(taken[size] for size in sizes)


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """Yield every comparison that is asked for."""
    for block in options.block:
        models = networks(block)
        for engine in options.engine:
            with tempfile.TemporaryDirectory() as folder:
                yield from compare(models, block, engine, Path(folder), options)
            torch._dynamo.reset()


def compare(
    models: Mapping[str, nn.Module],
    block: str,
    engine: str,
    folder: Path,
    options: argparse.Namespace,
) -> Iterator[Row]:
    """Yield the comparison of three networks in one engine, for each batch."""
    one = torch.randn(1, 3, options.size, options.size)
    targets = [target(side, models[side], engine, one, folder) for side in SIDES]
    place = Place(torch.device("cpu"), options.threads, folder)
    for batch in options.batch:
        image = torch.randn(batch, *one.shape[1:])
        with torch.inference_mode():
            runners = [engines.get(engine).prepare(each, (image,), place) for each in targets]
            for runner in runners:
                (runner.first or runner.call)()
        found = timing.race(runners, options.seconds)
        limit = limit_ms(map_bytes(models["plain"], block, image), PASSES[block])
        plain = float(np.median(found.samples_ms[0]))
        ours, timms, quotient = judge(found)
        yield Row(block, engine, batch, plain, plain * ours, plain * timms, quotient, limit)


@contextmanager
def cpu_clock(wanted: bool) -> Iterator[None]:
    """Time by the CPU seconds of this process, if wanted: others on the machine disturb less."""
    before = timing.clock_ns
    timing.clock_ns = time.process_time_ns if wanted else before
    try:
        yield
    finally:
        timing.clock_ns = before


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--block", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--engine", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each comparison")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time, not wall time")
    parser.add_argument("--publish", action="store_true", help="exchange the README's table")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # of the exporters, which are not what is looked at
    print(HEAD, flush=True)
    found = []
    with borrowed_threads(options.threads), cpu_clock(options.cpu_time):
        for row in rows(options):
            found.append(row)
            print(row, flush=True)
    told = "processor time" if options.cpu_time else "wall time"
    text = table_of(found, options.threads, options.size, told)
    print(f"\n{text}")
    if options.publish:
        write_readme(text, README)
    return 0


if __name__ == "__main__":
    sys.exit(main())
