"""Whatever is wrong with the input: one line, exit 2, nothing written and nothing lost."""

import copy
import ctypes
import json
import os
import pickle
import resource
import signal
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from attnsurgeon import digits
from attnsurgeon.cli import shell
from attnsurgeon.errors import BadFile, OutputRefused
from attnsurgeon.recipe import Recipe
from tests.conftest import contents

DIGITS = ("insert", "digits", "--block", "se")
SMALL_DISK = 300_000  # bytes: less than any file of the digits network
NEW_SE = ("--block", "se", "--weights", "none")
RESNET = ("insert", "resnet18", *NEW_SE)
COMMAND = (str(Path(sysconfig.get_path("scripts"), "attnsurgeon")),)


class TestNames:
    @pytest.mark.parametrize(
        ("args", "says"),
        [
            (("insert", "resnt50", "--block", "se"), ["'resnt50'", "'resnet50'"]),
            (("insert", "digit", "--block", "se"), ["'digit'", "'digits'"]),
            (("insert", "x" * 300, "--block", "se"), ["no model"]),
            (("export", "resnt50", "-o", "x.onnx"), ["'resnt50'", "'resnet50'"]),
            (("sites", "resnt50"), ["'resnt50'", "'resnet50'"]),
            (("models", "resnext500"), ["'resnext500'", "'resnet50'"]),
            (("insert", "digits", "--block", "cbma"), ["'cbma'", "'cbam'"]),
            ((*DIGITS, "--placement", "pots"), ["'pots'", "'post'"]),
            ((*DIGITS, "--placement", "replace"), ["'replace'", "post, standard", "is for sk"]),
            ((*DIGITS, "--set", "reduktion=8"), ["'reduktion'", "'reduction'"]),
            ((*DIGITS, "--set", "activation=rulu"), ["relu", "'rulu'"]),
            ((*DIGITS, "--weights", "DEFALT"), ["'DEFALT'", "'DEFAULT'"]),
            (("inser", "digits"), ["'inser'", "'insert'"]),
            ((*DIGITS, "--sed", "1"), ["--sed", "--seed"]),
        ],
    )
    def test_an_unknown_name_brings_the_nearest(self, refused, args, says):
        refused(*args, says=says)

    @pytest.mark.parametrize("dry", [(), ("--dry-run",)])
    @pytest.mark.parametrize("weights", ["IMAGENET1K_V9", "ResNet50_Weights.IMAGENET1K_V1"])
    def test_unknown_weights_are_refused_before_anything_is_built(
        self, refused, monkeypatch, weights, dry
    ):
        monkeypatch.setattr("attnsurgeon.job.open_target", None)
        args = ("insert", "resnet18", "--block", "se", "--weights", weights, *dry)
        refused(*args, says=[weights, "IMAGENET1K_V1'?", "--weights none"])

    def test_a_model_called_like_a_file_is_the_model(self, run, folder):
        (folder / "digits").write_text("not a model")
        assert run(*DIGITS, "--dry-run").code == 0


class TestChoices:
    @pytest.mark.parametrize(
        ("args", "says"),
        [
            (("--at", "features.99"), ["'features.99'", "7 sites", "'features."]),
            (("--at", "features.*", "layer1.*"), ["'layer1.*'"]),
            (("--at", ""), ["''"]),
            (("--exclude", "layer1.*"), ["'layer1.*'"]),
            (("--exclude", "*"), ["no site is left"]),
            (("--stage", "1", "9"), ["stage 9", "1 to"]),
            (("--stage", "0"), ["stage 0"]),
            (("--every", "0"), ["--every", "not 0"]),
            (("--every", "-1"), ["--every", "not -1"]),
            (("--every", "two"), ["--every"]),
            (("--seed", "one"), ["--seed"]),
            (("--num-classes", "0", "--weights", "none"), ["--num-classes", "not 0"]),
            (("--num-classes", "-3", "--weights", "none"), ["--num-classes", "not -3"]),
            (("--num-classes", "12"), ["--weights none"]),
            (("--num-classes", 10**30, "--weights", "none"), ["num_classes=1000"]),
            (("--set", "reduction"), ["--set takes key=value", "'reduction'"]),
            (("--set", "=8"), ["--set takes key=value", "'=8'"]),
            (("--set", "reduction=8", "reduction=4"), ["twice"]),
            (("--set", "reduction=eight"), ["reduction takes int", "'eight'"]),
            (("--set", "reduction=0"), ["reduction must be at least 1"]),
            (("--set", "ratio=1/0"), ["ratio", "'1/0'"]),
            (
                ("--block", "cbam", "--set", f"kernel_size={10**10 + 1}"),
                ["kernel_size=10000000001"],
            ),
            (("--model-arg", "width_mult"), ["--model-arg takes key=value"]),
            (("--model-arg", "wide=2", "--weights", "none"), ["wide=2"]),
            (("--model-arg", "dropout=5", "--weights", "none"), ["dropout=5", "between 0 and 1"]),
            (("--model-arg", "weights=DEFAULT"), ["weights is no --model-arg; use --weights"]),
            (("--model-arg", "pretrained=true"), ["pretrained is no --model-arg"]),
            (("--weights", "none", "-o", "x.foo"), ["'x.foo'", ".safetensors, .onnx, .pt"]),
            (("--weights", "none", "-o", "x"), ["'x'", ".safetensors, .onnx, .pt"]),
        ],
    )
    def test_a_choice_that_cannot_be_met(self, refused, args, says):
        refused(*DIGITS, *args, says=says)

    def test_more_classes_than_memory(self, refused):
        refused(*RESNET, "--num-classes", 10**12, says=["num_classes=1000000000000"])

    @pytest.mark.parametrize("model", ["vgg11", "alexnet"])
    def test_a_model_without_residual_blocks(self, refused, model):
        refused("insert", model, *NEW_SE, says=["no residual block", "such as resnet50"])

    @pytest.mark.parametrize(
        "args",
        [("--weights", "IMAGENET1K_V1"), ("--num-classes", "5"), ("--model-arg", "width_mult=1")],
    )
    def test_a_file_takes_no_arguments_of_a_model(self, refused, digits_file, args):
        refused("insert", digits_file, "--block", "gc", *args, says=["--checkpoint", args[0]])

    def test_weights_and_a_checkpoint_at_once(self, refused):
        args = ("--weights", "IMAGENET1K_V1", "--checkpoint", "x.pth")
        refused("insert", "resnet18", "--block", "se", *args, says=["--weights", "--checkpoint"])

    @pytest.mark.parametrize(
        ("args", "says"),
        [
            (("--opset", "16"), ["--opset", "17", "not 16"]),
            (("--opset", "17", "--exporter", "dynamo"), ["18", "--exporter torchscript"]),
            (("--exporter", "dynam"), ["'dynam'", "'dynamo'"]),
            (("--opset", "99"), ["--opset", "not 99"]),
            (("--opset", "new"), ["--opset"]),
            (("--input-size", "0"), ["--input-size", "not 0"]),
            (("--input-size", "32,0"), ["--input-size", "not 32,0"]),
            (("--input-size", "-8"), ["--input-size", "'-8'"]),
            (("--input-size", "big"), ["--input-size", "'big'"]),
            (("--input-size", "²"), ["--input-size", "'²'"]),
            (("--input-size", "8,8,8"), ["--input-size", "'8,8,8'"]),
            (("-o", "x.tflite"), ["'.tflite'", "'.pt'"]),
            (("-o", "x.pt", "--opset", "18"), ["--opset", ".pt"]),
        ],
    )
    def test_an_export_that_does_not_exist(self, refused, digits_file, args, says):
        refused("export", digits_file, "-o", "x.onnx", *args, says=says)

    def test_an_input_too_small_for_the_network(self, refused):
        args = ("export", "squeezenet1_1", "--weights", "none", "-o", "x.onnx")
        refused(*args, "--input-size", "8", says=["SqueezeNet", "8x8", "--input-size"])


class TestOutput:
    @pytest.mark.parametrize("name", ["x.safetensors", "x.onnx", "x.pt"])
    def test_an_existing_output_is_left_alone(self, refused, folder, name):
        (folder / name).write_bytes(b"precious")
        refused(*DIGITS, "-o", name, says=[name, "exists", "--force"], at_once=True)

    def test_an_existing_default_output_is_left_alone(self, refused, folder):
        (folder / "digits_se.safetensors").write_bytes(b"precious")
        refused(*DIGITS, says=["digits_se.safetensors", "exists", "--force"], at_once=True)

    def test_an_existing_export_is_left_alone(self, refused, folder, digits_file):
        (folder / "x.onnx").write_bytes(b"precious")
        refused(
            "export",
            digits_file,
            "-o",
            "x.onnx",
            says=["x.onnx", "exists", "--force"],
            at_once=True,
        )

    def test_a_link_to_nowhere_is_left_alone(self, refused, folder):
        (folder / "x.safetensors").symlink_to("nowhere")
        refused(*DIGITS, "-o", "x.safetensors", says=["exists"], at_once=True)

    @pytest.mark.parametrize("force", [(), ("--force",)])
    @pytest.mark.parametrize(
        ("output", "says"),
        [
            ("missing/x.safetensors", ["no folder", "'missing'", "-o"]),
            ("file/x.safetensors", ["no folder", "'file'"]),
            ("folder.safetensors", ["folder.safetensors", "is a folder", "-o"]),
            ("device.safetensors", ["device.safetensors", "no plain file"]),
            (f"{'x' * 300}.safetensors", ["name too long"]),
        ],
    )
    def test_a_place_that_takes_no_file(self, refused, folder, output, says, force):
        (folder / "file").touch()
        (folder / "folder.safetensors").mkdir()
        (folder / "device.safetensors").symlink_to(os.devnull)
        error = refused(*DIGITS, "-o", output, *force, at_once=True)
        assert all(text in error.replace("File name", "name") for text in says)

    def test_a_name_as_long_as_the_file_system_takes(self, run, folder):
        name = f"{'x' * 240}.safetensors"
        assert run(*DIGITS, "--stage", "2", "-o", name).code == 0
        assert list(contents(folder)) == [name]

    def test_a_read_only_folder(self, folder):
        (folder / "sealed").mkdir(mode=0o555)
        before = contents(folder)
        done = subprocess.run(
            [*COMMAND, *DIGITS, "-o", "sealed/x.safetensors"],
            preexec_fn=_obey_permissions,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr == ("error: the folder 'sealed' is read-only; choose another -o\n")
        assert contents(folder) == before

    @pytest.mark.parametrize(
        ("command", "name"),
        [
            (DIGITS, "x.safetensors"),
            (("export", "FILE", "--static"), "x.onnx"),
            (("export", "FILE", "--static"), "x.pt"),
        ],
    )
    def test_a_full_disk_keeps_what_was_there(self, run, folder, digits_file, command, name):
        words = [digits_file if word == "FILE" else word for word in command]
        (folder / name).write_bytes(b"precious")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_DISK, hard))
        try:
            outcome = run(*words, "-o", name, "--force")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (outcome.code, outcome.out) == (2, "")
        assert f"could not write '{name}'" in outcome.error
        assert "File too large" in outcome.error
        assert contents(folder) == {name: b"precious"}

    def test_an_output_that_appears_meanwhile_is_left_alone(self, run, folder, monkeypatch):
        from attnsurgeon import store

        write = store.save_file

        def write_and_be_overtaken(tensors, path, metadata):
            write(tensors, path, metadata)
            (folder / "x.safetensors").write_bytes(b"precious")

        monkeypatch.setattr(store, "save_file", write_and_be_overtaken)
        outcome = run(*DIGITS, "--stage", "2", "-o", "x.safetensors")
        assert (outcome.code, outcome.out) == (2, "")
        assert all(text in outcome.error for text in ("exists", "--force"))
        assert contents(folder) == {"x.safetensors": b"precious"}


def _obey_permissions():
    """Have the process obey file modes even if it is root's: without CAP_DAC_OVERRIDE."""
    drop, dac_override = 24, 1
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(drop, dac_override, 0, 0, 0) != 0:
        raise OSError("root cannot drop CAP_DAC_OVERRIDE here")


def _recipe(file):
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["attnsurgeon"])


def _with_recipe(file, recipe, tensors=None):
    text = recipe if isinstance(recipe, str) else json.dumps(recipe)
    save_file(
        load_file(file) if tensors is None else tensors, "x.safetensors", {"attnsurgeon": text}
    )
    return "x.safetensors"


def _at(recipe, path):
    *folders, last = path
    for name in folders:
        recipe = recipe[name]
    return recipe, last


class TestFiles:
    @pytest.mark.parametrize(
        "args",
        [
            ("insert", "x.safetensors", "--block", "se"),
            ("export", "x.safetensors", "-o", "x.onnx"),
            ("sites", "x.safetensors"),
            ("verify", "x.safetensors"),
        ],
    )
    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (None, "no file"),
            (b"", "is empty"),
            (b"hello world, this is no model", "not a whole safetensors file"),
        ],
    )
    def test_every_command_refuses_what_is_no_model(self, refused, folder, args, content, says):
        if content is not None:
            (folder / "x.safetensors").write_bytes(content)
        refused(*args, says=["'x.safetensors'", says])

    @pytest.mark.parametrize("kept", [1, 7, 8, 100, 0.1, 0.5, 0.999])
    def test_a_truncated_file(self, refused, folder, digits_file, kept):
        whole = digits_file.read_bytes()
        end = kept if isinstance(kept, int) else int(kept * len(whole))
        (folder / "x.safetensors").write_bytes(whole[:end])
        refused("verify", "x.safetensors", says=["'x.safetensors'", "safetensors file"])

    def test_a_folder(self, refused, folder):
        (folder / "x.safetensors").mkdir()
        refused("verify", "x.safetensors", says=["is a folder"])

    def test_a_safetensors_file_of_something_else(self, refused, folder):
        save_file({"conv.weight": torch.zeros(3)}, "x.safetensors", {"format": "pt"})
        refused("verify", "x.safetensors", says=["no recipe", "--checkpoint"])

    def test_a_checkpoint_as_the_model(self, refused, folder):
        torch.save(digits.read_weights(), "x.pth")
        refused("insert", "x.pth", "--block", "se", says=["'x.pth'", "safetensors"])

    def test_a_newer_format_says_so(self, refused, folder, digits_file):
        newer = {"format": 2, "unheard of": None}
        args = ("verify", _with_recipe(digits_file, newer))
        refused(*args, says=["of format 2", "pip install -U attnsurgeon"])

    @pytest.mark.parametrize("text", ["", "{", "[]", "7", '"x"', "[" * 100_000, "{}"])
    def test_a_recipe_that_is_none(self, refused, folder, digits_file, text):
        refused("verify", _with_recipe(digits_file, text), says=["recipe", "cannot be read"])

    @pytest.mark.parametrize(
        ("path", "value", "says"),
        [
            (("cuts", 0, "options"), {"reduction": 1}, "of another shape"),
            (("cuts", 0, "options"), {"bias": False}, "2 unexpected"),
            (("cuts", 0, "options"), {"reduktion": 1}, "'reduction'"),
            (("cuts", 0, "options"), {"reduction": 0}, "at least 1"),
            (("cuts", 0, "block"), "gc", "missing"),
            (("cuts", 0, "block"), "she", "'se'"),
            (("cuts", 0, "placement"), "replace", "'replace'"),
            (("cuts", 0, "path"), "features.99", "features.99"),
            (("cuts", 0, "place", "channels"), 1, "of another shape"),
            (("cuts", 0, "place", "channels"), "64", "channels"),
            (("cuts", 0, "place", "channels"), -1, "out of range"),
            (("cuts", 0, "place", "channels"), 10**9, "out of range"),
            (("cuts", 0, "splice", "child"), "attention_pre", "unexpected"),
            (("cuts", 0, "splice", "child"), "se", "splice"),
            (("cuts", 0, "splice", "placement"), "pre", "splice"),
            (("cuts", 0, "splice", "tail"), 3, "out of range"),
            (("cuts",), [], "no cuts"),
            (("gate",), "another", "'another'"),
            (("host", "name"), "resnet9000", "'resnet9000'"),
            (("host", "name"), "os.system", "'os.system'"),
            (("host", "name"), "resnet18", "no module 'features."),
            (("host", "arguments"), {"num_classes": 11}, "of another shape"),
            (("host", "arguments"), {"num_classes": 0}, "of another shape"),
            (("host", "arguments"), {"num_classes": -1}, "num_classes=-1"),
            (("host", "arguments"), {"num_classes": 10**9}, "of another shape"),
            (("host", "arguments"), {"num_classes": 10**30}, "num_classes=1000"),
            (("host", "arguments"), {"num_classes": "many"}, "num_classes='many'"),
            (("host", "arguments"), {"widening": 2}, "widening"),
            (("host", "arguments"), {"weights": "DEFAULT"}, "name weights"),
            (("host", "arguments"), {"weights_backbone": "DEFAULT"}, "name weights"),
            (("host", "arguments"), {"pretrained": True}, "name weights"),
            (("host", "input_shapes"), [], "inputs of shape"),
            (("host", "input_shapes"), [[1, 3, 10**6, 10**6]], "inputs of shape"),
            (("certificate",), {"exact": True}, "certificate"),
            (("sha256",), {}, "hashes"),
        ],
    )
    def test_a_recipe_that_does_not_fit(self, refused, folder, digits_file, path, value, says):
        recipe = _recipe(digits_file)
        held, last = _at(recipe, path)
        held[last] = value
        refused("verify", _with_recipe(digits_file, recipe), says=["x.safetensors", says])

    def test_a_recipe_without_one_of_its_keys(self, refused, folder, digits_file):
        recipe = _recipe(digits_file)
        for key in recipe.keys() - {
            "gate"
        }:  # files without it were written before there were forms
            less = {name: value for name, value in recipe.items() if name != key}
            refused("sites", _with_recipe(digits_file, less), says=["recipe", key])
            (folder / "x.safetensors").unlink()

    def test_any_leaf_of_a_recipe_can_be_anything(self, digits_file):
        recipe = _recipe(digits_file)
        wrong = [None, True, -1, 10**30, 1.5, float("nan"), "x", "", [], {}, [1], [[]], {"a": 1}]
        refusals = 0
        for path in _paths(recipe):
            for value in wrong:
                other = copy.deepcopy(recipe)
                held, last = _at(other, path)
                held[last] = value
                try:
                    Recipe.loads(json.dumps(other), "'x'")
                except BadFile as error:
                    assert "\n" not in str(error)  # noqa: PT017 (many do not raise)
                    refusals += 1
        assert refusals > 300

    def test_a_placement_that_the_block_does_not_have(self, refused, folder, digits_file):
        recipe = _recipe(digits_file)
        recipe["cuts"][0]["placement"] = recipe["cuts"][0]["splice"]["placement"] = "replace"
        refused("sites", _with_recipe(digits_file, recipe), says=["se has no placement 'replace'"])

    def test_two_cuts_at_the_very_same_place(self, refused, folder, digits_file):
        recipe = _recipe(digits_file)
        recipe["cuts"].append(recipe["cuts"][0])
        refused("verify", _with_recipe(digits_file, recipe), says=["very same place"])

    def test_a_recipe_takes_no_memory_it_has_no_tensors_for(self, refused, folder, digits_file):
        recipe = _recipe(digits_file)
        recipe["host"]["arguments"] = {"num_classes": 4_000_000}  # 5 GB
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        refused("sites", _with_recipe(digits_file, recipe), says=["does not fit"])
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB

    def test_a_recipe_runs_no_code(self, refused, folder, digits_file):
        recipe, tensors = _recipe(digits_file), load_file(digits_file)
        cut = recipe["cuts"][0]
        old = f"{cut['path']}.{cut['splice']['child']}."
        code = """training and None") or open("ran", "w") or getattr(self, "training"""
        cut["splice"]["child"] = code
        tensors = {key.replace(old, f"{cut['path']}.{code}."): t for key, t in tensors.items()}
        refused("sites", _with_recipe(digits_file, recipe, tensors), says=["splice"])
        assert not (folder / "ran").exists()

    @pytest.mark.parametrize(
        ("edit", "says"),
        [
            (lambda t: t.pop("classifier.1.bias"), ["1 missing", "classifier.1.bias"]),
            (lambda t: t.update(stray=torch.zeros(1)), ["1 unexpected", "stray"]),
            (
                lambda t: t.update({"classifier.1.bias": torch.zeros(11)}),
                ["1 of another shape", "classifier.1.bias (11,) instead of (10,)"],
            ),
            (
                lambda t: t.update({"classifier.1.bias": torch.zeros(10, dtype=torch.int64)}),
                ["1 of another kind", "classifier.1.bias int64 instead of float32"],
            ),
        ],
    )
    def test_tensors_that_do_not_fit(self, refused, folder, digits_file, edit, says):
        tensors = load_file(digits_file)
        edit(tensors)
        file = _with_recipe(digits_file, _recipe(digits_file), tensors)
        refused("verify", file, says=["does not fit its tensors", *says])

    def test_changed_numbers_break_the_identity(self, run, folder, digits_file):
        tensors = load_file(digits_file)
        tensors["classifier.1.bias"][3] += 1
        outcome = run("verify", _with_recipe(digits_file, _recipe(digits_file), tensors))
        assert (outcome.code, outcome.out) == (3, "")
        assert "classifier.1.bias" in outcome.error


def _paths(value, path=()):
    """Yield the path of everything in a recipe; of lists and hashes the first stands for all."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items)[: 1 if "sha256" in path or isinstance(value, list) else None]:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from _paths(item, (*path, key))


class Code:
    """Pickled, this is an order to make a file."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def _without(*heads):
    weights = digits.read_weights()
    return {key: tensor for key, tensor in weights.items() if not key.startswith(heads)}


def _changed(**changes):
    weights = digits.read_weights()
    return {**weights, **{key.replace("__", "."): value for key, value in changes.items()}}


class TestCheckpoints:
    """With `insert --checkpoint` and `export --checkpoint`, of whatever kind of file."""

    def insert(self, refused, file, says):
        return refused(*DIGITS, "--checkpoint", file, says=[f"'{file}'", *says])

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (None, ["no file"]),
            (b"", ["is empty"]),
            (b"hello", ["cannot be read"]),
            (b"<!DOCTYPE html><html>not found</html>", ["cannot be read"]),
            (bytes(1000), ["cannot be read"]),
            (b"PK\x03\x04 and no more", ["cannot be read"]),
        ],
    )
    @pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
    def test_no_checkpoint_at_all(self, refused, folder, name, content, says):
        if content is not None:
            (folder / name).write_bytes(content)
        self.insert(refused, name, says)

    def test_no_file_at_all(self, refused, folder):
        self.insert(refused, os.devnull, ["no plain file"])
        (folder / "x.pth").mkdir()
        self.insert(refused, "x.pth", ["is a folder"])
        self.insert(refused, "x" * 300, ["cannot be read"])

    @pytest.mark.parametrize("kept", [1, 2, 20, 100, 1000, 0.3, 0.9, 0.9999])
    @pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
    def test_a_truncated_checkpoint(self, refused, folder, kind, kept):
        if kind == "safetensors":
            save_file(digits.read_weights(), "x.safetensors")
        else:
            torch.save(
                digits.read_weights(),
                "x.safetensors",  # what it holds counts, not what it is called
                _use_new_zipfile_serialization=kind == "zip",
            )
        whole = (folder / "x.safetensors").read_bytes()
        end = kept if isinstance(kept, int) else int(kept * len(whole))
        (folder / "x.safetensors").unlink()
        (folder / "x.pth").write_bytes(whole[:end])
        self.insert(refused, "x.pth", ["cannot be read as a checkpoint"])

    @pytest.mark.parametrize("kind", ["torch", "pickle"])
    def test_a_pickle_that_would_run_code_does_not(self, refused, folder, kind):
        file = folder / "x.pth"
        if kind == "torch":
            torch.save({"state_dict": Code()}, file)
        else:
            file.write_bytes(pickle.dumps(Code(), 2))
        error = self.insert(refused, "x.pth", ["mkdir", "would run code"])
        assert "weights_only" not in error  # no advice to run it
        assert not (folder / "ran").exists()
        if kind == "torch":
            torch.load(file, weights_only=False)
        else:
            pickle.loads(file.read_bytes())
        assert (folder / "ran").exists()  # it is what it is said to be

    def test_a_whole_pickled_network(self, refused, folder):
        torch.save(torch.nn.Linear(2, 2), "x.pth")
        self.insert(refused, "x.pth", ["torch.nn.modules.linear.Linear", "would run code"])

    @pytest.mark.parametrize(
        "held", [None, {}, [torch.zeros(1)], torch.zeros(1), {1: torch.zeros(1)}, {"epoch": 3}]
    )
    def test_a_file_without_a_state_dict(self, refused, folder, held):
        torch.save(held, "x.pth")
        self.insert(refused, "x.pth", ["no state dict"])

    @pytest.mark.parametrize(
        ("weights", "says"),
        [
            (
                lambda: _without("classifier."),
                ["2 missing (classifier.1.weight, classifier.1.bias)", "tensors fit"],
            ),
            (
                lambda: _without("features.1."),
                ["missing (features.1.conv.0.0.weight, features.1.conv.0.1.weight", ", ...)"],
            ),
            (
                lambda: _changed(**{f"x{i}": torch.zeros(1) for i in range(5)}),
                ["5 unexpected (x0, x1, x2, ...)"],
            ),
            (
                lambda: {f"net.{key}": t for key, t in digits.read_weights().items()},
                ["0 of", "missing (features.0", "unexpected (net.features.0"],
            ),
            (
                lambda: _changed(classifier__1__bias=torch.zeros(7)),
                ["1 of another shape (classifier.1.bias (7,) instead of (10,))", "--num-classes"],
            ),
            (
                lambda: _changed(features__0__0__weight=torch.zeros(3)),
                ["1 of another shape (features.0.0.weight (3,)"],
            ),
            (
                lambda: {
                    **_without("features.18", "classifier.1.bias"),
                    "stray": torch.zeros(1),
                    "classifier.1.weight": torch.zeros(2),
                },
                ["missing (classifier.1.bias)", "1 unexpected (stray)", "1 of another shape"],
            ),
            (
                lambda: _changed(classifier__1__bias=torch.zeros(10, dtype=torch.int32)),
                ["1 of another kind (classifier.1.bias int32 instead of float32)"],
            ),
            (
                lambda: _changed(classifier__1__bias=torch.zeros(10, dtype=torch.complex64)),
                ["complex64 instead of float32"],
            ),
            (
                lambda: _changed(classifier__1__bias=torch.zeros(10).to(torch.float8_e4m3fn)),
                ["float8_e4m3fn instead of float32"],
            ),
            (
                lambda: _changed(classifier__1__bias=torch.zeros(10, device="meta")),
                ["meta float32 instead of float32"],
            ),
            (
                lambda: _changed(classifier__1__bias=torch.zeros(10).to_sparse()),
                ["sparse_coo float32 instead of float32"],
            ),
            (
                lambda: _changed(features__0__1__num_batches_tracked=torch.tensor(0.5)),
                ["float32 instead of int64"],
            ),
        ],
    )
    def test_tensors_that_do_not_fit(self, refused, folder, weights, says):
        torch.save(weights(), "x.pth")
        self.insert(refused, "x.pth", ["does not fit MobileNetV2", *says])

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda bias: bias * float("nan"), "NaN"),
            (lambda bias: bias.to(torch.float64), "fails on"),
        ],
    )
    def test_weights_that_compute_nothing(self, refused, folder, change, says):
        bias = change(digits.read_weights()["classifier.1.bias"])
        torch.save(_changed(classifier__1__bias=bias), "x.pth")
        refused(*DIGITS, "--checkpoint", "x.pth", says=["MobileNetV2", says])

    def test_export_refuses_the_checkpoint_of_the_plain_network(self, refused, folder, digits_file):
        torch.save(digits.read_weights(), "x.pth")
        args = ("export", digits_file, "-o", "x.onnx", "--checkpoint", "x.pth")
        refused(*args, says=["'x.pth'", "missing", "attention_post"])

    @pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x.SAFETENSORS", "x"])
    def test_a_good_one_is_taken_whatever_it_is_called(self, run, folder, name):
        weights = {key: t + 1 for key, t in digits.read_weights().items()}
        if name == "x.pth":
            torch.save({"epoch": 3, "state_dict": weights}, name)
        else:
            save_file(weights, name)
        assert run(*DIGITS, "--stage", "2", "--checkpoint", name).code == 0
        written = load_file("digits_se.safetensors")
        assert all(torch.equal(written[key], t) for key, t in weights.items())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_a_checkpoint_of_another_precision_is_taken_as_it_is(self, run, folder, dtype):
        weights = {
            key: t.to(dtype) if t.is_floating_point() else t
            for key, t in digits.read_weights().items()
        }
        torch.save(weights, "x.pth")
        assert run(*DIGITS, "--stage", "2", "--checkpoint", "x.pth").code == 0
        written = load_file("digits_se.safetensors")
        assert all(written[key].dtype == t.dtype for key, t in weights.items())
        assert all(torch.equal(written[key], t) for key, t in weights.items())
        assert run("verify", "digits_se.safetensors").code == 0


class TestInterrupt:
    """A real signal to a real process, while its last line of progress says what it is doing."""

    @pytest.mark.parametrize(
        ("args", "moment", "number", "code"),
        [
            (RESNET, "inserting", signal.SIGINT, 130),
            (("export", "FILE", "-o", "x.onnx"), "translating", signal.SIGINT, 130),
            (("export", "FILE", "-o", "x.pt"), "checking", signal.SIGTERM, 143),
        ],
    )
    def test_nothing_is_left(self, folder, digits_file, args, moment, number, code):
        words = [str(digits_file) if word == "FILE" else word for word in args]
        process = subprocess.Popen(
            [*COMMAND, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        told = ""
        while not told.startswith(moment):
            told = process.stderr.readline()
            assert told, "it ended before the moment came"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (code, ""), err
        assert contents(folder) == {}
        assert "Traceback" not in err
        if number == signal.SIGINT:
            assert err.splitlines()[-1] == "error: interrupted; no partial file was left"

    def test_in_the_middle_of_a_write(self, run, folder, monkeypatch):
        from attnsurgeon import store

        def write_half(tensors, path, metadata):
            path.write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(store, "save_file", write_half)
        (folder / "x.safetensors").write_bytes(b"precious")
        outcome = run(*DIGITS, "--stage", "2", "-o", "x.safetensors", "--force")
        assert (outcome.code, outcome.out) == (130, "")
        assert contents(folder) == {"x.safetensors": b"precious"}

    def test_wrapped_by_a_library(self, run, folder, monkeypatch):
        def fail(*args, **kwargs):
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as interrupt:  # as an import of compiled code does
                raise ImportError("initialization failed") from interrupt

        monkeypatch.setattr("attnsurgeon.job.open_target", fail)
        outcome = run(*DIGITS)
        assert (outcome.code, outcome.error) == (
            130,
            "error: interrupted; no partial file was left",
        )


class TestStdout:
    """Results that nobody can take; tables and JSON alike."""

    @pytest.mark.parametrize("say", [shell.say, shell.say_json])
    def test_a_full_disk(self, monkeypatch, say):
        with Path("/dev/full").open("w") as full:
            monkeypatch.setattr("sys.stdout", full)
            with pytest.raises(OutputRefused, match="cannot write the results to stdout"):
                say("result")

    @pytest.mark.parametrize("say", [shell.say, shell.say_json])
    def test_a_reader_that_has_seen_enough(self, monkeypatch, say):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w") as pipe:  # noqa: PTH123 (no path)
            monkeypatch.setattr("sys.stdout", pipe)
            with pytest.raises(typer.Exit) as ended:
                say("result")
        assert ended.value.exit_code == 141
