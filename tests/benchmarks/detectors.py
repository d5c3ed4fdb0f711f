"""Export every detection network of torchvision to ONNX, proven from disk on two images.

    python tests/benchmarks/detectors.py
    python tests/benchmarks/detectors.py --names ssd300_vgg16 --block cbam

The networks are those of their names, with random weights; only the size that images are brought
to, and the number of boxes, are smaller than published, where the builder takes them. `auto` is the
exporter, so that torch.export is asked first. One line each: the exporter that made the file, the
seconds of processor that it took with all checks, the largest difference over the largest number of
the same field, and how many boxes were compared with the model's, in how many runs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torchvision.models import detection, list_models

import attnsurgeon
from attnsurgeon.export import proof
from attnsurgeon.host import load_host
from attnsurgeon.plan import make_plan
from attnsurgeon.sites import find_sites
from attnsurgeon.surgery import apply_plan

SMALL = {"min_size": 64, "max_size": 96}
FEW = {"rpn_post_nms_top_n_test": 50, "box_detections_per_img": 8}
"""Of two-stage networks: with random weights each of a hundred boxes is gone through."""
ONE = "--one"


def main() -> None:
    """Export each in a process of its own; print what was compared, and end with 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", nargs="+", default=list_models(module=detection))
    parser.add_argument("--block", default="se", help="insert this first")
    parser.add_argument("--exporter", default="auto")
    parser.add_argument("--seed", default="0", help="of the random weights")
    wanted = parser.parse_args()
    asked = wanted.block, wanted.exporter, wanted.seed
    failed = [name for name in wanted.names if not _told(name, [name, *asked])]
    print(f"{len(wanted.names) - len(failed)} of {len(wanted.names)} exported and proven")
    sys.exit(1 if failed else 0)


def _told(name: str, arguments: list[str]) -> bool:
    """Export one and print its line; tell whether it was proven."""
    quiet = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command = [sys.executable, __file__, ONE, *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet
    ) as child:
        out, errors = child.communicate()
    lines = (out if not child.returncode else errors).splitlines()
    print(f"{name:40} {lines[-1] if lines else 'it said nothing'}", flush=True)
    return not child.returncode


def _export(name: str, block: str, exporter: str, seed: str) -> str:
    """Insert attention, unproven since that takes longer, export, and say what was compared."""
    torch.manual_seed(int(seed))
    arguments = {} if name.startswith("ssd") else {**SMALL, **(FEW if "rcnn" in name else {})}
    model = load_host(name, weights="none", arguments=arguments)
    sites = find_sites(model)
    is_plain = {site.kind for site in sites} == {"layer"}  # as in VGG, where nothing is added
    apply_plan(model, make_plan(model, sites, block, kind="layer" if is_plain else None))
    with tempfile.TemporaryDirectory() as folder, _counted() as counts:
        made = attnsurgeon.export_model(
            model, Path(folder) / "x.onnx", exporter=exporter, progress=_say
        )
    worst = max(check.max_rel for check in made.checks)
    fell_back = any("TorchScript-based" in notice for notice in made.notices)
    used = os.times()
    seconds = used.user + used.system + used.children_user + used.children_system
    gates = " and ".join(dict.fromkeys(check.gates for check in made.checks))
    return (
        f"{'torchscript' if fell_back else exporter:11} {seconds:4.0f} s  max_rel {worst:.1e}  "
        f"{sum(counts)} boxes in {len(made.checks)} runs, gates {gates}, {made.bytes >> 20} MiB"
    )


def _say(text: str) -> None:
    """Tell on stderr what is being done, and the seconds of processor that were used before."""
    print(f"{time.process_time():4.0f} s  {text}", file=sys.stderr, flush=True)


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Count the boxes of the model that a file's are held against."""
    counts: list[int] = []
    run = proof.run_with_gates

    def counting(model: nn.Module, gates: Any, inputs: Any) -> Any:
        found: Any = run(model, gates, inputs)
        counts.append(sum(len(boxes) for boxes in found.field("boxes")))
        return found

    with patch("attnsurgeon.export.proof.run_with_gates", counting):  # as check_file calls it
        yield counts


if __name__ == "__main__":
    if ONE in sys.argv:
        print(_export(*sys.argv[sys.argv.index(ONE) + 1 :]))
    else:
        main()
