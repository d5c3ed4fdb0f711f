"""examples/finetune.py for a few steps: alone, resumed, on images of a folder.

In two processes it runs with the others of tests/test_distributed.py, which are started once.
"""

import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import attnsurgeon
from examples import finetune

QUICK = ("--data", "digits", "--steps", "2", "--batch-size", "8", "--workers", "0")


@pytest.fixture
def train(folder, digits_file, monkeypatch, capsys):
    """Return a function that runs the script in this process and tells exit code and streams."""

    def call(*args):
        words = ["finetune.py", digits_file, *args]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        try:
            finetune.main()
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def photos(folder):
    for part in ("train", "val"):
        for kind in ("cat", "dog"):
            (folder / "photos" / part / kind).mkdir(parents=True)
            for i in range(4):
                picture = Image.effect_noise((50, 40), 60).convert("RGB")
                picture.save(folder / "photos" / part / kind / f"{i}.png")
    return folder / "photos"


def test_every_option(train, folder):
    options = ("--epochs", "1", "--freeze", "--anneal", "2", "--ema", "0.5", "--tensorboard")
    code, out, err = train(*QUICK, *options, "--amp", "bfloat16")
    assert code == 0, err
    assert "epoch 1/1: loss" in out
    written = sorted(path.name.partition(".out")[0] for path in (folder / "finetuned").iterdir())
    assert written == ["events", "last.pt", "trained.safetensors"]
    held = torch.load("finetuned/last.pt", weights_only=True)
    gates = {key: t.item() for key, t in held["model"].items() if key.endswith("openness")}
    assert set(gates.values()) == {1.0}
    trained = attnsurgeon.load_model("finetuned/trained.safetensors")
    averaged = {gate.item() for gate in attnsurgeon.gates(trained).values()}
    assert all(0 < value < 1 for value in averaged)
    assert attnsurgeon.remove_attention(trained).state_dict().keys() < trained.state_dict().keys()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("finetuned").Reload()
    assert {*events.Tags()["scalars"]} == {"loss", "accuracy", *(f"gates/{name}" for name in gates)}


def test_a_resumed_run_ends_where_a_straight_one_does(train):
    options = (*QUICK, "--epochs", "2", "--ema", "0.5", "--amp", "float16")
    assert train(*options, "--output", "straight")[0] == 0
    assert train(*options, "--output", "halted", "--stop-after", "1")[0] == 0
    half = load_file("halted/trained.safetensors")
    code, out, _ = train(*options, "--output", "halted", "--resume")
    assert code == 0
    assert "epoch 2/2" in out
    assert "epoch 1/2" not in out
    straight, resumed = (
        load_file(f"{name}/trained.safetensors") for name in ("straight", "halted")
    )
    assert all(torch.equal(straight[key], tensor) for key, tensor in resumed.items())
    assert not all(torch.equal(half[key], tensor) for key, tensor in resumed.items())


def test_images_of_a_folder(train, photos):
    code, out, err = train("--data", photos, "--epochs", "1", "--batch-size", "4", "--workers", "0")
    assert code == 0, err
    assert "epoch 1/1: loss" in out


class TestRefused:
    def one_line(self, done, *says):
        code, out, err = done
        assert (code, out.count("accuracy")) == (2, 0), err
        *_, last = err.splitlines()
        assert last.startswith("error: ")
        assert all(text in last for text in says), last

    def test_more_processes_than_the_data_can_fill(self, train, monkeypatch):
        monkeypatch.setattr(finetune, "start_processes", lambda: (0, 200, torch.device("cpu")))
        self.one_line(train(*QUICK), "1347 training images do not fill", "200 processes")

    def test_no_data(self, train):
        self.one_line(train("--data", "nowhere"), "--data", "nowhere")

    def test_more_classes_than_outputs(self, train, photos):
        for i in range(9):
            (photos / "train" / f"x{i}").mkdir()
            Image.new("RGB", (40, 40)).save(photos / "train" / f"x{i}" / "a.png")
        self.one_line(train("--data", photos, "--batch-size", "4"), "11 classes", "10 outputs")

    def test_an_image_that_cannot_be_read(self, train, photos):
        (photos / "train" / "cat" / "0.png").write_bytes(b"\x89PNG and no more")
        args = ("--data", photos, "--batch-size", "8", "--workers", "0")
        self.one_line(train(*args), "cat/0.png", "as an image")

    def test_nothing_to_resume(self, train):
        self.one_line(train(*QUICK, "--resume"), "there is no", "last.pt")

    def test_a_checkpoint_of_another_run(self, train, folder):
        (folder / "finetuned").mkdir()
        torch.save({"model": {}}, folder / "finetuned" / "last.pt")
        self.one_line(train(*QUICK, "--resume"), "of another run", "last.pt")

    def test_a_file_that_is_none(self, train, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["finetune.py", "none.safetensors", *QUICK])
        with pytest.raises(SystemExit, match="2"):
            finetune.main()

    def test_gates_that_were_lost(self, train):
        done = train(*QUICK, "--epochs", "1", "--attention-lr", "1e38", "--lr", "1e30")
        self.one_line(done, "became NaN or infinite at step")
