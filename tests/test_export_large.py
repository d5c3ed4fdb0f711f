"""What one ONNX file cannot hold lies in two: proven, replaced, removed and rejected together."""

import copy
import shutil

import onnx
import pytest
import torch
from PIL import Image

import attnsurgeon
from attnsurgeon.bench import targets
from attnsurgeon.bench.engines import onnx_runtime
from attnsurgeon.bench.engines.engine import Place
from attnsurgeon.errors import BadFile, ExportDiffers, OutputRefused
from attnsurgeon.export import onnx_data, onnx_file, verify_export
from attnsurgeon.export.onnx import Onnx
from attnsurgeon.export.onnx_file import read_file
from tests import exports

SOON = {"example": exports.EXAMPLE, "exporter": "torchscript", "static": True}


@pytest.fixture(scope="module", autouse=True)
def small_messages():
    """Have 4 kB stand for 2 GiB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, "MOST_BYTES", 4096)
        yield


@pytest.fixture(scope="module")
def operated():
    return exports.tiny()


@pytest.fixture(scope="module")
def exported(operated, small_messages, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "x.onnx"
    artifact = attnsurgeon.export_model(operated, path, example=exports.EXAMPLE)
    assert {check.gates for check in artifact.checks} == {"closed", "open"}
    assert artifact.bytes == sum(file.stat().st_size for file in path.parent.iterdir())
    return path


@pytest.fixture
def written(exported, tmp_path):
    for file in exported.parent.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path / "x.onnx"


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


def test_the_bench_opens_their_gates(operated, written, tmp_path):
    (target,) = targets.read_targets([written])
    assert target.is_opened
    opened, image = copy.deepcopy(operated), torch.randn(1, 3, 32, 32)
    targets._open(attnsurgeon.gates(opened).values())
    place = Place(torch.device("cpu"), threads=1, folder=tmp_path)
    (found, *_) = onnx_runtime.run_onnxruntime(target, (image,), place).first()
    with torch.no_grad():
        torch.testing.assert_close(found, opened(image), rtol=1e-4, atol=1e-5)


def test_gates_of_any_size_stay_in_the_first(operated, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_data, "SMALL_BYTES", 3)
    attnsurgeon.export_model(operated, tmp_path / "x.onnx", **SOON)
    told = onnx.load(tmp_path / "x.onnx", load_external_data=False).graph.initializer
    inside = {t.name for t in told if t.data_location != onnx.TensorProto.EXTERNAL}
    assert inside == set(attnsurgeon.gates(operated))


def test_eight_bits_of_two_files(operated, tmp_path, monkeypatch):
    """What is quantized is read from both, and of the first attempt nothing is left."""
    (tmp_path / "images").mkdir()
    for i in range(3):
        pixels = torch.randint(20 * i, 120 + 40 * i, (40, 48, 3)).byte()
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "out").mkdir()
    artifact = attnsurgeon.export_model(
        operated, tmp_path / "out" / "x.onnx", precision="int8", images=tmp_path / "images", **SOON
    )
    assert names(tmp_path / "out") == ["x.onnx"]
    assert artifact.bytes == (tmp_path / "out" / "x.onnx").stat().st_size


def test_they_are_moved_only_together(written, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = written.rename(tmp_path / "elsewhere" / "x.onnx")
    with pytest.raises(BadFile, match=r"x\.onnx"):
        Onnx().open(moved)


def test_neither_replaces_another_unasked(operated, tmp_path):
    (tmp_path / "x.onnx.data").write_bytes(b"precious")
    with pytest.raises(OutputRefused, match=r"x\.onnx\.data.*--force"):
        attnsurgeon.export_model(operated, tmp_path / "x.onnx", **SOON)
    assert names(tmp_path) == ["x.onnx.data"]
    attnsurgeon.export_model(operated, tmp_path / "x.onnx", force=True, **SOON)
    assert (tmp_path / "x.onnx.data").read_bytes() != b"precious"


@pytest.mark.parametrize("keep", [False, True])
def test_both_are_rejected(operated, tmp_path, monkeypatch, keep):
    """Kept, the first finds the second under its new name, and none that lies there already."""
    write = onnx_data.write_data
    monkeypatch.setattr(
        onnx_file,
        "write_data",
        lambda path, outside, tensors: write(path, reversed(list(outside)), tensors),
    )
    with pytest.raises(ExportDiffers):
        attnsurgeon.export_model(operated, tmp_path / "x.onnx", keep_rejected=keep, **SOON)
    both = ["x.onnx.data.rejected", "x.onnx.rejected"]
    assert names(tmp_path) == (both if keep else [])
    if keep:
        loaded = onnx.load(tmp_path / "x.onnx.rejected").graph.initializer
        assert len(next(t for t in loaded if t.name == "head.weight").raw_data) == 16 * 10 * 4
        Onnx().open(tmp_path / "x.onnx.rejected")
        (tmp_path / "x.onnx.data.rejected").unlink()
        with pytest.raises(BadFile, match=r"x\.onnx\.data\.rejected"):
            Onnx().open(tmp_path / "x.onnx.rejected")


def test_a_rejected_file_that_is_none(tmp_path):
    for name in ("x.onnx", "x.onnx.data"):
        (tmp_path / name).write_bytes(b"\xff no message")
    Onnx().refer(tmp_path / "x.onnx", ".rejected")
    assert (tmp_path / "x.onnx").read_bytes() == b"\xff no message"
