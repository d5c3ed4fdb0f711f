"""What a training script is given: groups, freezing, gates led and stripped, small files."""

import copy
import functools
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy

import attnsurgeon
from attnsurgeon import digits
from attnsurgeon.errors import (
    BadFile,
    BadOption,
    GateLost,
    HostUnusable,
    IdentityBroken,
    OptimizerMismatch,
)
from attnsurgeon.host import load_host
from attnsurgeon.inspection import inspect_file
from attnsurgeon.store import load_plain, read_recipe
from attnsurgeon.training.groups import NORMS, inserted_modules
from attnsurgeon.verify import verify_unchanged

IMAGES, LABELS = (part[:16] for part in digits.held_out())
BLOCKS = {"se": {"reduction": 4}, "cbam": {"reduction": 4}, "gc": {"reduction": 4}, "sk": {}}


def operate(*names, host=None):
    """Return the digits network with each block in turn after every residual block of stage 2."""
    return copy.deepcopy(_operated(*names)) if host is None else _insert(host, *names)


@functools.cache
def _operated(*names):
    return _insert(load_host("digits"), *names)


def _insert(model, *names):
    for name in names:
        model = attnsurgeon.insert_attention(model, name, stage=2, **BLOCKS[name])
    return model


def train(model, optimizer, steps=2, after=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()
        after()


def open_gates(model, value):
    with torch.no_grad():
        for gate in attnsurgeon.gates(model).values():
            gate.fill_(value)


@pytest.fixture
def model():
    return operate(*BLOCKS)


class TestGroups:
    def test_every_parameter_stands_in_exactly_one_group(self, model):
        groups = attnsurgeon.parameter_groups(
            model, lr=0.1, norm_weight_decay=0.0, bias_weight_decay=0.0
        )
        listed = [id(p) for group in groups for p in group["params"]]
        assert sorted(listed) == sorted(id(p) for p in model.parameters())
        assert {group["name"] for group in groups} == {
            *("base", "base_norms", "base_biases"),
            *("attention", "attention_norms", "attention_biases", "gates"),
        }

    def test_rates_and_decays(self, model):
        groups = attnsurgeon.parameter_groups(
            model,
            lr=0.1,
            attention_lr=0.2,
            gate_lr=0.3,
            weight_decay=0.4,
            norm_weight_decay=0.5,
            bias_weight_decay=0.6,
        )
        found = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
        assert found == {
            "base": (0.1, 0.4),
            "base_norms": (0.1, 0.5),
            "base_biases": (0.1, 0.6),
            "attention": (0.2, 0.4),
            "attention_norms": (0.2, 0.5),
            "attention_biases": (0.2, 0.6),
            "gates": (0.3, 0.0),
        }

    def test_the_defaults(self, model):
        groups = attnsurgeon.parameter_groups(model, lr=0.1, attention_lr=0.2, weight_decay=0.4)
        found = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
        assert found == {"base": (0.1, 0.4), "attention": (0.2, 0.4), "gates": (0.2, 0.0)}

    def test_what_is_in_them(self, model):
        groups = attnsurgeon.parameter_groups(
            model, lr=0.1, norm_weight_decay=0.0, bias_weight_decay=0.0
        )
        names = {id(p): name for name, p in model.named_parameters()}
        found = {g["name"]: {names[id(p)] for p in g["params"]} for g in groups}
        assert found["gates"] == set(attnsurgeon.gates(model))
        assert all(".attention_post" in name for name in found["attention"])
        assert not any(".attention_post" in name for name in found["base"])
        assert all(n.endswith(".bias") for n in found["base_biases"] | found["attention_biases"])
        modules = dict(model.named_modules())
        assert all(
            isinstance(modules[name.rpartition(".")[0]], NORMS)
            for name in found["base_norms"] | found["attention_norms"]
        )

    def test_they_divide_the_host_as_torchvision_does(self):
        """Its set_weight_decay: weights of norms, all biases, and all other weights."""
        host = load_host("digits")
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in host.modules())
        layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in host.modules())
        groups = attnsurgeon.parameter_groups(
            operate("se"), lr=0.1, norm_weight_decay=0.0, bias_weight_decay=0.0
        )
        sizes = {group["name"]: len(group["params"]) for group in groups}
        assert (sizes["base"], sizes["base_norms"]) == (layers, norms)
        assert sizes["base_biases"] == norms + 1  # that of the classifier

    def test_frozen_parameters_and_empty_groups_are_left_out(self, model):
        groups = attnsurgeon.parameter_groups(attnsurgeon.freeze_host(model), lr=0.1)
        assert {group["name"] for group in groups} == {"attention", "gates"}

    @pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
    def test_any_optimiser_takes_them(self, model, kind):
        optimizer = kind(attnsurgeon.parameter_groups(model, lr=1e-3, weight_decay=1e-4))
        attnsurgeon.check_optimizer(model, optimizer)
        train(model.train(), optimizer, 1)
        assert all(gate.item() != 0 for gate in attnsurgeon.gates(model).values())

    @pytest.mark.parametrize("rates", [{"lr": -1}, {"lr": 1, "weight_decay": float("nan")}])
    def test_a_rate_below_zero(self, model, rates):
        with pytest.raises(BadOption, match="at least 0"):
            attnsurgeon.parameter_groups(model, **rates)

    @pytest.mark.parametrize(
        "what",
        [
            lambda m: attnsurgeon.parameter_groups(m, lr=1),
            attnsurgeon.freeze_host,
            attnsurgeon.GateSchedule,
        ],
    )
    def test_a_plain_network(self, what):
        with pytest.raises(HostUnusable, match="insert_attention first"):
            what(load_host("digits"))


class TestCheckOptimizer:
    def test_made_before_the_surgery(self):
        host = load_host("digits")
        optimizer = torch.optim.SGD(host.parameters(), lr=0.1)
        operated = operate("se", host=host)
        with pytest.raises(
            OptimizerMismatch, match=r"does not hold \d+ of \d+ .* after the insertion"
        ):
            attnsurgeon.check_optimizer(operated, optimizer)

    def test_with_parameters_of_another_network(self, model):
        strangers = [*model.parameters(), *load_host("digits").parameters()]
        with pytest.raises(OptimizerMismatch, match="are not this MobileNetV2's"):
            attnsurgeon.check_optimizer(model, torch.optim.SGD(strangers, lr=0.1))

    def test_that_decays_gates(self, model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)
        with pytest.raises(OptimizerMismatch, match="decays .* gates, the first .*openness"):
            attnsurgeon.check_optimizer(model, optimizer)

    def test_frozen_parameters_need_not_be_held(self, model):
        attnsurgeon.freeze_host(model)
        trainable = [p for p in model.parameters() if p.requires_grad]
        attnsurgeon.check_optimizer(model, torch.optim.SGD(trainable, lr=0.1))


class TestFreezing:
    def copies(self, model):
        memory = io.BytesIO()
        torch.save(model, memory)
        memory.seek(0)
        return {
            "itself": model,
            "deepcopy": copy.deepcopy(model),
            "pickle": pickle.loads(pickle.dumps(model)),
            "saved": torch.load(memory, weights_only=False),
            "averaged": torch.optim.swa_utils.AveragedModel(model).module,
            "converted": nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)),
        }

    def test_it_survives_train_and_copies(self, model):
        frozen = attnsurgeon.freeze_host(model)
        for how, twin in self.copies(frozen).items():
            outer = nn.Sequential(twin)
            for setter in (twin.train, outer.train, outer.eval, outer.train):
                assert setter() is not None
            inserted = inserted_modules(twin)
            for module in twin.modules():
                wanted = id(module) in inserted or not isinstance(module, NORMS)
                assert module.training == wanted, (how, module)
            assert twin.train(False) is twin
            assert not any(module.training for module in twin.modules())

    def test_copies_are_independent(self, model):
        twin = copy.deepcopy(attnsurgeon.freeze_host(model)).train()
        assert not model.training
        assert twin.training

    @pytest.mark.parametrize("norms", [True, False])
    def test_only_the_attention_learns(self, model, norms):
        before = copy.deepcopy(model.state_dict())
        attnsurgeon.freeze_host(model, norms=norms)
        groups = attnsurgeon.parameter_groups(model, lr=0.1)
        train(model.train(), torch.optim.SGD(groups))
        after = model.state_dict()
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        inside = {key for key in moved if ".attention_post" in key}
        statistics = {key for key in before if "running_" in key or "num_batches" in key}
        assert inside
        assert moved - inside == (set() if norms else statistics - inside)

    def test_unfreezing(self, model):
        attnsurgeon.unfreeze_host(attnsurgeon.freeze_host(model))
        model.train()
        assert all(module.training for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_freezing_again_without_norms_lets_them_go(self, model):
        attnsurgeon.freeze_host(attnsurgeon.freeze_host(model), norms=False)
        assert all(module.training for module in model.train().modules())

    def test_a_frozen_network_still_compiles_and_exports(self, tmp_path):
        model = attnsurgeon.freeze_host(operate("se"))
        compiled = torch.compile(model, backend="aot_eager")
        compiled.train()
        assert model.training
        assert not any(isinstance(m, NORMS) and m.training for m in model.features[0].modules())
        attnsurgeon.export_model(model.eval(), tmp_path / "frozen.pt")


class TestGateSchedule:
    def test_free_leaves_the_gates_to_the_optimiser(self):
        left, led = operate("se"), operate("se")
        schedule = attnsurgeon.GateSchedule(led)
        for model, after in ((left, lambda: None), (led, schedule.step)):
            train(model.eval(), torch.optim.SGD(model.parameters(), lr=0.1), 2, after)
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                attnsurgeon.gates(left).values(), attnsurgeon.gates(led).values(), strict=True
            )
        )

    def test_annealed_gates_end_at_exactly_one_and_stay(self, model):
        groups = attnsurgeon.parameter_groups(model, lr=0.05)
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        schedule = attnsurgeon.GateSchedule(model, anneal=3)
        seen = []
        gate = next(iter(attnsurgeon.gates(model).values()))
        train(model.train(), optimizer, 5, lambda: (schedule.step(), seen.append(gate.item())))
        assert seen[0] < seen[1] < seen[2]
        assert seen[2:] == [1, 1, 1]
        assert all(gate.item() == 1 for gate in attnsurgeon.gates(model).values())

    def test_a_delay_waits(self, model):
        schedule = attnsurgeon.GateSchedule(model, anneal=1, delay=2)
        values = []
        for _ in range(3):
            schedule.step()
            values.append({gate.item() for gate in attnsurgeon.gates(model).values()})
        assert values == [{0.0}, {0.0}, {1.0}]

    def test_it_resumes(self, model):
        open_gates(model, 0.5)
        straight, first = copy.deepcopy(model), attnsurgeon.GateSchedule(model, anneal=4)
        whole = attnsurgeon.GateSchedule(straight, anneal=4)
        first.step()
        again = attnsurgeon.GateSchedule(model, anneal=4)
        again.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
        again.step()
        whole.step()
        whole.step()
        ends = [{g.item() for g in attnsurgeon.gates(m).values()} for m in (model, straight)]
        assert ends == [{0.75}, {0.75}]

    def test_only_gates_that_mix_branches_are_projected(self, model):
        for value, wanted in ((-0.5, 0.0), (1.5, 1.0), (0.25, 0.25)):
            open_gates(model, value)
            attnsurgeon.project_gates(model)
            for name, gate in attnsurgeon.gates(model).items():
                is_sk = "attention_post_4" in name
                assert gate.item() == (wanted if is_sk else value)

    def test_a_step_projects_too(self):
        model = operate("sk")
        open_gates(model, -1)
        attnsurgeon.GateSchedule(model).step()
        assert all(gate.item() == 0 for gate in attnsurgeon.gates(model).values())

    @pytest.mark.parametrize(("check_every", "told_at"), [(1, 3), (5, 5)])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_lost_gate_is_named_with_its_step(self, model, check_every, told_at, bad):
        schedule = attnsurgeon.GateSchedule(model, check_every=check_every)
        first, second, *_ = attnsurgeon.gates(model)
        lost = {3: second, 4: first}
        for step in range(1, told_at):
            if step in lost:
                attnsurgeon.gates(model)[lost[step]].data.fill_(bad)
            schedule.step()
        attnsurgeon.gates(model)[second].data.fill_(bad)
        with pytest.raises(GateLost, match=f"gate {second} became NaN or infinite at step 3"):
            schedule.step()

    @pytest.mark.parametrize("steps", [{"anneal": 0}, {"delay": -1}, {"check_every": 0}])
    def test_steps_that_are_none(self, model, steps):
        with pytest.raises(BadOption, match="counted from 1"):
            attnsurgeon.GateSchedule(model, **steps)


class TestStripping:
    def test_it_is_bitwise_the_network_with_gates_at_one(self, model, tmp_path):
        open_gates(model, 1)
        bare = attnsurgeon.strip_gates(model)
        assert attnsurgeon.gates(bare) == {}
        assert len(attnsurgeon.gates(model)) > 0
        assert verify_unchanged(model, bare, IMAGES).exact
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model(IMAGES), bare(IMAGES))

        file = tmp_path / "stripped.safetensors"
        recipe = attnsurgeon.save_model(bare, file)
        again = attnsurgeon.load_model(file)
        assert set(recipe.stripped) == {
            name
            for name, m in bare.named_modules()
            if name.rpartition(".")[2].startswith("attention")
        }
        assert verify_unchanged(model, again, IMAGES).exact
        assert not any(key.endswith("openness") for key in load_file(file))
        with pytest.raises(HostUnusable, match="stripped of its gates"):
            inspect_file(file)
        host = attnsurgeon.remove_attention(again)
        assert verify_unchanged(load_host("digits"), host, IMAGES).exact

    def test_a_stripped_network_can_be_operated_on_again(self, tmp_path):
        model = operate("se")
        open_gates(model, 1)
        both = operate("gc", host=attnsurgeon.strip_gates(model))
        assert verify_unchanged(model, both, IMAGES).exact
        attnsurgeon.save_model(both, tmp_path / "both.safetensors")
        again = attnsurgeon.load_model(tmp_path / "both.safetensors")
        assert attnsurgeon.gates(again).keys() == attnsurgeon.gates(both).keys() != set()
        assert verify_unchanged(both, again, IMAGES).exact

    def test_a_gate_that_is_not_at_one(self, model):
        open_gates(model, 1)
        name, gate = list(attnsurgeon.gates(model).items())[2]
        gate.data.fill_(1 - 2**-24)
        with pytest.raises(HostUnusable, match=f"1 of .* not at 1, the first {name}"):
            attnsurgeon.strip_gates(model)

    def test_without_gates(self):
        with pytest.raises(HostUnusable, match="no gates to strip"):
            attnsurgeon.strip_gates(load_host("digits"))


class TestAttentionOnly:
    @pytest.fixture
    def trained(self, model):
        attnsurgeon.freeze_host(model, norms=False)
        train(model.train(), torch.optim.SGD(attnsurgeon.parameter_groups(model, lr=0.1)))
        return model.eval()

    def test_it_holds_the_attention_and_what_moved(self, trained, tmp_path):
        file = tmp_path / "delta.safetensors"
        recipe = attnsurgeon.save_model(trained, file, only="attention")
        held = load_file(file)
        before = load_host("digits").state_dict()
        inside = {key for key in held if ".attention_post" in key}
        assert set(held) - inside == set(recipe.origin)
        assert all("running_" in key or "num_batches" in key for key in recipe.origin)
        again = attnsurgeon.load_model(file)
        assert verify_unchanged(trained, again, IMAGES).exact
        assert again.state_dict().keys() == trained.state_dict().keys()
        assert not set(before) <= set(held)

    def test_norms_held_still_are_left_out(self, model, tmp_path):
        attnsurgeon.freeze_host(model)
        train(model.train(), torch.optim.SGD(attnsurgeon.parameter_groups(model, lr=0.1)))
        recipe = attnsurgeon.save_model(model, tmp_path / "d.safetensors", only="attention")
        assert recipe.origin == {}
        assert all(".attention_post" in key for key in load_file(tmp_path / "d.safetensors"))

    def test_it_is_still_of_its_host_after_a_whole_file_between(self, trained, tmp_path):
        whole, delta = tmp_path / "whole.safetensors", tmp_path / "delta.safetensors"
        attnsurgeon.save_model(trained, whole)
        attnsurgeon.save_model(attnsurgeon.load_model(whole), delta, only="attention")
        assert verify_unchanged(trained, attnsurgeon.load_model(delta), IMAGES).exact
        attnsurgeon.save_model(attnsurgeon.load_model(delta), tmp_path / "x.safetensors")
        assert (tmp_path / "x.safetensors").read_bytes() == whole.read_bytes()
        assert inspect_file(delta).closed is False

    def test_a_network_of_ones_own(self, tmp_path):
        host = load_host("digits", weights="none")
        operated = operate("se", host=host)
        operated.__dict__.pop("_attnsurgeon_card")
        file = tmp_path / "own.safetensors"
        attnsurgeon.save_model(operated, file, only="attention")
        with pytest.raises(HostUnusable, match=r"load_model\(path, host=...\)"):
            attnsurgeon.load_model(file)
        assert verify_unchanged(host, attnsurgeon.load_model(file, host), IMAGES).exact

    def test_on_the_wrong_host(self, trained, tmp_path):
        file = tmp_path / "delta.safetensors"
        attnsurgeon.save_model(trained, file, only="attention")
        other = load_host("digits")
        other.features[0][0].weight.data[0, 0, 0, 0] += 1
        says = r"1 of \d+ tensors are not those .* the first features.0.0.weight"
        with pytest.raises(HostUnusable, match=says):
            attnsurgeon.load_model(file, other)
        with pytest.raises(HostUnusable, match="another host|not the one|was made from"):
            attnsurgeon.load_model(file, load_host("resnet18", weights="none"))

    def test_on_the_wrong_host_by_the_command_line(self, trained, run, refused, folder):
        attnsurgeon.save_model(trained, "delta.safetensors", only="attention")
        code = "from attnsurgeon.host import load_host\n\n\n"
        code += 'def build():\n    host = load_host("digits")'
        (folder / "right.py").write_text(f"{code}\n    return host\n")
        moved = "host.features[0][0].weight.data[0, 0, 0, 0] += 1"
        (folder / "wrong.py").write_text(f"{code}\n    {moved}\n    return host\n")
        says = ["belongs to another host: 1 of", "the first features.0.0.weight", "--host FILE.py"]
        refused("gates", "delta.safetensors", "--host", "wrong.py:build", says=says)
        assert run("gates", "delta.safetensors", "--host", "right.py:build").code == 0

    def test_a_host_that_was_trained_too(self, model, tmp_path):
        train(model.train(), torch.optim.SGD(model.parameters(), lr=0.1), 1)
        with pytest.raises(HostUnusable, match="of the host were trained too, the first features"):
            attnsurgeon.save_model(model, tmp_path / "d.safetensors", only="attention")
        assert list(tmp_path.iterdir()) == []

    def test_a_host_nobody_knows(self, model, tmp_path):
        del model.__dict__["_attnsurgeon_origin"]
        with pytest.raises(HostUnusable, match="not known"):
            attnsurgeon.save_model(model, tmp_path / "d.safetensors", only="attention")

    def test_only_something_else(self, model, tmp_path):
        with pytest.raises(BadOption, match="only takes 'attention'"):
            attnsurgeon.save_model(model, tmp_path / "d.safetensors", only="gates")

    def test_the_plain_host_of_one(self, trained, tmp_path):
        file = tmp_path / "delta.safetensors"
        attnsurgeon.save_model(trained, file, only="attention")
        plain = load_plain(file)
        assert all(
            torch.equal(tensor, trained.state_dict()[key])
            for key, tensor in plain.state_dict().items()
        )
        assert read_recipe(file).only == "attention"

    def test_a_tampered_one_is_noticed(self, trained, tmp_path):
        """The hashes are of the host as it was; the moved buffers have hashes of their own."""
        file = tmp_path / "delta.safetensors"
        recipe = attnsurgeon.save_model(trained, file, only="attention")
        from safetensors import safe_open
        from safetensors.torch import save_file

        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        key = next(key for key in recipe.origin if "running_mean" in key)
        tensors[key] += 1
        save_file(tensors, file, metadata=metadata)
        with pytest.raises((IdentityBroken, BadFile)):
            inspect_file(file)


class TestStack:
    def test_the_same_block_at_the_same_place_is_refused(self, model):
        with pytest.raises(attnsurgeon.AttnSurgeonError, match="has se at 'post' already.*--stack"):
            operate("se", host=model)

    def test_elsewhere_it_is_not(self):
        once = operate("se")
        twice = attnsurgeon.insert_attention(
            once, "se", placement="standard", at="features.5", **BLOCKS["se"]
        )
        more = attnsurgeon.insert_attention(once, "se", stage=(2, 4), **BLOCKS["se"])
        assert len(attnsurgeon.gates(twice)) > len(attnsurgeon.gates(once))
        assert len(attnsurgeon.gates(more)) > len(attnsurgeon.gates(once))

    def test_unless_asked(self):
        once = operate("se")
        twice = attnsurgeon.insert_attention(once, "se", stage=2, stack=True, **BLOCKS["se"])
        assert len(attnsurgeon.gates(twice)) == 2 * len(attnsurgeon.gates(once))

    def test_on_the_command_line(self, run, digits_file, folder, refused):
        again = ("insert", digits_file, "--block", "se", "--stage", "2", "-o", "x.safetensors")
        refused(*again, says=["already", "--stack"])
        assert run(*again, "--stack").code == 0
