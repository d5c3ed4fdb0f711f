"""What other programs and tired people count on: help, JSON, lists, exit codes, the same bytes."""

import contextlib
import gc
import hashlib
import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import typer
from rich.text import Text
from safetensors.torch import load_file

import attnsurgeon
import attnsurgeon.errors
from attnsurgeon.cli import app, main, shell
from attnsurgeon.store import read_recipe
from attnsurgeon.surgery import cuts_of
from tests.conftest import contents

GROUP = typer.main.get_command(app)
COMMANDS = sorted(GROUP.commands)
SCRIPT = str(Path(sysconfig.get_path("scripts"), "attnsurgeon"))
ESCAPE = "\x1b"
RANDOM = tuple(f".{layer}.{kind}" for layer in ("squeeze", "excite") for kind in ("weight", "bias"))

DIGITS = ("insert", "digits", "--block", "se")
DRY = (*DIGITS, "--dry-run", "--json")


def examples(command):
    """Return the command lines that the help of a command shows."""
    return re.findall(r"^ *(attnsurgeon .*)$", GROUP.commands[command].epilog, re.MULTILINE)


class TestHelp:
    def test_there_are_the_commands_promised(self):
        promised = "bench blocks demo export gates insert models remove show sites verify"
        assert promised.split() == COMMANDS

    @pytest.mark.parametrize("command", COMMANDS)
    def test_help_shows_examples(self, run, command):
        outcome = run(command, "--help")
        assert (outcome.code, outcome.err) == (0, "")
        assert examples(command)
        assert all(line[:70] in outcome.out for line in examples(command))

    @pytest.mark.parametrize("command", COMMANDS)
    def test_the_examples_can_be_parsed(self, command):
        for line in examples(command):
            _, name, *words = shlex.split(line)
            assert name == command
            GROUP.commands[name].make_context(name, words)

    @pytest.mark.parametrize("args", [(), ("--help",)])
    def test_nothing_at_all_is_help(self, run, args):
        outcome = run(*args)
        assert (outcome.code, outcome.err) == (0, "")
        assert all(command in outcome.out for command in COMMANDS)
        assert "Exit codes: 0 done" in outcome.out

    def test_the_version(self, run):
        outcome = run("--version")
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out == f"attnsurgeon {attnsurgeon.__version__}\n"

    @pytest.mark.parametrize("args", [["--help"], ["insert", "--help"], ["--version"], ["inser"]])
    def test_help_and_usage_do_not_wait_for_torch(self, args):
        code = (
            "import sys, attnsurgeon.cli as cli\n"
            "sys.argv = ['attnsurgeon', *sys.argv[1:]]\n"
            "try: cli.main()\n"
            "finally: assert not {'torch', 'torchvision', 'onnx', 'safetensors'} & {*sys.modules}\n"
        )
        command = [sys.executable, "-c", code, *args]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == (2 if args == ["inser"] else 0), done.stderr
        assert "AssertionError" not in done.stderr

    def test_the_installed_script(self):
        done = subprocess.run([SCRIPT, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"attnsurgeon {attnsurgeon.__version__}\n"


class TestJson:
    """One JSON value on stdout and nothing else; the keys are a promise."""

    def test_insert(self, run, folder):
        done = json.loads(run(*DIGITS, "--stage", "2", "--json").out)
        assert done.keys() >= {
            *("model", "output", "block", "placement", "sites"),
            *("parameters", "tensors", "identity", "liveness"),
        }
        assert (done["model"], done["block"], done["placement"]) == ("digits", "se", "post")
        assert done["output"] == "digits_se.safetensors"
        counts, tensors = done["parameters"], done["tensors"]
        assert counts.keys() == {"before", "added", "gates", "after"}
        assert counts["before"] + counts["added"] + counts["gates"] == counts["after"]
        assert tensors.keys() == {"original", "kept", "new"}
        assert tensors["original"] == tensors["kept"]
        assert sum((tensors["kept"], tensors["new"])) == len(load_file("digits_se.safetensors"))
        assert done["identity"]["exact"] is True
        modes = [(run["mode"], run["shapes"][0][0]) for run in done["identity"]["inputs"]]
        assert modes == [("eval", 2), ("eval", 3), ("train", 2), ("train", 3)]
        assert done["liveness"] == {"gates": len(done["sites"]), "live": len(done["sites"])}
        for site in done["sites"]:
            assert site.keys() >= {"path", "channels", "shape", "parameters"}
            assert site["shape"][1] == site["channels"]
        assert sum(site["parameters"] for site in done["sites"]) == counts["added"]

    @pytest.mark.parametrize(
        ("args", "kind", "opset", "batches"),
        [
            (("-o", "x.pt"), "torchscript", None, {1, 2, 5}),
            (("-o", "x.onnx", "--opset", "18", "--static"), "onnx", 18, {1}),
        ],
    )
    def test_export(self, run, folder, digits_file, args, kind, opset, batches):
        done = json.loads(run("export", digits_file, *args, "--json").out)
        assert done.keys() == {"output", "format", "bytes", "opset", "dynamic", "checks"}
        assert (done["output"], done["format"], done["opset"]) == (args[1], kind, opset)
        assert done["bytes"] == Path(args[1]).stat().st_size
        assert done["dynamic"] is ("--static" not in args)
        for check in done["checks"]:
            figures = {"max_abs", "max_rel", "cosine", "top1_agreement", "passed"}
            assert check.keys() == {"gates", "batch", "size", *figures}
            assert check["passed"] is True
        assert {(check["gates"], check["batch"]) for check in done["checks"]} == {
            (gates, batch) for gates in ("closed", "open") for batch in batches
        }

    def test_sites(self, run):
        found = json.loads(run("sites", "digits", "--json").out)
        fixed = {"path", "kind", "layout", "channels", "shape", "placements", "blocks"}
        residual = [site for site in found if site["kind"] == "residual"]
        assert len(residual) == len(json.loads(run(*DRY).out)["sites"])
        assert all(site.keys() >= fixed for site in found)
        assert {(site["kind"], site["layout"]) for site in found} == {
            ("residual", "NCHW"),
            ("plain", "NCHW"),
        }

    def test_verify(self, run, digits_file):
        done = json.loads(run("verify", digits_file, "--json").out)
        assert done["file"] == str(digits_file)
        assert done["tensors"]["original"] == done["tensors"]["matching"] > 0
        assert done["gates_closed"] is True
        assert done["identity"]["exact"] is True
        assert done["liveness"]["gates"] == done["liveness"]["live"] > 0

    @pytest.mark.parametrize("command", [("blocks",), ("models", "resnet*")])
    def test_lists(self, run, command):
        outcome = run(*command, "--json")
        assert outcome.code == 0
        assert all(entry["name"] for entry in json.loads(outcome.out))


class TestLists:
    """`--at a b` and `--at a --at b` are the same."""

    @pytest.mark.parametrize(
        ("together", "apart"),
        [
            (["--at", "features.1*", "features.5"], ["--at", "features.1*", "--at", "features.5"]),
            (["--at", "features.5", "features.8"], ["--at=features.5", "--at=features.8"]),
            (["--exclude", "*.5", "*.8"], ["--exclude", "*.5", "--exclude", "*.8"]),
            (["--stage", "1", "2"], ["--stage", "1", "--stage", "2"]),
            (
                ["--set", "reduction=4", "bias=false"],
                ["--set", "reduction=4", "--set", "bias=false"],
            ),
            (
                ["--weights", "none", "--model-arg", "width_mult=0.5", "dropout=0.1"],
                [
                    "--weights",
                    "none",
                    "--model-arg",
                    "width_mult=0.5",
                    "--model-arg",
                    "dropout=0.1",
                ],
            ),
        ],
    )
    def test_together_or_apart(self, run, together, apart):
        both = [run(*DRY, *flags) for flags in (together, apart)]
        assert both[0] == both[1]
        assert both[0].code == 0
        assert json.loads(both[0].out) != json.loads(run(*DRY).out)  # the flags change something

    def test_the_model_may_stand_behind_a_list(self, run):
        behind = run("insert", "--block", "se", "--stage", "2", "digits", "--dry-run", "--json")
        assert json.loads(behind.out) == json.loads(run(*DRY, "--stage", "2").out)

    def test_bench(self):
        def parsed(*words):
            return GROUP.commands["bench"].make_context("bench", list(words)).params

        words = ("a.onnx", "--batch", "1", "8", "--engine", "eager", "compile", "--threads", "2")
        params = parsed(*words)
        assert params["targets"] == ["a.onnx"]
        assert params["batch"] == ["1", "8"]
        assert params["engine"] == ["eager", "compile"]
        assert params["threads"] == 2
        apart = "a.onnx --batch 1 --batch 8 --engine eager --engine compile --threads 2"
        assert params == parsed(*apart.split())
        targets = parsed("--batch", "1", "8", "a.onnx", "b.onnx", "--engine", "eager")["targets"]
        assert targets == ["a.onnx", "b.onnx"]

    def test_a_dash_dash_ends_all_lists(self, run, folder):
        assert run("sites", "--", "--json").code == 2  # the name of a model now


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class TestInsert:
    def test_the_default_output(self, run, folder):
        assert run(*DIGITS, "--stage", "2").code == 0
        assert list(contents(folder)) == ["digits_se.safetensors"]
        assert run("insert", "digits_se.safetensors", "--block", "gc", "--stage", "2").code == 0
        assert list(contents(folder)) == ["digits_se.safetensors", "digits_se_gc.safetensors"]

    def test_the_same_command_gives_the_same_bytes(self, run, folder):
        def inserted(*seed):
            words = (*DIGITS, "--stage", "2", "-o", "x.safetensors", "--force", *seed)
            assert run(*words).code == 0
            return sha256("x.safetensors")

        words = [*DIGITS, "--stage", "2", "-o", "elsewhere.safetensors"]
        subprocess.run([SCRIPT, *words], capture_output=True, check=True)
        torch.rand(1)  # whatever else draws random numbers
        assert inserted("--seed", "0") == sha256("elsewhere.safetensors")
        first = load_file("x.safetensors")
        assert inserted("--seed", "1") != sha256("elsewhere.safetensors")
        other = load_file("x.safetensors")
        differing = {key for key, tensor in first.items() if not torch.equal(tensor, other[key])}
        assert differing == {key for key in first if key.endswith(RANDOM)}

    def test_a_dry_run_foretells_and_writes_nothing(self, run, folder):
        told = json.loads(run(*DRY, "--stage", "2").out)
        assert contents(folder) == {}
        assert told["output"] is told["identity"] is told["liveness"] is None
        done = json.loads(run(*DIGITS, "--stage", "2", "--json").out)
        for key in ("model", "block", "placement", "sites", "parameters", "tensors", "skipped"):
            assert told[key] == done[key]
        assert all(site["macs"] > 0 for site in told["sites"])

    def test_a_dry_run_minds_no_existing_output(self, run, folder):
        (folder / "digits_se.safetensors").write_bytes(b"precious")
        assert run(*DRY).code == 0

    def test_force_replaces(self, run, folder):
        (folder / "digits_se.safetensors").write_bytes(b"old")
        assert run(*DIGITS, "--stage", "2", "--force").code == 0
        assert read_recipe("digits_se.safetensors").cuts

    def test_chained_in_other_stages_and_at_one_site(self, run, folder):
        steps = [
            ("se", "digits", "2"),
            ("gc", "a.safetensors", "3"),
            ("cbam", "b.safetensors", "2"),
        ]
        for (block, model, stage), output in zip(steps, "abc", strict=True):
            args = ("--block", block, "--stage", stage, "-o", f"{output}.safetensors", "--json")
            outcome = run("insert", model, *args)
            assert outcome.code == 0, outcome.err
        done = json.loads(outcome.out)
        tensors = load_file("c.safetensors")
        assert done["tensors"]["original"] == done["tensors"]["kept"]
        assert all(torch.equal(tensors[k], t) for k, t in load_file("b.safetensors").items())
        cuts = read_recipe("c.safetensors").cuts
        assert list(dict.fromkeys(cut.block for cut in cuts)) == ["se", "gc", "cbam"]
        paths = [[cut.path for cut in cuts if cut.block == block] for block in ("se", "cbam")]
        assert paths[0] == paths[1]
        assert len({cut.child for cut in cuts}) == len(cuts)
        assert run("verify", "c.safetensors").code == 0

    @pytest.mark.parametrize("name", ["x.onnx", "X.PT", "X.SAFETENSORS"])
    def test_other_formats_at_once(self, run, folder, name):
        outcome = run(*DIGITS, "--stage", "2", "-o", name, "--json")
        assert outcome.code == 0, outcome.err
        assert json.loads(outcome.out)["output"] == name
        assert list(contents(folder)) == [name]
        if name == "x.onnx":
            import onnx

            held = {entry.key for entry in onnx.load(name).metadata_props}
            assert held >= {"attnsurgeon", "classes", "mean", "std"}
        elif name == "X.SAFETENSORS":
            assert run("verify", name).code == 0
        else:
            assert "TorchScript is deprecated" in outcome.err

    def test_arguments_of_the_builder_are_typed(self, run, folder):
        args = ("--weights", "none", "--num-classes", "7", "--model-arg", "width_mult=0.5")
        assert run("insert", "mobilenet_v2", "--block", "se", "--stage", "2", *args).code == 0
        host = read_recipe("mobilenet_v2_se.safetensors").host
        assert host.arguments == {"width_mult": 0.5, "num_classes": 7}
        assert host.weights is host.categories is None
        network = attnsurgeon.load_model("mobilenet_v2_se.safetensors")
        assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 7)

    def test_the_resnet_of_the_first_example(self, run, operated_file):
        network = attnsurgeon.load_model(operated_file)
        assert len(cuts_of(network)) == 8
        done = json.loads(run("verify", operated_file, "--json").out)
        assert done["tensors"] == {"original": 122, "matching": 122}


class TestTerminal:
    def test_no_escape_codes_into_a_file(self, run, digits_file):
        for args in (("sites", "digits"), ("verify", digits_file), ("insert", "nothing")):
            outcome = run(*args)
            assert outcome.err
            assert ESCAPE not in outcome.out + outcome.err

    @pytest.mark.parametrize(("no_color", "coloured"), [(None, True), ("1", False)])
    def test_colour_on_a_terminal_but_for_no_color(self, monkeypatch, no_color, coloured):
        monkeypatch.setenv("TERM", "xterm-256color")
        if no_color is not None:
            monkeypatch.setenv("NO_COLOR", no_color)
        master, slave = pty.openpty()
        with open(slave, "w") as terminal:  # noqa: PTH123 (no path)
            monkeypatch.setattr("sys.stdout", terminal)
            monkeypatch.setattr("sys.stderr", terminal)
            shell.complain("something [to put] right :smile:")
            shell.say(Text("result", "bold red"))
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while part := os.read(master, 1000):
                shown += part
        os.close(master)
        shown = shown.decode()
        assert (ESCAPE in shown) is coloured
        assert "something [to put] right :smile:" in shown  # no markup of ours
        assert "result" in shown

    def test_one_line_however_long(self, run):
        outcome = run("insert", "digits", "--block", "x" * 500)
        assert outcome.error.count("x" * 500) == 1

    def test_a_terminal_without_these_characters_shows_their_codes(self, monkeypatch):
        page, before = io.BytesIO(), gc.get_threshold()
        monkeypatch.setattr("signal.signal", lambda number, action: None)
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(page, "ascii"))
        monkeypatch.setattr("sys.argv", ["attnsurgeon", "blocks"])
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            gc.set_threshold(*before)
        assert ended.value.code == 0
        assert b"2C\\xb2/r" in page.getvalue()


class TestExitCodes:
    @pytest.mark.parametrize(
        ("error", "code"), [("IdentityBroken", 3), ("ExportDiffers", 4), ("BadOption", 2)]
    )
    def test_of_our_own_errors(self, run, folder, monkeypatch, error, code):
        def fail(*args):
            raise getattr(attnsurgeon.errors, error)("what\n  happened")

        monkeypatch.setattr("attnsurgeon.job.run_insert", fail)
        outcome = run(*DIGITS)
        assert (outcome.code, outcome.out, outcome.err) == (code, "", "error: what happened\n")

    def test_a_bug_keeps_its_traceback(self, folder):
        code = (
            "import sys, types\n"
            "def bug(*args): raise ValueError('planted')\n"
            "planted = types.SimpleNamespace(models_to_json=bug, show_models=bug)\n"
            "sys.modules['attnsurgeon.report.models'] = planted  # and torch is not waited for\n"
            "sys.argv = ['attnsurgeon', 'models', 'resnet18']\n"
            "from attnsurgeon.cli import main; main()\n"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("Traceback (most recent call last)")
        assert done.stderr.endswith("ValueError: planted\n")
