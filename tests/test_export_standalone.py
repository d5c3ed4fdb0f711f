"""The code that is written out stands alone: it builds the network where attnsurgeon is not."""

import runpy
import subprocess
import sys

import pytest
import torch

import attnsurgeon
from attnsurgeon.card import card_of
from attnsurgeon.errors import BadFile, ExportDiffers, ExportRefused
from attnsurgeon.export import source
from attnsurgeon.export.against import verify_export
from attnsurgeon.host import load_host
from attnsurgeon.surgery import cuts_of
from tests import exports

ALONE = """
import sys
sys.modules["attnsurgeon"] = None  # an import of it fails
import torch, model
net = model.load("x.safetensors")
image = torch.load("image.pt")
with torch.no_grad():
    torch.save(net(image), "found.pt")
"""


@pytest.fixture(scope="module")
def operated():
    """Return every block, at places that need a trace and at one that does not, gates open."""
    torch.manual_seed(0)
    model = load_host("resnet18", weights="none", num_classes=10)
    example = torch.zeros(1, 3, 64, 64)
    for block, placement, at in (
        ("cbam", "standard", "layer1.*"),
        ("gc", "post", "layer1.0"),
        ("sk", "replace", "layer2.1"),
        ("se", "conv", "layer3.0"),
    ):
        model = attnsurgeon.insert_attention(
            model, block, placement=placement, at=at, example=example
        )
    for i, gate in enumerate(attnsurgeon.gates(model).values()):
        gate.data.fill_(0.3 + 0.1 * i)
    return model


def test_it_runs_where_attnsurgeon_cannot_be_imported(operated, tmp_path):
    artifact = attnsurgeon.export_model(operated, tmp_path / "model.py", input_size=(64, 64))
    assert artifact.format == "python"
    assert any("no weights" in notice for notice in artifact.notices)
    assert all(check.max_abs == 0 for check in artifact.checks)
    attnsurgeon.save_model(operated, tmp_path / "x.safetensors")
    image = torch.randn(2, 3, 80, 64)
    torch.save(image, tmp_path / "image.pt")
    subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "found.pt"), operated(image))
    text = (tmp_path / "model.py").read_text()
    assert "import attnsurgeon" not in text
    assert "from attnsurgeon" not in text
    _check_later(operated, tmp_path / "model.py", text)


def _check_later(operated, path, text):
    """Hold the file against the model again, as it is and with attention that is half as strong."""
    assert all(check.max_abs == 0 for check in verify_export(path, operated).checks)
    path.write_text(text.replace("self.attention_conv(", "self.attention_conv(0.5 * "))
    with pytest.raises(ExportDiffers, match="differs from the model"):
        verify_export(path, operated)
    path.write_text("nothing = 0")
    with pytest.raises(BadFile, match="model.py cannot be run"):
        verify_export(path, operated)


def test_attention_in_the_wrong_place_is_caught(operated, tmp_path, monkeypatch):
    written = source._text_of
    monkeypatch.setattr(
        source,
        "_text_of",
        lambda *args: written(*args).replace("self.attention_conv(", "self.attention_conv(0.5 * "),
    )
    with pytest.raises(ExportDiffers, match="python file differs"):
        attnsurgeon.export_model(operated, tmp_path / "model.py", input_size=(64, 64))
    assert list(tmp_path.iterdir()) == []


def test_the_digits_network(tmp_path):
    model = attnsurgeon.insert_attention(load_host("digits"), "se", at="features.3")
    text = source.write_source(model, card_of(model), cuts_of(model), "x.safetensors")
    assert "get_model('mobilenet_v2'" in text
    compile(text, "model.py", "exec")


def test_code_of_your_own_is_refused(tmp_path):
    with pytest.raises(ExportRefused, match="its code is yours"):
        attnsurgeon.export_model(exports.tiny(), tmp_path / "model.py")


@pytest.mark.parametrize("setting", [{"opset": 18}, {"optimize": True}, {"exporter": "dynamo"}])
def test_settings_of_another_format(operated, tmp_path, setting):
    with pytest.raises(ExportRefused, match=r"\.py file"):
        attnsurgeon.export_model(operated, tmp_path / "model.py", **setting)


@pytest.mark.parametrize("block", attnsurgeon.blocks.names())
def test_every_block_is_written_out(block, tmp_path):
    torch.manual_seed(0)
    host = load_host("resnet18", weights="none")
    placement = attnsurgeon.blocks.get(block).placements[0]
    example = torch.zeros(1, 3, 64, 64)
    operated = attnsurgeon.insert_attention(
        host, block, at="layer2.1", placement=placement, example=example
    )
    for gate in attnsurgeon.gates(operated).values():
        gate.data.fill_(0.5)
    text = source.write_source(operated, card_of(host), cuts_of(operated), "x.safetensors")
    (tmp_path / "model.py").write_text(text, encoding="utf-8")
    alone = runpy.run_path(str(tmp_path / "model.py"))["build"]()
    alone.load_state_dict(operated.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(alone.eval()(image), operated(image))
        assert not torch.equal(operated(image), host(image))


def test_a_block_of_your_own_is_refused(operated, monkeypatch):
    monkeypatch.setattr(source.inspect, "getmodule", lambda kind: exports)
    with pytest.raises(ExportRefused, match=r"the code of cbam is not of this package"):
        source.write_source(
            operated, card_of(load_host("resnet18", weights="none")), cuts_of(operated), "x"
        )
