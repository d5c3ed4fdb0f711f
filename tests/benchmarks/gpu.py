"""What attention costs on a GPU, and that it changes nothing there; torch's engines alone.

    python tests/benchmarks/gpu.py -o gpu.json          # one NVIDIA GPU; an hour with all of it
    python tests/benchmarks/gpu.py --model resnet50 --block se --batch 32 --seconds 2 -o gpu.json
    python tests/benchmarks/gpu.py --table gpu.json     # the table of the README

Each block is timed against the plain host and against timm's module at the same places, where timm
is installed. First it is checked in each precision, TF32 off and on, and under autocast, that the
output is bitwise the host's and that every gate moves it. Without a GPU it runs on the CPU at small
sizes, and says so: such figures say nothing about a GPU.
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
PLACEMENTS = {"sk": ("replace",)}
"""Others are put where the papers put them, or else after the block."""
USUAL = ("standard", "post")
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
        other = _timm_selective(block) if cut.block == "sk" else made[cut.block](_channels(cut))
        if other is None:
            return None
        setattr(block, name, other)
    return twin.eval()


def _channels(cut: Cut) -> int:
    return int(cut.place.channels)


def _timm_selective(block: nn.Module) -> nn.Module | None:
    """Return timm's SK for a bottleneck of torchvision, whose own 3x3 is taken out."""
    from timm.layers.selective_kernel import SelectiveKernel

    conv = getattr(block, "conv2", None)
    if not isinstance(conv, nn.Conv2d) or not hasattr(block, "conv3"):
        return None
    block.conv2, block.bn2 = nn.Identity(), nn.Identity()  # timm's holds a 3x3 of its own
    return TimmSelective(
        SelectiveKernel(
            conv.in_channels,
            conv.out_channels,
            stride=conv.stride[0],
            groups=conv.groups,
            split_input=False,
        )
    )


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
    dead = [n for n, gate in gates.items() if gate.grad is None or not bool(gate.grad.any())]
    return {"exact": exact, "gates": len(gates), "dead": len(dead)}


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
    report = attnsurgeon.bench.compare_speed(
        sides,
        engines=options.engine,
        device=str(device),
        batches=options.batch,
        precisions=options.precision,
        channels_last=options.channels_last,
        seconds=options.seconds,
        example=image,
        progress=lambda text, share: print(f"{name} {block} {share:4.0%} {text}", flush=True),
    )
    placement = cuts_of(operated)[0].placement
    return {
        "model": name,
        "block": block,
        "placement": placement,
        "checks": checks,
        "rows": list(_rows(report, len(sides), _extra_bytes(operated, placement, block))),
        "failures": [failure.to_json() for failure in report.failures],
        "environment": dict(report.environment),
    }


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


def print_table(results: dict[str, Any]) -> None:
    """Print the table of the README."""
    print(f"Measured on {results['machine']}, {results['torch']}:\n")
    print("| network | block | run | ours | timm | of the least | unchanged, alive |")
    print("|---|---|---|--:|--:|--:|---|")
    for entry in results["entries"]:
        if "skipped" in entry:
            continue
        checks = entry["checks"]
        held = all(check["exact"] and not check["dead"] for check in checks)
        for row in entry["rows"]:
            ours, least = row["ours"]["ratio"] - 1, row["least_ratio"]
            timm = f"{100 * (row['timm']['ratio'] - 1):+.1f} %" if row["timm"] else ""
            share = f"{ours / (least - 1):.2f} ×" if least else ""
            print(
                f"| {entry['model']} | {entry['block']} | {row['engine']}, {row['precision']}, "
                f"batch {row['batch']} | {100 * ours:+.1f} % | {timm} | {share} | "
                f"{'yes' if held else 'NO'} |"
            )


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
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    if options.table is not None:
        print_table(json.loads(options.table.read_text(encoding="utf-8")))
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
    results: dict[str, Any] = {
        "machine": torch.cuda.get_device_name(device) if is_cuda else f"{options.machine} (CPU)",
        "torch": f"torch {torch.__version__}",
        "is_gpu": is_cuda,
        "entries": [],
    }
    for name in options.model:
        for block in options.block:
            results["entries"].append(measure(name, block, options, device))
            if options.output is not None:  # after each: what is measured is kept
                options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_table(results)


if __name__ == "__main__":
    main()
