"""What the README shows is run, and its lists are held against their source."""

import re
import shlex
from pathlib import Path

import pytest

import attnsurgeon
from attnsurgeon.sites import PLACEMENTS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGE = Path(attnsurgeon.__file__).parent


def fenced(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_python_examples_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    for code in fenced("python"):
        exec(compile(code, "README.md", "exec"), scope)
    assert scope["bare"]


def test_commands_run_in_order(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^\$ attnsurgeon (.*)$", "".join(fenced("console")), re.M)
    assert len(commands) >= 6
    for command in commands:
        done = run(*shlex.split(command))
        assert done.code == 0, (command, done.err)


def test_other_commands_are_understood(tmp_path, monkeypatch, run):
    """Those that need weights or images from afar are stopped by nothing but their absence."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nowhere"))
    lines = re.findall(r"^attnsurgeon (.*)$", "".join(fenced("text")), re.M)
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line, comments=True)
        done = run(*words)
        understood = ("could not be fetched", "there is no file", "there is no folder 'photos'")
        assert done.code == 0 or any(text in done.err for text in understood), (line, done.err)


def test_the_two_commands_open_it():
    first, second = fenced("console")[:2]
    assert first.strip() == "$ pip install . && attnsurgeon demo"
    assert second.strip() == '$ pip install -e ".[dev]" && pytest'
    assert README.index("terminal.svg") < README.index(first)


def test_the_map_is_the_package():
    mapped = re.findall(r"^\| `([\w/.]+)` \|", README.partition("## Map of the package")[2], re.M)
    real = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    real |= {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert set(mapped) == real


def test_every_placement_is_explained():
    explained = re.findall(r"^\| `(\w+)`(?: \(default\))? \| .* \| (?:22|–)", README, re.M)
    assert explained == list(PLACEMENTS)


@pytest.mark.parametrize("block", attnsurgeon.blocks.names())
def test_every_block_is_explained(block):
    assert re.search(rf"^\| `{block}` .*{attnsurgeon.blocks.get(block).paper}", README, re.M)


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_the_picture_is_an_svg():
    assert (ROOT / "examples" / "terminal.svg").read_text(encoding="utf-8").startswith("<svg")


def test_the_table_of_networks_is_what_was_observed():
    from examples.models_table import markdown_table

    assert markdown_table() in README
