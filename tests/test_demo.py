"""The shipped network is trained, and the demo leaves what it promises."""

import json

import pytest
import torch

import attnsurgeon
from attnsurgeon import demo, digits
from attnsurgeon.borrow import borrowed_randomness
from attnsurgeon.host import load_host
from attnsurgeon.store import load_model


@pytest.fixture
def short_bench(monkeypatch):
    monkeypatch.setattr(demo, "BENCH_SECONDS", 0.3)


def test_digits_reads_real_digits():
    images, labels = digits.held_out()
    with torch.no_grad():
        right = load_host("digits")(images).argmax(1) == labels
    assert len(labels) >= 450
    assert set(labels.tolist()) == set(range(10))
    assert right.double().mean() >= 0.98
    card = digits.read_card()
    assert right.double().mean().item() == pytest.approx(card.accuracy)
    assert card.images == len(labels)


def test_the_weights_are_small():
    weights = digits.read_weights()
    assert sum(t.numel() * t.element_size() for t in weights.values()) < 2 * 2**20


def test_random_digits_read_nothing():
    images, labels = digits.held_out()
    with torch.no_grad():
        right = load_host("digits", weights="none")(images).argmax(1) == labels
    assert right.double().mean() < 0.5


def test_the_demo(tmp_path, monkeypatch, run, short_bench):
    monkeypatch.chdir(tmp_path)
    done = run("demo", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["accuracy"]["before"] == told["accuracy"]["after"] >= 0.98
    assert told["insertion"]["identity"]["exact"]
    assert [c["engine"] for c in told["comparisons"]] == ["eager", "onnxruntime"]
    assert told["comparisons"][1]["target"].endswith("digits_cbam.onnx")  # not exported again
    folder = tmp_path / "attnsurgeon-demo"
    names = {"digits_cbam.safetensors", "digits_cbam.onnx", "digits_cbam.pt", "bench.json"}
    names.add("digits_cbam_trained.safetensors")
    assert {path.name for path in folder.iterdir()} == names
    assert {tmp_path / file for file in told["files"]} == set(folder.iterdir())
    assert told["accuracy"].keys() == {"before", "after", "digits_cbam.onnx", "digits_cbam.pt"}
    hold_to_the_lesson(told["training"], tmp_path)


def hold_to_the_lesson(lesson, folder):
    """It learnt, its gates opened, and the accuracies are of digits that it did not see."""
    images, labels = digits.held_out()
    assert lesson["images"] + lesson["tested_on"] == len(labels) == 450
    assert lesson["accuracy"]["after"] > lesson["accuracy"]["before"] + 0.2
    trained = load_model(folder / lesson["file"])
    gates = {path: gate.item() for path, gate in attnsurgeon.gates(trained).items()}
    assert gates == lesson["gates"]
    assert all(gates.values())
    noisy = images[lesson["images"] :]
    with borrowed_randomness(0), torch.no_grad():
        right = trained(noisy + lesson["noise"] * torch.randn_like(noisy)).argmax(1)
    after = (right == labels[lesson["images"] :]).double().mean().item()
    assert after == pytest.approx(lesson["accuracy"]["after"])


def test_it_computes_on_one_thread_and_gives_the_others_back(tmp_path, monkeypatch):
    seen = []

    def stop(*_):
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_insert", stop)
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(tmp_path / "new")
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(1)


def test_the_demo_writes_over_nothing(tmp_path, run, short_bench):
    (tmp_path / "mine").write_text("precious")
    done = run("demo", str(tmp_path))
    assert done.code == 2
    assert "not an empty folder" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_changed_logit_is_noticed(tmp_path, run, short_bench, monkeypatch):
    load = demo.load_plain

    def spoiled(path):
        model = load(path)
        next(model.parameters()).data.mul_(1.001)
        return model

    monkeypatch.setattr(demo, "load_plain", spoiled)
    done = run("demo", str(tmp_path / "new"))
    assert done.code == 3
    assert "a logit on the held-out digits changed" in done.err
