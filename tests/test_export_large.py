"""What one ONNX file cannot hold lies in two: proven, replaced, removed and rejected together."""

import copy
import gc
import shutil

import onnx
import pytest
import torch
from PIL import Image

import attnsurgeon
from attnsurgeon import export
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


def spoil(data, how):
    """Do to a second file what may befall it; the last is of a file of the same sizes."""
    if how == "gone":
        data.unlink()
    elif how == "cut off":
        data.write_bytes(data.read_bytes()[:-8192])
    else:
        whole = bytearray(data.read_bytes())
        whole[5000] ^= 1
        data.write_bytes(whole)


SPOILT = {
    "gone": "'x.onnx.data', which is not beside it",
    "cut off": "'x.onnx.data' has .* was cut off",
    "another": "'x.onnx.data' is not what x.onnx was written with",
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_second_file_that_is_not_its_own(written, how):
    """A flipped bit moves no output by as much as the tolerance, and is no longer the file."""
    spoil(written.with_name("x.onnx.data"), how)
    for read in (Onnx().open, lambda path: targets.read_targets([path])):
        with pytest.raises(BadFile, match=SPOILT[how]):
            read(written)


@pytest.mark.parametrize("how", SPOILT)
def test_it_is_told_in_one_line(run, written, tmp_path, how):
    host = tmp_path / "digits.safetensors"
    spoil(written.with_name("x.onnx.data"), how)
    if how == "gone":
        assert run("insert", "digits", "--block", "se", "-o", host).code == 0
        outcome = run("verify", written, "--against", host)
    else:
        outcome = run("bench", written, "--engine", "onnxruntime", "--seconds", "0.1")
    assert outcome.code == 2
    assert outcome.out == ""
    assert sum(line.startswith("error: ") for line in outcome.err.splitlines()) == 1


def test_what_others_wrote_has_no_checksum(written):
    model = onnx.load(written)
    onnx.save(model, written, save_as_external_data=True, location="x.onnx.data")
    Onnx().open(written)
    spoil(written.with_name("x.onnx.data"), "gone")
    with pytest.raises(BadFile, match=SPOILT["gone"]):
        Onnx().open(written)


def test_it_is_told_where_no_number_stands(written):
    model = onnx.load(written, load_external_data=False)
    told = next(t for t in model.graph.initializer if t.external_data).external_data
    next(entry for entry in told if entry.key == "length").value = "many"
    written.write_bytes(model.SerializeToString())
    with pytest.raises(BadFile, match="does not tell where its weights are"):
        Onnx().open(written)


@pytest.mark.parametrize("is_large", [False, True])
def test_of_large_weights_no_copy_is_left_to_the_proof(operated, tmp_path, monkeypatch, is_large):
    """Neither by the exporters, nor by the rules of the optimizer; small ones wait for Python."""
    found = []

    def prove(*args):
        found.extend(folded(operated))
        raise ExportDiffers("enough")

    monkeypatch.setattr(export, "prove", prove)
    monkeypatch.setattr(export, "LARGE_BYTES", 0 if is_large else 2**20)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ExportDiffers, match="enough"):
            attnsurgeon.export_model(operated, tmp_path / "x.onnx", example=exports.EXAMPLE)
    finally:
        gc.enable()
    assert bool(found) is not is_large


def folded(model):
    """Return the tensors of the shape of its 3x3 filters that are not its own."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    return [
        thing
        for thing in gc.get_objects()
        if type(thing) is torch.nn.Parameter
        and thing.shape == (16, 16, 3, 3)
        and not thing.is_meta
        and thing.data_ptr() not in own
    ]


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
