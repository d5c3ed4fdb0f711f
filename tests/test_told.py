"""What the command line says of networks of one's own: all of it, and what to type next."""

import io
import textwrap

import pytest
from rich.console import Console

from attnsurgeon.card import HostCard, card_of
from attnsurgeon.errors import BadFile
from attnsurgeon.host import load_host
from attnsurgeon.opening import watch
from attnsurgeon.report.sites import show_sites
from attnsurgeon.store import read_recipe

NETS = """
    from collections import OrderedDict

    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width=8):
            super().__init__()
            self.conv = nn.Conv2d(width, width, 3, padding=1)

        def forward(self, x):
            return x + self.conv(x).relu()

    class Net(nn.Module):
        def __init__(self, width=8):
            super().__init__()
            self.stem = nn.Conv2d(3, width, 3, padding=1)
            self.blocks = nn.Sequential(Block(width), Block(width))

        def forward(self, image):
            return self.blocks(self.stem(image)).mean((2, 3))

    def build():
        return Net()

    LONG = "a_part_whose_name_is_as_long_as_those_of_maxvit"

    def deep():
        net = Net()
        net.blocks = nn.Sequential(OrderedDict({LONG: Block()}))
        return net

    class Detector(nn.Module):  # as torchvision's: targets in training, which returns losses
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, images, targets=None):
            found = [self.net(image[None])[0] for image in images]
            if not self.training:
                return [{"scores": scores} for scores in found]
            if targets is None:
                raise ValueError("targets should not be none when in training mode")
            share = torch.stack([t["boxes"].mean() for t in targets]).mean()
            return {"loss": torch.stack(found).mean() * share}

    class Batches(Detector):
        def forward(self, images, targets=None):
            return self.net(images)

    class Lists(nn.Module):  # of images of one size, of no more than a hundred pixels a side
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, images):
            assert isinstance(images, list)
            assert max(images[0].shape) <= 100
            return self.net(torch.stack(images))

    def weighted(weights, pretrained=False):
        assert weights in (None, "here"), weights
        return Net(4 if pretrained else 8)
"""
SMALL = ("--input", "1,3,32,32")


@pytest.fixture
def nets(folder):
    """Return the name of a file of networks in the current folder."""
    (folder / "nets.py").write_text(textwrap.dedent(NETS))
    return "nets.py"


def insert(name, *args):
    return ("insert", f"nets.py:{name}", "--block", "se", *args)


class TestWeightArguments:
    """`weights` is a name like any other to a factory of one's own."""

    @pytest.mark.parametrize("given", ["none", "None", "here"])
    def test_reach_it(self, run, nets, given):
        asked = ("--model-arg", f"weights={given}", *SMALL, "-o", "o.safetensors")
        done = run(*insert("weighted", *asked))
        assert done.code == 0, done.err
        # It is asked for the network again, and not for weights that the file has.
        recipe = read_recipe("o.safetensors")
        assert recipe.host.arguments == {"weights": None}
        assert run("verify", "o.safetensors", "--host", f"{nets}:weighted").code == 0

    def test_false_stays(self, run, nets):
        asked = ("--model-arg", "weights=none", "pretrained=false", *SMALL, "-o", "o.safetensors")
        assert run(*insert("weighted", *asked)).code == 0
        assert read_recipe("o.safetensors").host.arguments["pretrained"] is False

    @pytest.mark.parametrize(("name", "value"), [(None, "DEFAULT"), ("resnet18", None)])
    def test_no_file_fetches_by_them(self, name, value):
        card = HostCard(name, "Net", arguments={"weights": value})
        with pytest.raises(BadFile, match="name weights"):
            HostCard.from_json(card.to_json())


class TestNamesInTables:
    """A name in a table can be read whole; where there is room, also copied in one piece."""

    NAME = "blocks.a_part_whose_name_is_as_long_as_those_of_maxvit"

    @pytest.fixture
    def deep(self, nets, run):
        """Return the name of a file with attention at a site of a long name."""
        assert run(*insert("deep", *SMALL, "-o", "deep.safetensors")).code == 0
        return "deep.safetensors"

    def test_in_one_piece(self, run, deep):
        asked = ("--host", "nets.py:deep")
        for args in (
            ("sites", deep, *asked),
            ("gates", deep, *asked),
            insert("deep", *SMALL, "--dry-run"),
        ):
            told = run(*args)
            assert f" {self.NAME} " in told.out, told

    def test_of_models(self, run):
        name = "fasterrcnn_mobilenet_v3_large_320_fpn"
        assert f" {name} " in run("models", name).out

    def test_whole_where_they_must_wrap(self, nets):
        page = io.StringIO()
        table = show_sites("deep", watch("nets.py:deep", inputs=SMALL[1:]))
        Console(file=page, width=90).print(table)
        lines = page.getvalue().splitlines()
        header = next(line for line in lines if "kind" in line)
        cells = [line[header.index("site") : header.index("kind")] for line in lines[3:]]
        assert self.NAME in "".join(cell.strip() for cell in cells)


class TestLists:
    """Detectors of one's own are recognised by what they run on."""

    @pytest.mark.parametrize(("asked", "shapes"), [((), 2), (("--input", "3,40,48"), 1)])
    def test_of_a_detector(self, run, nets, asked, shapes):
        done = run(*insert("Detector", *asked, "-o", "o.safetensors"))
        assert done.code == 0, done.err
        host = read_recipe("o.safetensors").host
        assert (host.listed, len(host.input_shapes)) == (True, shapes)
        assert not asked or host.input_shapes == ((3, 40, 48),)
        assert run("verify", "o.safetensors", "--host", f"{nets}:Detector").code == 0

    def test_of_images_of_a_size_that_is_told(self, run, nets):
        done = run(*insert("Lists", "--input", "3,40,48", "-o", "o.safetensors"))
        assert done.code == 0, done.err
        assert read_recipe("o.safetensors").host.listed

    @pytest.mark.parametrize(("name", "asked"), [("Batches", ()), ("build", ()), ("build", SMALL)])
    def test_are_not_what_takes_batches(self, nets, name, asked):
        card = card_of(load_host(f"{nets}:{name}", inputs=asked[1:]))
        assert not card.listed
        assert len(card.input_shapes[0]) == 4
