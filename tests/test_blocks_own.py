"""Attention from a file, a package and timm: found by name, checked, never run unasked."""

import copy
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm.layers
import torch

import attnsurgeon
from attnsurgeon import blocks
from attnsurgeon.blocks import own
from attnsurgeon.blocks.block import Place
from attnsurgeon.blocks.timm_attention import NAMES
from attnsurgeon.errors import BadFile, BadOption, MissingPackage, UnknownName
from attnsurgeon.export.torchscript import make_torchscript
from attnsurgeon.gate import named_gates
from attnsurgeon.verify import verify_unchanged
from tests import hosts
from tests.conftest import contents, run_command

ROOT = Path(__file__).parent.parent
NULL_BYTES = "SyntaxError" if sys.version_info >= (3, 11, 4) else "ValueError"
"""What Python itself makes of a file with null bytes."""
EXAMPLE = ROOT / "examples" / "contrast_attention"
CONTRAST = f"{EXAMPLE}/contrast_attention.py:ContrastAttention"
MINE = """
import torch
from torch import nn
from attnsurgeon.blocks import AttentionBlock
from attnsurgeon.gate import Gate

class Mine(AttentionBlock):
    def __init__(self, channels, *, sharpness=1.0, bias=True):
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 1, bias=bias)
        self.sharpness = sharpness
        self.gate = Gate()

    def forward(self, x):
        return x * self.gate(torch.sigmoid(self.sharpness * self.conv(x)), x)

class Plain(nn.Module):
    def __init__(self, channels):
        super().__init__()

class Needy(Mine):
    def __init__(self, channels, heads):
        super().__init__(channels)

class Misplaced(Mine):
    placements = ("everywhere",)

class Sideways(Mine):
    layouts = ("CNHW",)

class Foreign(Mine):
    def __init__(self, channels, *, size: "NoSuchType" = 1):
        super().__init__(channels)

class Shrinking(Mine):
    def forward(self, x):
        return super().forward(x)[:, :, ::2]

class Listing(Mine):
    def forward(self, x):
        return [x]

class Failing(Mine):
    def forward(self, x):
        return x.view(3, 5, 7)

class Unbuilt(Mine):
    def __init__(self, channels):
        raise ValueError("not today")

class Leaving(Mine):
    def __init__(self, channels):
        raise SystemExit(0)

class LeavingLate(Mine):
    def forward(self, x):
        raise SystemExit(0)

class Gateless(AttentionBlock):
    def __init__(self, channels):
        super().__init__()

    def forward(self, x):
        return x

def factory(channels):
    return Mine(channels)
"""
FEATURES = torch.randn(2, 32, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mine(folder, monkeypatch):
    """Return a folder, the current one, with mine.py; what is learnt is forgotten afterwards."""
    monkeypatch.setattr(own, "_from_files", {})
    (folder / "mine.py").write_text(MINE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def mine_in_digits(tmp_path_factory):
    """Return a file of digits with mine.py:Mine, which is learnt no more."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text(MINE, encoding="utf-8")
    file = folder / "x.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "_from_files", {})
        done = run_command("insert", "digits", "--block", f"{folder}/mine.py:Mine", "-o", file)
    assert done.code == 0, done.err
    return file


def opened(model, value=1.0):
    with torch.no_grad():
        for gate in named_gates(model).values():
            gate.fill_(value)
    return model


class TestFile:
    """path/to/file.py:Class, through the command line and as a library."""

    def test_from_insert_to_verify(self, run, mine):
        done = run("insert", "digits", "--block", "mine.py:Mine", "--set", "sharpness=2.5")
        assert done.code == 0, done.err
        assert [path for path in contents(mine) if "mine" in path] == [
            "digits_mine.safetensors",
            "mine.py",
        ]
        assert run("verify", "digits_mine.safetensors").code == 0
        loaded = attnsurgeon.load_model("digits_mine.safetensors")
        cut = loaded.__dict__["_attnsurgeon_cuts"][0]
        assert (cut.block, cut.options) == ("mine.py:Mine", {"sharpness": 2.5})
        assert loaded.get_submodule(cut.child).sharpness == 2.5

    def test_loading_runs_no_code(self, run, mine, mine_in_digits):
        """Not even the code of a file that lies where it lay."""
        (mine / "mine.py").write_text("raise SystemExit('it was run')", encoding="utf-8")
        for command in ("verify", "sites"):
            outcome = run(command, mine_in_digits)
            assert outcome.code == 2
            assert "--own-block path/to/mine.py:Mine" in outcome.error
            assert "no file is run" in outcome.error
        with pytest.raises(BadFile, match=r"attnsurgeon\.blocks\.learn"):
            attnsurgeon.load_model(mine_in_digits)

    def test_naming_it_again_loads_it(self, run, mine, mine_in_digits):
        (mine / "elsewhere").mkdir()
        (mine / "mine.py").rename(mine / "elsewhere" / "mine.py")
        again = ("--own-block", "elsewhere/mine.py:Mine")
        assert run(*again, "verify", mine_in_digits).code == 0
        more = run(*again, "insert", mine_in_digits, "--block", "gc", "-o", "y.safetensors")
        assert more.code == 0, more.err

    def test_another_class_of_that_name_does_not_fit(self, run, mine, mine_in_digits):
        wider = MINE.replace("nn.Conv2d(channels, 1, 1", "nn.Conv2d(channels, 2, 1")
        (mine / "mine.py").write_text(wider, encoding="utf-8")
        outcome = run("--own-block", "mine.py:Mine", "verify", mine_in_digits)
        assert outcome.code == 2
        assert "shape" in outcome.error

    def test_it_is_a_citizen(self, mine):
        host = hosts.host("resnet18")
        example = torch.zeros(1, 3, 64, 64)
        operated = attnsurgeon.insert_attention(
            host, "mine.py:Mine", at="layer4.*", example=example, bias="false"
        )
        x = hosts.image()
        assert verify_unchanged(host, operated, x).exact
        opened(operated)
        assert not torch.equal(operated(x), host(x))
        for twin in (copy.deepcopy(operated), pickle.loads(pickle.dumps(operated))):
            assert torch.equal(twin(x), operated(x))
        assert torch.equal(make_torchscript(operated, (x,))(x), operated(x))

    def test_a_file_is_run_once_and_anew_when_it_changed(self, mine):
        file = mine / "counting.py"
        ran = mine / "ran"
        count = f"with open({str(ran)!r}, 'a') as f: f.write('x')"
        file.write_text(f"{count}\n{MINE}", encoding="utf-8")
        assert blocks.learn(f"{file}:Mine") == blocks.learn("counting.py:Mine")
        assert ran.read_text() == "x"
        file.write_text(file.read_text().replace("sharpness=1.0", "sharpness=3.0"))
        assert blocks.get(blocks.learn("counting.py:Mine"))(8).sharpness == 3.0
        assert ran.read_text() == "xx"

    def test_a_plan_finds_what_was_named_before(self, run, mine):
        (mine / "mine.py").rename(mine / "moved.py")
        (mine / "away").mkdir()
        (mine / "moved.py").rename(mine / "away" / "mine.py")
        name = ("--own-block", "away/mine.py:Mine")
        words = ("insert", "digits", "--dry-run", "--json")
        planned = run(*words, "--block", "away/mine.py:Mine")
        (mine / "plan.json").write_text(planned.out, encoding="utf-8")
        done = run(*name, "insert", "digits", "--plan", "plan.json", "-o", "x.safetensors")
        assert done.code == 0, done.err
        own._from_files.clear()
        assert "there is no file 'mine.py'" in run("insert", "digits", "--plan", "plan.json").error

    def test_options_without_annotations_are_read_like_their_defaults(self, mine):
        name = blocks.learn("mine.py:Mine")
        assert blocks.option_types(name) == {"sharpness": float, "bias": bool}
        assert blocks.check_options(name, {"sharpness": "1/2"}) == {"sharpness": 0.5}

    def test_it_is_not_among_the_published(self, mine):
        before = blocks.names()
        blocks.learn("mine.py:Mine")
        assert blocks.names() == before

    @pytest.mark.parametrize(
        ("block", "says"),
        [
            ("nowhere.py:Mine", ["there is no file 'nowhere.py'"]),
            ("folder.py:Mine", ["cannot read 'folder.py'", "directory"]),
            (".py:Mine", ["'.py'"]),
            ("mine.py:Mime", ["class of mine.py", "'Mime'", "did you mean 'Mine'"]),
            ("mine.py:", ["class of mine.py", "''"]),
            ("mine.py:Plain", ["mine.py:Plain is no attention", "AttentionBlock"]),
            ("mine.py:factory", ["is no attention"]),
            ("mine.py:torch", ["is no attention"]),
            ("mine.py:AttentionBlock", ["is no attention"]),
            ("mine.py:Needy", ["mine.py:Needy", "heads"]),
            ("mine.py:Misplaced", ["placements", "post"]),
            ("mine.py:Sideways", ["layouts", "NCHW"]),
            ("mine.py:Foreign", ["mine.py:Foreign", "NoSuchType"]),
            ("mine.py:Shrinking", ["mine.py:Shrinking", "makes (2, "]),
            ("mine.py:Listing", ["mine.py:Listing", "makes list"]),
            ("mine.py:Unbuilt", ["mine.py:Unbuilt", "cannot be built", "ValueError: not today"]),
            ("mine.py:Leaving", ["mine.py:Leaving", "cannot be built", "SystemExit: 0"]),
            ("mine.py:LeavingLate", ["mine.py:LeavingLate", "SystemExit: 0"]),
            ("mine.py:Gateless", ["mine.py:Gateless has no gate", "Gate()"]),
            ("mine.py:Failing", ["mine.py:Failing", "RuntimeError", "[3, 5, 7]"]),
        ],
    )
    def test_a_bad_one_is_refused(self, refused, mine, block, says):
        (mine / "folder.py").mkdir()
        refused("insert", "digits", "--block", block, says=says)

    @pytest.mark.parametrize(
        ("source", "says"),
        [
            ("1 / 0", "ZeroDivisionError: division by zero"),
            ("def (:", "SyntaxError"),
            ("raise SystemExit(3)", "SystemExit: 3"),
            ("import no_such_package", "ModuleNotFoundError"),
            ("\0", f"{NULL_BYTES}: source code string cannot contain null bytes"),
            ("raise ValueError", "ValueError"),
        ],
    )
    def test_a_file_that_cannot_be_run(self, refused, mine, source, says):
        (mine / "bad.py").write_text(source, encoding="utf-8")
        refused("insert", "digits", "--block", "bad.py:Mine", says=["'bad.py'", says])
        refused("--own-block", "bad.py:Mine", "blocks", says=["'bad.py'", says])
        assert not [name for name in sys.modules if name.startswith("own_attention_bad")]

    def test_an_option_it_does_not_have(self, refused, mine):
        says = ["option of mine.py:Mine", "'sharpness'"]
        refused("insert", "digits", "--block", "mine.py:Mine", "--set", "sharpnes=2", says=says)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("se", "se"),
        ("timm:se", "timm_se"),
        ("mine.py:MyAttention", "myattention"),
        ("a b.py:_", "attention"),
    ],
)
def test_a_name_in_the_name_of_a_file(name, label):
    assert blocks.label(name) == label


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a folder that the example package is installed in."""
    source = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "package")
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    flags = ["--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*pip, *flags, str(source)], check=True, capture_output=True)
    return target


class TestPackage:
    """The example in examples/contrast_attention, installed."""

    def test_it_is_found_by_its_entry_point(self, installed, run, folder, monkeypatch):
        words = ["insert", "digits", "--block", "contrast", "--set", "reduction=4"]
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(installed))
            done = run(*words)
        assert done.code == 0, done.err

        # without the package the file cannot be loaded, and the error says what is missing
        outcome = run("verify", "digits_contrast.safetensors")
        assert outcome.code == 2
        assert "'contrast'" in outcome.error
        assert "install the package" in outcome.error

        # with it, the name alone is enough
        monkeypatch.syspath_prepend(str(installed))
        assert run("verify", "digits_contrast.safetensors").code == 0

    def test_blocks_shows_it(self, installed, run, monkeypatch):
        assert "contrast" not in run("blocks").out
        monkeypatch.syspath_prepend(str(installed))
        outcome = run("blocks")
        assert "arXiv:1909.11856" in outcome.out
        assert outcome.err == ""
        assert "contrast" not in blocks.names()

    def test_as_a_file_it_computes_the_same(self, installed, mine, monkeypatch):
        monkeypatch.syspath_prepend(str(installed))
        torch.manual_seed(0)
        packed = opened(blocks.get("contrast")(32))
        torch.manual_seed(0)
        loose = opened(blocks.get(blocks.learn(CONTRAST))(32))
        assert torch.equal(packed(FEATURES), loose(FEATURES))
        spread = FEATURES.std((2, 3), correction=0) + FEATURES.mean((2, 3))
        hidden = torch.relu(spread @ loose.squeeze.weight.flatten(1).T + loose.squeeze.bias)
        logits = hidden @ loose.excite.weight.flatten(1).T + loose.excite.bias
        expected = FEATURES * torch.sigmoid(logits)[:, :, None, None]
        # Another order of the same sums: float32 rounding.
        torch.testing.assert_close(loose(FEATURES), expected, rtol=1e-5, atol=1e-5)
        count = sum(p.numel() for p in loose.parameters()) - 1
        assert count == 2 * 32 * 32 // 16 + 32 // 16 + 32

    @pytest.mark.parametrize(
        ("announced", "kind", "says"),
        [
            ("no_such_module:X", MissingPackage, "no_such_module"),
            ("math:NoSuch", MissingPackage, "NoSuch"),
            ("math:sqrt", BadOption, "is no attention"),
        ],
    )
    def test_a_broken_one_is_told_of(self, run, folder, monkeypatch, announced, kind, says):
        info = folder / "broken-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
        text = f"[{own.GROUP}]\nbroken = {announced}\nse = math:sqrt\n"
        (info / "entry_points.txt").write_text(text)
        monkeypatch.syspath_prepend(str(folder))
        with pytest.raises(kind, match=says):
            blocks.get("broken")
        assert blocks.get("se").title == "Squeeze-and-Excitation"
        outcome = run("blocks", "--json")
        assert outcome.code == 0
        assert f"skipped broken of {announced}" in outcome.err
        assert "skipped se of math:sqrt" in outcome.err


SETTINGS = {
    "ge": {"use_mlp": False},
    "bottleneck": {"feat_size": (16, 16)},
    "bat": {"block_size": 8},
}
"""What some layers of timm cannot be built or run without here."""


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_of_timm(name):
    block = blocks.get(f"timm:{name}")
    torch.manual_seed(0)
    attention = block.build(Place(32), **SETTINGS.get(name, {})).eval()
    assert torch.equal(attention(FEATURES), FEATURES)
    (gate,) = named_gates(attention).values()
    (gradient,) = torch.autograd.grad(attention(FEATURES).square().sum(), [gate])
    assert gradient.isfinite().all()
    assert gradient.any()
    opened(attention)
    expected = attention.layer(FEATURES)
    # x + (f(x) - x) is f(x) but for float32 rounding.
    torch.testing.assert_close(attention(FEATURES), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, FEATURES, atol=1e-3)


class TestTimm:
    def test_through_the_command_line(self, run, folder):
        words = ["--block", "timm:cbam", "--set", "rd_ratio=1/4", "spatial_kernel_size=3"]
        done = run("insert", "digits", *words)
        assert done.code == 0, done.err
        assert run("verify", "digits_timm_cbam.safetensors").code == 0

    def test_a_class_by_its_name(self):
        attention = blocks.get("timm:SqueezeExcite").build(Place(32))
        assert isinstance(attention.layer, timm.layers.SqueezeExcite)
        twin = pickle.loads(pickle.dumps(attention))
        assert torch.equal(opened(twin)(FEATURES), opened(attention)(FEATURES))

    def test_what_starts_at_zero_is_woken(self):
        block = blocks.get("timm:nl").build(Place(32))
        assert block.layer.norm.weight.eq(1).all()
        assert not timm.layers.NonLocalAttn(32).norm.weight.any()

    def test_options_are_those_of_the_layer(self):
        assert blocks.check_options(
            "timm:bottleneck", {"feat_size": "8,8", "num_heads": "2", "qkv_bias": "no"}
        ) == {"feat_size": (8, 8), "num_heads": 2, "qkv_bias": False}
        assert blocks.check_options("timm:nl", {"rd_ratio": "1/2"}) == {"rd_ratio": 0.5}
        with pytest.raises(UnknownName, match="did you mean 'rd_ratio'"):
            blocks.check_options("timm:se", {"rd_ration": "1/2"})

    @pytest.mark.parametrize(
        ("block", "says"),
        [
            ("timm:sse", ["attention layer of timm", "'sse'"]),
            ("timm:", ["attention layer of timm", "''"]),
            ("timm:create_attn", ["attention layer of timm"]),
            ("timm:bottleneck", ["timm:bottleneck", "feature size"]),
            ("timm:bat", ["timm:bat", "fails on a map of"]),
        ],
    )
    def test_a_bad_one_is_refused(self, refused, block, says):
        refused("insert", "digits", "--block", block, says=says)

    def test_without_timm(self, refused, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)
        monkeypatch.setitem(sys.modules, "timm.layers", None)
        blocks.timm_block.cache_clear()
        refused("insert", "digits", "--block", "timm:se", says=["pip install timm"])
