"""What attention costs on a GPU, and that it changes nothing there; torch's engines alone.

    python tests/benchmarks/gpu.py          # one NVIDIA GPU: gpu.json beside this file, and README
    python tests/benchmarks/gpu.py --model resnet50 --block se --seconds 2      # in pieces
    python tests/benchmarks/gpu.py --table tests/benchmarks/gpu.json            # the table alone

Each block is timed against the plain host and against timm's module at the same places, where timm
is installed. First it is checked in each precision, TF32 off and on, and under autocast, that the
output is bitwise the host's and that every gate moves it. What the file has already is kept, so
that an hour's work can be done in pieces. Without a GPU it runs on the CPU at small sizes, and says
so: such figures say nothing about a GPU, and the README is left alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torchvision
from gpu_table import README, table_of, write_readme
from torch import Tensor, nn

import attnsurgeon
from attnsurgeon.bench.precision import borrowed_tf32
from attnsurgeon.bench.results import Report, Timing
from attnsurgeon.errors import AttnSurgeonError
from attnsurgeon.gate import named_gates
from attnsurgeon.plan import Cut
from attnsurgeon.surgery import cuts_of

MODELS = ("resnet50", "convnext_tiny", "efficientnet_b0", "regnet_y_8gf")
BLOCKS = ("se", "cbam", "sk", "gc")
USUAL = ("standard", "post")
PLACEMENTS = {"sk": ("replace", *USUAL)}
"""Each is put where its paper puts it, or else after the block."""
RESULTS = Path(__file__).with_name("gpu.json")
PASSES = {("se", "standard"): 1, ("se", "post"): 3}
"""Times the features have to cross the memory: to be squeezed; after the block also to be scaled,
read and written, which inside it goes along with the addition."""
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def insert(host: nn.Module, block: str, image: Tensor) -> nn.Module | None:
    """Return the host with the block at every site that takes it; None where there is none."""
    for placement in PLACEMENTS.get(block, USUAL):
        try:
            return attnsurgeon.insert_attention(host, block, placement=placement, example=image)
        except AttnSurgeonError:
            continue
    return None


class TimmSelective(nn.Module):
    """timm's module in the place of ours, which is also given what the replaced layers made."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        """Return what timm's module makes of x alone."""
        chosen: Tensor = self.layer(x)
        return chosen


def with_timm(operated: nn.Module) -> nn.Module | None:
    """Return a copy with timm's modules in the places of ours; None where that cannot be done."""
    try:
        from timm.layers.cbam import CbamModule
        from timm.layers.global_context import GlobalContext
        from timm.layers.squeeze_excite import SEModule
    except ImportError:
        return None
    made: dict[str, Callable[[int], nn.Module]] = {
        "se": lambda channels: SEModule(channels, rd_ratio=1 / 16),
        "cbam": lambda channels: CbamModule(channels, rd_ratio=1 / 16),
        "gc": lambda channels: GlobalContext(
            channels, rd_ratio=1 / 16, fuse_add=True, fuse_scale=False
        ),
    }
    twin = copy.deepcopy(operated)
    for cut in cuts_of(twin):
        parent, _, name = cut.child.rpartition(".")
        block = twin.get_submodule(parent)
        other = (
            _timm_selective(block, cut) if cut.block == "sk" else made[cut.block](_channels(cut))
        )
        setattr(block, name, other)
    return twin.eval()


def _channels(cut: Cut) -> int:
    return int(cut.place.channels)


def _timm_selective(block: nn.Module, cut: Cut) -> nn.Module:
    """Return timm's SK; in the place of a 3x3, that one and its norm are taken out of the block."""
    from timm.layers.selective_kernel import SelectiveKernel

    if cut.splice.conv is None:
        return SelectiveKernel(_channels(cut), split_input=False)
    conv = block.get_submodule(cut.splice.conv)
    assert isinstance(conv, nn.Conv2d)
    for path in (cut.splice.conv, _norm_after(block, cut.splice.conv)):
        parent, _, name = path.rpartition(".")
        setattr(block.get_submodule(parent), name, nn.Identity())  # timm's has its own
    return TimmSelective(
        SelectiveKernel(
            conv.in_channels,
            conv.out_channels,
            stride=conv.stride[0],
            groups=conv.groups,
            split_input=False,
        )
    )


def _norm_after(block: nn.Module, conv: str) -> str:
    """Return the path of the first norm that is declared after a convolution."""
    paths: list[str] = [path for path, _ in block.named_modules()]
    for path in paths[paths.index(conv) + 1 :]:
        if isinstance(block.get_submodule(path), nn.BatchNorm2d):
            return path
    raise LookupError(f"no norm follows {conv}")


def check_precisions(
    host: nn.Module, operated: nn.Module, device: torch.device, image: Tensor
) -> Iterator[dict[str, Any]]:
    """Yield for each precision whether nothing changed, and how many gates are dead."""
    is_cuda = device.type == "cuda"
    ways: list[tuple[str, bool, torch.dtype | None]] = [("fp32", False, None)]
    ways += [("bf16", False, None)]
    ways += [("tf32", True, None), ("fp16", False, None)] if is_cuda else []
    ways += [(f"autocast {name}", False, dtype) for name, dtype in HALF.items() if is_cuda]
    ways += [] if is_cuda else [("autocast bf16", False, torch.bfloat16)]
    for name, tf32, autocast in ways:
        dtype = HALF.get(name, torch.float32)
        sides = [copy.deepcopy(net).to(device, dtype).eval() for net in (host, operated)]
        inside: AbstractContextManager[Any] = (
            torch.autocast(device.type, dtype=autocast) if autocast else nullcontext()
        )
        with borrowed_tf32(allowed=tf32), inside:
            yield {"precision": name, **_check(sides, image.to(device, dtype))}


def _check(sides: Sequence[nn.Module], image: Tensor) -> dict[str, Any]:
    """Compare closed gates bitwise, and open each gate by its gradient."""
    host, operated = sides
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=_tf32()):
        with torch.no_grad():
            exact = torch.equal(host(image), operated(image))
        gates = named_gates(operated)
        output = operated(image)
        output.float().square().sum().backward()
    dead = [name for name, gate in gates.items() if not _is_alive(gate.grad)]
    return {"exact": exact, "gates": len(gates), "dead": len(dead)}


def _is_alive(gradient: Tensor | None) -> bool:
    """Tell whether a gate learns: a gradient that is NaN or infinite moves nothing either."""
    if gradient is None:
        return False
    return bool(torch.isfinite(gradient).all()) and bool(gradient.any())


def _tf32() -> bool:
    return bool(torch.backends.cudnn.allow_tf32)


def measure(
    name: str, block: str, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Return checks and times of one block in one network."""
    image = torch.randn(1, 3, options.size, options.size)
    host = torchvision.models.get_model(name, weights=None).eval()
    operated = insert(host, block, image)
    if operated is None:
        return {"model": name, "block": block, "skipped": "no site takes it"}
    checks = list(check_precisions(host, operated, device, image))
    twin = with_timm(operated)
    sides = [host, operated] if twin is None else [host, operated, twin]
    placement = cuts_of(operated)[0].placement
    entry: dict[str, Any] = {"model": name, "block": block, "placement": placement}
    entry |= {"checks": checks, "rows": [], "failures": [], "environment": {}}
    extra = _extra_bytes(operated, placement, block)
    for engine in options.engine:  # one that cannot take the network leaves the others
        try:
            report = time_sides(sides, engine, image, options, device, f"{name} {block}")
        except AttnSurgeonError as error:
            entry["failures"].append({"engine": engine, "reason": str(error)})
            continue
        entry["rows"] += _rows(report, len(sides), extra)
        entry["failures"] += [failure.to_json() for failure in report.failures]
        entry["environment"][engine] = dict(report.environment)
    return entry


def time_sides(
    sides: Sequence[nn.Module],
    engine: str,
    image: Tensor,
    options: argparse.Namespace,
    device: torch.device,
    label: str,
) -> Report:
    """Return the times of the host, ours and timm's on one engine."""
    return attnsurgeon.bench.compare_speed(
        sides,
        engines=(engine,),
        device=str(device),
        batches=options.batch,
        precisions=options.precision,
        channels_last=options.channels_last,
        seconds=options.seconds,
        example=image,
        progress=lambda text, share: print(f"{label} {share:4.0%} {text}", flush=True),
    )


def _extra_bytes(operated: nn.Module, placement: str, block: str) -> int | None:
    """Return the bytes, of float32 and one image, that the block has to move; None if unknown."""
    passes = PASSES.get((block, placement))
    if passes is None:
        return None
    return passes * sum(4 * math.prod(cut.shape[1:]) for cut in cuts_of(operated))


def _rows(report: Report, sides: int, extra: int | None) -> Iterator[dict[str, Any]]:
    """Yield ours and timm's overhead for each job, and the least that ours could be."""
    rates = {one["precision"]: one["bytes_per_s"] for one in report.environment["ceilings"]}
    others = sides - 1
    for number, run in enumerate(report.runs[::sides]):
        ours, *rest = report.comparisons[number * others : (number + 1) * others]
        timms = rest[0] if rest else None
        least = None
        if extra is not None:
            width = 0.5 if run.precision in HALF else 1.0
            least = _least(run, extra * width, rates[run.precision])
        yield {
            "engine": run.engine,
            "batch": run.batch,
            "precision": run.precision,
            "host_ms": round(run.median_ms, 4),
            "ours": {"ratio": ours.ratio, "interval95": list(ours.interval95)},
            "timm": None
            if timms is None
            else {"ratio": timms.ratio, "interval95": list(timms.interval95)},
            "least_ratio": least,
            "doubts": sorted({*run.doubts, *ours.doubts}),
        }


def _least(host: Timing, extra_bytes: float, bytes_per_s: float) -> float:
    """Return the ratio of a network that does nothing beside its host but move the bytes."""
    return 1 + 1e3 * host.batch * extra_bytes / bytes_per_s / host.median_ms


def earlier(path: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a file of the same machine and torch has already.

    Raises:
        SystemExit: it is of another machine or torch.
    """
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    for key in ("machine", "torch"):
        if found[key] != results[key]:
            raise SystemExit(f"{path} is of {found[key]}, this is {results[key]}: give another -o")
    return list(found["entries"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or print the table of what was measured."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--table", type=Path, help="print the table of an earlier file")
    parser.add_argument("--model", nargs="+")
    parser.add_argument("--block", nargs="+", default=list(BLOCKS))
    parser.add_argument("--engine", nargs="+")
    parser.add_argument("--batch", nargs="+", type=int)
    parser.add_argument("--precision", nargs="+")
    parser.add_argument("--size", type=int)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--contiguous", dest="channels_last", action="store_false")
    parser.add_argument("--machine", default=os.environ.get("MACHINE") or platform.machine())
    parser.add_argument("-o", "--output", type=Path, help="gpu.json beside this file on a GPU")
    parser.add_argument("--readme", type=Path, default=README, help="gets the table, on a GPU")
    options = parser.parse_args(arguments)
    if options.table is not None:
        print(table_of(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if is_cuda else torch.device("cpu")
    if not is_cuda:
        print("no CUDA device: small sizes on the CPU, which say nothing about a GPU", flush=True)
    options.model = options.model or (list(MODELS) if is_cuda else ["resnet18"])
    options.engine = options.engine or (
        ["eager", "compile", "cudagraphs"] if is_cuda else ["eager"]
    )
    options.batch = options.batch or ([1, 32, 256] if is_cuda else [1])
    options.precision = options.precision or (["bf16", "fp16"] if is_cuda else ["fp32"])
    options.size = options.size or (224 if is_cuda else 64)
    options.output = options.output or (RESULTS if is_cuda else None)
    results: dict[str, Any] = {
        "machine": torch.cuda.get_device_name(device) if is_cuda else f"{options.machine} (CPU)",
        "torch": f"torch {torch.__version__}",
        "is_gpu": is_cuda,
        "entries": [],
    }
    if options.output is not None:
        results["entries"] = earlier(options.output, results)
    done = {(entry["model"], entry["block"]) for entry in results["entries"]}
    for name in options.model:
        for block in options.block:
            if (name, block) in done:
                continue
            results["entries"].append(measure(name, block, options, device))
            if options.output is not None:  # after each: what is measured is kept
                options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if is_cuda:
        write_readme(results, options.readme)
    print(table_of(results))


if __name__ == "__main__":
    main()
