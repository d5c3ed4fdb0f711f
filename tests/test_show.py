"""`show`: what the attention looks at in real photographs."""

import base64
import json
import re
import sys
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn

import attnsurgeon
from attnsurgeon.blocks.convolutional_block_attention import SpatialMap
from attnsurgeon.card import card_of, give_card
from attnsurgeon.host import load_host
from attnsurgeon.report.attention_page import HEAT, heat, make_page
from attnsurgeon.report.page_html import write_html
from attnsurgeon.report.page_png import write_png
from attnsurgeon.store import save_model
from attnsurgeon.training.images import read_photograph


@pytest.fixture(scope="module")
def model():
    """Return the digits network with one of each block in stage 2, gates open."""
    model = load_host("digits")
    for block in ("cbam", "gc", "sk", "se"):
        model = attnsurgeon.insert_attention(model, block, at="features.5")
    for i, gate in enumerate(attnsurgeon.gates(model).values()):
        gate.data.fill_(0.1 * i + 0.1)
    return model


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("shown") / "shown.safetensors"
    save_model(model, path)
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Return the two photographs that come with scikit-learn, as files."""
    folder = tmp_path_factory.mktemp("photographs")
    sample = load_sample_images()
    for name, pixels in zip(sample.filenames, sample.images, strict=True):
        Image.fromarray(pixels).save(folder / Path(name).with_suffix(".png").name)
    return sorted(folder.iterdir())


class TestPage:
    def test_every_map_is_on_it(self, model, photographs):
        page = make_page(model, read_photograph(photographs[0], model))
        assert [picture.title for picture in page.overlays] == [
            "features.5 cbam spatial",
            "features.5 gc context",
        ]
        assert [(strip.title.split()[1:], strip.pixels.shape[:2]) for strip in page.strips] == [
            (["cbam", "channel"], (1, 24)),
            (["gc", "added"], (1, 24)),
            (["sk", "branch"], (2, 24)),
            (["se", "channel"], (1, 24)),
        ]
        assert list(page.branches) == ["features.5 sk branch"]
        assert sum(page.branches["features.5 sk branch"]) == pytest.approx(1)
        assert "gate +0.100" in page.strips[0].caption
        assert "gate +0.200" in page.overlays[0].caption
        assert re.fullmatch(r"china\.png: read as '\d' \([\d.]+%\)", page.title)

    def test_photographs_differ(self, model, photographs):
        pages = [make_page(model, read_photograph(path, model)) for path in photographs]
        for a, b in zip(pages[0].overlays, pages[1].overlays, strict=True):
            assert not torch.equal(a.pixels, b.pixels)

    def test_the_overlay_is_bright_where_the_map_is_high(self, model, photographs, monkeypatch):
        def corner(self, x):
            out = torch.zeros_like(x[:, :1])
            out[..., :2, :3] = 1
            return out

        monkeypatch.setattr(SpatialMap, "forward", corner)
        page = make_page(model, read_photograph(photographs[0], model))
        pixels = page.overlays[0].pixels.float()
        assert pixels[:4, :8].mean() > 1.5 * pixels[16:, 16:].mean()
        assert page.overlays[0].caption == "0 to 1, gate +0.200"

    def test_heat(self):
        least, middle, most = heat(torch.tensor([[-1.0, 0.0, 1.0]]))[0].tolist()
        assert (tuple(least), tuple(middle), tuple(most)) == (HEAT[0], HEAT[2], HEAT[4])
        assert heat(torch.full((2, 2), 0.5)).unique(dim=0).shape[0] == 1

    def test_a_photograph_is_read_as_the_card_says(self, model, photographs):
        photograph = read_photograph(photographs[0], model)
        assert photograph.shown.shape == (3, 32, 32)
        wanted = (photograph.shown / 255 - 0.3) / 0.35
        torch.testing.assert_close(photograph.read[0], wanted)
        with Image.open(photographs[0]) as whole:
            small = whole.resize((48, 32)).crop((8, 0, 40, 32))
        theirs = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(32, 32, 3)
        assert (photograph.shown.permute(1, 2, 0).float() - theirs.float()).abs().mean() < 8

    def test_a_grey_network_gets_one_channel(self, photographs):
        host = nn.Sequential(nn.Conv2d(1, 1, 1))
        give_card(
            host, card_of(load_host("digits")).__class__(None, "x", input_shapes=((1, 1, 8, 8),))
        )
        assert read_photograph(photographs[0], host).read.shape == (1, 1, 8, 8)


class TestShow:
    @pytest.mark.parametrize("form", ["png", "html"])
    def test_a_page_for_each_image(self, run, file, photographs, folder, form):
        options = ["--html"] if form == "html" else []
        done = run("show", file, *photographs, *options, "--json")
        assert done.code == 0, done.err
        told = json.loads(done.out)
        names = [f"{path.stem}_attention.{form}" for path in photographs]
        assert [page["page"] for page in told["pages"]] == names
        assert sorted(path.name for path in folder.iterdir()) == names
        (branches,) = [m["branches"] for m in told["pages"][0]["maps"] if m["kind"] == "branch"]
        assert sum(branches) == pytest.approx(1)
        context = next(m for m in told["pages"][0]["maps"] if m["kind"] == "context")
        assert context["shape"] == [8, 8]
        assert context["mean"] == pytest.approx(1 / 64)

    def test_a_checkpoint(self, run, file, model, photographs, folder):
        state = model.state_dict()
        state = {k: t * 1.5 if t.is_floating_point() else t for k, t in state.items()}
        torch.save(state, "other.pth")
        args = ("show", file, photographs[0], "--json", "--html")
        plain = json.loads(run(*args).out)["pages"][0]["maps"]
        trained = json.loads(run(*args, "--checkpoint", "other.pth", "--force").out)
        assert plain != trained["pages"][0]["maps"]
        assert trained["file"] == "other.pth"

    def test_html_stands_alone(self, model, photographs, tmp_path):
        page = make_page(model, read_photograph(photographs[0], model))
        page = page.__class__(**{**page.__dict__, "title": "<b>&"})
        write_html(page, tmp_path / "x.html")
        text = (tmp_path / "x.html").read_text(encoding="utf-8")
        assert "&lt;b&gt;&amp;" in text
        assert "<b>" not in text
        sources = re.findall(r'(?:src|href)="([^"]+)"', text)
        assert len(sources) == 1 + len(page.overlays) + len(page.strips)
        pictures = [source.removeprefix("data:image/png;base64,") for source in sources]
        sizes = [Image.open(BytesIO(base64.b64decode(picture))).size for picture in pictures]
        assert sizes[:3] == [(32, 32)] * 3
        assert text.count('<span style="width:') == 2

    def test_png_shows_the_page(self, model, photographs, tmp_path):
        pages = [make_page(model, read_photograph(path, model)) for path in photographs]
        for page, name in zip((*pages, pages[0]), "abc", strict=True):
            write_png(page, tmp_path / f"{name}.png")
        a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
        assert a == c != b
        with Image.open(tmp_path / "a.png") as picture:
            assert picture.width > 1000

    @pytest.mark.parametrize("output", ["here.html", "pages"])
    def test_where_to(self, run, file, photographs, folder, output):
        (folder / "pages").mkdir()
        assert run("show", file, photographs[0], "-o", output, "--html").code == 0
        assert (
            folder / ("here.html" if output == "here.html" else "pages/china_attention.html")
        ).exists()

    def test_refused(self, refused, file, photographs, folder, monkeypatch):
        one, two = photographs
        refused("show", file, one, two, "-o", "x.png", says=["give a folder as -o"], at_once=True)
        refused("show", file, one, one, says=["one at a time"], at_once=True)
        refused("show", file, one, "-o", "x.png", "--html", says=["end -o in .html"], at_once=True)
        refused("show", file, one, "-o", "no/such", says=["no folder"], at_once=True)
        refused("show", file, "none.jpg", "--html", says=["there is no file 'none.jpg'"])
        (folder / "text.jpg").write_text("no image")
        refused("show", file, one, "text.jpg", "--html", says=["text.jpg", "as an image"])
        (folder / "half.png").write_bytes(one.read_bytes()[:2000])
        refused("show", file, "half.png", "--html", says=["half.png", "as an image"])
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        refused("show", file, one, says=["attnsurgeon[plot]", "or give --html"], at_once=True)

    def test_a_network_of_other_inputs(self, refused, photographs, folder):
        model = attnsurgeon.insert_attention(load_host("digits"), "se", at="features.5")
        card = card_of(model)
        give_card(model, card.__class__(**{**card.__dict__, "input_shapes": ((1, 3, 4, 32, 32),)}))
        save_model(model, "video.safetensors")
        refused(
            "show", "video.safetensors", photographs[0], "--html", says=["takes no single image"]
        )
