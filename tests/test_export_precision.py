"""Files in other numbers than the model's: what they hold, take and return, and what is caught."""

import copy
import json
from pathlib import Path

import numpy
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from torch import nn

import attnsurgeon
from attnsurgeon.card import HostCard
from attnsurgeon.errors import BadFile, BadOption, ExportDiffers, ExportRefused, UnknownName
from attnsurgeon.export import images as images_of_export
from attnsurgeon.export import onnx_int8
from attnsurgeon.export.format import format_for
from attnsurgeon.export.images import read_images
from attnsurgeon.export.onnx import write_onnx
from attnsurgeon.export.precision import OFFERED, PRECISIONS
from attnsurgeon.export.torchscript import load_torchscript
from tests import exports
from tests.exports import Planted, cross_two_gates, edit_onnx, flatten_attention, shift_a_weight

HALVES = [(".onnx", "fp16"), (".pt", "fp16"), (".pt", "bf16"), (".pt2", "bf16")]


@pytest.fixture(scope="module")
def operated():
    return exports.tiny()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Return a folder of images of many brightnesses, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        noise = torch.randint(20 * i, 120 + 25 * i, (40, 48 + i, 3)).byte()
        Image.fromarray(noise.numpy()).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("none")
    return folder


@pytest.fixture(scope="module")
def half(operated, tmp_path_factory):
    path = tmp_path_factory.mktemp("half") / "x.onnx"
    return path, attnsurgeon.export_model(operated, path, precision="fp16")


@pytest.fixture(scope="module")
def eight(operated, pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("eight") / "x.onnx"
    told = []
    settings = {"precision": "int8", "images": pictures, "progress": told.append}
    return path, attnsurgeon.export_model(operated, path, **settings), told


def held_in(path):
    """Return name -> dtype of the floating tensors that a file holds."""
    if path.suffix == ".onnx":
        held = {t.name: numpy_helper.to_array(t).dtype for t in onnx.load(path).graph.initializer}
        return {name: str(dtype) for name, dtype in held.items() if dtype.kind == "f"}
    if path.suffix == ".pt":
        state = load_torchscript(path)[0].state_dict()
    else:
        state = torch.export.load(path).state_dict
    floating = {name: t for name, t in state.items() if t.is_floating_point()}
    return {name: str(t.dtype).removeprefix("torch.") for name, t in floating.items()}


@pytest.mark.parametrize(("suffix", "name"), HALVES)
def test_all_numbers_are_of_that_kind(operated, half, tmp_path, suffix, name):
    before = {key: tensor.clone() for key, tensor in operated.state_dict().items()}
    path, artifact = half
    if suffix != ".onnx":
        path = tmp_path / f"x{suffix}"
        artifact = attnsurgeon.export_model(operated, path, precision=name)
    dtype = PRECISIONS[name].dtype
    assert set(held_in(path).values()) == {str(dtype).removeprefix("torch.")}
    opened = format_for(path).open(path)
    assert opened.precision == name
    image = torch.randn(4, 3, 40, 32)
    (found,) = opened((image.to(dtype),))
    assert found.dtype == dtype
    with torch.no_grad():
        torch.testing.assert_close(found.float(), operated(image), rtol=0.1, atol=0.02)
    assert [check.gates for check in artifact.checks] == ["closed"] * 3 + ["open"] * 3
    assert max(check.max_rel for check in artifact.checks) > PRECISIONS["fp32"].max_rel
    told = artifact.to_json()
    assert (told["precision"], told["tolerance"]) == (name, PRECISIONS[name].to_json())
    after = operated.state_dict()
    assert all(
        torch.equal(t, before[key]) and t.dtype == before[key].dtype for key, t in after.items()
    )


def test_the_file_says_what_it_takes(half, eight):
    for (path, *_), name, kind in ((half, "fp16", 10), (eight, "int8", 1)):
        model = onnx.load(path)
        assert {p.key: p.value for p in model.metadata_props}["precision"] == name
        (image,), (output,) = model.graph.input, model.graph.output
        kinds = {image.type.tensor_type.elem_type, output.type.tensor_type.elem_type}
        assert kinds == {kind}
        assert image.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_in_fp32_as_without_asking(operated, tmp_path):
    plain = attnsurgeon.export_model(operated, tmp_path / "a.pt")
    asked = attnsurgeon.export_model(operated, tmp_path / "b.pt", precision="fp32")
    assert asked.checks == plain.checks
    assert "precision" not in plain.to_json()
    assert asked.to_json()["tolerance"] == {"max_rel": 1e-4, "min_cosine": 0.9999}


def test_tied_weights_stay_tied(tmp_path):
    class Tied(exports.Tiny):
        def __init__(self):
            super().__init__()
            self.blocks[1] = self.blocks[0]

    torch.manual_seed(0)
    sizes = [
        attnsurgeon.export_model(
            Tied().eval(), tmp_path / f"{name}.pt", precision=name, example=exports.EXAMPLE
        ).bytes
        for name in ("fp32", "fp16")
    ]
    state = load_torchscript(tmp_path / "fp16.pt")[0].state_dict()
    assert state["blocks.0.conv.weight"].data_ptr() == state["blocks.1.conv.weight"].data_ptr()
    assert sizes[1] < sizes[0]


def test_the_readme_has_the_table():
    text = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    for name in OFFERED:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` | ")]
        told = [float(word) for word in row.rpartition("|")[0].rpartition("|")[2].split(",")]
        assert told == [PRECISIONS[name].max_rel, PRECISIONS[name].min_cosine]


class TestEightBits:
    def test_what_is_heavy_is_in_int8(self, operated, eight):
        model = onnx.load(eight[0])
        held = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        filters = [
            array for array in held.values() if array.dtype == numpy.int8 and array.ndim == 4
        ]
        assert len(filters) == 1 + 3 + 2 * 3
        assert all(numpy.abs(array).max() <= 64 for array in filters)
        wide = {name: array for name, array in held.items() if array.dtype == numpy.float32}
        gates = attnsurgeon.gates(operated)
        assert {name for name in wide if name.endswith("openness")} == gates.keys()
        assert all(array.size < 100 for array in wide.values())
        assert {node.domain for node in model.graph.node} == {""}
        assert {"QuantizeLinear", "DequantizeLinear"} <= {n.op_type for n in model.graph.node}

    def test_it_is_checked_on_the_images(self, eight, pictures):
        _, artifact, told = eight
        assert [check.gates for check in artifact.checks] == ["closed"] * 3 + ["open"] * 3
        assert 1e-4 < max(check.max_rel for check in artifact.checks) < 0.2
        assert "checking it before it is quantized" in told
        (notice,) = artifact.notices
        assert f"calibrated on 6 of 6 images of '{pictures}'" in notice
        assert "no images there: 1, the first 'notes.txt'" in notice

    def test_not_on_more_images_than_tell_something(self, operated, pictures, monkeypatch):
        monkeypatch.setattr(images_of_export, "MOST", 3)
        some = images_of_export.Photographs(pictures, operated, exports.EXAMPLE)
        assert [file.name for file in some.files] == ["0.png", "2.png", "4.png"]
        assert "3 of 6 images" in some.notice
        (five,) = some.in_place_of([(torch.zeros(5, 3, 20, 28),)])
        assert five[0].shape == (5, 3, 20, 28)
        assert torch.equal(five[0][0], five[0][3])

    def test_what_a_softmax_reads_stays_exact(self, tmp_path):
        model, path = exports.tiny("snl"), tmp_path / "x.onnx"
        write_onnx(model, (torch.zeros(2, 3, 32, 32),), path)
        nodes = {node.name: node for node in onnx.load(path).graph.node}
        names = onnx_int8.read_by_softmax(path)
        assert len(names) == 3
        assert all(nodes[name].input[1].endswith("pool.mask.weight") for name in names)

    def test_other_images_calibrate_otherwise(self, operated, eight, tmp_path):
        dark = tmp_path / "dark"
        dark.mkdir()
        Image.new("RGB", (40, 40), (9, 5, 2)).save(dark / "0.png")
        path = tmp_path / "x.onnx"
        attnsurgeon.export_model(operated, path, precision="int8", images=dark, static=True)
        scales = [
            next(
                numpy_helper.to_array(t)
                for t in onnx.load(p).graph.initializer
                if t.name == "input_scale"
            )
            for p in (eight[0], path)
        ]
        assert scales[1] < scales[0] / 5

    def test_verified_later(self, operated, eight, pictures):
        found = attnsurgeon.export.verify_export(eight[0], operated, pictures)
        assert [c.gates for c in found.checks] == ["closed"] * 3 + ["open"] * 3 + ["images"] * 6
        assert len(found.images) == 6
        assert found.notices == ()

    def test_verified_later_without_images(self, operated, eight):
        """Noise is nothing that the steps of its maps were made for: they are left out."""
        found = attnsurgeon.export.verify_export(eight[0], operated)
        assert [check.gates for check in found.checks] == ["closed"] * 3 + ["open"] * 3
        assert "was not compared" in found.notices[0]
        assert max(check.max_rel for check in found.checks) < 0.05

    def test_given_gates_leave_the_maps_unrounded(self, operated, eight):
        """Those of bright noise lie far outside the steps that were made for the images."""
        own = {name: gate.detach() for name, gate in attnsurgeon.gates(operated).items()}
        image = torch.randn(1, 3, 32, 32) * 20
        with torch.no_grad():
            want = operated(image)
        found = [format_for("x.onnx").open(eight[0], gates)((image,))[0] for gates in (None, own)]
        rounded, exact = ((out - want).abs().max() / want.abs().max() for out in found)
        assert exact < 0.05 < 0.3 < rounded

    def test_clamps_that_were_quantized_away_come_back(self, pictures, tmp_path):
        class Clamped(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

            def forward(self, x):
                return self.second(self.first(x).clamp(0, 0.25)).relu().mean((2, 3))

        torch.manual_seed(0)
        model, path = Clamped().eval(), tmp_path / "x.onnx"
        attnsurgeon.export_model(
            model, path, example=exports.EXAMPLE, precision="int8", images=pictures, static=True
        )
        image = torch.randn(1, 3, 32, 32) * 9
        found = format_for(path).open(path, {})((image,))[0]
        with torch.no_grad():
            torch.testing.assert_close(found, model(image), rtol=0.05, atol=0.01)


def stretch_the_filters(graph):
    for tensor in graph.initializer:
        if tensor.name == "stem.weight_scale":
            array = numpy_helper.to_array(tensor) * numpy.float32(2)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def saturate_attention(graph):
    for tensor in graph.initializer:
        if tensor.name.endswith("excite.weight_scale"):
            array = numpy_helper.to_array(tensor) * numpy.float32(1000)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


class TestWrongAnswersAreCaught:
    @pytest.mark.parametrize(
        ("edit", "says"),
        [
            (shift_a_weight, "gates closed"),
            (flatten_attention, "gates open"),
            (cross_two_gates, "gates open"),
        ],
    )
    def test_in_half_precision(self, operated, half, tmp_path, monkeypatch, edit, says):
        path = tmp_path / "x.onnx"
        path.write_bytes(half[0].read_bytes())
        attnsurgeon.export.verify_export(path, operated)
        edit_onnx(path, edit)
        with pytest.raises(ExportDiffers, match=says):
            attnsurgeon.export.verify_export(path, operated)

    def test_before_it_is_quantized(self, operated, pictures, tmp_path, monkeypatch):
        """Eight bits hide what float32 shows: the file that they are made from is proven first."""
        Planted.after_writing(monkeypatch, cross_two_gates)
        with pytest.raises(ExportDiffers, match="the onnx file .* gates open"):
            attnsurgeon.export_model(
                operated, tmp_path / "x.onnx", precision="int8", images=pictures
            )
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("edit", "says"),
        [(stretch_the_filters, "gates closed"), (saturate_attention, "gates open")],
    )
    def test_in_eight_bits_later(self, operated, eight, tmp_path, edit, says):
        path = tmp_path / "x.onnx"
        path.write_bytes(eight[0].read_bytes())
        edit_onnx(path, edit)
        with pytest.raises(ExportDiffers, match=says):
            attnsurgeon.export.verify_export(path, operated)

    def test_after_it_was_quantized(self, operated, eight, pictures, tmp_path):
        path = tmp_path / "x.onnx"
        path.write_bytes(eight[0].read_bytes())
        edit_onnx(path, stretch_the_filters)
        with pytest.raises(ExportDiffers, match="gates closed"):
            attnsurgeon.export.verify_export(path, operated, pictures)

    def test_after_it_was_quantized_with_gates_open(
        self, operated, pictures, tmp_path, monkeypatch
    ):
        quantize, written = onnx_int8.quantize, []

        def spoiled(plain, target, images):
            quantize(plain, target, images)
            written.append(target)
            if len(written) == 2:
                edit_onnx(target, stretch_the_filters)

        monkeypatch.setattr(onnx_int8, "quantize", spoiled)
        settings = {"precision": "int8", "images": pictures, "static": True}
        with pytest.raises(ExportDiffers, match="the int8 onnx file .* gates open.*--images"):
            attnsurgeon.export_model(operated, tmp_path / "x.onnx", **settings)
        assert list(tmp_path.iterdir()) == []

    def test_numbers_that_half_precision_does_not_hold(self, operated, tmp_path):
        large = copy.deepcopy(operated)
        with torch.no_grad():
            large.head.weight.mul_(1e6)
        with pytest.raises(
            ExportDiffers, match=r"fp16 torchscript .*above 65504 .*--precision bf16"
        ):
            attnsurgeon.export_model(large, tmp_path / "x.pt", precision="fp16")
        assert attnsurgeon.export_model(large, tmp_path / "x.pt", precision="bf16").checks


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "settings", "error", "says"),
        [
            ("x.onnx", {"precision": "fp15"}, UnknownName, "did you mean 'fp1"),
            ("x.onnx", {"precision": "bf16"}, ExportRefused, "export it to .pt"),
            (
                "x.pt",
                {"precision": "int8"},
                ExportRefused,
                "in fp32, fp16, bf16; export it to .onnx",
            ),
            ("x.pt2", {"precision": "int8"}, ExportRefused, "export it to .onnx"),
            ("model.py", {"precision": "fp16"}, ExportRefused, "a .py file, which can be in fp32"),
            ("x.onnx", {"precision": "int8"}, BadOption, "give --images DIR"),
            ("x.onnx", {"images": "."}, BadOption, "give both, or none"),
            ("x.onnx", {"precision": "int8", "images": "no"}, BadOption, "there is no folder 'no'"),
        ],
    )
    def test_settings(self, operated, tmp_path, monkeypatch, name, settings, error, says):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(error, match=says):
            attnsurgeon.export_model(operated, name, **settings)
        assert list(tmp_path.iterdir()) == []

    def test_images_that_cannot_be_read(self, operated, pictures, tmp_path):
        folder = tmp_path / "some"
        folder.mkdir()
        (folder / "good.png").write_bytes((pictures / "0.png").read_bytes())
        (folder / "cut.png").write_bytes((pictures / "0.png").read_bytes()[:300])
        (folder / "empty.jpg").write_bytes(b"")
        (folder / "text.png").write_text("no picture")
        with pytest.raises(BadFile, match=r"3 of 4 images cannot be read, the first .*cut\.png"):
            attnsurgeon.export_model(operated, tmp_path / "x.onnx", precision="int8", images=folder)
        assert not (tmp_path / "x.onnx").exists()

    def test_a_network_of_no_images(self, pictures, tmp_path):
        class Listed(exports.Tiny):
            def forward(self, images):
                return super().forward(torch.stack(images))

        for example in ([torch.rand(3, 32, 32)], torch.rand(1, 1, 32, 32)):
            model = Listed() if isinstance(example, list) else nn.Conv2d(1, 2, 3)
            with pytest.raises(BadOption, match="networks of one RGB image"):
                attnsurgeon.export_model(
                    model, tmp_path / "x.onnx", precision="int8", images=pictures, example=example
                )

    def test_a_network_that_does_not_run_in_it(self, tmp_path):
        class Plain(exports.Tiny):
            def forward(self, x):
                return super().forward(x) @ torch.eye(10)

        with pytest.raises(
            ExportRefused, match="Plain does not run in fp16 here.*--precision fp32"
        ):
            attnsurgeon.export_model(
                Plain(), tmp_path / "x.pt", precision="fp16", example=exports.EXAMPLE
            )

    def test_another_precision_of_a_network_that_is_not_in_fp32(self, operated, tmp_path):
        with pytest.raises(BadOption, match="is in bf16.*model.float"):
            attnsurgeon.export_model(
                copy.deepcopy(operated).bfloat16(), tmp_path / "x.pt", precision="fp16"
            )

    def test_a_file_of_unknown_precision(self, operated, half, tmp_path):
        model = onnx.load(half[0])
        next(p for p in model.metadata_props if p.key == "precision").value = "fp3"
        onnx.save(model, tmp_path / "x.onnx")
        with pytest.raises(BadFile, match="says that it is in 'fp3'"):
            attnsurgeon.export.verify_export(tmp_path / "x.onnx", operated)


class TestImages:
    @pytest.mark.parametrize(
        ("weights", "share"),
        [
            ("ResNet50_Weights.IMAGENET1K_V2", 224 / 232),
            ("ResNet50_Weights.IMAGENET1K_V1", 224 / 256),
            ("timm:resnet50.a1_in1k", 0.95),
            ("mine.pth", 1.0),
            (None, 1.0),
        ],
    )
    def test_they_are_cut_as_the_weights_want_it(self, weights, share, tmp_path):
        if weights is not None and weights.startswith("timm:"):
            pytest.importorskip("timm")
        ramp = numpy.linspace(0, 255, 400).astype("uint8")
        rows = numpy.repeat(ramp[None, :, None], 400, 0).repeat(3, 2)
        Image.fromarray(rows).save(tmp_path / "ramp.png")
        card = HostCard(None, "Tiny", weights=weights)
        (image,) = read_images([tmp_path / "ramp.png"], card, (64, 64))
        assert image.shape == (1, 3, 64, 64)
        assert (image[..., -1] - image[..., 0]).mean().item() == pytest.approx(share, abs=0.03)

    def test_they_are_turned_as_the_camera_was(self, tmp_path):
        picture = Image.new("RGB", (60, 40), (255, 0, 0))
        picture.paste((0, 0, 255), (0, 0, 30, 40))
        exif = picture.getexif()
        exif[0x0112] = 3  # upside down
        picture.save(tmp_path / "x.jpg", exif=exif)
        (image,) = read_images([tmp_path / "x.jpg"], None, (40, 60))
        assert image[0, 0, 20, 5] > 0.9
        assert image[0, 2, 20, 55] > 0.9


NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
"""


class TestCommandLine:
    def test_half(self, run, folder, digits_file):
        asked = ("-o", "x.pt", "--precision", "fp16", "--static", "--json")
        outcome = run("export", digits_file, *asked)
        assert outcome.code == 0, outcome.err
        assert json.loads(outcome.out)["tolerance"]["max_rel"] == PRECISIONS["fp16"].max_rel
        assert set(held_in(Path("x.pt")).values()) == {"float16"}

    def test_eight_bits(self, run, folder, pictures):
        Path("net.py").write_text(NET)
        asked = ("--precision", "int8", "--images", pictures, "--static")
        outcome = run("export", "net.py:build", "--input", "1,3,24,24", "-o", "x.onnx", *asked)
        assert outcome.code == 0, outcome.err
        assert "onnx in int8" in outcome.out
        assert "calibrated on 6 of 6 images" in outcome.err

    def test_refused_at_once(self, refused, digits_file):
        args = ("export", digits_file, "-o", "x.onnx", "--precision")
        refused(*args, "int8", says=["--images DIR"], at_once=True)
        refused(*args, "int8", "--images", "nowhere", says=["no folder 'nowhere'"], at_once=True)
        refused(*args, "bf16", says=["export it to .pt"], at_once=True)

    def test_help_names_all(self, run):
        text = run("export", "--help").out
        assert all(name in text for name in OFFERED)
