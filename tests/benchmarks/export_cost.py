"""What `attnsurgeon export` costs, all checks included, over a plain script that exports.

    python tests/benchmarks/export_cost.py --model resnet50 --runs 3

Target: time at most 1.6 x. The network of `insert --block se` is exported, and the plain script
exports the untouched network by torch.onnx.export(dynamo=True), unchecked.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

from processes import compare, program

PLAIN = """
import torch
import torchvision

model = torchvision.models.{model}(weights=None).eval()
torch.onnx.export(model, (torch.randn(1, 3, 224, 224),), "plain.onnx", dynamo=True)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--block", default="se")
    parser.add_argument("--runs", type=int, default=3)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def clean() -> None:
            for file in folder.glob("*.onnx*"):
                file.unlink()

        host = ["insert", wanted.model, "--block", wanted.block, "--weights", "none"]
        subprocess.run(
            [program(), *host, "-o", "host.safetensors"],
            cwd=folder,
            check=True,
            capture_output=True,
        )
        export = [program(), "export", "host.safetensors", "-o", "ours.onnx"]
        compare(export, PLAIN.format(model=wanted.model), folder, wanted.runs, clean)


if __name__ == "__main__":
    main()
