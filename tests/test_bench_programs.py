"""A program of torch.export is timed as it lies on the disk, with its gates open."""

import json

import pytest
import torch

import attnsurgeon
from attnsurgeon.bench import engines, targets
from attnsurgeon.errors import BadFile, BadOption
from tests import exports


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Return the program of the tiny network, with free axes."""
    path = tmp_path_factory.mktemp("programs") / "tiny.pt2"
    attnsurgeon.export_model(exports.tiny(), path, example=exports.EXAMPLE)
    return path


def test_its_gates_are_open(program, tmp_path):
    (target,) = targets.read_targets([program])
    assert target.gates == tuple(attnsurgeon.gates(exports.tiny()))
    assert target.example[0].shape == (1, 3, 32, 32)
    inputs = (torch.randn(2, 3, 32, 40),)
    place = engines.Place(torch.device("cpu"), 1, tmp_path)
    runner = engines.get("eager").prepare(target, inputs, place)
    (model,) = targets.read_targets([exports.tiny()], exports.EXAMPLE)[1:]
    with torch.inference_mode():
        found = runner.call()
        assert torch.allclose(found, model.module(*inputs), atol=1e-6)
        assert not torch.allclose(found, exports.tiny()(*inputs))
        runner.move()
        assert torch.equal(runner.call(), found)


def test_on_the_command_line(run, program):
    outcome = run("bench", program, "--seconds", "0.1", "--json")
    (timing,) = json.loads(outcome.out)["runs"]
    assert (timing["engine"], timing["weights"]) == ("eager", "file")
    assert timing["parameters"] == sum(p.numel() for p in exports.tiny().parameters())
    assert timing["doubts"] == [d for d in timing["doubts"] if not d.startswith("folded")]


def test_axes_that_it_fixes(tmp_path):
    path = tmp_path / "x.pt2"
    attnsurgeon.export_model(exports.tiny(), path, static=True)
    with pytest.raises(BadOption, match=r"takes inputs of 1x3x32x32 only, not 2x3x32x32"):
        attnsurgeon.compare_speed([path], batches=(2,))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engines": ("onnxruntime",)}, "cannot run on onnxruntime; give --engine eager"),
        ({"precisions": ("bf16",)}, "holds fp32 numbers and cannot be timed in bf16"),
        ({"train": True}, "was exported for inference; leave it or --train out"),
    ],
)
def test_what_it_cannot_do(program, options, words):
    with pytest.raises(BadOption, match=words):
        attnsurgeon.compare_speed([program], **options)


def test_no_program(tmp_path):
    (tmp_path / "x.pt2").write_bytes(b"no zip file")
    with pytest.raises(BadFile, match=r"x\.pt2' is no program of torch\.export"):
        attnsurgeon.compare_speed([tmp_path / "x.pt2"])
