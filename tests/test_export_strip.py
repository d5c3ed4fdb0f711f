"""`--strip`: what gates at 0 and 1 make superfluous is left out, and nothing else."""

import copy

import onnx
import pytest
import torch

import attnsurgeon
from attnsurgeon.errors import ExportRefused, IdentityBroken
from attnsurgeon.export.strip import strip_decided
from tests import exports


def with_gates(*values):
    model = copy.deepcopy(exports.tiny())
    for gate, value in zip(attnsurgeon.gates(model).values(), values, strict=True):
        gate.data.fill_(value)
    return model


IMAGE = (torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),)


@pytest.mark.parametrize(
    ("values", "left", "blocks"),
    [((0, 0, 0), 0, 0), ((1, 1, 1), 0, 3), ((0, 1, 0.5), 1, 2), ((0, 0.4, 0.5), 2, 2)],
)
def test_what_is_left(values, left, blocks):
    model = with_gates(*values)
    bare, told = strip_decided(model, IMAGE)
    assert len(attnsurgeon.gates(bare)) == left
    assert sum("squeeze.weight" in key for key in bare.state_dict()) == blocks
    with torch.no_grad():
        assert torch.equal(bare(*IMAGE), model(*IMAGE))
    assert f"{values.count(0)} dropped" in told
    assert f"{values.count(1)} freed" in told
    assert [gate.item() for gate in attnsurgeon.gates(model).values()] == pytest.approx(values)


def test_undecided_gates_stay():
    model = with_gates(0.1, 0.5, 0.999)
    bare, told = strip_decided(model, IMAGE)
    assert bare is model
    assert "nothing was stripped" in told


def test_layers_that_are_gates_have_no_1():
    model = attnsurgeon.insert_attention(
        exports.Tiny().eval(), "se", gate="layer", example=exports.EXAMPLE, reduction=4
    )
    for parameter in list(attnsurgeon.gates(model).values())[:2]:
        parameter.data.fill_(1)
    bare, told = strip_decided(model, IMAGE)
    assert "2 dropped" in told
    assert "0 freed" in told
    assert len(attnsurgeon.gates(bare)) == 2


def test_a_term_that_0_does_not_silence():
    model = with_gates(0, 1, 0.5)
    path = next(iter(attnsurgeon.gates(model))).removesuffix(".gate.openness")
    model.get_submodule(path).excite.bias.data.fill_(float("nan"))
    with pytest.raises(IdentityBroken, match="without --strip"):
        strip_decided(model, IMAGE)


def test_the_file(tmp_path):
    model = with_gates(0, 1, 0.5)
    artifact = attnsurgeon.export_model(model, tmp_path / "x.onnx", strip=True, static=True)
    graph = onnx.load(tmp_path / "x.onnx").graph
    assert sum(node.op_type == "Sigmoid" for node in graph.node) == 2
    gates = [tensor.name for tensor in graph.initializer if tensor.name.endswith(".openness")]
    assert gates == list(attnsurgeon.gates(model))[2:]
    assert {check.gates for check in artifact.checks} == {"open"}
    assert "1 dropped" in artifact.notices[0]
    whole = attnsurgeon.export_model(with_gates(1, 1, 1), tmp_path / "x.pt", strip=True)
    assert [check.gates for check in whole.checks] == ["open"] * 3  # there is no gate to open


def test_code_has_all_gates(refused, digits_file, tmp_path):
    refused("export", digits_file, "-o", "m.py", "--strip", says=["not for a .py"], at_once=True)
    operated = attnsurgeon.load_model(digits_file)
    for gate in attnsurgeon.gates(operated).values():
        gate.data.fill_(1)
    with pytest.raises(ExportRefused, match="was stripped of its gates"):
        attnsurgeon.export_model(attnsurgeon.strip_gates(operated), tmp_path / "m.py")


def test_on_the_command_line(run, folder, digits_file):
    args = ("export", digits_file, "-o", "x.pt", "--static", "--strip")
    outcome = run(*args)
    assert outcome.code == 0, outcome.err
    assert "dropped, whose gates are at 0" in outcome.err
    assert "closed" in outcome.out
