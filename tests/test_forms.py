"""How the gate opens is a choice: recorded, exported, measured, trained, and refused by name."""

import copy
import functools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import attnsurgeon
from attnsurgeon import blocks, gate
from attnsurgeon.bench import ready, targets
from attnsurgeon.errors import BadFile, BadOption, ExportDiffers, HostUnusable, IdentityBroken
from attnsurgeon.gate import CentredGate, Gate, LayerGate, gate_numbers
from attnsurgeon.host import load_host
from attnsurgeon.recipe import Recipe
from attnsurgeon.store import load_model, make_recipe, save_model
from attnsurgeon.surgery import count_parameters, cuts_of
from attnsurgeon.training.images import sample_inputs
from attnsurgeon.training.maps import watch_maps
from attnsurgeon.training.openings import measure_openings
from tests import exports
from tests.exports import Planted

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
LAYERS = {"cbam": "layer", "gc": "layer", "nonlocal": "layer", "se": "centred"}
OPTIONS = {"cbam": {}, "gc": {"reduction": 4}, "nonlocal": {"norm": True}, "se": {}}


@pytest.fixture(scope="module")
def tiny():
    """Return a tiny network with three blocks by last layers, of which two are norms."""
    torch.manual_seed(0)
    model = exports.Tiny().eval()
    for block, form in LAYERS.items():
        model = attnsurgeon.insert_attention(
            model, block, at="blocks.1", gate=form, example=exports.EXAMPLE, **OPTIONS[block]
        )
    return model


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Return the digits network with SE whose last layers are the gates, one of them opened."""
    model = attnsurgeon.insert_attention(load_host("digits"), "se", stage=2, gate="layer")
    first = next(iter(attnsurgeon.gates(model).values()))
    first.data.fill_(0.5)
    path = tmp_path_factory.mktemp("layer") / "layer.safetensors"
    save_model(model, path)
    return path


class TestArithmetic:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_a_last_layer_at_zero_is_exactly_one(self, dtype):
        x = torch.randn(2, 8, 4, 4, dtype=dtype)
        assert torch.equal(
            LayerGate("")(torch.sigmoid(torch.zeros(2, 8, 1, 1, dtype=dtype)), x),
            torch.ones(2, 8, 1, 1, dtype=dtype),
        )

    def test_centred_is_one_where_the_logits_are_zero_however_far_it_is_open(self):
        opened = CentredGate(is_sigmoid=True)
        opened.openness.data.fill_(0.75)
        half, x = torch.full((1, 8, 1, 1), 0.5), torch.randn(1, 8, 4, 4)
        assert torch.equal(opened(half, x), torch.ones_like(half))
        assert not torch.equal(Gate().requires_grad_()(half, x) * 0 + 1, opened(half * 1.5, x))

    @pytest.mark.parametrize(("form", "factor"), [("centred", 2), ("layer", 2), ("mix", 1)])
    def test_what_it_is_when_open(self, form, factor):
        """The published map, times 2 in the forms that are centred."""
        block = blocks.get("se")(32)
        gate.give_form(block, form)
        for number in gate_numbers(block).values():
            nn.init.ones_(number)
        nn.init.normal_(block.excite.weight)
        x = torch.randn(2, 32, 4, 4)
        hidden = torch.relu(block.squeeze(x.mean((2, 3), keepdim=True)))
        assert torch.allclose(block(x), factor * x * torch.sigmoid(block.excite(hidden)))

    def test_an_unknown_form(self, refused):
        refused(
            "insert",
            "digits",
            "--block",
            "se",
            "--gate",
            "centered",
            at_once=True,
            says=["no form of gate is called 'centered'", "'centred'"],
        )

    def test_a_block_that_cannot(self, refused):
        refused(
            "insert",
            "digits",
            "--block",
            "sk",
            "--gate",
            "layer",
            at_once=True,
            says=["sk: gate 'layer' needs a last layer", "it takes mix"],
        )

    def test_a_block_of_your_own_says_what_it_has(self):
        host = exports.Tiny().eval()
        with pytest.raises(BadOption, match=r"timm:se at blocks\.0: gate 'layer' needs"):
            attnsurgeon.insert_attention(host, "timm:se", gate="layer", example=exports.EXAMPLE)


@pytest.mark.parametrize("form", ["centred", "layer"])
def test_the_readme_names_the_blocks(form):
    """For `ge`, whose gathering alone has no last layer, with the option that gives it one."""
    (row,) = re.findall(rf"^\| `{form}` \| .* \| (.*) \|$", README, re.M)
    named = [name for name in re.findall(r"`(\w+)`", row) if name in blocks.names()]
    able = []
    for name in blocks.names():
        options = {"mlp": True} if name == "ge" else {}
        if form in gate.forms_of(blocks.get(name)(32, **options)):
            able.append(name)
    assert named == able


class TestRecipe:
    def test_each_cut_has_its_own(self, tiny):
        recipe = make_recipe(tiny)
        assert recipe.gate == "layer+centred"
        assert json.loads(recipe.dumps())["gate"] == "layer+centred"
        again = Recipe.loads(recipe.dumps(), "x")
        assert [cut.gate for cut in again.cuts] == list(LAYERS.values())

    def test_files_that_name_none_are_mixed(self, digits_file):
        with safe_open(digits_file, framework="pt") as held:
            data = json.loads(held.metadata()["attnsurgeon"])
        assert data["gate"] == "mix"
        assert not any("gate" in cut for cut in data["cuts"])
        del data["gate"]
        assert Recipe.loads(json.dumps(data), "x").gate == "mix"

    @pytest.mark.parametrize("form", ["layer", "other"])
    def test_a_form_that_its_cuts_do_not_have(self, digits_file, form):
        with safe_open(digits_file, framework="pt") as held:
            data = json.loads(held.metadata()["attnsurgeon"])
        with pytest.raises(BadFile, match=f"unknown form '{form}'"):
            Recipe.loads(json.dumps({**data, "gate": form}), "x")

    def test_a_plan_names_it(self, run, folder):
        insert = ("insert", "digits", "--block", "se", "--at", "features.5", "--gate", "layer")
        told = run(*insert, "--dry-run", "--json").out
        assert json.loads(told)["plan"][0]["gate"] == "layer"
        (folder / "plan.json").write_text(told)
        assert run(*insert, "-o", "a.safetensors").code == 0
        assert run("insert", "digits", "--plan", "plan.json", "-o", "b.safetensors").code == 0
        assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()

    def test_a_layer_adds_no_number(self, file, digits_file):
        counts = [count_parameters(load_model(path)) for path in (file, digits_file)]
        assert [count["gates"] for count in counts] == [0, 2]
        assert counts[0]["added"] == counts[1]["added"]


class TestTheChecksHaveTeeth:
    def test_a_last_layer_that_is_not_zero(self, monkeypatch):
        monkeypatch.setattr(gate, "_zero", lambda layer: None)
        with pytest.raises(IdentityBroken, match="not the same"):
            attnsurgeon.insert_attention(
                exports.Tiny().eval(), "se", gate="layer", example=exports.EXAMPLE
            )

    def test_two_zeros_in_series(self, monkeypatch):
        start = blocks.get("se").__init__

        @functools.wraps(start)
        def silent(self, *args, **options):
            start(self, *args, **options)
            nn.init.zeros_(self.squeeze.weight)

        monkeypatch.setattr(blocks.get("se"), "__init__", silent)
        with pytest.raises(IdentityBroken, match="cannot learn"):
            attnsurgeon.insert_attention(
                exports.Tiny().eval(), "se", gate="layer", bias=False, example=exports.EXAMPLE
            )


class TestExport:
    @pytest.mark.parametrize(
        ("suffix", "options"),
        [
            (".onnx", {"exporter": "dynamo"}),
            (".onnx", {"exporter": "torchscript"}),
            (".pt", {}),
            (".pt", {"optimize": True}),
        ],
    )
    def test_opened_layers_are_checked(self, tiny, tmp_path, suffix, options):
        path = tmp_path / f"x{suffix}"
        made = attnsurgeon.export_model(tiny, path, example=exports.EXAMPLE, **options)
        assert [check.gates for check in made.checks] == ["closed"] * 3 + ["open"] * 3
        norms = [m for name, m in tiny.named_modules() if name.endswith("map.norm")]
        assert [type(norm) for norm in norms] == [nn.BatchNorm2d]  # given back as it was
        (target,) = targets.read_targets([path])
        if suffix == ".pt" and not options:
            held = dict(target.module.named_parameters())
            assert all(held[name].any() for name in attnsurgeon.gates(tiny))
        assert len(target.patches) == (len(attnsurgeon.gates(tiny)) if suffix == ".onnx" else 0)

    def test_layers_written_to_the_wrong_block_are_noticed(self, tmp_path, monkeypatch):
        torch.manual_seed(0)
        model = attnsurgeon.insert_attention(
            exports.Tiny().eval(), "se", gate="layer", reduction=4, example=exports.EXAMPLE
        )
        write = exports.onnx_format.OnnxDraft.write

        def crossed(self, path, gates):
            weights = [name for name in gates if name.endswith("weight")]
            turned = dict(zip(weights, (gates[n] for n in weights[1:] + weights[:1]), strict=True))
            write(self, path, {**gates, **turned})

        monkeypatch.setattr(exports.onnx_format.OnnxDraft, "write", crossed)
        for weight in list(attnsurgeon.gates(model).values())[::2]:
            nn.init.normal_(weight)
        with pytest.raises(ExportDiffers, match="gates open"):
            attnsurgeon.export_model(
                model, tmp_path / "x.onnx", exporter="torchscript", example=exports.EXAMPLE
            )

    def test_attention_that_is_broken_behind_a_closed_layer(self, tmp_path, monkeypatch):
        torch.manual_seed(0)
        model = attnsurgeon.insert_attention(
            exports.Tiny().eval(), "se", gate="layer", reduction=4, example=exports.EXAMPLE
        )
        Planted.after_writing(monkeypatch, _silence_the_squeeze)
        with pytest.raises(ExportDiffers, match="gates open"):
            attnsurgeon.export_model(
                model, tmp_path / "x.onnx", exporter="torchscript", example=exports.EXAMPLE
            )


def _silence_the_squeeze(graph):
    for tensor in graph.initializer:
        if "squeeze" in tensor.name:
            array = exports.onnx.numpy_helper.to_array(tensor) * 0
            tensor.CopyFrom(exports.onnx.numpy_helper.from_array(array, tensor.name))


class TestAfterwards:
    def test_gates_tells_of_the_layers(self, run, file):
        told = json.loads(run("gates", file, "--json").out)["sites"]
        assert [site["form"] for site in told] == ["layer"] * 2
        assert [site["openness"] for site in told] == [0.5, 0]
        assert told[0]["gates"] == {"excite.weight": 0.5, "excite.bias": 0}
        assert told[0]["change"] > 0 == told[1]["change"]

    def test_verify_closes_the_layers(self, run, file):
        done = json.loads(run("verify", file, "--json").out)
        assert done["identity"]["exact"]
        assert done["gates_closed"] is False
        assert done["liveness"] == {"gates": 2, "live": 2}

    def test_bench_opens_the_layers_and_sees_whether_they_were_folded_away(self, file):
        (target,) = targets.read_targets([file, "digits"])[:1]
        held = dict(target.module.named_parameters())
        assert set(target.gates) == set(attnsurgeon.gates(target.module))
        assert all(held[name].any() for name in target.gates)
        opened = [target.module(*target.example)]
        for name in target.gates:
            held[name].data.zero_()
        closed = [target.module(*target.example)]
        (again,) = targets.read_targets([file, "digits"])[:1]
        assert ready.gates_doubt(again, again.example, opened) is None
        assert "folded away" in ready.gates_doubt(again, again.example, closed)

    def test_closing_a_layer_is_removing_it(self, file):
        model = load_model(file)
        sample = sample_inputs(model)
        first = measure_openings(model, sample)[0]
        bare = attnsurgeon.remove_attention(model, first.cut.path)
        moved = (model(*sample.inputs) - bare(*sample.inputs)).abs().max().item()
        assert first.change.largest == moved > 0

    def test_its_map_is_heard(self, file):
        model = load_model(file)
        maps = watch_maps(model, sample_inputs(model).inputs)[1]
        assert [found.kind for found in maps] == ["channel"] * 2
        assert torch.equal(maps[1].values, torch.full_like(maps[1].values, 0.5))

    def test_what_is_nearly_closed_is_removed(self, run, file, folder):
        told = json.loads(run("remove", file, "--below", "0.02", "--json").out)
        assert [cut["path"] for cut in told["removed"]] == ["features.6"]
        assert [cut.gate for cut in cuts_of(load_model(told["output"]))] == ["layer"]

    def test_layers_are_trained_as_attention_and_may_be_decayed(self, file):
        model = load_model(file)
        groups = attnsurgeon.parameter_groups(model, lr=0.1, weight_decay=0.01)
        assert {group["name"] for group in groups} == {"base", "attention"}
        attnsurgeon.check_optimizer(model, torch.optim.SGD(groups))

    def test_a_layer_that_is_no_number_is_named_with_its_step(self, file):
        model = load_model(file)
        schedule = attnsurgeon.GateSchedule(model, check_every=1)
        schedule.step()
        name, weight = list(attnsurgeon.gates(model).items())[2]
        weight.data[0] = float("nan")
        with pytest.raises(attnsurgeon.AttnSurgeonError, match=rf"{name} became NaN .* step 2"):
            schedule.step()

    @pytest.mark.parametrize("turned", [False, True])
    def test_a_checkpoint_of_another_form(self, refused, file, digits_file, folder, turned):
        own, other = (digits_file, file) if turned else (file, digits_file)
        torch.save(dict(load_model(other).state_dict()), "other.pth")  # without torch's notes
        says = ["other.pth", "another form of gate", "gate.openness", "--gate"]
        says.append(("the file has" if turned else "it has") + " a number")
        refused("gates", own, "--checkpoint", "other.pth", says=says)

    def test_there_is_no_number_to_anneal_or_strip(self, file):
        model = load_model(file)
        with pytest.raises(BadOption, match="'layer' have no number"):
            attnsurgeon.GateSchedule(model, anneal=10)
        with pytest.raises(HostUnusable, match="last layers, without a number"):
            attnsurgeon.strip_gates(model)

    def test_centred_gates_are_stripped_to_twice_the_block(self, tmp_path):
        torch.manual_seed(0)
        model = attnsurgeon.insert_attention(
            exports.Tiny().eval(), "se", gate="centred", example=exports.EXAMPLE
        )
        for number in attnsurgeon.gates(model).values():
            nn.init.ones_(number)
        bare, images = attnsurgeon.strip_gates(model), torch.randn(2, 3, 32, 32)
        assert torch.equal(bare(images), model(images))
        save_model(bare, tmp_path / "x.safetensors")
        again = load_model(tmp_path / "x.safetensors", host=exports.Tiny)
        assert torch.equal(again(images), model(images))
        assert attnsurgeon.gates(copy.deepcopy(again)) == {}
