"""Weights of one form of gate are not taken for those of another whose keys are the same."""

import copy
from collections import OrderedDict

import pytest
import torch

import attnsurgeon
from attnsurgeon.gate import CentredGate
from attnsurgeon.host import load_host
from attnsurgeon.store import load_model, save_model

FORMS = ("mix", "centred")


def operate(form, **options):
    return attnsurgeon.insert_attention(
        load_host("digits"), "cbam", at="features.5", gate=form, **options
    )


@pytest.fixture(scope="module")
def models():
    return {form: operate(form) for form in FORMS}


@pytest.fixture
def file(models, folder):
    save_model(models["mix"], "mix.safetensors")
    return "mix.safetensors"


def test_the_keys_are_the_same(models):
    mix, centred = (models[form].state_dict() for form in FORMS)
    assert mix.keys() == centred.keys() == OrderedDict(mix).keys()


class TestLoadStateDict:
    def test_its_own(self, models):
        for model in models.values():
            fit = copy.deepcopy(model).load_state_dict(model.state_dict())
            assert not fit.missing_keys

    @pytest.mark.parametrize("strict", [True, False])
    def test_of_another_form(self, models, strict):
        says = "attention_post.channel.gate is of the form 'mix', that of the state dict 'centred'"
        with pytest.raises(RuntimeError, match=says):
            copy.deepcopy(models["mix"]).load_state_dict(
                models["centred"].state_dict(), strict=strict
            )

    def test_without_notes_as_ever(self, models):
        copy.deepcopy(models["mix"]).load_state_dict(dict(models["centred"].state_dict()))

    def test_stripped(self, models):
        """Neither has a number; one is the published block, the other that times 2."""
        stripped = []
        for model in (copy.deepcopy(models[form]) for form in FORMS):
            for gate in attnsurgeon.gates(model).values():
                gate.data.fill_(1)
            stripped.append(attnsurgeon.strip_gates(model))
        mix, centred = stripped
        assert mix.state_dict().keys() == centred.state_dict().keys()
        with pytest.raises(RuntimeError, match="'mix, stripped', that .* 'centred, stripped'"):
            mix.load_state_dict(centred.state_dict())


class TestCheckpoint:
    """`gates --checkpoint`, as all that takes one."""

    def test_of_another_form(self, models, file, run, refused):
        state = models["centred"].state_dict()
        averaged = torch.optim.swa_utils.AveragedModel(models["centred"])
        says = ["another form of gate: 'centred' where the file has 'mix'", "--gate"]
        for held in (state, {"model": state, "epoch": 3}, averaged.state_dict()):
            torch.save(held, "trained.pth")
            refused("gates", file, "--checkpoint", "trained.pth", says=says)
        torch.save(models["mix"].state_dict(), "trained.pth")
        assert run("gates", file, "--checkpoint", "trained.pth").code == 0

    def test_a_file_of_another_form(self, models, file, refused):
        save_model(models["centred"], "trained.safetensors")
        says = ["of another plan: gate 'centred' at features.5.attention_post", "has 'mix'"]
        refused("gates", file, "--checkpoint", "trained.safetensors", says=says)

    def test_a_file_with_other_options(self, file, refused):
        save_model(operate("mix", pool_types=("avg",)), "trained.safetensors")
        refused("gates", file, "--checkpoint", "trained.safetensors", says=["options {", "'avg'"])

    def test_a_file_of_the_same_plan_with_another_seed(self, file, run):
        save_model(operate("mix", seed=5), "trained.safetensors")
        assert run("gates", file, "--checkpoint", "trained.safetensors").code == 0


def test_a_loaded_file_is_of_its_form(models, folder):
    save_model(models["centred"], "x.safetensors")
    again = load_model("x.safetensors")
    assert any(isinstance(module, CentredGate) for module in again.modules())
    again.load_state_dict(models["centred"].state_dict())
