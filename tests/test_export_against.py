"""An exported file is held against its model later, on images too; a rejected one can be kept."""

import copy
import io
import json

import onnx
import pytest
import torch
from PIL import Image
from rich.console import Console

import attnsurgeon
from attnsurgeon.card import HostCard, card_of, give_card
from attnsurgeon.errors import BadFile, BadOption, ExportDiffers
from attnsurgeon.export import verify_export
from attnsurgeon.export.images import read_images
from attnsurgeon.host import load_host
from attnsurgeon.report.artifact import show_agreement
from tests import exports
from tests.exports import Planted, edit_onnx, flatten_attention, shift_a_weight


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "x.onnx"
    attnsurgeon.export_model(exports.tiny(), path)
    return path


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        noise = torch.randint(0, 255, (40 + i, 60, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{i}.png")
    return folder


def test_it_agrees(exported, pictures):
    found = verify_export(exported, exports.tiny(), pictures)
    assert [check.gates for check in found.checks] == ["closed"] * 3 + ["open"] * 3 + ["images"] * 3
    assert [name.rsplit("/")[-1] for name in found.images] == ["0.png", "1.png", "2.png"]
    assert all(kind.isdecimal() for kind in found.images.values())
    json.dumps(found.to_json(), allow_nan=False)
    page = io.StringIO()
    Console(file=page, width=200).print(show_agreement(found))
    assert "2.png" in page.getvalue()
    assert "computes what the model computes, in 9 runs" in page.getvalue()


@pytest.mark.parametrize("edit", [shift_a_weight, flatten_attention])
def test_a_file_that_was_changed(exported, tmp_path, edit):
    changed = tmp_path / "x.onnx"
    changed.write_bytes(exported.read_bytes())
    edit_onnx(changed, edit)
    with pytest.raises(ExportDiffers, match="differs from the model in"):
        verify_export(changed, exports.tiny())


def test_another_model(exported):
    other = copy.deepcopy(exports.tiny())
    torch.nn.init.normal_(other.head.weight)
    with pytest.raises(ExportDiffers):
        verify_export(exported, other)


def test_a_file_that_holds_no_gates_to_set(tmp_path):
    attnsurgeon.export_model(exports.tiny(), tmp_path / "x.pt", optimize=True)
    found = verify_export(tmp_path / "x.pt", exports.tiny())
    assert {check.gates for check in found.checks} == {"closed"}


class TestImages:
    def test_they_are_normed_by_the_card(self, pictures):
        card = card_of(load_host("digits"))
        (plain,) = read_images([pictures / "0.png"], None, (32, 48))
        (normed,) = read_images([pictures / "0.png"], card, (32, 48))
        assert plain.shape == normed.shape == (1, 3, 32, 48)
        mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (card.mean, card.std))
        torch.testing.assert_close(normed, (plain - mean) / std)

    def test_unreadable_ones(self, exported, pictures):
        for i in range(5):
            (pictures / f"bad{i}.jpg").write_bytes(b"no picture")
        with pytest.raises(BadFile, match=r"5 of 8 images cannot be read.*bad0.*bad2\.jpg'; take"):
            verify_export(exported, exports.tiny(), pictures)

    def test_a_large_one_is_read_without_a_word(self, pictures, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # of which there are 2400
        (read,) = read_images([pictures / "0.png"], None, (32, 32))
        assert read.shape == (1, 3, 32, 32)

    def test_a_map_of_classes_is_held_to_the_tolerance(self, tmp_path, pictures):
        """In fp16 some place of a map always has two classes that rounding exchanges."""
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 8, 3, padding=1)
        with torch.no_grad():
            model.weight[1:].copy_(model.weight[:1] * (1 + 1e-4 * torch.randn(7, 3, 3, 3)))
            model.bias.zero_()
        give_card(model, HostCard(None, "Conv2d", input_shapes=((1, 3, 32, 32),)))
        attnsurgeon.export_model(model, tmp_path / "x.onnx", precision="fp16")
        found = verify_export(tmp_path / "x.onnx", model, pictures)
        assert min(c.top1_agreement for c in found.checks if c.gates == "images") < 1
        assert all(int(name) < 8 for name in found.images.values())

    def test_a_class_that_rounding_exchanges_is_not_seen_alike(self, tmp_path, pictures):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        model.append(torch.nn.Linear(3, 64, bias=False))
        with torch.no_grad():
            model[2].weight[:] = torch.ones(1, 3) + 1e-4 * torch.randn(64, 3)
        give_card(model, HostCard(None, "Means", input_shapes=((1, 3, 32, 32),)))
        attnsurgeon.export_model(model, tmp_path / "x.onnx", precision="fp16")
        with pytest.raises(ExportDiffers, match="gates images.*top-1 same for 0 %"):
            verify_export(tmp_path / "x.onnx", model, pictures)

    def test_a_video_is_no_image(self, tmp_path, pictures):
        video = torch.nn.Conv3d(3, 4, 3, padding=1)
        give_card(video, HostCard(None, "Conv3d", input_shapes=((1, 3, 4, 16, 16),)))
        attnsurgeon.export_model(video, tmp_path / "x.onnx")
        with pytest.raises(BadOption, match=r"one RGB image; Conv3d takes \[1, 3, 4, 16, 16\]"):
            verify_export(tmp_path / "x.onnx", video, pictures)

    @pytest.mark.parametrize("name", ["empty", "missing"])
    def test_none(self, exported, tmp_path, name):
        (tmp_path / "empty").mkdir()
        with pytest.raises(BadOption, match="image"):
            verify_export(exported, exports.tiny(), tmp_path / name)


class TestRejected:
    def test_it_is_kept_on_request(self, tmp_path, monkeypatch):
        Planted.after_writing(monkeypatch, shift_a_weight)
        with pytest.raises(ExportDiffers, match=r"it was kept as .*x\.onnx\.rejected"):
            attnsurgeon.export_model(exports.tiny(), tmp_path / "x.onnx", keep_rejected=True)
        assert [path.name for path in tmp_path.iterdir()] == ["x.onnx.rejected"]
        onnx.checker.check_model(onnx.load(tmp_path / "x.onnx.rejected"))


class TestCommandLine:
    def test_verify_against(self, run, folder, digits_file):
        assert run("export", digits_file, "-o", "x.pt").code == 0
        outcome = run("verify", "x.pt", "--against", digits_file, "--json")
        assert outcome.code == 0, outcome.err
        assert len(json.loads(outcome.out)["checks"]) == 6

    def test_images_without_a_model(self, refused, digits_file, tmp_path):
        refused("verify", digits_file, "--images", tmp_path, says=["--against MODEL"])

    @pytest.mark.parametrize("name", ["x.onnx", "x.PT", "x.pt2", "model.py"])
    def test_a_file_without_its_model(self, refused, name):
        refused("verify", name, says=[f"'{name}' is an exported file; give --against MODEL"])

    def test_no_such_format(self, refused, digits_file):
        refused("verify", "x.onx", "--against", digits_file, says=["did you mean '.onnx'"])
