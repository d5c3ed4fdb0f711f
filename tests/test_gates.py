"""`gates` and `remove`: whether the attention took, and the way back."""

import copy
import json
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import attnsurgeon
from attnsurgeon import blocks, digits
from attnsurgeon.card import card_of, give_card
from attnsurgeon.host import load_host
from attnsurgeon.plan import make_plan
from attnsurgeon.report.attention_page import make_page
from attnsurgeon.report.gate_chart import write_chart
from attnsurgeon.report.gates import summary
from attnsurgeon.sites import find_sites
from attnsurgeon.store import load_plain, save_model
from attnsurgeon.surgery import apply_plan, cuts_of
from attnsurgeon.training.images import Photograph, sample_inputs
from attnsurgeon.training.maps import watch_maps
from attnsurgeon.training.openings import compare_outputs, measure_openings

OPENED = {  # site, block -> gates
    ("features.5", "cbam"): [0.5, -0.25],
    ("features.6", "cbam"): [0.01, 0.0],
    ("features.5", "gc"): [-0.4],
    ("features.6", "gc"): [0.0],
}


@pytest.fixture(scope="module")
def opened():
    """Return the digits network with CBAM and GC at two sites, gates at the values above."""
    model = load_host("digits")
    for block in ("cbam", "gc"):
        model = attnsurgeon.insert_attention(model, block, stage=2, reduction=4)
    for cut in cuts_of(model):
        gates = attnsurgeon.gates(model.get_submodule(cut.child)).values()
        for gate, value in zip(gates, OPENED[cut.path, cut.block], strict=True):
            gate.data.fill_(value)
    return model


@pytest.fixture(scope="module")
def file(opened, tmp_path_factory):
    path = tmp_path_factory.mktemp("opened") / "opened.safetensors"
    save_model(opened, path)
    return path


@pytest.fixture(scope="module")
def moved(opened, tmp_path_factory):
    """Return a file of the same network whose host was trained too."""
    host = attnsurgeon.load_model(_saved(opened, tmp_path_factory))
    host.features[0][0].weight.data.mul_(1.01)
    return _saved(host, tmp_path_factory)


def _saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "moved.safetensors"
    save_model(model, path)
    return path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.jpg", "below/c.png")):
        Image.effect_noise((40 + 8 * i, 50), 60).convert("RGB").save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


class TestMeasuring:
    def test_the_values(self, opened):
        found = measure_openings(opened, sample_inputs(opened))
        assert {
            (o.cut.path, o.cut.block): [round(v, 6) for v in o.gates.values()] for o in found
        } == OPENED
        assert [o.cut.path for o in found] == [*["features.5"] * 2, *["features.6"] * 2]
        assert [o.to_json()["sign"] for o in found] == [1, -1, 1, 0]
        assert [round(o.openness, 6) for o in found] == [0.5, -0.4, 0.01, 0]

    def test_what_closing_one_changes_is_what_removing_it_changes(self, opened):
        sample = sample_inputs(opened)
        found = measure_openings(opened, sample)
        bare = attnsurgeon.remove_attention(opened, "features.6")
        reference = opened(*sample.inputs)
        assert found[3].change.relative == found[3].change.largest == found[3].change.top1 == 0
        assert found[2].change == compare_outputs(reference, bare(*sample.inputs))
        assert found[0].change.relative > 10 * found[2].change.relative > 0

    def test_a_map_that_is_the_same_for_all_images_does_not_vary(self, opened):
        sample = sample_inputs(opened)
        twin = attnsurgeon.remove_attention(opened, "features.6")
        mlp = twin.get_submodule("features.5.attention_post").channel.mlp
        before = measure_openings(twin, sample)[0].variation
        spatial = twin.get_submodule("features.5.attention_post").spatial.map
        mlp[2].weight.data.zero_()
        spatial.norm.weight.data.zero_()
        assert before > 0
        assert measure_openings(twin, sample)[0].variation == 0

    def test_the_model_is_given_back(self, opened):
        state = {key: tensor.clone() for key, tensor in opened.state_dict().items()}
        opened.train()
        measure_openings(opened, sample_inputs(opened))
        opened.eval()
        assert all(torch.equal(state[key], tensor) for key, tensor in opened.state_dict().items())
        for module in opened.modules():
            assert "admit" not in module.__dict__
            assert not module._forward_hooks
            assert not module._forward_pre_hooks

    def test_watching_changes_no_output(self, opened):
        (inputs,) = sample_inputs(opened).inputs
        output, maps = watch_maps(opened, (inputs,))
        assert torch.equal(output, opened(inputs))
        kinds = [(m.cut.path, m.kind) for m in maps]
        assert kinds == [
            *(("features.5", kind) for kind in ("channel", "spatial")),
            *(("features.6", kind) for kind in ("channel", "spatial")),
            *(("features.5", kind) for kind in ("context", "added")),
            *(("features.6", kind) for kind in ("context", "added")),
        ]

    def test_the_maps_are_those_of_the_papers(self, opened):
        (inputs,) = sample_inputs(opened).inputs
        _, maps = watch_maps(opened, (inputs,))
        block = opened.get_submodule("features.5.attention_post")
        seen = []
        hook = block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        opened(inputs)
        hook.remove()
        assert torch.equal(maps[0].values, block.channel(seen[0]).flatten(1))
        context = maps[4].values
        torch.testing.assert_close(context.sum((1, 2)), torch.ones(len(inputs)))

    def test_branches_of_sk_sum_to_one(self):
        model = attnsurgeon.insert_attention(load_host("digits"), "sk", stage=4, branches=3)
        (inputs,) = sample_inputs(model).inputs
        (found,) = watch_maps(model, (inputs,))[1]
        assert (found.kind, found.values.shape[1]) == ("branch", 3)
        torch.testing.assert_close(found.values.sum(1), torch.ones_like(found.values[:, 0]))

    def test_every_block_is_heard(self):
        """One after the other in one block of the network; a new one is tested by existing."""
        model = load_host("digits")
        sites = find_sites(model)
        names = [n for n in blocks.names() if "post" in blocks.get(n).placements]
        for name in names:
            apply_plan(model, make_plan(model, sites, name, at="features.5"))
        found = measure_openings(model, sample_inputs(model))
        assert [opening.cut.block for opening in found] == names
        heard = {m.cut.block: m.kind for m in watch_maps(model, sample_inputs(model).inputs)[1]}
        assert heard.keys() == set(names)
        page = make_page(
            model,
            Photograph("x", torch.zeros(3, 32, 32, dtype=torch.uint8), torch.zeros(1, 3, 32, 32)),
        )
        assert len(page.numbers) == len(page.overlays) + len(page.strips) > len(names)

    def test_non_local_shows_what_is_attended_to(self):
        model = attnsurgeon.insert_attention(load_host("digits"), "nonlocal", at="features.5")
        block = model.get_submodule("features.5.attention_post")
        with torch.no_grad():  # every query asks for the same: the positions where phi is greatest
            block.theta.weight.zero_()
            block.theta.bias.fill_(1)
        (inputs,) = sample_inputs(model).inputs
        keys = []
        hook = block.phi.register_forward_hook(lambda _, args, output: keys.append(output))
        context = watch_maps(model, (inputs,))[1][0].values
        hook.remove()
        wanted = keys[0].sum(1).flatten(1).softmax(1)
        torch.testing.assert_close(context.flatten(1), wanted)


class TestGates:
    def test_table_and_json(self, run, file):
        outcome = run("gates", file)
        assert outcome.code == 0
        assert "+0.5000 -0.2500" in outcome.out
        assert "64 held-out digits" in outcome.out
        told = json.loads(run("gates", file, "--json").out)
        assert told.keys() == {"file", "images", "chart", "sites"}
        assert told["images"] == {"source": "64 held-out digits", "count": 64}
        assert told["sites"][0].keys() == {
            *("path", "block", "placement", "gates", "form", "openness", "sign"),
            *("variation", "change", "top1_changed"),
        }
        assert told["sites"][1]["gates"] == {"fuse.0.gate": pytest.approx(-0.4)}

    def test_as_inserted(self, run, digits_file):
        assert "every gate is closed" in run("gates", digits_file).out

    @pytest.mark.parametrize("nested", [False, True])
    def test_a_trained_checkpoint(self, run, opened, digits_file, folder, nested):
        model = attnsurgeon.load_model(digits_file)
        for gate in attnsurgeon.gates(model).values():
            gate.data.fill_(0.125)
        state = model.state_dict()
        torch.save({"state_dict": state} if nested else state, "trained.pth")
        told = json.loads(run("gates", digits_file, "--checkpoint", "trained.pth", "--json").out)
        assert {site["openness"] for site in told["sites"]} == {0.125}
        assert told["file"] == "trained.pth"

    def test_images_of_a_folder(self, run, file, photos):
        told = json.loads(run("gates", file, "--images", photos, "--json").out)
        assert told["images"] == {"source": f"3 images of {photos}", "count": 3}

    def test_noise_for_a_network_without_images(self, run, opened, folder):
        model = copy.deepcopy(opened)
        give_card(model, replace(card_of(opened), name="mobilenet_v2"))
        sample = sample_inputs(model)
        assert (sample.source, sample.inputs[0].shape) == ("8 inputs of noise", (8, 3, 32, 32))
        assert torch.equal(sample.inputs[0], sample_inputs(model).inputs[0])
        found = measure_openings(model, sample)
        assert "give --images FOLDER" in summary(found, sample)[-1]

    def test_a_chart(self, run, refused, file, folder):
        assert run("gates", file, "-o", "a.svg").code == 0
        text = (folder / "a.svg").read_text(encoding="utf-8")
        assert text.startswith("<?xml")
        assert text.count("features.") == 4
        assert "64 held-out digits" in text
        refused("gates", file, "-o", "a.svg", says=["exists", "--force"], at_once=True)

    @pytest.mark.parametrize("suffix", [".png", ".svg"])
    def test_a_chart_shows_the_gates(self, opened, folder, suffix):
        sample = sample_inputs(opened)
        found = measure_openings(opened, sample)
        other = [replace(found[0], gates={"gate": -0.5}), *found[1:]]
        for openings, name in ((found, "a"), (found, "b"), (other, "c")):
            write_chart(openings, sample, "x", folder / f"{name}{suffix}")
        a, b, c = ((folder / f"{name}{suffix}").read_bytes() for name in "abc")
        assert a == b != c


class TestGatesRefused:
    def test_a_chart_of_another_kind(self, refused, file):
        refused("gates", file, "-o", "x.pdf", says=["x.pdf", ".png or .svg"], at_once=True)

    def test_matplotlib_is_missing(self, refused, file, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        refused(
            "gates", file, "-o", "x.png", says=["pip install 'attnsurgeon[plot]'"], at_once=True
        )

    def test_a_checkpoint_of_the_plain_host(self, refused, file, folder):
        torch.save(load_host("digits").state_dict(), "plain.pth")
        refused("gates", file, "--checkpoint", "plain.pth", says=["plain.pth", "of the plain host"])

    def test_a_checkpoint_of_another_plan(self, refused, file, digits_file, folder):
        torch.save(attnsurgeon.load_model(digits_file).state_dict(), "other.pth")
        says = ["of another plan", "2 places in it and at 4"]
        refused("gates", file, "--checkpoint", "other.pth", says=says)

    def test_a_checkpoint_of_another_network(self, refused, file, folder):
        torch.save({"weight": torch.zeros(1)}, "other.pth")
        refused("gates", file, "--checkpoint", "other.pth", says=["does not fit", "missing"])

    def test_a_gate_that_is_no_number(self, refused, opened, folder):
        model = attnsurgeon.remove_attention(opened, "features.6")
        model.get_submodule("features.5.attention_post").spatial.gate.openness.data.fill_(
            float("nan")
        )
        save_model(model, "lost.safetensors")
        says = ["features.5.attention_post.spatial.gate", "NaN"]
        refused("gates", "lost.safetensors", says=says)

    def test_no_gates(self, refused, opened, folder):
        model = attnsurgeon.remove_attention(opened, "features.6")
        for gate in attnsurgeon.gates(model).values():
            gate.data.fill_(1)
        save_model(attnsurgeon.strip_gates(model), "stripped.safetensors")
        refused("gates", "stripped.safetensors", says=["no gates", "stripped"])

    @pytest.mark.parametrize(
        ("content", "says"), [(b"", "is empty"), (b"\x89PNG no more", "cannot be read as an image")]
    )
    def test_an_image_that_cannot_be_read(self, refused, file, photos, content, says):
        (photos / "broken.png").write_bytes(content)
        refused("gates", file, "--images", photos, says=["broken.png", says])

    def test_a_folder_without_images(self, refused, file, folder):
        (folder / "empty").mkdir()
        refused("gates", file, "--images", "empty", says=["no image in 'empty'"])


class TestRemove:
    def test_all_of_a_frozen_host_is_the_original(self, run, file, folder):
        outcome = run("remove", file)
        assert outcome.code == 0, outcome.err
        assert "byte for byte" in outcome.out
        plain, original = load_file("opened_plain.safetensors"), load_host("digits").state_dict()
        assert plain.keys() == original.keys()
        assert all(torch.equal(plain[key], tensor) for key, tensor in original.items())
        again = load_host("digits", checkpoint="opened_plain.safetensors")
        images = digits.held_out()[0][:4]
        assert torch.equal(again(images), load_host("digits")(images))

    def test_a_host_that_was_trained_is_said_to_be_another(self, run, moved, folder):
        outcome = run("remove", moved)
        assert "not the original: it was trained" in outcome.out
        told = json.loads(run("remove", moved, "--json", "--force").out)
        assert told["restored"] is False
        assert told["tensors"]["matching"] == told["tensors"]["original"] - 1
        assert told["change"]["relative"] > 0
        assert told["images"] == "64 held-out digits"

    def test_what_is_nearly_closed(self, run, file, folder):
        told = json.loads(run("remove", file, "--below", "0.02", "--json").out)
        assert [(cut["path"], cut["block"]) for cut in told["removed"]] == [
            ("features.6", "cbam"),
            ("features.6", "gc"),
        ]
        assert (told["restored"], told["output"]) == (False, "opened_pruned.safetensors")
        assert told["tensors"]["matching"] == told["tensors"]["original"]
        left = attnsurgeon.load_model("opened_pruned.safetensors")
        assert {cut.path for cut in cuts_of(left)} == {"features.5"}
        sample = sample_inputs(left)
        whole = attnsurgeon.load_model(file)(*sample.inputs)
        change = compare_outputs(whole, left(*sample.inputs))
        assert told["change"]["relative"] == pytest.approx(change.relative)
        assert 0 < change.relative < 0.01

    def test_some_sites(self, run, file, photos, folder):
        args = ("--at", "*.5", "-o", "less.safetensors", "--images", photos, "--json")
        told = json.loads(run("remove", file, *args).out)
        assert {cut["path"] for cut in told["removed"]} == {"features.5"}
        assert {cut["path"] for cut in told["kept"]} == {"features.6"}
        assert told["images"] == f"3 images of {photos}"
        assert load_plain("less.safetensors")

    def test_a_file_of_the_attention_only(self, run, opened, folder):
        save_model(opened, "small.safetensors", only="attention")
        assert "byte for byte" in run("remove", "small.safetensors").out

    def test_after_a_second_operation_the_original_is_still_known(self, run, file, folder):
        run("insert", file, "--block", "se", "--stage", "2", "-o", "more.safetensors")
        assert "byte for byte" in run("remove", "more.safetensors").out

    def test_refused(self, refused, file, moved):
        refused("remove", file, "--at", "x*", says=["'x*' matches none of the 4 operated sites"])
        refused("remove", file, "--below", "0", says=["no gate is below 0", "features.6"])
        refused("remove", file, "--below", "-1", says=["at least 0"], at_once=True)
        refused("remove", file, "--below", "nan", says=["at least 0"], at_once=True)
        both = ("--below", "1", "--at", "features.5")
        refused("remove", file, *both, says=["--at or --below, not both"], at_once=True)
        refused("remove", file, "-o", "x.onnx", says=["end it in .safetensors"], at_once=True)
        refused("remove", file, "-o", file, says=["exists", "--force"], at_once=True)
