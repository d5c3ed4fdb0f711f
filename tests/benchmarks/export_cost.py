"""What `attnsurgeon export` costs, all checks included, over a plain script that exports.

    python tests/benchmarks/export_cost.py --runs 3
    python tests/benchmarks/export_cost.py --block se --runs 3

Target: time at most 1.6 x. Both sides export the same network, the plain script unchecked by
torch.onnx.export(dynamo=True); with --block it is the operated one, whose file is checked
with its gates closed and opened.
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
PLAIN_OPERATED = """
import torch
import attnsurgeon

model = attnsurgeon.load_model("host.safetensors")
torch.onnx.export(model, (torch.randn(1, 3, 224, 224),), "plain.onnx", dynamo=True)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--block", help="insert this first; the untouched network by default")
    parser.add_argument("--runs", type=int, default=3)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def clean() -> None:
            for file in folder.glob("*.onnx*"):
                file.unlink()

        source = [wanted.model, "--weights", "none"]
        plain = PLAIN.format(model=wanted.model)
        if wanted.block:
            insert = [
                program(),
                "insert",
                *source,
                "--block",
                wanted.block,
                "-o",
                "host.safetensors",
            ]
            subprocess.run(insert, cwd=folder, check=True, capture_output=True)
            source, plain = ["host.safetensors"], PLAIN_OPERATED
        export = [program(), "export", *source, "-o", "ours.onnx"]
        compare(export, plain, folder, wanted.runs, clean)


if __name__ == "__main__":
    main()
