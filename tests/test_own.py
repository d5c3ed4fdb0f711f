"""A network of one's own: named on the command line, checkpointed, and named again later."""

import json
import pickle
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import attnsurgeon
from attnsurgeon.errors import AttnSurgeonError, HostUnusable
from attnsurgeon.host import load_host
from attnsurgeon.opening import open_model
from attnsurgeon.store import load_plain, read_recipe

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PARTS = """
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.conv = nn.Conv2d(width, width, 3, padding=1)
            self.norm = nn.BatchNorm2d(width)

        def forward(self, x):
            return x + self.norm(self.conv(x)).relu()
"""
NET = """
    from __future__ import annotations

    import sys
    from dataclasses import dataclass

    import torch
    from torch import nn

    from parts import Block  # beside this file, found as `python net.py` would

    @dataclass
    class Widths:
        width: int = 8

    class TinyNet(nn.Module):
        def __init__(self, width=8, num_classes=5):
            super().__init__()
            self.stem = nn.Conv2d(3, width, 3, padding=1)
            self.blocks = nn.Sequential(Block(width), Block(width))
            self.head = nn.Linear(width, num_classes)

        def forward(self, image):
            return self.head(self.blocks(self.stem(image)).mean((2, 3)))

    class Labelled(TinyNet):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 5)

        def forward(self, image, label):
            return super().forward(image) + self.embed(label)

    def build(width=8, num_classes=5):
        return TinyNet(Widths(width).width, num_classes)

    def loud(**arguments):
        print("building")
        return build(**arguments)

    def fixed():
        return TinyNet(num_classes=10)

    def other(width=8):
        return nn.Sequential(nn.Conv2d(3, 4, 3))

    def same_name(extra=3):
        class TinyNet(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem = nn.Conv2d(extra, 4, 3)
        return TinyNet()

    def compiled():
        return torch.compile(TinyNet(), backend="eager")

    def shapes_only():
        with torch.device("meta"):
            return TinyNet()

    def raises():
        raise ValueError("no luck today")

    def leaves():
        sys.exit(3)

    def interrupts():
        raise KeyboardInterrupt

    def needs(width, depth):
        return TinyNet(width)

    def number():
        return 3

    def pair():
        return TinyNet(), 224

    async def later():
        return TinyNet()

    def smooth():
        import timm  # beside its registry, which has no such network

        return timm.create_model("test_resnet", act_layer=nn.SiLU)

    ready = TinyNet()
    table = {}
"""
INPUT = ("--input", "1,3,32,32")
INSERT = ("insert", "net.py:build", *INPUT, "--block", "se")


@pytest.fixture
def net(folder):
    """Return a folder, the current one, with a network's code in two files."""
    (folder / "net.py").write_text(textwrap.dedent(NET))
    (folder / "parts.py").write_text(textwrap.dedent(PARTS))
    yield folder
    for name in [n for n in sys.modules if n == "parts" or n.startswith(("net", "own_package"))]:
        del sys.modules[name]


@pytest.fixture
def made(run, net):
    """Return the folder with a file made from `net.py:build`, of width 4."""
    outcome = run(*INSERT, "--model-arg", "width=4", "-o", "made.safetensors")
    assert outcome.code == 0, outcome.err
    return net


def trained(width=8, num_classes=5):
    """Return other weights than a fresh network has."""
    torch.manual_seed(3)
    return load_host("net.py:build", arguments={"width": width, "num_classes": num_classes})


class TestEndToEnd:
    def test_from_a_wrapped_checkpoint_to_a_proven_export(self, run, net):
        weights = trained(num_classes=7).state_dict()
        wrapped = {f"module.{key}": tensor for key, tensor in weights.items()}
        torch.save({"model": wrapped, "epoch": 3}, "mine.pth")
        outcome = run(*INSERT, "--checkpoint", "mine.pth", "--json")
        assert outcome.code == 0, outcome.err
        done = json.loads(outcome.out)
        assert done["output"] == "net_se.safetensors"
        new = done["tensors"]["new"]
        assert done["checkpoint"] == {
            **{"kept": len(weights), "new": new, "missing": 0, "unexpected": 0},
            **{"unwrapped": ["model", "module."], "dropped": []},
        }
        assert done["identity"]["exact"]
        written = load_file("net_se.safetensors")
        assert all(torch.equal(written[key], tensor) for key, tensor in weights.items())

        again = ("--host", "net.py:build")
        for words in (
            ("verify", "net_se.safetensors", *again),
            ("sites", "net_se.safetensors", *again),
            ("export", "net_se.safetensors", *again, "-o", "net.onnx"),
            ("insert", "net_se.safetensors", *again, "--block", "gc"),
        ):
            outcome = run(*words)
            assert outcome.code == 0, outcome.err
        both = attnsurgeon.load_model("net_se_gc.safetensors", host="net.py:build")
        assert len(attnsurgeon.gates(both)) == 4
        assert not list(net.rglob("*.pyc"))

    @pytest.mark.parametrize("factory", ["build", "smooth"])
    def test_named_again_after_training(self, run, net, refused, factory):
        host = f"net.py:{factory}"
        args = ("insert", host, *INPUT, "--block", "se", "--every", "2", "-o", "x.safetensors")
        assert run(*args).code == 0
        Image.new("RGB", (40, 40), (200, 30, 90)).save("a.png")
        for words in (
            ("gates", "x.safetensors", "--json"),
            ("show", "x.safetensors", "a.png", "-o", "page.html", "--json"),
            ("remove", "x.safetensors", "-o", "plain.safetensors", "--json"),
        ):
            refused(*words, says=[f"--host path/to/{host}"])
            refused(*words, "--host", "net.py:biuld", says=["--host net.py:biuld: no factory"])
            outcome = run(*words, "--host", host)
            assert outcome.code == 0, outcome.err
            assert json.loads(outcome.out)
        assert load_file("plain.safetensors").keys() == load_host(host).state_dict().keys()

    def test_the_name_of_a_module(self, run, net, monkeypatch):
        (net / "own_package").mkdir()
        (net / "own_package" / "nets.py").write_text("from net import TinyNet\n")
        outcome = run("insert", "own_package.nets:TinyNet", *INPUT, "--block", "se")
        assert outcome.code == 0, outcome.err
        assert (net / "nets_se.safetensors").exists()
        assert run("verify", "nets_se.safetensors", "--host", "own_package.nets:TinyNet").code == 0

    def test_what_it_prints_is_no_result(self, run, net):
        outcome = run("sites", "net.py:loud", *INPUT, "--json")
        assert json.loads(outcome.out)
        assert "building\n" in outcome.err

    def test_a_network_in_the_place_of_a_factory(self, run, net):
        outcome = run("insert", "net.py:ready", *INPUT, "--block", "se")
        assert outcome.code == 0, outcome.err

    def test_a_compiled_one_is_taken_out(self, run, net):
        outcome = run("insert", "net.py:compiled", *INPUT, "--block", "se")
        assert outcome.code == 0, outcome.err
        assert "taken out of OptimizedModule (._orig_mod)" in outcome.err
        assert read_recipe("net_se.safetensors").host.class_name == "TinyNet"

    def test_exported_and_watched_by_its_own_name(self, run, net):
        outcome = run("export", "net.py:build", *INPUT, "--model-arg", "width=4", "-o", "x.pt")
        assert outcome.code == 0, outcome.err
        found = json.loads(run("sites", "net.py:build", *INPUT, "--json").out)
        assert [site["path"] for site in found] == ["blocks.0", "blocks.1"]
        assert {tuple(site["shape"]) for site in found} == {(1, 8, 32, 32)}


class TestRecipe:
    def test_what_is_written_down(self, made):
        host = read_recipe("made.safetensors").host
        assert (host.name, host.class_name, host.factory) == (None, "TinyNet", "net.py:build")
        assert host.arguments == {"width": 4}
        assert host.input_shapes == ((1, 3, 32, 32),)
        assert str(made) not in Path("made.safetensors").read_bytes().decode("latin-1")

    def test_no_code_is_run_because_a_file_names_it(self, made, refused):
        (made / "net.py").write_text("open('ran', 'w')")
        says = ["TinyNet", "--host path/to/net.py:build", "host= to load_model"]
        for words in (
            ("verify",),
            ("sites",),
            ("export", "-o", "x.onnx"),
            ("insert", "--block", "se"),
        ):
            refused(words[0], "made.safetensors", *words[1:], says=says)
        with pytest.raises(HostUnusable, match="no code is run"):
            load_plain("made.safetensors")
        assert not (made / "ran").exists()

    def test_named_again_in_a_library(self, made):
        factory = _factory()
        given = factory(width=4)
        before = {key: tensor.clone() for key, tensor in given.state_dict().items()}
        image = torch.randn(2, 3, 32, 32)
        outputs = [
            attnsurgeon.load_model("made.safetensors", host=host)(image)
            for host in ("net.py:build", factory, given, nn.DataParallel(given))
        ]
        assert all(torch.equal(output, outputs[0]) for output in outputs)
        assert all(torch.equal(given.state_dict()[key], t) for key, t in before.items())
        assert torch.equal(load_plain("made.safetensors", factory)(image), outputs[0])

    @pytest.mark.parametrize(
        ("host", "says"),
        [
            ("net.py:other", "--host net.py:other: .* made from TinyNet, not from Sequential"),
            ("resnet1", "--host resnet1: no model is called 'resnet1'; did you mean 'resnet"),
            ("made.safetensors", "--host made.safetensors: no model is called"),
            ("resnet18", "resnet18 cannot be built with width=4"),
            ("net.py:fixed", r"fixed\(\) cannot be called: .*'width'"),
            ("net.py:ready", "takes no --model-arg"),
            ("net.py:raises", "cannot be called"),
        ],
    )
    def test_another_one_is_refused(self, made, refused, host, says):
        with pytest.raises(AttnSurgeonError, match=says):
            attnsurgeon.load_model("made.safetensors", host=host)
        refused("verify", "made.safetensors", "--host", host)

    def test_a_factory_may_return_the_same_network_each_time(self, made):
        shared = _factory()(width=4)
        for _ in range(2):
            again = attnsurgeon.load_model("made.safetensors", host=lambda width: shared)
            assert len(attnsurgeon.gates(again)) == 2
        assert not attnsurgeon.gates(shared)

    def test_a_file_is_imported_once_as_long_as_it_stays_as_it_is(self, net):
        models = [load_host("net.py:build") for _ in range(2)]
        assert type(models[0]) is type(models[1])
        assert type(pickle.loads(pickle.dumps(models[0]))) is type(models[0])
        (net / "net.py").write_text((net / "net.py").read_text() + "\nedited = True\n")
        assert type(load_host("net.py:build")) is not type(models[0])

    def test_one_with_other_keys_or_shapes_is_refused(self, made):
        same_class = type("TinyNet", (nn.Module,), {})
        with pytest.raises(HostUnusable, match="not the one that 'made.safetensors' was made from"):
            attnsurgeon.load_model("made.safetensors", host=same_class())
        wide = _factory()(width=8)
        with pytest.raises(HostUnusable, match="of another shape"):
            attnsurgeon.load_model("made.safetensors", host=wide)
        other = _factory()(width=4)
        other.register_buffer("count", torch.zeros(1))
        with pytest.raises(HostUnusable, match="missing .count"):
            attnsurgeon.load_model("made.safetensors", host=other)
        whole = _factory()(width=4)
        whole.head.bias = nn.Parameter(torch.zeros(5, dtype=torch.int64), requires_grad=False)
        with pytest.raises(HostUnusable, match="head.bias float32 instead of int64"):
            attnsurgeon.load_model("made.safetensors", host=whole)

    def test_named_around_what_loads_it(self, made, run, digits_file):
        with attnsurgeon.naming_host("net.py:build"):
            outer = attnsurgeon.load_model("made.safetensors")
            with attnsurgeon.naming_host(None):  # changes nothing
                attnsurgeon.load_model("made.safetensors")
            assert type(attnsurgeon.load_model(digits_file)).__name__ == "MobileNetV2"
        assert type(outer).__name__ == "TinyNet"
        with pytest.raises(HostUnusable, match="no code is run"):
            attnsurgeon.load_model("made.safetensors")

    def test_benched(self, made, run):
        flags = ("--seconds", "0.05", "--json")
        outcome = run("bench", "made.safetensors", *flags)
        assert outcome.code == 2
        assert "--host path/to/net.py:build" in outcome.err
        outcome = run("bench", "made.safetensors", *flags, "--host", "net.py:build")
        assert outcome.code == 0, outcome.err
        assert len(json.loads(outcome.out)["comparisons"]) == 1
        outcome = run("bench", "net.py:build", "--input-size", "32", *flags)
        assert outcome.code == 0, outcome.err

    def test_a_registered_network_from_own_code_needs_no_naming(self, run, net):
        (net / "mine.py").write_text(
            "import torchvision\n"
            "def build(classes=3):\n"
            "    return torchvision.models.mobilenet_v3_small(weights=None, num_classes=classes)\n"
        )
        args = ("mine.py:build", "--model-arg", "classes=4", "--input", "1,3,64,64")
        where = ("--block", "se", "--stage", "2", "-o", "x.safetensors")
        assert run("insert", *args, *where).code == 0
        host = read_recipe("x.safetensors").host
        assert (host.name, host.arguments) == ("mobilenet_v3_small", {"num_classes": 4})
        assert run("verify", "x.safetensors").code == 0
        with pytest.raises(HostUnusable, match="of another shape"):  # it is made with 3 classes
            attnsurgeon.load_model("x.safetensors", host="mine.py:build")

    def test_a_registered_network_with_other_arguments_is_ones_own(self, folder):
        def build():
            return torchvision.models.mobilenet_v3_small(weights=None, reduced_tail=True)

        where = {"at": "features.4", "example": torch.zeros(1, 3, 64, 64)}
        operated = attnsurgeon.insert_attention(build().eval(), "se", **where)
        attnsurgeon.save_model(operated, "x.safetensors")
        says = r"own MobileNetV3 \(arguments of its own.*--host FILE.py:NAME of what builds it so"
        with pytest.raises(HostUnusable, match=says):
            attnsurgeon.load_model("x.safetensors")
        assert attnsurgeon.gates(attnsurgeon.load_model("x.safetensors", host=build))

    def test_a_host_is_for_files(self, net, refused):
        refused(*INSERT, "--host", "net.py:build", says=["--host", "net.py:build names one"])

    def test_a_planted_tensor_is_noticed(self, run, made):
        from safetensors import safe_open
        from safetensors.torch import save_file

        tensors = load_file("made.safetensors")
        with safe_open("made.safetensors", framework="pt") as opened:
            metadata = opened.metadata()
        tensors["head.bias"][0] += 1
        save_file(tensors, "changed.safetensors", metadata)
        outcome = run("verify", "changed.safetensors", "--host", "net.py:build")
        assert outcome.code == 3
        assert "head.bias" in outcome.error


def _factory():
    from attnsurgeon.sources.own import find_factory

    return find_factory("net.py:build")


class TestInputs:
    def test_are_kept_with_their_dtypes(self, run, net):
        args = ("--input", "1,3,32,32", "--input", "1:int64", "--block", "se")
        outcome = run("insert", "net.py:Labelled", *args, "-o", "x.safetensors")
        assert outcome.code == 0, outcome.err
        host = read_recipe("x.safetensors").host
        assert host.input_shapes == ((1, 3, 32, 32), (1,))
        assert host.input_dtypes == (None, "int64")
        assert [t.dtype for t in host.example()] == [torch.float32, torch.int64]
        assert run("verify", "x.safetensors", "--host", "net.py:Labelled").code == 0

    def test_of_the_library_are_kept_too(self, net):
        torch.manual_seed(0)
        model = load_host("net.py:Labelled")
        example = (torch.zeros(1, 3, 32, 32), torch.tensor([3]))
        attnsurgeon.save_model(
            attnsurgeon.insert_attention(model, "se", example=example), "x.safetensors"
        )
        assert read_recipe("x.safetensors").host.input_dtypes == (None, "int64")

    def test_of_any_network(self, run, folder):
        args = ("resnet18", "--weights", "none", "--input", "1,3,64,96", "--json")
        sites = json.loads(run("sites", *args[:1], *args[3:]).out)
        assert sites[0]["shape"] == [1, 64, 16, 24]
        assert open_model("digits", inputs=["2,3,40,40"])(torch.zeros(1, 3, 32, 32)).shape == (
            1,
            10,
        )

    def test_are_checked_against_the_network(self, net, refused):
        refused(
            "insert",
            "net.py:build",
            "--input",
            "1,4,32,32",
            "--block",
            "se",
            says=["[(1, 4, 32, 32)]"],
        )

    @pytest.mark.parametrize(
        "text",
        ["", "1,3,x", "1;3", "-1,3", "1,3,32,32:float33", "0,3,32,32", "1,3,99999,99999", "²"],
    )
    def test_that_are_none(self, net, refused, text):
        refused("insert", "net.py:build", f"--input={text}", "--block", "se", says=["--input"])


class TestFactories:
    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("raises", ["net.py:raises() raised ValueError: no luck today", "of net.py"]),
            ("leaves", ["net.py:leaves() raised SystemExit: 3"]),
            ("number", ["returned int, no torch.nn.Module"]),
            ("pair", ["returned tuple, no torch.nn.Module"]),
            ("later", ["net.py:later is async", "without async"]),
            ("needs", ["needs(width, depth)", "'width'", "--model-arg NAME=VALUE"]),
            ("table", ["is dict, nothing that makes a network"]),
            ("biuld", ["'biuld'", "did you mean 'build'?"]),
            ("", ["name what in 'net.py' makes the network"]),
        ],
    )
    @pytest.mark.parametrize(
        "command", [("insert", "--block", "se"), ("sites",), ("export", "-o", "x.pt")]
    )
    def test_that_make_no_network(self, net, refused, name, says, command):
        refused(command[0], f"net.py:{name}", *command[1:], says=says)

    def test_that_make_shapes_and_no_numbers(self, run, net, refused):
        assert run("sites", "net.py:shapes_only", *INPUT).code == 0
        args = ("insert", "net.py:shapes_only", *INPUT, "--block", "se")
        refused(*args, says=["stem.weight", "meta device", "build the network on the CPU"])
        with pytest.raises(HostUnusable, match="meta device"):
            attnsurgeon.insert_attention(load_host("net.py:shapes_only", inputs=INPUT[1:]), "se")

    def test_the_line_that_raised(self, net, refused):
        lines = (net / "net.py").read_text().splitlines()
        number = next(i for i, line in enumerate(lines, 1) if "no luck" in line)
        refused("sites", "net.py:raises", says=[f"(line {number} of net.py)"])

    @pytest.mark.parametrize(
        ("model", "says"),
        [
            ("net.py", ["as net.py:build"]),
            ("missing.py:build", ["there is no file 'missing.py'"]),
            ("missing.nets:build", ["no module is called 'missing.nets'"]),
            ("net:build.of", ["no factory in 'net' is called 'build.of'"]),
            ("nets/mine:build", ["no module is called 'nets/mine'", "mean nets/mine.py:NAME?"]),
            ("broken.py:build", ["importing 'broken.py' raised SyntaxError"]),
            ("noisy.py:build", ["importing 'noisy.py' raised ZeroDivisionError", "line 2"]),
            ("wanting.py:build", ["ModuleNotFoundError", "not_there"]),
            ("folder.py:build", ["is a folder"]),
        ],
    )
    def test_files_that_hold_none(self, net, refused, model, says):
        (net / "broken.py").write_text("def build(:\n")
        (net / "noisy.py").write_text("hello = 3\n1 / 0\n")
        (net / "wanting.py").write_text("import not_there\n")
        (net / "folder.py").mkdir()
        (net / "nets").mkdir()
        (net / "nets" / "mine.py").touch()
        refused("insert", model, "--block", "se", says=says)

    @pytest.mark.parametrize(
        ("args", "says"),
        [
            (("--model-arg", "widht=4"), ["'widht'", "build(width=8, num_classes=5)"]),
            (("--model-arg", "width=four"), ["width='four'", "raised"]),
            (("--weights", "IMAGENET1K_V1"), ["--weights IMAGENET1K_V1", "--checkpoint"]),
            (("--num-classes", "0"), ["--num-classes"]),
        ],
    )
    def test_arguments_that_they_do_not_take(self, net, refused, args, says):
        refused(*INSERT, *args, says=says)

    def test_an_interrupt_is_one(self, run, net):
        assert run("sites", "net.py:interrupts").code == 130

    def test_what_was_lent_is_given_back(self, run, net):
        before = list(sys.path), sys.dont_write_bytecode, sys.stdout
        for name in ("build", "raises"):
            run("sites", f"net.py:{name}", *INPUT)
        assert (list(sys.path), sys.dont_write_bytecode, sys.stdout) == before

    def test_classes_and_arguments_reach_them(self, run, net):
        outcome = run(*INSERT, "--num-classes", "9", "--model-arg", "width=4")
        assert outcome.code == 0, outcome.err
        assert load_file("net_se.safetensors")["head.weight"].shape == (9, 4)
        assert read_recipe("net_se.safetensors").host.arguments == {"width": 4, "num_classes": 9}

    def test_a_checkpoint_of_another_network(self, net, refused):
        torch.save(nn.Linear(3, 4).state_dict(), "x.pth")
        refused(*INSERT, "--checkpoint", "x.pth", says=["'x.pth' does not fit TinyNet", "missing"])
        torch.save(trained(width=6).state_dict(), "x.pth")
        refused(*INSERT, "--checkpoint", "x.pth", says=["stem.weight (6, 3, 3, 3) instead of (8"])
        torch.save(trained(num_classes=9).state_dict(), "x.pth")
        args = ("insert", "net.py:fixed", *INPUT, "--block", "se", "--checkpoint", "x.pth")
        refused(*args, says=["head.weight (9, 8) instead of (10, 8)", "--num-classes"])


def test_the_readmes_own_network(run, net):
    """The file and the commands of the README's section, as they stand there."""
    section = README.partition("## Your own network")[2].partition("\n## ")[0]
    code = re.search(r"```python\n# nets/mine.py\n(.*?)```", section, re.S)[1]
    (net / "nets").mkdir()
    (net / "nets" / "mine.py").write_text(code)
    plan = re.search(r"```json\n(.*?)```", section, re.S)[1]
    (net / "plan.json").write_text(plan)
    torch.save({"model": load_host("nets/mine.py:build").state_dict()}, "mine.pth")
    commands = re.findall(r"^attnsurgeon (.*)$", section, re.M)
    assert len(commands) >= 6
    for command in commands:
        done = run(*shlex.split(command, comments=True))
        assert done.code == 0, (command, done.err)
