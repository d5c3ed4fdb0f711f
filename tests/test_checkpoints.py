"""Checkpoints as training scripts leave them: taken out of everything, then fitted strictly."""

import argparse
import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import get_model

import attnsurgeon
from attnsurgeon.checkpoint import class_counts, load_checkpoint, read_checkpoint
from attnsurgeon.errors import BadFile, CheckpointMismatch, UnknownName
from attnsurgeon.host import load_host, open_host
from attnsurgeon.store import read_recipe


class Net(nn.Module):
    """A network of which one part is called as wrappers call theirs."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 3)


def small(num_classes=10, seed=1):
    """Return the digits network with other weights."""
    torch.manual_seed(seed)
    return load_host("digits", weights="none", num_classes=num_classes)


def held(tmp_path, thing, name="x.pth"):
    torch.save(thing, tmp_path / name)
    return tmp_path / name


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], t) for k, t in other.items())


def as_reference(model, average):
    """Return what torchvision's references/classification/train.py saves."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.zeros(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=2),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
        ],
        milestones=[2],
    )
    return {
        "model": nn.DataParallel(model).module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, model="resnet50", val_crop_size=224, test_only=False),
        "model_ema": average.state_dict(),
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
    }


def partly_compiled(state):
    return {k.replace("features.", "features._orig_mod."): t for k, t in state.items()}


class TestUnwrapped:
    @pytest.mark.parametrize(
        ("wrap", "unwrapped"),
        [
            (lambda state: state, ()),
            (lambda state: {"state_dict": state, "epoch": 3}, ("state_dict",)),
            (lambda state: {"model": state}, ("model",)),
            (lambda state: {"model_state_dict": state, "loss": 0.1}, ("model_state_dict",)),
            (lambda state: {"model_ema": state}, ("model_ema",)),
            (lambda state: {"ema": {"state_dict": state}}, ("ema", "state_dict")),
            (lambda state: prefixed(state, "module."), ("module.",)),
            (lambda state: prefixed(state, "_orig_mod."), ("_orig_mod.",)),
            (
                lambda state: {"model": prefixed(state, "module._orig_mod.")},
                ("model", "module.", "_orig_mod."),
            ),
            (
                lambda state: {
                    k.replace("features.", "features._orig_mod."): t for k, t in state.items()
                },
                ("._orig_mod.",),
            ),
        ],
    )
    @pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
    def test_by_itself(self, tmp_path, wrap, unwrapped, suffix):
        state = small().state_dict()
        wrapped, file = wrap(state), tmp_path / f"x{suffix}"
        if suffix == ".safetensors" and len(wrapped) == len(state):
            save_file(wrapped, file)
        else:
            file = file.with_suffix(".pt" if suffix == ".safetensors" else suffix)
            torch.save(wrapped, file)
        model = small(seed=2)
        fit = load_checkpoint(model, read_checkpoint(file))
        assert fit.checkpoint.unwrapped == unwrapped
        assert (fit.kept, fit.missing, fit.unexpected) == (len(state), 0, 0)
        assert same(model.state_dict(), state)

    def test_of_torchvisions_reference_training(self, run, folder):
        """The real thing: Namespace and all, read as tensors alone, with its average."""
        model = small(num_classes=4)
        average = AveragedModel(model)
        with torch.no_grad():
            model.classifier[1].bias.add_(1)
        torch.save(as_reference(model, average), "checkpoint.pth")
        wanted = {None: model.state_dict(), "model_ema": average.module.state_dict()}
        for key, state in wanted.items():
            choice = () if key is None else ("--checkpoint-key", key)
            args = ("--checkpoint", "checkpoint.pth", *choice, "--block", "se", "--stage", "2")
            outcome = run("insert", "digits", *args, "--json", "--force")
            assert outcome.code == 0, outcome.err
            loaded = json.loads(outcome.out)["checkpoint"]
            assert loaded["kept"] == len(state)
            assert loaded["unwrapped"] == (["model"] if key is None else ["model_ema", "module."])
            assert loaded["dropped"] == ([] if key is None else ["n_averaged"])
            written = load_file("digits_se.safetensors")
            assert all(torch.equal(written[name], tensor) for name, tensor in state.items())
            assert ("holds model_ema as well as model" in outcome.err) is (key is None)
        shown = run("insert", "digits", *args, "--dry-run").out
        assert "taken out of model_ema, module.; without n_averaged" in shown
        assert "0 missing, 0 unexpected" in shown
        assert read_recipe("digits_se.safetensors").host.arguments == {"num_classes": 4}
        assert argparse.Namespace not in torch.serialization.get_safe_globals()

    def test_nothing_else_is_let_in_beside_a_namespace(self, tmp_path):
        args = argparse.Namespace(data=pathlib.PurePosixPath("/data"))
        with pytest.raises(BadFile, match="pathlib.PurePosixPath.*would run code"):
            read_checkpoint(held(tmp_path, {"model": small().state_dict(), "args": args}))

    def test_a_prefix_of_the_networks_own_stays(self, tmp_path):
        model = Net()
        state = {key: tensor + 1 for key, tensor in model.state_dict().items()}
        fit = load_checkpoint(model, read_checkpoint(held(tmp_path, state)))
        assert fit.checkpoint.unwrapped == ()
        assert same(model.state_dict(), state)

    def test_a_prefix_of_some_keys_only_is_no_wrapper(self, tmp_path):
        state = small().state_dict()
        first = next(iter(state))
        state = {**prefixed(state, "module."), "stray": state[first]}
        with pytest.raises(CheckpointMismatch, match="unexpected .module.features"):
            load_checkpoint(small(), read_checkpoint(held(tmp_path, state)))


def prefixed(state, prefix):
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


class TestKey:
    @pytest.mark.parametrize(
        ("key", "found"),
        [
            (None, "a"),
            ("model", "a"),
            ("other", "b"),
            ("deep.er", "c"),
            ("deep.dotted.name", "d"),
            ("flat.net", "e"),
            ("flat.net.inner", "f"),
        ],
    )
    def test_chooses(self, tmp_path, key, found):
        weights = {letter: torch.tensor([float(i)]) for i, letter in enumerate("abcdef")}
        file = held(
            tmp_path,
            {
                "model": {"w": weights["a"]},
                "other": {"w": weights["b"]},
                "deep": {"er": {"model": {"w": weights["c"]}}, "dotted.name": {"w": weights["d"]}},
                "flat": {"net.w": weights["e"], "net.inner.w": weights["f"], "loss": weights["a"]},
            },
        )
        state = read_checkpoint(file, key).state
        assert torch.equal(state["w"], weights[found])

    @pytest.mark.parametrize(
        ("key", "says"),
        [
            ("modle", "no key in .*x.pth' is called 'modle'; did you mean 'model'"),
            ("model.x", "no key"),
            ("", "no key"),
            ("epoch", "no state dict"),
        ],
    )
    def test_that_is_not_there(self, tmp_path, key, says):
        file = held(tmp_path, {"model": {"w": torch.zeros(1)}, "epoch": 3})
        with pytest.raises((UnknownName, BadFile), match=says):
            read_checkpoint(file, key)

    def test_what_it_could_be_is_named(self, tmp_path):
        file = held(tmp_path, {"generator": {"w": torch.zeros(1)}, "critic": {"w": torch.zeros(1)}})
        with pytest.raises(BadFile, match="--checkpoint-key chooses among generator, critic"):
            read_checkpoint(file)

    def test_a_circle_has_an_end(self, tmp_path):
        circle = {"epoch": 3}
        circle["model"] = circle
        with pytest.raises(BadFile, match="no state dict"):
            read_checkpoint(held(tmp_path, circle))

    def test_without_a_checkpoint(self, refused):
        args = ("insert", "digits", "--block", "se", "--checkpoint-key", "model")
        refused(*args, says=["--checkpoint-key is for a --checkpoint"])

    def test_of_a_file_of_attnsurgeon(self, run, folder, digits_file):
        trained = {key: tensor * 2 for key, tensor in load_file(digits_file).items()}
        torch.save({"a": {"b": prefixed(trained, "module.")}}, "x.pth")
        args = ("--checkpoint", "x.pth", "--checkpoint-key", "a.b", "--static")
        assert run("export", digits_file, *args, "-o", "x.pt").code == 0


class TestClasses:
    @pytest.mark.parametrize(
        "name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "timm:resnet18"]
    )
    def test_are_the_checkpoints(self, tmp_path, name):
        torch.manual_seed(0)
        trained = load_host(name, weights="none", num_classes=7)
        file = held(tmp_path, trained.state_dict())
        host = open_host(name, checkpoint=file)
        assert same(host.model.state_dict(), trained.state_dict())
        assert host.notices == (f"{str(file)!r} is of 7 classes, and so is the network",)

    def test_of_two_heads(self, tmp_path):
        """A detector's box regression has four numbers a class."""
        name, backbone = "fasterrcnn_mobilenet_v3_large_320_fpn", {"weights_backbone": None}
        trained = get_model(name, weights=None, num_classes=3, **backbone)
        default = get_model(name, weights=None, **backbone)
        assert class_counts(default, trained.state_dict()) == [3, 12]
        host = open_host(name, checkpoint=held(tmp_path, trained.state_dict()))
        assert same(host.model.state_dict(), trained.state_dict())

    def test_asked_for_otherwise_are_refused(self, tmp_path, refused):
        file = held(tmp_path, small(num_classes=7).state_dict())
        args = ("insert", "digits", "--block", "se", "--checkpoint", file)
        refused(
            *args, "--num-classes", "5", says=["(7, 1280) instead of (5, 1280)", "--num-classes"]
        )

    def test_that_are_not_one_number_are_refused(self, tmp_path, refused):
        state = small(num_classes=7).state_dict()
        state["classifier.1.bias"] = torch.zeros(8)
        file = held(tmp_path, state)
        says = ["2 of another shape", "--num-classes"]
        refused("insert", "digits", "--block", "se", "--checkpoint", file, says=says)

    def test_another_network_is_not_one_of_other_classes(self, tmp_path, refused):
        file = held(tmp_path, get_model("resnet34", weights=None, num_classes=7).state_dict())
        args = ("insert", "resnet18", "--block", "se", "--checkpoint", file)
        refused(*args, says=["does not fit ResNet", "unexpected (layer1.2.conv1.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept(run, folder, dtype):
    """The network takes the dtype of its tensors, and so does the attention."""
    torch.save({"model": small().to(dtype).state_dict()}, "x.pth")
    args = ("digits", "--checkpoint", "x.pth", "--block", "se", "--stage", "2")
    assert run("insert", *args).code == 0
    network = attnsurgeon.load_model("digits_se.safetensors")
    assert {p.dtype for p in network.parameters()} == {dtype}
