"""Networks of timm, by their names there; its own loader brings their weights."""

import builtins
import json
import sys

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import attnsurgeon
from attnsurgeon.card import card_of
from attnsurgeon.errors import BadFile, HostUnusable, MissingPackage
from attnsurgeon.host import load_host, rebuild_host
from attnsurgeon.store import read_recipe

SMALL = ("--model-arg", "channels=[8,16,16,16]", "--num-classes", "4")
INSERT = ("insert", "timm:resnet18", "--block", "se", "--stage", "4")


@pytest.fixture
def published(monkeypatch, tmp_path):
    """Return weights that timm's own loader reads, from a file instead of from afar."""
    torch.manual_seed(5)
    weights = timm.create_model("resnet18", pretrained=False).state_dict()
    file = tmp_path / "published.pth"
    torch.save(weights, file)
    builder = timm.models._builder
    monkeypatch.setattr(builder, "_resolve_pretrained_source", lambda _: ("file", str(file)))
    return weights


class TestEndToEnd:
    def test_from_a_name_to_a_proven_export(self, run, folder):
        outcome = run(*INSERT, "--weights", "none", *SMALL, "--json")
        assert outcome.code == 0, outcome.err
        assert json.loads(outcome.out)["identity"]["exact"]
        file = "resnet18_se.safetensors"
        host = read_recipe(file).host
        assert (host.name, host.class_name) == ("timm:resnet18", "ResNet")
        assert host.arguments == {"channels": [8, 16, 16, 16], "num_classes": 4}
        assert host.input_shapes == ((1, 3, 224, 224),)
        assert host.weights is host.mean is None
        assert run("verify", file).code == 0  # by its name: the registry's code, not the file's
        args = ("export", file, "--input-size", "64", "--static", "-o", "x.pt")
        assert run(*args).code == 0, "export"

    def test_with_weights_by_its_own_loader(self, run, folder, published):
        outcome = run(*INSERT)
        assert outcome.code == 0, outcome.err
        written = load_file("resnet18_se.safetensors")
        assert all(torch.equal(written[key], tensor) for key, tensor in published.items())
        host = read_recipe("resnet18_se.safetensors").host
        config = timm.get_pretrained_cfg("resnet18")
        assert host.weights == f"timm:resnet18.{config.tag}"
        assert (host.mean, host.std) == (tuple(config.mean), tuple(config.std))
        for name, weights in (("resnet18.tv_in1k", "DEFAULT"), ("resnet18", "tv_in1k")):
            card = card_of(load_host(f"timm:{name}", weights=weights))
            assert card.weights == "timm:resnet18.tv_in1k"

    @pytest.mark.parametrize(
        ("name", "arguments", "shape"),
        [
            ("resnet18", {"in_chans": 1}, (1, 1, 224, 224)),
            ("efficientnet_b1", {}, (1, 3, 224, 224)),
            ("convnext_atto", {}, (1, 3, 224, 224)),
            ("regnetx_002", {"num_classes": 3}, (1, 3, 224, 224)),
            ("mobilenetv3_small_050", {}, (1, 3, 224, 224)),
        ],
    )
    def test_the_size_of_its_input(self, name, arguments, shape):
        model = load_host(f"timm:{name}", weights="none", arguments=arguments)
        card = card_of(model)
        known = timm.get_pretrained_cfg(name).input_size
        assert card.input_shapes == ((1, arguments.get("in_chans", known[0]), *known[1:]),)
        again = rebuild_host(card, weightless=True)
        assert {k: t.shape for k, t in again.state_dict().items()} == {
            k: t.shape for k, t in model.state_dict().items()
        }
        assert shape[1] == card.input_shapes[0][1]


class TestRecognised:
    """A network of timm's that is given to the library is known by its build."""

    def save(self, model, file):
        image = torch.zeros(1, 3, 64, 64)
        operated = attnsurgeon.insert_attention(model, "se", at="layer4.*", example=image)
        attnsurgeon.save_model(operated, file)
        return read_recipe(file).host

    @pytest.mark.parametrize("arguments", [{}, {"num_classes": 3}])
    def test_and_loaded_by_its_name(self, tmp_path, arguments):
        model = timm.create_model("resnet18", pretrained=False, **arguments).eval()
        host = self.save(model, tmp_path / "x.safetensors")
        assert (host.name, host.arguments) == ("timm:resnet18", arguments)
        assert host.input_shapes == ((1, 3, 64, 64),)
        image = torch.randn(2, 3, 64, 64)
        again = attnsurgeon.load_model(tmp_path / "x.safetensors")
        assert torch.equal(again(image), model(image))

    def test_not_if_it_was_changed(self, tmp_path):
        model = timm.create_model("resnet18", pretrained=False).eval()
        model.fc = torch.nn.Sequential(torch.nn.Linear(512, 7))
        assert self.save(model, tmp_path / "x.safetensors").name is None


class TestRefused:
    @pytest.mark.parametrize(
        ("args", "says"),
        [
            (("timm:resnt18",), ["no model of timm is called 'resnt18'", "'resnet18'"]),
            (("timm:",), ["no model of timm"]),
            (("timm:hf-hub:somebody/net",), ["no model of timm", "hf-hub:somebody/net"]),
            (("timm:local-dir:/tmp",), ["no model of timm"]),
            (("timm:resnet18.a1_in2k",), ["'a1_in2k'", "'a1_in1k'"]),
            (
                ("timm:resnet18", "--weights", "a1_in2k"),
                ["'a1_in2k'", "'a1_in1k'", "--weights none"],
            ),
            (("timm:resnet18", "--num-classes", "7"), ["1000 classes, not 7", "--checkpoint FILE"]),
            (("timm:resnet18", "--weights", "none", "--model-arg", "wide=7"), ["wide=7"]),
            (("timm:resnet18", "--model-arg", "checkpoint_path=x.pth"), ["no --model-arg"]),
            (("timm:resnet18", "--model-arg", "pretrained_cfg=x"), ["no --model-arg"]),
        ],
    )
    def test_one_line(self, refused, args, says):
        refused("insert", *args, "--block", "se", says=says)

    def test_weights_that_cannot_be_fetched(self, run, folder, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setenv("HF_HUB_CACHE", str(folder))
        outcome = run(*INSERT)
        assert (outcome.code, outcome.out) == (2, "")
        last = outcome.err.splitlines()[-1]
        says = ("timm:resnet18 could not be fetched", "--checkpoint FILE", "--weights none")
        assert all(text in last for text in says), last

    def test_without_timm(self, refused, monkeypatch, run, folder):
        assert run(*INSERT, "--weights", "none").code == 0
        monkeypatch.setitem(sys.modules, "timm", None)
        refused(*INSERT, "-o", "x.safetensors", says=["pip install timm"])
        refused("verify", "resnet18_se.safetensors", says=["pip install timm"])
        with pytest.raises(MissingPackage, match="pip install timm"):
            attnsurgeon.load_model("resnet18_se.safetensors")

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"name": "timm:hf-hub:somebody/net"}, "no model of timm"),
            ({"name": "timm:resnet19"}, "no model of timm"),
            ({"name": "net.py:build"}, "no torchvision model"),
            ({"arguments": {"pretrained": True}}, "name weights"),
            ({"arguments": {"pretrained_cfg": {"file": "x"}}}, "name weights"),
            ({"arguments": {"checkpoint_path": "x"}}, "name weights"),
        ],
    )
    def test_a_recipe_that_would_read_from_elsewhere(self, run, folder, monkeypatch, change, says):
        assert run(*INSERT, "--weights", "none", *SMALL).code == 0
        with safe_open("resnet18_se.safetensors", framework="pt") as opened:
            recipe = json.loads(opened.metadata()["attnsurgeon"])
        recipe["host"].update(change)
        tensors = load_file("resnet18_se.safetensors")
        save_file(tensors, "x.safetensors", {"attnsurgeon": json.dumps(recipe)})
        monkeypatch.setattr(builtins, "__import__", _watchful(builtins.__import__))
        with pytest.raises((BadFile, HostUnusable), match=says):
            attnsurgeon.load_model("x.safetensors")


def _watchful(genuine):
    """Return an import that fails for a module called as the recipe's factory."""

    def watched(name, *args, **kwargs):
        assert name != "net"
        return genuine(name, *args, **kwargs)

    return watched
