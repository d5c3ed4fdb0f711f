"""Find out whether inserted attention pays, and how its gate should open.

One command, from a checkout:

    python -m examples.study

It trains a small network of torchvision per seed on scikit-learn's digits, fine-tunes every arm of
arms.py on a harder domain of them, and leaves results.json, study.svg, table.md (what stands in
the README, with --publish) and a trained network, looked at by `attnsurgeon gates`, `show` and
`remove`, in --output. A run that was interrupted goes on where it was. Progress goes to
stderr. It takes under 25 minutes on two cores, and needs `pip install -e ".[train,plot]"`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import nn

import attnsurgeon
from attnsurgeon.outputs import atomic_output
from examples.study import data, host, run
from examples.study.afterwards import look_at
from examples.study.arms import ARMS, Arm
from examples.study.figure import draw
from examples.study.results import summarise, text

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
TRAINED = "trained.safetensors"
MARKS = ("<!-- study -->", "<!-- end of study -->")
SHOWN = "se layer"
"""The arm whose network of seed 0 is kept, for `attnsurgeon gates`, `show` and `remove`."""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("study-results"), metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--publish", action="store_true", help="exchange what README and this folder tell of it"
    )
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="only these, and plain")
    return parser.parse_args()


def one_run(folder: Path, arm: Arm, seed: int) -> dict[str, Any]:
    """Fine-tune one arm with one seed, in a process of its own."""
    accuracy, model = run.fine_tune(arm, read_host(folder, seed), data.load(), seed)
    if (arm.name, seed) == (SHOWN, 0):
        attnsurgeon.save_model(model, folder / TRAINED, force=True)
    return {"arm": arm.name, "seed": seed, "accuracy": accuracy}


def one_host(folder: Path, seed: int) -> None:
    """Train the host of a seed, unless it is there."""
    path = folder / f"host-{seed}.pt"
    if not path.exists():
        state = host.trained(data.load(), seed).state_dict()
        with atomic_output(path) as part:
            torch.save(state, part)


@functools.lru_cache(maxsize=1)
def read_host(folder: Path, seed: int) -> nn.Module:
    """Return the host of a seed: one object for all of its arms, which share what is made of it."""
    network = host.build()
    network.load_state_dict(torch.load(folder / f"host-{seed}.pt", weights_only=True))
    return network.eval()


def start_process() -> None:
    """Compute on one thread, and the same each time."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Return the runs that are done; a line that was cut off is none."""
    runs = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            runs.append(json.loads(line))
        except ValueError:
            continue
    return runs


def run_all(folder: Path, arms: list[Arm], seeds: int, processes: int) -> list[dict[str, Any]]:
    """Run what is not done yet, in as many processes, and return all runs of these arms."""
    path = folder / "runs.jsonl"
    done = {(found["arm"], found["seed"]) for found in read_runs(path)}
    left = [(a, s) for s in range(seeds) for a in arms if (a.name, s) not in done]
    left.sort(key=lambda pair: pair[0].half)  # the first half with every seed, then the second
    with ProcessPoolExecutor(processes, initializer=start_process) as pool:
        list(pool.map(one_host, [folder] * seeds, range(seeds)))
        waiting = [pool.submit(one_run, folder, arm, seed) for arm, seed in left]
        for count, future in enumerate(as_completed(waiting), 1):
            found = future.result()
            with path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(found) + "\n")
            end = found["accuracy"][-1]
            print(
                f"{count}/{len(left)} {found['arm']}, seed {found['seed']}: {100 * end:.1f} %",
                file=sys.stderr,
                flush=True,
            )
    wanted = {(arm.name, seed) for arm in arms for seed in range(seeds)}
    return [found for found in read_runs(path) if (found["arm"], found["seed"]) in wanted]


def main() -> None:
    """Train what is missing, and sum up."""
    options = parse_arguments()
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    arms = [a for a in ARMS if not options.arms or a.name in (*options.arms, "plain")]
    results = summarise(run_all(folder, arms, options.seeds, options.processes), arms)
    if (folder / TRAINED).exists():
        results |= {"shown": SHOWN, "varies": look_at(folder / TRAINED)}
    write(folder / "table.md", text(results))
    publish(results, folder)
    if options.publish:
        publish(results, HERE)
        write(README, put_between(README.read_text("utf-8"), text(results)))
    print(text(results))


def publish(results: dict[str, Any], folder: Path) -> None:
    """Write the results and their picture into a folder."""
    write(folder / "results.json", json.dumps(results) + "\n")
    draw(results, folder / "study.svg")


def write(path: Path, content: str) -> None:
    """Write a file whole or not at all."""
    with atomic_output(path, force=True) as part:
        part.write_text(content, encoding="utf-8")


def put_between(page: str, content: str) -> str:
    """Return a page with what stands between its two MARKS exchanged."""
    before, _, rest = page.partition(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{content}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"


if __name__ == "__main__":
    main()
