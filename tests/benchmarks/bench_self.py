"""Bench a file against itself: how far the bench sees a difference where there is none.

    python tests/benchmarks/bench_self.py
    python tests/benchmarks/bench_self.py resnet18 --engine eager onnxruntime --seconds 20

On a quiet machine every interval holds 1.00 and is no wider than +-2 % within 20 s. Each line
says so or not; one interval in twenty misses 1.00 by its nature.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import attnsurgeon
from attnsurgeon.bench import Comparison, engine_names
from attnsurgeon.card import card_of
from attnsurgeon.host import load_host

BLOCK = "se"
WIDEST = 0.02
"""Half-width of the interval that the bench is to stay within."""


def write_file(name: str, folder: Path) -> Path:
    """Return a file of the network with SE in every block, random weights."""
    host = load_host(name, weights="none")
    card = card_of(host)
    operated = attnsurgeon.insert_attention(host, BLOCK, example=card.example() if card else None)
    path = folder / f"{name}_{BLOCK}.safetensors"
    attnsurgeon.save_model(operated, path)
    return path


def line(name: str, found: Comparison) -> str:
    """Return one row of the table."""
    low, high = found.interval95
    half = (high - low) / 2
    holds = "holds 1.00" if low <= 1 <= high else "misses 1.00"
    width = "narrow" if half <= WIDEST else "TOO WIDE"
    return (
        f"{name:12} {found.engine:12} {found.ratio:.4f}  [{low:.4f}, {high:.4f}]  "
        f"+-{100 * half:.2f} %  {holds}, {width}"
    )


def main() -> None:
    """Print a line for each network and engine."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("models", nargs="*", default=["resnet18", "resnet50"])
    parser.add_argument("--engine", nargs="+", default=["eager", "torchscript", "onnxruntime"],
                        choices=engine_names())  # fmt: skip
    parser.add_argument("--seconds", type=float, default=20.0, help="for each engine")
    parser.add_argument("--threads", type=int, default=None)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen.models:
            path = write_file(name, Path(folder))
            for engine in chosen.engine:
                report = attnsurgeon.compare_speed(
                    [path, path], engines=[engine], seconds=chosen.seconds, threads=chosen.threads
                )
                load = report.environment["load_average"]
                for found in report.comparisons:
                    print(f"{line(name, found)}  (load {load})", flush=True)


if __name__ == "__main__":
    main()
