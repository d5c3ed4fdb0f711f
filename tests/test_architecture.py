"""The architecture is a test: imports only go down, lists are kept once, words stay out."""

import ast
import re
from pathlib import Path

import pytest

import attnsurgeon

PACKAGE = Path(attnsurgeon.__file__).parent
ROOT = PACKAGE.parent

FLOORS = [
    {"errors", "digits"},
    {"arguments", "answers", "noted"},
    {"registry", "gate", "borrow", "outputs", "schema", "tracks", "observation", "walks"},
    {"blocks"},
    {"anatomy", "card", "network", "cost", "trial", "unwrapping", "watch"},
    {"tracing"},
    {"splicing"},
    {"observe", "wiring", "checkpoint", "probes"},
    {"builder", "spots", "liveness", "example", "inputs"},
    {"site"},
    {"sites"},
    {"sources", "selection"},
    {"plan"},
    {"host", "steps", "surgery", "verify"},
    {"origin", "survey"},
    {"operation"},
    {"recipe"},
    {"training"},
    {"store"},
    {"export"},
    {"bench", "inspection", "insertion", "removal", "opening"},
    {"job"},
    {"demo"},
    {"report"},
    {"cli"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py"))


def part_of(path):
    """Return the floor's name that a file belongs to: a file or a folder of the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("attnsurgeon"):
            names = node.module.split(".")[1:]
            yield from [names[0]] if names else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("attnsurgeon.")
            ]


def climbing_imports(files):
    for path in files:
        own = part_of(path)
        for part in imported_parts(path):
            if part in FLOOR and part != own and FLOOR[part] >= FLOOR[own]:
                yield f"{path.relative_to(PACKAGE)} imports {part}"


def test_imports_only_go_down():
    files = [path for path in modules() if path.name != "__init__.py" or path.parent != PACKAGE]
    assert list(climbing_imports(files)) == []


def test_the_floor_test_has_teeth(tmp_path, monkeypatch):
    climber = tmp_path / "gate.py"
    climber.write_text("from attnsurgeon.surgery import apply_plan\n")
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    assert list(climbing_imports([climber])) == ["gate.py imports surgery"]


def test_every_part_has_a_floor():
    parts = {part_of(path) for path in modules()} - {"__init__"}
    assert parts == set(FLOOR)


def test_only_the_shell_and_the_reports_know_rich():
    users = {
        part_of(path)
        for path in modules()
        if re.search(r"^\s*(from|import) (rich|typer)", path.read_text(encoding="utf-8"), re.M)
    }
    assert users <= {"report", "cli"}


def test_only_one_file_makes_torchscript():
    users = [
        path.relative_to(PACKAGE).as_posix()
        for path in modules()
        if re.search(r"torch\.jit\.(script|trace|save|load|freeze)\b", path.read_text("utf-8"))
    ]
    # The first only watches a network while it is traced, the last reads files elsewhere.
    assert users == ["export/decisions.py", "export/torchscript.py", "export/worker.py"]


def test_no_file_outgrows_its_reader():
    long = {p.name: n for p in modules() if (n := len(p.read_text("utf-8").splitlines())) > 400}
    assert long == {}


@pytest.mark.parametrize("name", attnsurgeon.__all__)
def test_public_names_exist_and_are_documented(name):
    thing = getattr(attnsurgeon, name)
    assert name == "__version__" or thing.__doc__


def test_no_other_public_name():
    with pytest.raises(AttributeError, match="no attribute 'insert'"):
        attnsurgeon.insert  # noqa: B018


def test_the_error_tree_in_the_docstring_is_the_tree():
    from attnsurgeon import errors

    drawn = set(re.findall(r"[├└]── (\w+)", errors.__doc__))
    assert drawn == {kind.__name__ for kind in errors.AttnSurgeonError.__subclasses__()}
