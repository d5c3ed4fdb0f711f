"""Files are run in a process that nothing of this package, and nothing of the export, can help."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import attnsurgeon
from attnsurgeon.errors import BadFile
from attnsurgeon.export import fresh
from attnsurgeon.export.format import RunFailed, format_for
from attnsurgeon.export.fresh import FreshProcess, ready_process
from tests import exports

SPY = "import os, sys\ndef build():\n    {}\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for suffix in (".pt", ".pt2"):
        path = folder / f"x{suffix}"
        attnsurgeon.export_model(exports.tiny(), path, example=exports.EXAMPLE, static=True)
    return folder


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_this_process_does_not_run_the_file(files, monkeypatch, suffix):
    def fail(*args, **kwargs):
        raise AssertionError("it was loaded here")

    monkeypatch.setattr(torch.jit, "load", fail)
    monkeypatch.setattr(torch.export, "load", fail)
    opened = format_for(f"x{suffix}").open(files / f"x{suffix}")
    (logits,) = opened((torch.zeros(1, 3, 32, 32),))
    assert logits.shape == (1, 10)


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_two_openings_do_not_share_their_gates(files, suffix):
    kind, image = format_for(f"x{suffix}"), (torch.randn(1, 3, 32, 32),)
    gates = {name: torch.full((1,), 0.5) for name in attnsurgeon.gates(exports.tiny())}
    closed = kind.open(files / f"x{suffix}")
    before = closed(image)
    opened = kind.open(files / f"x{suffix}", gates)
    assert not torch.allclose(opened(image)[0], before[0])
    assert torch.equal(closed(image)[0], before[0])


def test_this_package_cannot_be_imported_there(tmp_path):
    (tmp_path / "spy.py").write_text(SPY.format("import attnsurgeon"))
    with pytest.raises(BadFile, match=r"spy\.py cannot be run: .*attnsurgeon"):
        FreshProcess("spy.py", "open_python", str(tmp_path / "spy.py"), {"w": torch.zeros(1)})


def test_a_file_that_ends_the_process(tmp_path):
    """With one that is ready, the next file is opened in another."""
    (tmp_path / "spy.py").write_text(SPY.format("os._exit(3)"))
    held = list(fresh._ready)
    fresh._ready.clear()
    try:
        with ready_process("json"):
            with pytest.raises(BadFile, match=r"its process ended"):
                FreshProcess(
                    "spy.py", "open_python", str(tmp_path / "spy.py"), {"w": torch.ones(1)}
                )
            again = FreshProcess("x.py", "open_python", *_network(tmp_path))
            assert again((torch.ones(1, 2),))[0].shape == (1, 1)
            with pytest.raises(RunFailed, match="RuntimeError"):
                again((torch.ones(1, 3),))
    finally:
        fresh._ready.extend(held)


def _network(folder):
    (folder / "x.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(2, 1)\n")
    return str(folder / "x.py"), nn.Linear(2, 1).state_dict()


def test_no_process_is_left(tmp_path):
    held = list(fresh._ready)
    fresh._ready.clear()
    try:
        with ready_process("json"):
            (process,) = fresh._ready
            with ready_process("json"):
                assert fresh._ready == [process]
        assert fresh._ready == []
        assert process._process.poll() is not None
    finally:
        fresh._ready.extend(held)


def test_the_worker_needs_nothing_but_python(tmp_path):
    code = "import runpy; runpy.run_path(%r); import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-I", "-c", code % fresh.worker.__file__], check=True)
