"""Several attentions in one go: a plan as a dry run prints it, edited by hand."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import attnsurgeon
from attnsurgeon.errors import AttnSurgeonError, BadOption, UnknownName
from attnsurgeon.host import load_host
from attnsurgeon.insertion import Insertion
from attnsurgeon.steps import REPORTED, Step, read_steps
from attnsurgeon.store import read_recipe

STEPS = [
    {"at": "features.1*", "block": "se", "placement": "standard", "options": {"reduction": 4}},
    {"at": ["features.5", "features.8"], "block": "gc", "seed": 5},
    {"stage": 2, "block": "cbam", "every": 2},
    {"path": "features.5", "block": "gc", "stack": True},
]
FLAGS = [
    "--at features.1* --block se --placement standard --set reduction=4",
    "--at features.5 features.8 --block gc --seed 5",
    "--stage 2 --block cbam --every 2",
    "--at features.5 --block gc --stack",
]
EXAMPLE = torch.zeros(1, 3, 32, 32)


def write(steps, name="plan.json"):
    Path(name).write_text(json.dumps(steps))
    return name


def inserted(run, *args):
    outcome = run("insert", *args, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


class TestCommand:
    def test_is_what_one_after_the_other_gives(self, run, folder):
        """The very same bytes, and the same numbers with the gates opened."""
        model = "digits"
        for i, flags in enumerate(FLAGS):
            inserted(run, model, *flags.split(), "-o", f"{i}.safetensors")
            model = f"{i}.safetensors"
        done = inserted(run, "digits", "--plan", write(STEPS), "-o", "joined.safetensors")
        assert done["identity"]["exact"]
        assert (done["block"], done["placement"]) == ("se+gc+cbam", "standard+post")
        apart, joined = load_file(model), load_file("joined.safetensors")
        assert apart.keys() == joined.keys()
        assert all(torch.equal(apart[key], tensor) for key, tensor in joined.items())
        assert Path(model).read_bytes() == Path("joined.safetensors").read_bytes()
        outputs = []
        for file in (model, "joined.safetensors"):
            network = attnsurgeon.load_model(file)
            for i, gate in enumerate(attnsurgeon.gates(network).values()):
                gate.data.fill_(0.1 + 0.05 * i)
            outputs.append(network(torch.ones(2, 3, 32, 32)))
        assert torch.equal(*outputs)
        assert not torch.equal(outputs[0], load_host("digits")(torch.ones(2, 3, 32, 32)))

    def test_what_a_dry_run_prints_is_a_plan(self, run, folder):
        flags = ["--stage", "2", "3", "--exclude", "features.8", "--every", "2"]
        flags += ["--set", "reduction=2", "--seed", "3"]
        told = inserted(run, "digits", "--block", "se", *flags, "--dry-run")
        assert told["plan"] == [
            {
                **{"block": "se", "at": ["*"], "exclude": ["features.8"], "stage": [2, 3]},
                **{"every": 2, "placement": "post", "options": {"reduction": 2}, "seed": 3},
            }
        ]
        inserted(run, "digits", "--block", "se", *flags, "-o", "flags.safetensors")
        inserted(run, "digits", "--plan", write(told), "-o", "plan.safetensors")
        assert Path("flags.safetensors").read_bytes() == Path("plan.safetensors").read_bytes()
        again = inserted(run, "digits", "--plan", write(told), "--dry-run")
        assert again == told

    def test_so_is_its_list_of_sites(self, run, folder):
        told = inserted(run, "digits", "--block", "se", "--stage", "2", "--dry-run")
        again = inserted(run, "digits", "--plan", write(told["sites"]), "--dry-run")
        for key in ("sites", "block", "placement", "parameters", "tensors"):
            assert again[key] == told[key]

    def test_edited_by_hand(self, run, folder):
        told = inserted(run, "digits", "--block", "se", "--at", "features.5", "--dry-run")
        told["plan"][0]["options"]["reduction"] = 2
        told["plan"].append({"at": "features.8", "block": "gc", "placement": "standard"})
        done = inserted(run, "digits", "--plan", write(told))
        assert done["output"] == "digits_se_gc.safetensors"
        cuts = read_recipe("digits_se_gc.safetensors").cuts
        assert [(cut.block, cut.placement) for cut in cuts][-1] == ("gc", "standard")
        assert cuts[0].options == {"reduction": 2}
        shown = run("insert", "digits", "--plan", "plan.json", "--dry-run").out
        assert all(word in shown for word in ("se+gc in digits", "standard", "features.8"))

    def test_the_seed_is_of_steps_that_name_none(self, run, folder):
        named = {"at": "features.8", "block": "gc", "seed": 5}
        plan = write([{"at": "features.5", "block": "se"}, named])
        for seed in ("1", "2"):
            told = inserted(run, "digits", "--plan", plan, "--seed", seed, "--dry-run")
            assert [step["seed"] for step in told["plan"]] == [int(seed), 5]
            assert [site["seed"] for site in told["sites"]] == [int(seed), 5]


class TestRefused:
    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (None, ["no file"]),
            ("", ["is empty"]),
            ("{", ["no JSON", "--dry-run --json"]),
            ("[" * 100_000, ["no JSON"]),
            ('[{"block": "se", "block": "gc"}]', ["no JSON", "'block' is there twice"]),
            ("[]", ["is empty", "layer3.*"]),
            ("{}", ["no list of steps"]),
            ("7", ["no list of steps"]),
            ('{"plan": []}', ["is empty"]),
            ('{"plan": "plan.json"}', ["no list of steps"]),
            ('{"plan": {"plan": []}}', ["no list of steps"]),
            ('{"plam": [{"block": "se"}]}', ["'plam'", "'plan'"]),
            ('{"plan": [{"block": "se"}], "seed": 3}', ["'seed'"]),
            ("[[]]", ["step 1", "list"]),
            ("[{}]", ["step 1", "no 'block'"]),
            ('[{"block": "se"}, {"at": "*"}]', ["step 2", "no 'block'"]),
            ('[{"block": "she"}]', ["step 1", "'she'", "'se'"]),
            ('[{"block": 7}]', ["step 1", "block is int"]),
            ('[{"block": "se", "blok": 3}]', ["step 1", "'blok'", "'block'"]),
            ('[{"block": "se", "channels": 3}]', ["step 1", "'channels'"]),
            ('[{"block": "se", "at": []}]', ["step 1", "empty 'at'"]),
            ('[{"block": "se", "at": 7}]', ["step 1", "at[0] is int"]),
            ('[{"block": "se", "at": "*", "path": "features.5"}]', ["both 'at' and 'path'"]),
            ('[{"block": "se", "at": "layer9.*"}]', ["'layer9.*'", "none of the 7 sites"]),
            ('[{"block": "se", "stage": 9}]', ["stage 9"]),
            ('[{"block": "se", "stage": "two"}]', ["step 1", "stage[0] is str"]),
            ('[{"block": "se", "every": 0}]', ["step 1", "not 0"]),
            ('[{"block": "se", "seed": 1.5}]', ["step 1", "seed is float"]),
            ('[{"block": "se", "placement": "pots"}]', ["step 1", "'pots'", "'post'"]),
            ('[{"block": "se", "placement": "replace"}]', ["step 1", "is for sk"]),
            ('[{"block": "se", "options": {"reduktion": 2}}]', ["step 1", "'reduktion'"]),
            ('[{"block": "se", "options": {"reduction": 0}}]', ["reduction must be at least 1"]),
            ('[{"block": "se", "options": NaN}]', ["cannot be read"]),
            (
                # Attention goes into the network, not into attention: no circle can be made.
                '[{"block": "se"}, {"block": "gc", "at": "features.5.attention_post"}]',
                ["'features.5.attention_post' matches none"],
            ),
        ],
    )
    def test_a_plan_that_is_none(self, refused, folder, content, says):
        if content is not None:
            (folder / "plan.json").write_text(content)
        refused("insert", "digits", "--plan", "plan.json", says=says)

    @pytest.mark.parametrize(
        "flags",
        [
            ("--block", "se"),
            ("--at", "features.5"),
            ("--exclude", "features.5"),
            ("--stage", "2"),
            ("--every", "2"),
            ("--placement", "standard"),
            ("--set", "reduction=2"),
        ],
    )
    def test_flags_that_say_it_too(self, refused, folder, flags):
        write(STEPS)
        says = ["--plan", f"leave {flags[0]} out"]
        refused("insert", "digits", "--plan", "plan.json", *flags, says=says, at_once=True)

    def test_neither_a_block_nor_a_plan(self, refused):
        refused("insert", "digits", says=["--block NAME", "--plan FILE"], at_once=True)

    def test_a_plan_that_contains_itself(self):
        steps = [{"block": "se"}]
        steps.append(steps)
        step = {"block": "se", "options": {}}
        step["options"]["more"] = step
        for cyclic in (steps, [step]):
            with pytest.raises(BadOption, match="contains itself"):
                read_steps(cyclic)

    def test_the_kind_of_error_is_that_of_the_flags(self):
        with pytest.raises(UnknownName, match=r"step 1 of the plan: no block"):
            read_steps([{"block": "she"}])
        with pytest.raises(BadOption, match="cannot be read"):
            read_steps([{"block": object()}])
        with pytest.raises(AttnSurgeonError, match="reduction"):
            read_steps([{"block": "se", "options": {"reduction": "x"}}])


class TestLibrary:
    def test_a_list_of_mappings_or_a_file(self, folder):
        host = load_host("digits")
        operated = attnsurgeon.insert_plan(host, STEPS[1:2], example=EXAMPLE)
        assert len(attnsurgeon.gates(operated)) == 2
        assert torch.equal(operated(EXAMPLE), host(EXAMPLE))
        state = operated.state_dict()
        from_file = attnsurgeon.insert_plan(host, write(STEPS[1:2])).state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in from_file.items())
        one = [{"block": "se", "at": "features.5"}]
        seeded = [attnsurgeon.insert_plan(host, one, seed=seed).state_dict() for seed in (0, 9)]
        assert any(not torch.equal(seeded[0][key], tensor) for key, tensor in seeded[1].items())

    def test_nothing_is_kept_of_a_plan_that_fails_late(self):
        host = load_host("digits")
        keys = host.state_dict().keys()
        with pytest.raises(AttnSurgeonError, match=r"layer9"):
            attnsurgeon.insert_plan(host, [*STEPS, {"block": "se", "at": "layer9"}])
        assert host.state_dict().keys() == keys
        assert not attnsurgeon.gates(host)


def test_what_a_plan_may_stand_beside_is_what_is_reported():
    done = Insertion("m", None, (Step("se"),), (), {}, {}, {}).to_json()
    assert set(done) == {"plan", *REPORTED}


def test_a_step_is_read_as_it_was_written():
    chosen = {"at": ("a", "b"), "exclude": ("c",), "stage": (1, 2), "every": 3, "kind": "residual"}
    step = Step("se", **chosen, placement="pre", options={"reduction": 2}, seed=4)
    assert read_steps([step.to_json()]) == (step,)
    assert read_steps([Step("gc").to_json()]) == (Step("gc"),)
