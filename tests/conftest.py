"""What every test may ask for: the command line in this process, and operated files."""

import gc
import os
import re
from dataclasses import dataclass

# Before torch is imported: each worker of pytest-xdist, and what it starts, computes on one thread.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from typer.testing import CliRunner

from attnsurgeon.cli import app
from attnsurgeon.export.fresh import ready_process
from attnsurgeon.export.onnx import write_onnx
from attnsurgeon.export.torchscript import make_torchscript
from tests.networks import SIZES, Tiny

TERMINAL = ("FORCE_COLOR", "NO_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "COLUMNS")
PROGRESS = re.compile(r"(loading|watching|inserting|writing|translating|checking) \S")


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def error(self):
        """The one error line, after nothing but progress; any other form of failing is none."""
        *progress, last = self.err.splitlines()
        assert last.startswith("error: "), self.err
        assert all(PROGRESS.match(line) for line in progress), self.err
        return last


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


class _Anything:
    """Holds whatever one asks for."""

    def __contains__(self, _):
        return True


@pytest.fixture(autouse=True)
def _engines_are_warm(monkeypatch):
    """Let no test be the one in which an engine is started: what it counts would hang on that."""
    monkeypatch.setattr("attnsurgeon.bench.warmup._warm", _Anything())


@pytest.fixture(scope="session", autouse=True)
def _imports_are_no_garbage():
    """Look for garbage among what tests make, and as seldom as the command line does.

    A million objects that imports left would be searched by each race of the bench, which takes
    half of its tests' time.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _one_process_for_files(_one_thread):
    """Open the .pt and .pt2 files of all exports in one process, which imports torch once."""
    with ready_process("torch"):
        yield


@pytest.fixture(scope="session", autouse=True)
def _surroundings(tmp_path_factory):
    """Hide the caller's terminal settings and downloaded weights."""
    with pytest.MonkeyPatch.context() as patch:
        for name in TERMINAL:
            patch.delenv(name, raising=False)
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch-home")))
        yield


def run_command(*args):
    """Run the command line in this process; a bug comes out as the exception it is."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


@pytest.fixture(scope="session")
def run():
    """Return the function that runs the command line."""
    return run_command


def _operated(tmp_path_factory, *args):
    file = tmp_path_factory.mktemp("operated") / "operated.safetensors"
    outcome = run_command("insert", *args, "-o", file)
    assert outcome.code == 0, outcome.err
    return file


@pytest.fixture(scope="session")
def operated_file(tmp_path_factory):
    """Return resnet18 with random weights and SE at every block, as `insert` saved it."""
    return _operated(tmp_path_factory, "resnet18", "--weights", "none", "--block", "se")


@pytest.fixture(scope="session")
def digits_file(tmp_path_factory):
    """Return the trained digits network with SE at the blocks of stage 2: small and fast."""
    return _operated(tmp_path_factory, "digits", "--block", "se", "--stage", "2")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return an empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    """Return every path below a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(run, folder):
    """Return a function that runs a command which must refuse: one line, exit 2, nothing done."""

    def check(*args, says=(), at_once=False):
        before = contents(folder)
        outcome = run(*args)
        assert not at_once or outcome.err == f"{outcome.error}\n"  # before any work
        assert (outcome.code, outcome.out) == (2, ""), outcome
        assert contents(folder) == before
        missing = [text for text in says if text not in outcome.error]
        assert not missing, f"{missing} not in {outcome.error}"
        return outcome.error

    return check


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory):
    """Return the .onnx file of a network that is soon run."""
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    write_onnx(Tiny().eval(), (torch.randn(2, 3, 20, 24),), path)
    return path


@pytest.fixture(scope="session")
def tiny_script(tmp_path_factory):
    """Return its TorchScript file, which tells its input size."""
    path = tmp_path_factory.mktemp("script") / "tiny.pt"
    module = make_torchscript(Tiny().eval(), (torch.randn(2, 3, 20, 24),))
    module.save(str(path), _extra_files={"input_size": SIZES})
    return path
