"""Every wrong answer planted in a file is caught before it ships, and nothing is left."""

import copy

import pytest

import attnsurgeon
from attnsurgeon.errors import ExportDiffers
from attnsurgeon.export import onnx as onnx_format
from attnsurgeon.export import onnx_file, program, torchscript
from tests import exports
from tests.exports import Planted, cross_two_gates, fix_the_batch, flatten_attention, shift_a_weight


@pytest.fixture(scope="module")
def operated():
    return exports.tiny()


def refused(operated, path):
    with pytest.raises(ExportDiffers) as caught:
        attnsurgeon.export_model(operated, path, example=exports.EXAMPLE)
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
        [(".onnx", onnx_format.OnnxDraft), (".pt", torchscript._ScriptDraft)],
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
        assert "the batch of the onnx file's input came out fixed" in refused(
            operated, tmp_path / "x.onnx"
        )

    def test_an_axis_fixed_by_the_exporter(self, operated, tmp_path, monkeypatch):
        export = program.export_program
        monkeypatch.setattr(
            program,
            "export_program",
            lambda model, inputs, free: export(model, inputs, free=()),
        )
        refused(operated, tmp_path / "x.onnx")

    def test_an_existing_file_survives_a_failed_export(self, operated, tmp_path, monkeypatch):
        Planted.after_writing(monkeypatch, shift_a_weight)
        (tmp_path / "x.onnx").write_bytes(b"precious")
        with pytest.raises(ExportDiffers):
            attnsurgeon.export_model(
                operated, tmp_path / "x.onnx", example=exports.EXAMPLE, force=True
            )
        assert (tmp_path / "x.onnx").read_bytes() == b"precious"
