"""Exports are proven from disk: every wrong answer planted here is caught, and nothing is left."""

import copy
import json
from dataclasses import replace
from itertools import pairwise

import onnx
import pytest
import torch
from torch import nn

import attnsurgeon
from attnsurgeon.errors import (
    BadOption,
    ExportDiffers,
    ExportRefused,
    HostUnusable,
    MissingPackage,
    UnknownName,
)
from attnsurgeon.export import onnx as onnx_format
from attnsurgeon.export import onnx_file, torchscript
from attnsurgeon.export.format import format_for
from attnsurgeon.export.proof import (
    TOLERANCES,
    compare_outputs,
    gate_values,
    opened_values,
    run_with_gates,
)
from attnsurgeon.host import load_host
from attnsurgeon.plan import make_plan
from attnsurgeon.recipe import Recipe
from attnsurgeon.surgery import apply_plan
from tests import hosts

SUFFIXES = [".onnx", ".pt"]


@pytest.fixture(scope="module")
def operated():
    return attnsurgeon.insert_attention(
        load_host("digits"), "se", reduction=4, example=torch.zeros(1, 3, 32, 32)
    )


def state_of(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_file_alone_computes_what_the_model_computes(operated, tmp_path, suffix):
    before, modes = state_of(operated), [m.training for m in operated.modules()]
    artifact = attnsurgeon.export_model(operated, tmp_path / f"x{suffix}")
    assert artifact.bytes == (tmp_path / f"x{suffix}").stat().st_size
    run = format_for(artifact.output).open(tmp_path / f"x{suffix}")
    for batch, size in ((1, 32), (4, 48), (7, 40)):
        image = torch.randn(batch, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(run((image,))[0], operated(image), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, before[key]) for key, tensor in operated.state_dict().items())
    assert modes == [m.training for m in operated.modules()]
    assert list(tmp_path.iterdir()) == [tmp_path / f"x{suffix}"]


def test_artifact_json(operated, tmp_path):
    data = attnsurgeon.export_model(operated, tmp_path / "x.onnx").to_json()
    assert data.keys() == {"output", "format", "bytes", "opset", "dynamic", "checks"}
    assert [check["gates"] for check in data["checks"]] == ["closed"] * 3 + ["open"] * 3
    assert data["checks"][0].keys() == {
        "gates",
        "batch",
        "size",
        "max_abs",
        "max_rel",
        "cosine",
        "top1_agreement",
        "passed",
    }
    json.dumps(data, allow_nan=False)


def test_the_attention_stays_in_the_graph(operated, tmp_path):
    attnsurgeon.export_model(operated, tmp_path / "x.onnx")
    graph = onnx.load(tmp_path / "x.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("Sigmoid") == len(attnsurgeon.gates(operated))


def test_what_a_deployer_needs_is_in_the_file(operated, tmp_path):
    attnsurgeon.export_model(operated, tmp_path / "x.onnx")
    model = onnx.load(tmp_path / "x.onnx")
    props = {prop.key: prop.value for prop in model.metadata_props}
    recipe = Recipe.loads(props["attnsurgeon"], "x.onnx")
    assert recipe.host.name == "digits"
    assert len(recipe.cuts) == len(attnsurgeon.gates(operated))
    assert json.loads(props["classes"]) == [str(i) for i in range(10)]
    assert len(json.loads(props["mean"])) == len(json.loads(props["std"])) == 3
    (image,) = model.graph.input
    dims = [dim.dim_param or dim.dim_value for dim in image.type.tensor_type.shape.dim]
    assert (image.name, dims) == ("input", ["batch", 3, "height", "width"])


@pytest.mark.parametrize("opset", [18, 20, 22])
def test_the_opset_is_the_one_asked_for(operated, tmp_path, opset):
    artifact = attnsurgeon.export_model(operated, tmp_path / "x.onnx", opset=opset)
    assert artifact.opset == opset
    (imported,) = onnx.load(tmp_path / "x.onnx").opset_import
    assert imported.version == opset


def test_static_fixes_the_axes(operated, tmp_path):
    artifact = attnsurgeon.export_model(operated, tmp_path / "x.onnx", static=True)
    assert not artifact.dynamic
    fixed = onnx_format.Onnx().open(tmp_path / "x.onnx").fixed_axes
    assert fixed == ("input.batch", "input.height", "input.width")


def test_input_size(operated, tmp_path):
    artifact = attnsurgeon.export_model(operated, tmp_path / "x.pt", input_size=(40, 56))
    assert artifact.checks[0].size == (40, 56)


def test_trained_gates_are_checked_as_they_are(operated, tmp_path):
    trained = copy.deepcopy(operated)
    for gate in attnsurgeon.gates(trained).values():
        gate.data.fill_(0.3)
    artifact = attnsurgeon.export_model(trained, tmp_path / "x.onnx")
    assert {check.gates for check in artifact.checks} == {"open"}
    run = onnx_format.Onnx().open(tmp_path / "x.onnx")
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(run((image,))[0], trained(image), rtol=1e-4, atol=1e-4)


def edit_onnx(path, edit):
    model = onnx.load(path)
    edit(model.graph)
    onnx.save(model, path)


def shift_a_weight(graph):
    weights = max(graph.initializer, key=lambda tensor: len(tensor.raw_data))
    array = onnx.numpy_helper.to_array(weights).copy()
    array.flat[::2] *= 1.05
    weights.CopyFrom(onnx.numpy_helper.from_array(array, weights.name))


def flatten_attention(graph):
    for tensor in graph.initializer:
        if "excite" in tensor.name:
            array = onnx.numpy_helper.to_array(tensor) * 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def fix_the_batch(graph):
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def cross_two_gates(graph):
    first, second = [t.name for t in graph.initializer if t.name.endswith("gate.openness")][:2]
    other = {first: second, second: first}
    for node in graph.node:
        node.input[:] = [other.get(name, name) for name in node.input]


def crossed(gates):
    names = list(gates)
    return {a: gates[b] for a, b in zip(names, names[1:] + names[:1], strict=True)}


class Planted:
    """Spoil what a draft writes; tells which gates the first refused check had."""

    @staticmethod
    def after_writing(monkeypatch, edit):
        write = onnx_format._OnnxDraft.write

        def spoiled(self, path, gates):
            write(self, path, gates)
            edit_onnx(path, edit)

        monkeypatch.setattr(onnx_format._OnnxDraft, "write", spoiled)

    @staticmethod
    def gates(monkeypatch, draft):
        write = draft.write
        monkeypatch.setattr(
            draft, "write", lambda self, path, gates: write(self, path, crossed(gates))
        )

    @staticmethod
    def axes(monkeypatch, kind):
        opened = kind.open

        def turned(self, path, gates=None):
            file = opened(self, path, gates)
            return replace(file, run=lambda inputs: file.run((inputs[0].transpose(2, 3),)))

        monkeypatch.setattr(kind, "open", turned)


def refused(operated, path):
    with pytest.raises(ExportDiffers) as caught:
        attnsurgeon.export_model(operated, path)
    assert caught.value.exit_code == 4
    assert list(path.parent.iterdir()) == []
    return str(caught.value)


class TestWrongAnswersAreCaught:
    def test_a_wrong_constant(self, operated, tmp_path, monkeypatch):
        Planted.after_writing(monkeypatch, shift_a_weight)
        assert "gates closed" in refused(operated, tmp_path / "x.onnx")

    def test_broken_attention_behind_a_closed_gate(self, operated, tmp_path, monkeypatch):
        Planted.after_writing(monkeypatch, flatten_attention)
        assert "gates open" in refused(operated, tmp_path / "x.onnx")

    def test_a_gate_wired_to_the_wrong_block(self, operated, tmp_path, monkeypatch):
        Planted.after_writing(monkeypatch, cross_two_gates)
        assert "gates open" in refused(operated, tmp_path / "x.onnx")

    @pytest.mark.parametrize(
        ("suffix", "draft"),
        [(".onnx", onnx_format._OnnxDraft), (".pt", torchscript._ScriptDraft)],
    )
    def test_trained_gates_written_to_the_wrong_block(
        self, operated, tmp_path, monkeypatch, suffix, draft
    ):
        trained = copy.deepcopy(operated)
        for i, gate in enumerate(attnsurgeon.gates(trained).values()):
            gate.data.fill_(0.2 + 0.1 * i)
        Planted.gates(monkeypatch, draft)
        assert "gates open" in refused(trained, tmp_path / f"x{suffix}")

    @pytest.mark.parametrize(
        ("suffix", "kind"), [(".onnx", onnx_format.Onnx), (".pt", torchscript.TorchScript)]
    )
    def test_a_swapped_axis(self, operated, tmp_path, monkeypatch, suffix, kind):
        Planted.axes(monkeypatch, kind)
        assert "differs" in refused(operated, tmp_path / f"x{suffix}")

    def test_a_dynamic_axis_that_came_out_fixed(self, operated, tmp_path, monkeypatch):
        Planted.after_writing(monkeypatch, fix_the_batch)
        assert "input.batch came out fixed" in refused(operated, tmp_path / "x.onnx")

    def test_an_axis_that_is_fixed_without_saying_so(self, operated, tmp_path, monkeypatch):
        Planted.after_writing(monkeypatch, fix_the_batch)
        monkeypatch.setattr(onnx_file.OnnxFile, "fixed_axes", ())
        assert "max_rel inf" in refused(operated, tmp_path / "x.onnx")

    def test_an_axis_fixed_by_the_exporter(self, operated, tmp_path, monkeypatch):
        export = onnx_format._export
        monkeypatch.setattr(
            onnx_format, "_export", lambda model, inputs, dynamic: export(model, inputs, False)
        )
        refused(operated, tmp_path / "x.onnx")

    def test_an_existing_file_survives_a_failed_export(self, operated, tmp_path, monkeypatch):
        Planted.after_writing(monkeypatch, shift_a_weight)
        (tmp_path / "x.onnx").write_bytes(b"precious")
        with pytest.raises(ExportDiffers):
            attnsurgeon.export_model(operated, tmp_path / "x.onnx", force=True)
        assert (tmp_path / "x.onnx").read_bytes() == b"precious"


class TestComparer:
    def test_equal(self):
        x = torch.randn(4, 10)
        assert compare_outputs([x], [x.clone()], 1e-4) == (0.0, 0.0, pytest.approx(1.0), 1.0, True)

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda x: x + 1e-3 * x.abs().max(),
            lambda x: x.flip(1),
            lambda x: x[:, :5],
            lambda x: x * float("nan"),
            lambda x: torch.where(x == x.max(), torch.inf, x),
            lambda x: -x,
            lambda x: x * 0,
        ],
    )
    def test_wrong(self, wrong):
        x = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
        assert not compare_outputs([x], [wrong(x)], 1e-4)[-1]
        assert not compare_outputs([x], [], 1e-4)[-1]

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_any_scale(self, scale):
        x = torch.randn(4, 10, dtype=torch.float64) * scale
        assert compare_outputs([x], [x.clone()], 1e-4)[2:] == (pytest.approx(1.0), 1.0, True)
        assert not compare_outputs([x], [x.flip(1)], 1e-4)[-1]
        assert not compare_outputs([x], [x * 0], 1e-4)[-1]
        assert not compare_outputs([x * 0], [x], 1e-4)[-1]

    def test_nan_on_both_sides_is_no_agreement(self):
        x = torch.full((2, 3), float("nan"))
        assert not compare_outputs([x], [x], 1e-4)[-1]

    def test_top1(self):
        x = torch.eye(4)
        assert compare_outputs([x], [x.flip(1)], 1e-4)[3] == 0.0


@pytest.mark.parametrize("name", hosts.NAMES)
def test_each_gate_wired_wrongly_is_noticed(name):
    """Two neighbours exchanged, or one attention left out: the opened check sees it."""
    model = copy.deepcopy(hosts.host(name))
    plan = make_plan(model, hosts.sites(name), "se", every=3)
    apply_plan(model, plan)
    image = (hosts.image(1),)
    opened = opened_values(model, image)
    expected = run_with_gates(model, opened, image)
    near = sorted(opened, key=lambda path: opened[path].item())
    assert len({value.item() for value in opened.values()}) == len(near) > 1
    wrong = [{**opened, path: torch.zeros(1)} for path in near]
    wrong += [{**opened, a: opened[b], b: opened[a]} for a, b in pairwise(near)]
    for gates in wrong:
        found = run_with_gates(model, gates, image)
        assert not compare_outputs(expected, found, TOLERANCES[torch.float32])[-1]


def test_hidden_gates_are_opened_until_it_shows(operated):
    """A branch behind a tiny layer scale would hide whatever its attention computes."""
    hidden = copy.deepcopy(operated)
    paths = list(attnsurgeon.gates(hidden))
    weak = hidden.get_submodule(paths[1].removesuffix(".gate.openness"))
    nn.init.constant_(weak.excite.bias, 12.0)  # a map of nearly 1
    weak.excite.weight.data.mul_(1e-3)
    image = (torch.randn(1, 3, 32, 32),)
    assert max(v.max() for v in opened_values(operated, image).values()) <= 1
    opened = opened_values(hidden, image)
    assert [path for path, value in opened.items() if value.item() > 1] == [paths[1]]
    assert all(not value.any() for value in gate_values(hidden).values())
    assert not any(p.grad is not None for p in hidden.parameters())


def test_a_check_that_could_not_fail_is_refused(operated, tmp_path):
    """Where attention moves no output, an opened file would agree whatever it computes."""
    silent = copy.deepcopy(operated)
    for parameter in silent.classifier.parameters():
        parameter.data.zero_()
    with pytest.raises(ExportRefused, match="moves no output visibly"):
        attnsurgeon.export_model(silent, tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []


class TestRefused:
    def test_unknown_suffix(self, operated, tmp_path):
        with pytest.raises(UnknownName, match="did you mean"):
            attnsurgeon.export_model(operated, tmp_path / "x.onx")

    @pytest.mark.parametrize("size", [(0, 32), (32, 10**6)])
    def test_size_out_of_range(self, operated, tmp_path, size):
        with pytest.raises(BadOption, match="--input-size must be 1 to"):
            attnsurgeon.export_model(operated, tmp_path / "x.onnx", input_size=size)

    @pytest.mark.parametrize("opset", [0, 17, 99])
    def test_opset(self, operated, tmp_path, opset):
        with pytest.raises(BadOption, match="--opset must be 18"):
            attnsurgeon.export_model(operated, tmp_path / "x.onnx", opset=opset)

    def test_opset_of_torchscript(self, operated, tmp_path):
        with pytest.raises(ExportRefused, match="--opset is for .onnx"):
            attnsurgeon.export_model(operated, tmp_path / "x.pt", opset=18)

    def test_too_small(self, tmp_path):
        model = load_host("alexnet", weights="none")
        with pytest.raises(HostUnusable, match="8x8"):
            attnsurgeon.export_model(model, tmp_path / "x.onnx", input_size=(8, 8))

    def test_too_large_for_one_file(self, operated, tmp_path, monkeypatch):
        monkeypatch.setattr(onnx_format, "MOST_BYTES", 2**19)
        with pytest.raises(ExportRefused, match="export it to .pt"):
            attnsurgeon.export_model(operated, tmp_path / "x.onnx")

    @pytest.mark.parametrize("bad", ["0.5.0", "0.5.6"])
    def test_known_bad_onnxscript(self, operated, tmp_path, monkeypatch, bad):
        monkeypatch.setattr(onnx_format, "version", lambda name: bad)
        with pytest.raises(MissingPackage, match=f"onnxscript {bad}.*pip install"):
            attnsurgeon.export_model(operated, tmp_path / "x.onnx")


def test_a_network_that_cannot_be_scripted_is_traced(tmp_path):
    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.blocks = nn.ModuleDict({"a": nn.Conv2d(8, 8, 3, padding=1)})

        def forward(self, x, *unused):
            x = self.conv(x)
            return (x + self.blocks["a"](x)).mean((2, 3))

    artifact = attnsurgeon.export_model(
        Opaque(), tmp_path / "x.pt", example=torch.zeros(1, 3, 32, 32)
    )
    assert any("traced" in notice for notice in artifact.notices)
    assert all(check.passed for check in artifact.checks)


def test_the_deprecation_is_told_once(operated, tmp_path):
    notices = attnsurgeon.export_model(operated, tmp_path / "x.pt").notices
    assert sum("deprecated" in notice for notice in notices) == 1
