"""Exports are proven from disk: every wrong answer planted here is caught, and nothing is left."""

import copy
import json

import onnx
import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

import attnsurgeon
from attnsurgeon.errors import (
    BadFile,
    BadOption,
    ExportDiffers,
    ExportRefused,
    HostUnusable,
    MissingPackage,
    UnknownName,
)
from attnsurgeon.export import onnx as onnx_format
from attnsurgeon.export import onnx_draft, onnx_runtime
from attnsurgeon.export.format import format_for
from attnsurgeon.export.onnx_runtime import newest_ir, newest_opset
from attnsurgeon.export.torchscript import load_torchscript
from attnsurgeon.host import load_host
from attnsurgeon.recipe import Recipe
from tests import exports

SUFFIXES = [".onnx", ".pt", ".pt2"]


@pytest.fixture(scope="module")
def operated():
    return exports.tiny()


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


def test_what_a_deployer_needs_is_in_the_file(tmp_path):
    operated = attnsurgeon.insert_attention(load_host("digits"), "se", at="features.3")
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


@pytest.mark.parametrize("opset", [17, 18, newest_opset()])
def test_the_opset_is_the_one_asked_for(operated, tmp_path, opset, capfd):
    artifact = attnsurgeon.export_model(operated, tmp_path / "x.onnx", opset=opset, static=True)
    assert artifact.opset == opset
    assert capfd.readouterr() == ("", "")
    assert any("TorchScript-based" in notice for notice in artifact.notices) == (opset == 17)
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


class TestRefused:
    def test_unknown_suffix(self, operated, tmp_path):
        with pytest.raises(UnknownName, match="did you mean"):
            attnsurgeon.export_model(operated, tmp_path / "x.onx")

    @pytest.mark.parametrize("size", [(0, 32), (32, 10**6)])
    def test_size_out_of_range(self, operated, tmp_path, size):
        with pytest.raises(BadOption, match="--input-size must be 1 to"):
            attnsurgeon.export_model(operated, tmp_path / "x.onnx", input_size=size)

    @pytest.mark.parametrize("opset", [0, 16, newest_opset() + 1, 99])
    def test_opset(self, operated, tmp_path, opset):
        with pytest.raises(BadOption, match=f"--opset must be 17 to {newest_opset()}"):
            attnsurgeon.export_model(operated, tmp_path / "x.onnx", opset=opset)

    def test_opset_that_the_runtime_does_not_read(self, operated, tmp_path, monkeypatch):
        reads = onnx_runtime._reads
        monkeypatch.setattr(
            onnx_runtime, "_reads", lambda opset, ir: opset <= 19 and reads(opset, ir)
        )
        newest_opset.cache_clear()
        try:
            with pytest.raises(BadOption, match="--opset must be 17 to 19, not 20"):
                attnsurgeon.export_model(operated, tmp_path / "x.onnx", opset=20)
        finally:
            newest_opset.cache_clear()

    def test_opset_of_an_exporter(self, operated, tmp_path):
        with pytest.raises(BadOption, match="--exporter torchscript"):
            attnsurgeon.export_model(operated, tmp_path / "x.onnx", opset=17, exporter="dynamo")

    def test_unknown_exporter(self, operated, tmp_path):
        with pytest.raises(UnknownName, match="did you mean 'torchscript'"):
            attnsurgeon.export_model(operated, tmp_path / "x.onnx", exporter="torchscrip")

    @pytest.mark.parametrize(
        ("suffix", "setting", "says"),
        [
            (".pt", {"exporter": "dynamo"}, "--exporter is for .onnx"),
            (".pt2", {"exporter": "dynamo"}, "--exporter is for .onnx"),
            (".pt2", {"opset": 18}, "--opset is for .onnx; a .pt2 file has none"),
            (".pt2", {"optimize": True}, "--optimize freezes TorchScript"),
            (".onnx", {"optimize": True}, "--optimize freezes TorchScript"),
        ],
    )
    def test_settings_of_another_format(self, operated, tmp_path, suffix, setting, says):
        with pytest.raises(ExportRefused, match=says):
            attnsurgeon.export_model(operated, tmp_path / f"x{suffix}", **setting)

    def test_opset_of_torchscript(self, operated, tmp_path):
        with pytest.raises(ExportRefused, match="--opset is for .onnx"):
            attnsurgeon.export_model(operated, tmp_path / "x.pt", opset=18)

    def test_too_small(self, tmp_path):
        model = load_host("alexnet", weights="none")
        with pytest.raises(HostUnusable, match="8x8"):
            attnsurgeon.export_model(model, tmp_path / "x.onnx", input_size=(8, 8))

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


class Detector(exports.Tiny):
    """As detection networks are: a list of images, a list of dicts, and a branch on the data."""

    def forward(self, images):
        found = []
        for image in images:
            features = self.blocks(self.stem(image[None]))
            if bool(features.abs().sum() < 0):
                features = features * 0
            scores = self.head(features.mean((2, 3)))
            found.append({"scores": scores[0], "labels": scores.argmax(1)})
        return found


class TestExporters:
    def test_the_older_one(self, operated, tmp_path):
        artifact = attnsurgeon.export_model(operated, tmp_path / "x.onnx", exporter="torchscript")
        assert artifact.opset == 17
        assert artifact.notices == ()
        assert onnx.load(tmp_path / "x.onnx").producer_name == "pytorch"
        assert all(check.passed for check in artifact.checks)

    def test_the_older_one_where_the_newer_refuses(self, tmp_path, caplog):
        torch.manual_seed(0)
        model = Detector().eval()
        images = [torch.rand(3, 40, 48), torch.rand(3, 32, 56)]
        path = tmp_path / "x.onnx"
        with pytest.raises(ExportRefused, match="torch.export cannot take Detector"):
            attnsurgeon.export_model(model, path, example=images, exporter="dynamo")
        artifact = attnsurgeon.export_model(model, path, example=images)
        assert not [record for record in caplog.records if record.levelname != "DEBUG"]
        assert len(artifact.notices) == 1
        assert "the TorchScript-based exporter was used instead; Detector" in artifact.notices[0]
        assert "decides by values of its inputs, at test_export.py" in artifact.notices[0]
        assert {check.batch for check in artifact.checks} == {2}
        assert len({check.size for check in artifact.checks}) == 3
        scores, labels, *others = format_for(path).open(path)((images,))
        with torch.no_grad():
            first, second = model(images)
        torch.testing.assert_close(scores, first["scores"], rtol=1e-4, atol=1e-4)
        assert labels == first["labels"]
        torch.testing.assert_close(others[0], second["scores"], rtol=1e-4, atol=1e-4)

    def test_refused_by_both(self, tmp_path):
        class Listed(exports.Tiny):
            def forward(self, x):
                return super().forward(x).tolist()

        with pytest.raises(ExportRefused, match=r"torch.export cannot .*based exporter cannot"):
            attnsurgeon.export_model(Listed(), tmp_path / "x.onnx", example=exports.EXAMPLE)

    def test_what_the_tracer_takes_for_a_constant(self, tmp_path):
        class Numpy(exports.Tiny):
            def forward(self, x):
                return torch.from_numpy(super().forward(x).numpy(force=True).round(2))

        with pytest.raises(ExportDiffers, match="max_rel inf"):
            attnsurgeon.export_model(Numpy(), tmp_path / "x.onnx", example=exports.EXAMPLE)

    def test_the_format_is_one_that_the_runtime_reads(self, operated, tmp_path, monkeypatch):
        monkeypatch.setattr(onnx_draft, "newest_ir", lambda: 9)
        attnsurgeon.export_model(operated, tmp_path / "x.onnx")
        assert onnx.load(tmp_path / "x.onnx").ir_version == 9 <= newest_ir()


def test_several_inputs(tmp_path):
    class Pair(exports.Tiny):
        def forward(self, left, right):
            return {"sum": super().forward(left + right), "first": left.mean((2, 3))}

    example = (torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))
    for suffix in SUFFIXES:
        artifact = attnsurgeon.export_model(Pair().eval(), tmp_path / f"x{suffix}", example=example)
        assert [check.batch for check in artifact.checks] == [1, 2, 5]


WEIGHT = "blocks.0.attention_post.excite.weight"


class TestFrozen:
    def test_weights_are_constants(self, operated, tmp_path):
        artifact = attnsurgeon.export_model(operated, tmp_path / "x.pt", optimize=True)
        module, _ = load_torchscript(tmp_path / "x.pt")
        assert not list(module.parameters())
        assert "batch_norm" not in str(module.inlined_graph)
        assert str(module.inlined_graph).count("aten::sigmoid") == 3  # attention stays at gate 0
        assert {check.gates for check in artifact.checks} == {"closed", "open"}

    def test_broken_attention_is_caught(self, operated, tmp_path, monkeypatch):
        """A frozen file's gates are out of reach: its twin shows what is behind them."""
        freeze = torch.jit.freeze

        def spoiled(module):
            with torch.no_grad():
                dict(module.named_parameters())[WEIGHT].zero_()
            return freeze(module)

        monkeypatch.setattr(torch.jit, "freeze", spoiled)
        with pytest.raises(ExportDiffers, match="gates open"):
            attnsurgeon.export_model(operated, tmp_path / "x.pt", optimize=True)
        assert list(tmp_path.iterdir()) == []


class TestProgram:
    def test_it_holds_the_metadata(self, operated, tmp_path):
        attnsurgeon.export_model(operated, tmp_path / "x.pt2")
        notes = {"attnsurgeon": "", "input_size": ""}
        torch.export.load(tmp_path / "x.pt2", extra_files=notes)
        assert json.loads(notes["input_size"]) == [32, 32]
        assert len(Recipe.loads(notes["attnsurgeon"], "x.pt2").cuts) == 3

    def test_static_axes(self, operated, tmp_path):
        artifact = attnsurgeon.export_model(operated, tmp_path / "x.pt2", static=True)
        assert len(artifact.checks) == 2
        fixed = format_for("x.pt2").open(tmp_path / "x.pt2").fixed_axes
        assert fixed == ("x.batch", "x.height", "x.width")

    def test_a_block_in_two_places_has_its_gate_under_both_names(self, tmp_path):
        host = exports.Tiny().eval()
        host.blocks[2] = host.blocks[0]
        inserted = attnsurgeon.insert_attention(host, "se", example=exports.EXAMPLE, reduction=4)
        artifact = attnsurgeon.export_model(inserted, tmp_path / "x.pt2", example=exports.EXAMPLE)
        assert {check.gates for check in artifact.checks if check.passed} == {"closed", "open"}
        assert not any(gate.any() for gate in attnsurgeon.gates(inserted).values())

    def test_no_program(self, tmp_path):
        (tmp_path / "x.pt2").write_bytes(b"no zip file")
        with pytest.raises(BadFile, match=r"x\.pt2 is no program"):
            format_for("x.pt2").open(tmp_path / "x.pt2")


def test_fused_attention_is_traced_operator_by_operator(tmp_path, capfd):
    """torch runs its own attention as one operator in eval mode, which ONNX does not have."""
    torch.manual_seed(0)
    host = VisionTransformer(32, 16, 2, 4, 64, 128, num_classes=10).eval()
    torch.nn.init.normal_(host.heads.head.weight)
    was_fused = torch.backends.mha.get_fastpath_enabled()
    example, path = torch.zeros(1, 3, 32, 32), tmp_path / "x.onnx"
    operated = attnsurgeon.insert_attention(
        host, "se", example=example, at="encoder.layers.encoder_layer_0"
    )
    artifact = attnsurgeon.export_model(operated, path, exporter="torchscript", example=example)
    assert all(check.passed for check in artifact.checks)
    assert torch.backends.mha.get_fastpath_enabled() == was_fused
    assert capfd.readouterr().out == ""
