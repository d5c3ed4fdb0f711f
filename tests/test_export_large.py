"""What one ONNX file cannot hold lies in two: proven, replaced, removed and rejected together."""

import onnx
import pytest
import torch

import attnsurgeon
from attnsurgeon.bench.targets import read_targets
from attnsurgeon.errors import BadFile, ExportDiffers, OutputRefused
from attnsurgeon.export import onnx_file, verify_export
from attnsurgeon.export.onnx import Onnx
from attnsurgeon.export.onnx_file import read_file
from tests import exports


@pytest.fixture(autouse=True)
def small_messages(monkeypatch):
    """Have 4 kB stand for 2 GiB."""
    monkeypatch.setattr(onnx_file, "MOST_BYTES", 4096)


@pytest.fixture(scope="module")
def operated():
    return exports.tiny()


@pytest.fixture
def written(operated, tmp_path):
    path = tmp_path / "x.onnx"
    artifact = attnsurgeon.export_model(operated, path, example=exports.EXAMPLE)
    assert {check.gates for check in artifact.checks} == {"closed", "open"}
    assert artifact.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    return path


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_two_files_are_one_model(operated, written):
    assert names(written.parent) == ["x.onnx", "x.onnx.data"]
    told = onnx.load(written, load_external_data=False).graph.initializer
    assert sum(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in told) > 3
    model = onnx.load(written)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert all(name in weights for name in attnsurgeon.gates(operated))
    assert (torch.tensor(weights["head.weight"]) == operated.head.weight).all()
    assert set(attnsurgeon.gates(operated)) <= set(read_file(written).spots)
    image = (torch.randn(3, 3, 40, 48),)
    with torch.no_grad():
        expected = operated(*image)
    torch.testing.assert_close(Onnx().open(written)(image)[0], expected, rtol=1e-4, atol=1e-4)
    assert len(verify_export(written, operated).checks) == 6
    assert read_targets([written])[0].file == written


def test_they_are_moved_only_together(written, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = written.rename(tmp_path / "elsewhere" / "x.onnx")
    with pytest.raises(BadFile, match=r"x\.onnx"):
        Onnx().open(moved)


def test_neither_replaces_another_unasked(operated, tmp_path):
    (tmp_path / "x.onnx.data").write_bytes(b"precious")
    with pytest.raises(OutputRefused, match=r"x\.onnx\.data.*--force"):
        attnsurgeon.export_model(operated, tmp_path / "x.onnx", example=exports.EXAMPLE)
    assert names(tmp_path) == ["x.onnx.data"]
    attnsurgeon.export_model(operated, tmp_path / "x.onnx", example=exports.EXAMPLE, force=True)
    assert (tmp_path / "x.onnx.data").read_bytes() != b"precious"


@pytest.mark.parametrize("keep", [False, True])
def test_both_are_rejected(operated, tmp_path, monkeypatch, keep):
    write = onnx_file._write_data
    monkeypatch.setattr(
        onnx_file,
        "_write_data",
        lambda path, outside, tensors: write(path, reversed(list(outside)), tensors),
    )
    with pytest.raises(ExportDiffers):
        attnsurgeon.export_model(
            operated, tmp_path / "x.onnx", example=exports.EXAMPLE, keep_rejected=keep
        )
    both = ["x.onnx.data.rejected", "x.onnx.rejected"]
    assert names(tmp_path) == (both if keep else [])
