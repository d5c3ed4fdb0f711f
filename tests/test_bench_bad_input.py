"""What a user can put right in a bench: one line, before anything is timed."""

from pathlib import Path

import onnxruntime
import pytest
import torch

import attnsurgeon
from attnsurgeon import compare_speed
from attnsurgeon.bench import environment
from attnsurgeon.errors import (
    BadFile,
    BadOption,
    EngineUnavailable,
    HostUnusable,
    UnknownName,
)
from tests.networks import QUICK, Residual, Tiny

BAD_OPTIONS = [
    ({"batches": (1, 0)}, BadOption, "--batch must be at least 1, not 0"),
    ({"batches": ()}, BadOption, "--batch"),
    ({"batches": (10**20,)}, BadOption, "--batch must be at most 2147483647, not 1000"),
    ({"threads": 0}, BadOption, "--threads must be at least 1, not 0"),
    ({"threads": 100000}, BadOption, "--threads must be at most 1024, not 100000"),
    ({"input_size": (32, 10**9)}, BadOption, "--input-size must be at most 65536"),
    ({"seconds": 0}, BadOption, "--seconds must be above 0, not 0"),
    ({"seconds": -1.0}, BadOption, "--seconds"),
    ({"seconds": float("nan")}, BadOption, "--seconds"),
    ({"seconds": float("inf")}, BadOption, "--seconds"),
    ({"input_size": (0, 32)}, BadOption, "--input-size must be at least 1"),
    ({"engines": ("onnx",)}, UnknownName, "no engine is called 'onnx'; did you mean 'onnxruntime'"),
    ({"engines": ()}, BadOption, "--engine"),
    ({"device": "tpu"}, BadOption, "--device takes auto, cpu, cuda or cuda:N, not 'tpu'"),
    ({"device": "cuda:"}, BadOption, "--device"),
    ({"device": "cuda:x"}, BadOption, "--device"),
    ({"device": "cudaX"}, BadOption, "--device"),
    ({"targets": ()}, BadOption, "at least one target"),
]


class TestBadInput:
    @pytest.mark.parametrize(("wrong", "kind", "words"), BAD_OPTIONS)
    def test_options_are_refused_before_anything_is_loaded(self, wrong, kind, words, monkeypatch):
        def too_late(*args, **kwargs):
            raise AssertionError("a target was read")

        monkeypatch.setattr("attnsurgeon.bench.compare.read_targets", too_late)
        options = {"targets": ["digits"], **QUICK, **wrong}
        with pytest.raises(kind, match=words) as caught:
            compare_speed(**options)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)

    def test_an_engine_without_cuda_is_refused_before_another_one_is_timed(self, monkeypatch):
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("onnxruntime-gpu is installed")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(EngineUnavailable, match="no CUDAExecutionProvider"):
            compare_speed(["digits"], engines=("eager", "onnxruntime"), device="cuda:0")

    @pytest.mark.parametrize("device", ["cuda", "cuda:1"])
    def test_no_cuda(self, device, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(EngineUnavailable, match="no CUDA device here; give --device cpu"):
            compare_speed(["digits"], device=device)

    def test_too_few_cuda_devices(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(EngineUnavailable, match="no CUDA device 2 here; there are 2"):
            environment.find_device("cuda:2")
        assert environment.find_device("cuda:1") == torch.device("cuda", 1)

    @pytest.mark.parametrize(
        ("name", "content", "kind", "words"),
        [
            ("resnet81", None, UnknownName, "did you mean 'resnet18'"),
            ("gone.safetensors", None, BadFile, "there is no file"),
            ("gone.onnx", None, BadFile, "there is no file"),
            ("gone.pt", None, BadFile, "there is no file"),
            ("empty.onnx", b"", BadFile, "is empty"),
            ("noise.safetensors", b"x" * 99, BadFile, "not a whole safetensors file"),
            ("noise.onnx", b"x" * 99, BadFile, "is no ONNX file"),
            ("noise.pt", b"x" * 99, BadFile, "is no TorchScript file"),
            ("gone.pt2", None, BadFile, "there is no file"),
            ("noise.pt2", b"x" * 99, BadFile, "is no program of torch.export"),
            ("noise.pth", b"x" * 99, BadFile, "cannot be timed: a target is"),
        ],
    )
    def test_targets(self, tmp_path, name, content, kind, words, caplog):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        suffix = Path(name).suffix
        engine = {".onnx": "onnxruntime", ".pt": "torchscript"}.get(suffix, "eager")
        with pytest.raises(kind, match=words) as caught:
            compare_speed([path if suffix else name], engines=(engine,), **QUICK)
        assert caught.value.exit_code == 2
        assert not caplog.records  # nothing besides that one line

    @pytest.mark.parametrize("engine", ["eager", "torchscript", "compile"])
    def test_an_onnx_file_runs_on_onnxruntime_only(self, tiny_onnx, engine):
        with pytest.raises(BadOption, match="give --engine onnxruntime alone"):
            compare_speed([tiny_onnx], engines=("onnxruntime", engine), **QUICK)

    def test_a_torchscript_file_runs_on_torchscript_only(self, tiny_script):
        with pytest.raises(BadOption, match="give --engine torchscript alone"):
            compare_speed([tiny_script], **QUICK)

    @pytest.mark.parametrize(
        ("other", "words"),
        [
            (Tiny(channels=1), "takes 1-channel images, Tiny takes 3-channel images"),
            (Tiny(classes=5), "returns 1x5, Tiny returns 1x4"),
        ],
    )
    def test_targets_of_different_kinds(self, other, words):
        with pytest.raises(BadOption, match=f"{words}: they cannot be compared"):
            compare_speed([Tiny(), other], input_size=(16, 16), **QUICK)

    def test_a_network_does_not_run_at_that_size(self, tmp_path):
        with pytest.raises(HostUnusable, match="give another --input-size") as caught:
            compare_speed(["alexnet"], input_size=(8, 8), **QUICK)
        assert caught.value.exit_code == 2
        assert "(1, 3, 8, 8)" in str(caught.value)

    def test_a_file_of_a_network_of_ones_own(self, tmp_path):
        path = tmp_path / "own.safetensors"
        own = attnsurgeon.insert_attention(Residual(), "se", example=torch.zeros(1, 3, 16, 16))
        attnsurgeon.save_model(own, path)
        with pytest.raises(HostUnusable, match="your own Residual"):
            compare_speed([path], **QUICK)
