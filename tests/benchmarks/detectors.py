"""Export every detection network of torchvision to ONNX, proven from disk on two images.

    python tests/benchmarks/detectors.py
    python tests/benchmarks/detectors.py --names ssd300_vgg16 --block se

The networks are those of their names, with random weights; only the size that images are brought
to is smaller than published, where the builder takes one. `auto` is the exporter, so that
torch.export is asked first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

from processes import program
from torchvision.models import detection, list_models

SMALL = ("--model-arg", "min_size=96", "--model-arg", "max_size=160")


def main() -> None:
    """Export each; print what was compared."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", nargs="+", default=list_models(module=detection))
    parser.add_argument("--block", help="insert this first; the untouched network by default")
    parser.add_argument("--exporter", default="auto")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for network in wanted.names:
            print(f"{network:40} {_export(network, Path(name), wanted)}", flush=True)


def _export(name: str, folder: Path, wanted: argparse.Namespace) -> str:
    source = [name, "--weights", "none", *(() if name.startswith("ssd") else SMALL)]
    if wanted.block:
        made = folder / f"{name}.safetensors"
        insert = ["insert", *source, "--block", wanted.block, "-o", str(made)]
        done = _run(insert)
        if done.returncode:
            return done.stderr.splitlines()[-1]
        source = [str(made)]
    output = folder / f"{name}.onnx"
    done = _run(["export", *source, "-o", str(output), "--json", "--exporter", wanted.exporter])
    output.unlink(missing_ok=True)
    if done.returncode:
        return done.stderr.splitlines()[-1]
    found = json.loads(done.stdout)
    worst = max(check["max_rel"] for check in found["checks"])
    sizes = " ".join("x".join(map(str, check["size"])) for check in found["checks"])
    axes = "free" if found["dynamic"] else "fixed"
    fell_back = "TorchScript-based" in done.stderr
    return f"{found['bytes'] >> 20} MiB, axes {axes}, max_rel {worst:.1e} at {sizes}" + (
        ", torch.export refused it" if fell_back else ""
    )


def _run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    quiet = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.run(
        [program(), *arguments], capture_output=True, text=True, env=quiet, check=False
    )


if __name__ == "__main__":
    main()
