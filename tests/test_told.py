"""What the command line says of networks of one's own: all of it, and what to type next."""

import io
import json
import textwrap

import pytest
import torch
from rich.console import Console
from torch import nn

from attnsurgeon.card import HostCard, card_of
from attnsurgeon.errors import BadFile, first_line
from attnsurgeon.host import load_host
from attnsurgeon.opening import watch
from attnsurgeon.report.sites import show_sites
from attnsurgeon.store import read_recipe
from attnsurgeon.trial import remedy

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

    class One(Net):
        def forward(self, image):
            return super().forward(image.view(1, 3, 32, 32))

    class OneOfNumbers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(Row(), Row())

        def forward(self, x):
            return self.layers(x.view(1, 4, 8))

    class Row(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return x + self.linear(x)

    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(8, 8, 3, padding=1)

        def forward(self, x):
            return x + self.conv(x)

    def lines():
        return nn.Sequential(Line(), Line())

    class Mixed(Net):
        def __init__(self):
            super().__init__()
            self.row = Row()

        def forward(self, image):
            return self.row(self.blocks(self.stem(image)).flatten(2).transpose(1, 2))

    class Odd(BaseException):
        pass

    def odd():
        raise Odd("as odd as this")

    def interrupted():
        raise KeyboardInterrupt

    class OddWhenRun(Net):
        def forward(self, image):
            raise Odd("as odd as this")

    def required(width):
        return Net(width)

    def weighted(weights, pretrained=False):
        assert weights in (None, "here"), weights
        return Net(4 if pretrained else 8)
"""
BLOCKS = """
    from attnsurgeon.blocks import AttentionBlock
    from attnsurgeon.gate import Gate

    class Odd(BaseException):
        pass

    class Built(AttentionBlock):
        def __init__(self, channels):
            raise Odd("as odd as this")

    class Run(AttentionBlock):
        def __init__(self, channels):
            super().__init__()
            self.gate = Gate()

        def forward(self, x):
            raise Odd("as odd as this")
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


class TestWhatToTypeNext:
    @pytest.mark.parametrize(("name", "shape"), [("One", "1,3,32,32"), ("OneOfNumbers", "1,4,8")])
    def test_a_network_of_one_batch_size(self, refused, nets, name, shape):
        args = insert(name, "--block", "eca", "--input", shape)
        refused(*args, says=["batches of 2 and of 3 are tried", "any size"])

    def test_a_network_that_fails_at_every_batch_size(self):
        assert remedy(nn.Conv2d(3, 4, 3), (torch.zeros(2, 5, 9, 9),)).startswith("give a network")

    def test_maps_of_no_known_layout(self, refused, nets):
        says = ["what 0 adds", "1x8x32", "none of the layouts", "NLC"]
        refused("sites", f"{nets}:lines", "--input", "1,8,32", says=says)

    def test_no_place_but_a_name(self, refused):
        refused("insert", ":build", "--block", "se", says=["path/to/net.py:build"])

    def test_a_file_takes_no_arguments(self, run, nets):
        assert run(*insert("build", *SMALL, "-o", "o.safetensors")).code == 0
        told = run("verify", "o.safetensors", "--host", f"{nets}:required")
        assert told.code == 2
        assert "'width'" in told.error
        assert "a function that calls this" in told.error
        assert "--model-arg" not in told.error

    def test_the_step_of_a_plan(self, refused, nets, folder):
        steps = [{"block": "se", "at": "blocks.0"}, {"block": "eca", "at": "zzz.*"}]
        (folder / "plan.json").write_text(json.dumps(steps))
        args = ("insert", f"{nets}:build", *SMALL, "--plan", "plan.json")
        refused(*args, says=["step 2 of the plan: 'zzz.*'"])

    def test_one_step_needs_no_number(self, refused, nets):
        assert "step" not in refused(*insert("build", *SMALL, "--at", "zzz.*"), says=["'zzz.*'"])

    def test_sites_of_another_layout(self, run, nets):
        args = ("--block", "cbam", "--at", "*", "--dry-run")
        told = run("insert", f"{nets}:Mixed", *SMALL, *args)
        assert told.code == 0, told.err
        reason = "cbam cannot serve row at 'post': its feature map is NLC"
        assert f"1 site: {reason}" in told.out
        assert reason in told.err

    @pytest.mark.parametrize("name", ["odd", "OddWhenRun"])
    def test_whatever_a_network_raises(self, refused, nets, name):
        refused(*insert(name, *SMALL), says=["as odd as this"])

    def test_an_interrupt_stays_one(self, run, nets):
        assert run(*insert("interrupted", *SMALL)).code == 130

    @pytest.mark.parametrize("name", ["Built", "Run"])
    def test_whatever_a_block_raises(self, refused, nets, folder, name):
        (folder / "own.py").write_text(textwrap.dedent(BLOCKS))
        args = ("insert", f"{nets}:build", *SMALL, "--block", f"own.py:{name}", "--dry-run")
        refused(*args, says=[f"own.py:{name}", "Odd: as odd as this"])

    def test_an_assertion_without_words(self):
        def raised(check):
            with pytest.raises(AssertionError) as caught:
                check()
            return first_line(caught.value)

        def plain():
            raise AssertionError

        def torchs():
            torch._assert(1 % 2 == 0, "")

        assert raised(torchs) == "it asserts 1 % 2 == 0"
        assert raised(plain) == "AssertionError"

    def test_an_assertion_of_timm(self, refused, nets):
        pytest.importorskip("timm")
        args = ("insert", f"{nets}:build", "--input", "1,3,30,30", "--block", "timm:bat")
        refused(*args, says=["it asserts", "block_size", "--at"])


class TestCheckpoints:
    def held(self, nets, wrap):
        state = load_host(f"{nets}:build").state_dict()
        torch.save(wrap(state), "x.pth")
        return insert("build", *SMALL, "--checkpoint", "x.pth")

    def test_of_a_network_with_more_around_it(self, run, refused, nets, folder):
        def wrap(state):
            inside = {f"module.backbone.{key}": tensor for key, tensor in state.items()}
            return {"model": {**inside, "module.head.weight": torch.ones(1)}}

        args = self.held(nets, wrap)
        key = "model.module.backbone"
        refused(*args, says=["under 'backbone'", f"give --checkpoint-key {key}"])
        assert run(*args, "--checkpoint-key", key, "--dry-run").code == 0

    def test_of_another_network(self, refused, nets):
        args = self.held(nets, lambda state: {"other.weight": torch.ones(1)})
        refused(*args, says=["give a checkpoint of this very network"])
