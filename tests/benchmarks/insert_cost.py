"""What `attnsurgeon insert` costs over a plain script that builds the network and saves it.

    python tests/benchmarks/insert_cost.py --model resnet50 --runs 5

Targets: time at most 1.5 x for resnet50; peak memory at most 1.3 x for regnet_y_128gf.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from processes import compare, program

PLAIN = """
import torchvision
from safetensors.torch import save_file

save_file(torchvision.models.{model}(weights=None).state_dict(), "plain.safetensors")
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--block", default="se")
    parser.add_argument("--runs", type=int, default=5)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def clean() -> None:
            for file in folder.glob("*.safetensors"):
                file.unlink()

        insert = ["insert", wanted.model, "--block", wanted.block, "--weights", "none"]
        plain = PLAIN.format(model=wanted.model)
        compare([program(), *insert], plain, folder, wanted.runs, clean)


if __name__ == "__main__":
    main()
