"""What the command line says of networks of one's own: all of it, and what to type next."""

import textwrap

import pytest

from attnsurgeon.card import HostCard
from attnsurgeon.errors import BadFile
from attnsurgeon.store import read_recipe

NETS = """
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
