"""Pretrained weights: torchvision's own way of fetching them, over real HTTP on this machine."""

import functools
import hashlib
import http.server
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchvision.models import MobileNet_V3_Large_Weights, ResNet18_Weights, resnet18

from attnsurgeon.store import read_recipe
from tests.conftest import contents

ENTRY = ResNet18_Weights.IMAGENET1K_V1
INSERT = ("insert", "resnet18", "--block", "se", "--stage", "4")
REMEDY = ("ResNet18_Weights.IMAGENET1K_V1", "--weights none", "--checkpoint FILE")


@pytest.fixture(scope="module")
def weights():
    """Return the state dict of a resnet18 that nobody else has."""
    torch.manual_seed(7)
    return resnet18(weights=None).state_dict()


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory):
    """Return a file of them."""
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(weights, file)
    return file


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, counts what is asked for, and can hang up in the middle."""

    asked: list = []
    hangs_up = False

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[: len(content) // 2] if self.hangs_up else content)

    def log_message(self, *args):
        """Keep stderr to the command under test."""


@pytest.fixture
def served(tmp_path):
    """Return a folder, its address and the handler of a server on the loopback interface."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = type("Fresh", (Handler,), {"asked": []})
    make = functools.partial(handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), make) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


@pytest.fixture
def published(served, monkeypatch, tmp_path):
    """Return a function that publishes a file as torchvision's weights; nothing is cached yet."""
    folder, address, _ = served
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)

    def publish(content, checksum=None):
        checksum = checksum or hashlib.sha256(content).hexdigest()[:8]
        (folder / f"resnet18-{checksum}.pth").write_bytes(content)
        monkeypatch.setattr(ENTRY.value, "url", f"{address}/resnet18-{checksum}.pth")

    return publish


def cached():
    """Return the names of the files in torch's cache."""
    return [name for name in contents(Path(os.environ["TORCH_HOME"])) if "." in name]


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_FBGEMM_V1"])
def test_quantized_ones_are_refused_before_they_are_fetched(run, refused, weights):
    args = ("insert", "quantized_resnet18", "--block", "se", "--dry-run", "--weights", weights)
    says = ["IMAGENET1K_FBGEMM_V1 of quantized_resnet18", "take resnet18", "--checkpoint FILE"]
    refused(*args, says=says, at_once=True)
    assert run("sites", "quantized_resnet18").code == 0


class TestFetched:
    @pytest.mark.parametrize(
        "flag", [(), ("--weights", "IMAGENET1K_V1"), ("--weights", str(ENTRY))]
    )
    def test_exactly_these_tensors_with_their_meaning(
        self, run, published, checkpoint, weights, flag
    ):
        published(checkpoint.read_bytes())
        outcome = run(*INSERT, *flag, "--json")
        assert outcome.code == 0, outcome.err
        written = load_file("resnet18_se.safetensors")
        assert all(torch.equal(written[key], tensor) for key, tensor in weights.items())
        host = read_recipe("resnet18_se.safetensors").host
        assert host.weights == "ResNet18_Weights.IMAGENET1K_V1"
        assert host.categories == tuple(ENTRY.meta["categories"])
        assert host.mean == tuple(ENTRY.transforms().mean)
        assert host.std == tuple(ENTRY.transforms().std)
        assert json.loads(outcome.out)["identity"]["exact"]  # stdout is JSON and nothing else
        assert "100" in outcome.err  # the progress bar
        assert "%" in outcome.err

    def test_only_once(self, run, published, served, checkpoint):
        published(checkpoint.read_bytes())
        for output in ("a.safetensors", "b.safetensors"):
            assert run(*INSERT, "-o", output).code == 0
        assert len(served[2].asked) == 1
        assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()

    def test_from_a_file_url(self, run, published, checkpoint, weights, monkeypatch, tmp_path):
        checksum = hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:8]
        file = tmp_path / f"resnet18-{checksum}.pth"
        file.hardlink_to(checkpoint)
        monkeypatch.setattr(ENTRY.value, "url", file.as_uri())
        assert run(*INSERT).code == 0
        written = load_file("resnet18_se.safetensors")
        assert all(torch.equal(written[key], tensor) for key, tensor in weights.items())

    def test_the_environment_is_given_back(self, run, published, checkpoint, monkeypatch):
        published(checkpoint.read_bytes())
        monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
        before = dict(os.environ)
        assert run(*INSERT).code == 0
        assert dict(os.environ) == before


class TestNotFetched:
    """Refused with what to type next, never a random network instead, and nothing kept."""

    def refused(self, run, *args):
        outcome = run(*INSERT, *args)
        assert (outcome.code, outcome.out) == (2, "")
        last = outcome.err.splitlines()[-1]
        assert last.startswith("error: ")
        assert outcome.err.count("error: ") == 1
        assert "Traceback" not in outcome.err
        assert contents(Path.cwd()) == {}
        return last

    def refused_with_remedy(self, run, reason):
        error = self.refused(run)
        assert all(text in error for text in (*REMEDY, reason)), error

    def test_a_page_that_is_not_there(self, run, published, served, monkeypatch):
        monkeypatch.setattr(ENTRY.value, "url", f"{served[1]}/resnet18-00000000.pth")
        self.refused_with_remedy(run, "404")

    @pytest.mark.parametrize(
        ("host", "reason"), [("127.0.0.1:9", "refused"), ("nowhere.invalid", "")]
    )
    def test_no_network(self, run, published, monkeypatch, host, reason):
        monkeypatch.setattr(ENTRY.value, "url", f"http://{host}/resnet18-00000000.pth")
        self.refused_with_remedy(run, reason)
        assert cached() == []

    def test_is_not_blamed_on_the_arguments(self, run, published, served, monkeypatch):
        monkeypatch.setattr(ENTRY.value, "url", f"{served[1]}/resnet18-00000000.pth")
        error = self.refused(run, "--model-arg", "norm_layer=null")
        assert all(text in error for text in (*REMEDY, "404")), error

    def test_a_wrong_checksum(self, run, published, checkpoint):
        published(checkpoint.read_bytes(), checksum="deadbeef")
        self.refused_with_remedy(run, "deadbeef")
        assert cached() == []

    def test_a_page_of_somebody_else(self, run, published):
        published(b"<!DOCTYPE html><html>Please log in</html>", checksum="deadbeef")
        self.refused_with_remedy(run, "deadbeef")

    def test_a_connection_that_breaks_off(self, run, published, served, checkpoint):
        served[2].hangs_up = True
        published(checkpoint.read_bytes())
        self.refused_with_remedy(run, "")
        assert cached() == []

    def test_a_file_that_was_truncated_before(self, run, published, checkpoint):
        published(checkpoint.read_bytes()[:1_000_000])  # its own checksum: it is what was published
        self.refused_with_remedy(run, "PytorchStreamReader failed")

    def test_a_file_that_would_run_code(self, run, published, tmp_path):
        torch.save({"fc.weight": Code()}, tmp_path / "code.pth")
        published((tmp_path / "code.pth").read_bytes())
        self.refused_with_remedy(run, "would run code")
        assert not Path("ran").exists()

    @pytest.mark.parametrize("held", [{"fc.weight": torch.zeros(3)}, [torch.zeros(3)]])
    def test_a_file_of_something_else(self, run, published, tmp_path, held):
        torch.save(held, tmp_path / "other.pth")
        published((tmp_path / "other.pth").read_bytes())
        self.refused_with_remedy(run, "")

    @pytest.mark.parametrize(
        ("args", "says"),
        [
            (("--num-classes", "10"), ["num_classes=10", "--checkpoint FILE", "--weights none"]),
            (("--model-arg", "replace_stride_with_dilation=3"), ["replace_stride_with_dilation=3"]),
            (("--model-arg", "wide=3"), ["wide=3"]),
        ],
    )
    def test_arguments_that_do_not_fit_are_not_the_networks_fault(
        self, run, published, checkpoint, args, says
    ):
        published(checkpoint.read_bytes())
        error = self.refused(run, *args)
        assert all(text in error for text in ("cannot be built", *says)), error

    def test_nothing_is_fetched_with_weights_none(self, run, published, served, monkeypatch):
        monkeypatch.setattr(ENTRY.value, "url", f"{served[1]}/resnet18-00000000.pth")
        for args in ((), ("--dry-run",)):
            assert run(*INSERT, "--weights", "none", *args).code == 0
        assert run(*INSERT, "--dry-run", "-o", "x.safetensors").code == 0
        assert run("sites", "resnet18").code == 0
        assert served[2].asked == []
        assert read_recipe("resnet18_se.safetensors").host.weights is None

    def test_nothing_is_fetched_for_a_part_either(self, run, published, served, monkeypatch):
        entry = MobileNet_V3_Large_Weights.IMAGENET1K_V1
        monkeypatch.setattr(entry.value, "url", f"{served[1]}/mobilenet_v3-00000000.pth")
        assert run("sites", "deeplabv3_mobilenet_v3_large").code == 0
        assert served[2].asked == []


class Code:
    """Pickled, this is an order to make a folder."""

    def __reduce__(self):
        return os.mkdir, ("ran",)
