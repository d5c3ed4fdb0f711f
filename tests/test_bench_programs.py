"""A program of torch.export is timed as it lies on the disk, with its gates open."""

import pytest
import torch

import attnsurgeon
from attnsurgeon.bench import engines, targets
from attnsurgeon.bench.cost import count_cost
from attnsurgeon.bench.ready import gates_doubt
from attnsurgeon.cost import multiply_adds
from attnsurgeon.errors import BadFile, BadOption
from attnsurgeon.export import _metadata
from attnsurgeon.export.format import Settings, format_for
from attnsurgeon.export.proof import gate_values
from tests import exports


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Return the program of the tiny network, with free axes."""
    return written(tmp_path_factory.mktemp("programs") / "tiny.pt2", Settings())


def written(path, settings):
    """Write what export writes, without the proof, which is tested elsewhere."""
    model = exports.tiny()
    images = (torch.zeros(2 if settings.dynamic else 1, 3, 32, 32),)
    draft = format_for(path).draft(model, images, settings, _metadata(model, images))
    draft.write(path, gate_values(model))
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


def test_what_it_costs_and_whether_its_attention_is_there(program):
    (target,) = targets.read_targets([program])
    inputs = (torch.randn(2, 3, 32, 40),)
    cost = count_cost(target, inputs)
    norms = (m for m in exports.tiny().modules() if isinstance(m, torch.nn.BatchNorm2d))
    folded = sum(norm.weight.numel() for norm in norms)  # their biases are the convolutions'
    assert cost.parameters == sum(p.numel() for p in exports.tiny().parameters()) - folded
    assert cost.macs == multiply_adds(exports.tiny(), (inputs[0][:1],))
    with torch.no_grad():
        assert gates_doubt(target, inputs, [target.module(*inputs)]) is None
        assert "folded" in gates_doubt(target, inputs, [exports.tiny()(*inputs)])


def test_axes_that_it_fixes(tmp_path):
    path = written(tmp_path / "x.pt2", Settings(dynamic=False))
    with pytest.raises(BadOption, match=r"takes batches of 1 only, not 2; give --batch 1"):
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
