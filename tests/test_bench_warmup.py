"""What an engine sets up once is charged to no target."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnsurgeon import compare_speed
from attnsurgeon.bench import engines, warmup
from attnsurgeon.bench.engines import Place
from attnsurgeon.bench.targets import read_targets
from attnsurgeon.errors import EngineUnavailable
from attnsurgeon.export.torchscript import make_torchscript
from tests.networks import IMAGE, QUICK, Residual

ONE_OF_ITS_OWN = """
import json
from attnsurgeon import compare_speed
from tests.networks import IMAGE, QUICK, Residual

models = [Residual(), Residual()]
report = compare_speed(models, engines=["onnxruntime"], example=IMAGE, **QUICK)
print(json.dumps([run.peak_host_bytes for run in report.runs]))
"""


@pytest.fixture(autouse=True)
def cold(monkeypatch):
    """Let this process be one in which no engine has run yet."""
    monkeypatch.setattr(warmup, "_warm", set())


@pytest.fixture
def prepared(monkeypatch):
    """Return the names of what the eager engine is made ready for, in turn."""
    seen = []
    eager = engines.get("eager")

    def prepare(target, inputs, place):
        seen.append(target.name)
        return eager.prepare(target, inputs, place)

    known = engines.engine._registry._things
    monkeypatch.setitem(known, "eager", dataclasses.replace(eager, prepare=prepare))
    return seen


def test_it_comes_before_all_and_once(prepared):
    for _ in range(2):
        compare_speed([Residual(), Residual()], example=IMAGE, batches=(1, 2), **QUICK)
    assert prepared == ["a small network", *["Residual"] * 8]


def test_the_baseline_has_no_more_memory_than_its_twin():
    """ONNX Runtime and the exporter hold 90 MiB once they are imported."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_OF_ITS_OWN],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    baseline, twin = json.loads(done.stdout)
    if baseline is None:
        pytest.skip("this system does not tell")
    assert baseline - twin < 40 * 2**20


def test_a_step_of_training_is_another_start(prepared):
    for train in (False, True):
        compare_speed([Residual()], example=IMAGE, train=train, **QUICK)
    assert prepared == ["a small network", "Residual"] * 2


def test_an_engine_that_does_not_start_is_started_again(tmp_path):
    place, started = Place(torch.device("cpu"), 1, tmp_path), []

    def run(target, inputs):
        started.append(target.name)
        if len(started) == 1:
            raise EngineUnavailable("not yet")

    targets = read_targets([Residual()], IMAGE)
    with pytest.raises(EngineUnavailable):
        warmup.warm_up("eager", targets, (IMAGE,), place, run)
    for _ in range(2):
        warmup.warm_up("eager", targets, (IMAGE,), place, run)
    assert started == ["a small network"] * 2


def test_files_need_no_small_network(tmp_path):
    file = tmp_path / "x.pt"
    make_torchscript(Residual().eval(), (IMAGE,)).save(str(file))
    place, started = Place(torch.device("cpu"), 1, tmp_path), []

    def run(target, inputs):
        started.append((target.name, inputs))

    own = (torch.zeros(2),)
    warmup.warm_up("torchscript", read_targets([file], IMAGE), own, place, run)
    warmup.warm_up("torchscript", read_targets([file, Residual()], IMAGE), own, place, run)
    (first, given), (second, _) = started
    assert (first, second) == (str(file), "a small network")
    assert given is own
