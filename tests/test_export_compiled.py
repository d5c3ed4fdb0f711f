"""A .pt2 package of machine code is proven in the shipped bytes, as every other file is."""

import copy
import io
import json
import logging
import zipfile
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor

import attnsurgeon
from attnsurgeon.bench import engines, targets
from attnsurgeon.errors import (
    BadFile,
    BadOption,
    EngineUnavailable,
    ExportDiffers,
    ExportRefused,
    MissingPackage,
)
from attnsurgeon.export import compiled, verify_export
from attnsurgeon.export.format import format_for
from attnsurgeon.recipe import Recipe
from tests import exports


def has_compiler():
    try:
        compiled.check_compiler()
    except MissingPackage:
        return False
    return True


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the one package that is compiled here, and what its export found."""
    if not has_compiler():
        pytest.skip("there is no C++ compiler")
    path = tmp_path_factory.mktemp("compiled") / "x.pt2"
    with inductor.patch("aot_inductor.compile_wrapper_opt_level", "O0"):  # sooner done
        artifact = attnsurgeon.export_model(
            exports.tiny(), path, compile=True, example=exports.EXAMPLE
        )
    return path, artifact


def rewritten(path, edit):
    """Return the bytes of a package in which `edit` made (name, bytes) of its files others."""
    memory = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(memory, "w") as new:
        for name in old.namelist():
            new.writestr(name, edit(name, old.read(name)))
    return memory.getvalue()


def shift_a_weight(name, content):
    if not name.endswith(".so"):
        return content
    weight = exports.tiny().get_parameter("stem.weight").detach()
    raw = weight.numpy().tobytes()
    assert content.count(raw) == 1
    return content.replace(raw, (1.05 * weight).numpy().tobytes())


def retold(key, change):
    """Return an edit for `rewritten` that makes one entry of the metadata another."""

    def edit(name, content):
        if not name.endswith("_metadata.json"):
            return content
        notes = json.loads(content)
        return json.dumps({**notes, key: json.dumps(change(json.loads(notes[key])))}).encode()

    return edit


cross_the_gates = retold(compiled.CONSTANTS_KEY, exports.crossed)


class TestProof:
    def test_it_computes_what_the_model_computes(self, made):
        path, artifact = made
        assert artifact.format == "aotinductor"
        assert artifact.notices[0] == compiled.NOTICE
        assert [(check.gates, check.batch) for check in artifact.checks] == [
            (gates, batch) for gates in ("closed", "open") for batch in (1, 2, 5)
        ]
        assert len({check.size for check in artifact.checks}) == 3
        assert all(check.passed for check in artifact.checks)
        assert list(path.parent.iterdir()) == [path]

    def test_every_gate_is_opened_in_the_shipped_bytes(self, made):
        path, _ = made
        image = (torch.randn(3, 3, 40, 48),)
        zeros = {name: torch.zeros(1) for name in attnsurgeon.gates(exports.tiny())}
        closed = format_for(path).open(path)(image)[0]
        for name in zeros:
            opened = format_for(path).open(path, {**zeros, name: torch.ones(1)})
            assert not torch.allclose(opened(image)[0], closed)

    def test_it_is_verified_later(self, made):
        path, _ = made
        agreement = verify_export(path, exports.tiny())
        assert agreement.format == "aotinductor"
        assert len(agreement.checks) == 6
        other = copy.deepcopy(exports.tiny())
        other.head.bias.data += 0.1
        with pytest.raises(ExportDiffers, match="6 of 6 runs"):
            verify_export(path, other)

    @pytest.mark.parametrize(
        ("edit", "gates"), [(shift_a_weight, "closed"), (cross_the_gates, "open")]
    )
    def test_a_wrong_answer_is_caught(self, made, tmp_path, monkeypatch, edit, gates):
        spoiled = rewritten(made[0], edit)
        monkeypatch.setattr(
            compiled, "compile_program", lambda p, path, *_: path.write_bytes(spoiled)
        )
        with pytest.raises(
            ExportDiffers, match=f"aotinductor file differs .* gates {gates}"
        ) as caught:
            attnsurgeon.export_model(exports.tiny(), tmp_path / "x.pt2", compile=True)
        assert caught.value.exit_code == 4
        assert list(tmp_path.iterdir()) == []

    def test_bytes_that_were_only_rewritten_pass(self, made, tmp_path, monkeypatch):
        same = rewritten(made[0], lambda name, content: content)
        monkeypatch.setattr(compiled, "compile_program", lambda p, path, *_: path.write_bytes(same))
        attnsurgeon.export_model(exports.tiny(), tmp_path / "x.pt2", compile=True)


class TestTheFile:
    def test_it_says_what_it_is(self, made):
        notes = compiled.notes_of(made[0])
        assert json.loads(notes["input_size"]) == [32, 32]
        assert notes["precision"] == "fp32"
        assert len(Recipe.loads(notes["attnsurgeon"], "x.pt2").cuts) == 3
        assert list(compiled.gates_of(notes)) == list(attnsurgeon.gates(exports.tiny()))

    def test_it_tells_nothing_of_this_machine(self, made):
        with zipfile.ZipFile(made[0]) as package:
            held = b"".join(package.read(name) for name in package.namelist())
        for folder in (Path(attnsurgeon.__file__).parent, Path(torch.__file__).parents[1]):
            assert str(folder).encode() not in held
        assert b"attnsurgeon-" not in held  # the folder that it was compiled in

    def test_threads_are_those_of_where_it_runs(self, made):
        with zipfile.ZipFile(made[0]) as package:
            code = b"".join(package.read(n) for n in package.namelist() if n.endswith(".cpp"))
        assert b"omp parallel" in code
        assert b"num_threads(" not in code

    def test_axes_that_it_fixes(self, made, tmp_path):
        def fix(inputs):
            ((axes, dtype),) = inputs.values()
            return {"x": [[2, *axes[1:]], dtype]}

        edit = retold(compiled.INPUTS_KEY, fix)
        (tmp_path / "x.pt2").write_bytes(rewritten(made[0], edit))
        assert format_for("x.pt2").open(made[0]).fixed_axes == ()
        assert format_for("x.pt2").open(tmp_path / "x.pt2").fixed_axes == ("x.batch",)

    def test_a_gate_of_several_names(self, made, tmp_path):
        """The package knows a module in two places by one of them."""
        module = torch.nn.Linear(2, 2)
        twice = torch.nn.Sequential(module, module)
        program = torch.export.export(twice, (torch.zeros(1, 2),))
        told = compiled._signature(program, {"0.bias": module.bias})
        assert compiled.gates_of(told) == {"0.bias": (["0.bias", "1.bias"], [2])}

        def add(named):
            return {name: [["elsewhere", *names], axes] for name, (names, axes) in named.items()}

        path, image = tmp_path / "x.pt2", (torch.randn(1, 3, 32, 32),)
        path.write_bytes(rewritten(made[0], retold(compiled.CONSTANTS_KEY, add)))
        gates = {name: torch.ones(1) for name in attnsurgeon.gates(exports.tiny())}
        opened = [format_for(file).open(file, gates)(image)[0] for file in (path, made[0])]
        assert torch.equal(*opened)
        with pytest.raises(BadFile, match="it has no constant other"):
            format_for(path).open(path, {"other": torch.ones(1)})


class TestBench:
    def prepare(self, path, folder, **place):
        (target,) = targets.read_targets([path])
        place = engines.Place(torch.device(place.get("device", "cpu")), 1, folder)
        inputs = (torch.randn(2, 3, 32, 32),)
        return engines.get("aotinductor").prepare(target, inputs, place), inputs

    def test_its_gates_are_open(self, made, tmp_path):
        runner, inputs = self.prepare(made[0], tmp_path)
        with torch.inference_mode():
            before = runner.call()
            assert not torch.allclose(before, exports.tiny()(*inputs))
            (model,) = targets.read_targets([exports.tiny()], exports.EXAMPLE)[1:]
            assert torch.allclose(before, model.module(*inputs), atol=1e-5)
            runner.move()
            assert torch.equal(runner.call(), before)

    def test_on_the_command_line(self, run, made):
        outcome = run("bench", made[0], "--engine", "aotinductor", "--seconds", "0.1", "--json")
        (timing,) = json.loads(outcome.out)["runs"]
        assert (timing["engine"], timing["weights"]) == ("aotinductor", "file")

    def test_another_engine(self, made):
        with pytest.raises(BadOption, match="cannot run on eager; give --engine aotinductor"):
            attnsurgeon.compare_speed([made[0]], seconds=0.1)

    def test_another_layout(self, made):
        with pytest.raises(EngineUnavailable, match="leave --channels-last out"):
            attnsurgeon.compare_speed(
                [made[0]], engines=("aotinductor",), seconds=0.1, channels_last=True
            )


def test_without_a_compiler(refused, digits_file):
    args = ("export", digits_file, "-o", "x.pt2", "--compile")
    with inductor.patch("cpp.cxx", (None, "no-such-compiler")):
        refused(*args, says=["C++ compiler", "install g++", "leave --compile out"], at_once=True)


def test_what_cannot_be_compiled(tmp_path, monkeypatch, caplog):
    def fail(*args, **options):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    monkeypatch.setattr(compiled, "check_compiler", lambda: None)
    with pytest.raises(ExportRefused, match="cannot compile the network: no such kernel; leave"):
        attnsurgeon.export_model(exports.tiny(), tmp_path / "x.pt2", compile=True)
    assert list(tmp_path.iterdir()) == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("suffix", [".onnx", ".pt", ".py"])
def test_other_formats_are_not_compiled(tmp_path, suffix):
    with pytest.raises(ExportRefused, match=f"--compile is for .pt2; a {suffix} file"):
        attnsurgeon.export_model(exports.tiny(), tmp_path / f"x{suffix}", compile=True)


def test_a_network_elsewhere():
    with pytest.raises(ExportRefused, match=r"this Linear is on meta; give model\.cpu\(\)"):
        compiled.check_device(torch.nn.Linear(2, 2, device="meta"))
