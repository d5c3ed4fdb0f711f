"""Axes of a bench: precision, layout, training, the largest batch, memory that runs out."""

import dataclasses
import json
import sys

import pytest
import torch
from torch import nn

from attnsurgeon import bench, compare_speed
from attnsurgeon.bench import (
    engines,
    largest,
    lineup,
    memory,
    precision,
    ready,
    targets,
    training,
)
from attnsurgeon.bench.session import BenchInterrupted, measured_before
from attnsurgeon.errors import (
    BadOption,
    EngineUnavailable,
    HostUnusable,
    MissingPackage,
    UnknownName,
)
from tests.networks import IMAGE, QUICK, Residual, Tiny

SMALL = {**QUICK, "input_size": (8, 8), "seconds": 0.05}


class Witness(nn.Module):
    """Notes the dtype, layout and mode it is called in."""

    seen: list

    def __init__(self):
        super().__init__()
        self.net = Tiny()

    def forward(self, x):
        Witness.seen.append(
            {
                "dtype": x.dtype,
                "weight": self.net.stem.weight.dtype,
                "channels_last": x.is_contiguous(memory_format=torch.channels_last),
                "training": self.training,
                "grad": torch.is_grad_enabled(),
                "autocast": torch.is_autocast_enabled("cpu"),
            }
        )
        return self.net(x)


@pytest.fixture
def witness():
    Witness.seen = []
    return Witness()


def seen(key):
    return Witness.seen[-1][key]


class TestPrecision:
    @pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
    def test_weights_and_inputs_are_cast(self, witness, name, dtype):
        (run,) = compare_speed([witness], precisions=(name,), **SMALL).runs
        assert run.precision == name
        assert seen("dtype") == seen("weight") == dtype

    def test_each_is_a_job_of_its_own(self):
        report = compare_speed([Tiny()], precisions=("bf16", "fp32", "bf16"), **SMALL)
        assert [run.precision for run in report.runs] == ["bf16", "fp32"]
        assert {c["precision"] for c in report.environment["ceilings"]} == {"bf16", "fp32"}

    def test_by_default_it_is_the_targets_own(self):
        runs = compare_speed([Tiny(), Tiny().bfloat16()], **SMALL).runs
        assert [run.precision for run in runs] == ["fp32", "bf16"]

    def test_a_target_that_has_it_is_not_copied(self):
        (target,) = targets.read_targets([Tiny()])
        same = precision.fit_target(target, "fp32", channels_last=False, train=False)
        assert same is target

    def test_tf32_is_set_and_given_back(self):
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        with precision.borrowed_tf32(allowed=True):
            assert torch.backends.cudnn.allow_tf32
            assert torch.get_float32_matmul_precision() == "high"
        with precision.borrowed_tf32(allowed=False):
            assert not torch.backends.cudnn.allow_tf32
            assert torch.get_float32_matmul_precision() == "highest"
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before

    def test_an_operator_without_it_is_said_to_be_missing(self, monkeypatch):
        class Halfless(Tiny):
            def forward(self, x):
                if x.dtype == torch.float16:
                    raise RuntimeError("\"conv_depthwise\" not implemented for 'Half'")
                return super().forward(x)

        with pytest.raises(EngineUnavailable, match="eager cannot run Halfless in fp16 on cpu"):
            compare_speed([Halfless()], precisions=("fp16",), **SMALL)

    def test_an_onnx_file_keeps_its_own(self, tiny_onnx):
        options = {"engines": ("onnxruntime",), **QUICK, "input_size": (8, 8)}
        with pytest.raises(BadOption, match="holds fp32 numbers and cannot be timed in fp16"):
            compare_speed([tiny_onnx], precisions=("fp16",), **options)
        assert compare_speed([tiny_onnx], precisions=("fp32",), **options).runs

    def test_refusals(self):
        with pytest.raises(UnknownName, match="no precision is called 'fp23'; did you mean"):
            compare_speed([Tiny()], precisions=("fp23",), **SMALL)
        with pytest.raises(BadOption, match="onnxruntime takes no bf16; leave it or --precision"):
            compare_speed([Tiny()], engines=("eager", "onnxruntime"), precisions=("bf16",), **SMALL)
        with pytest.raises(BadOption, match="tf32 is of CUDA devices"):
            compare_speed([Tiny()], precisions=("tf32",), **SMALL)


class TestLayout:
    @pytest.mark.parametrize("wished", [True, False])
    def test_channels_last(self, witness, wished):
        (run,) = compare_speed([witness], channels_last=wished, **SMALL).runs
        assert seen("channels_last") == run.channels_last == wished

    def test_onnxruntime_has_its_own(self, tiny_onnx):
        with pytest.raises(BadOption, match="onnxruntime has a layout of its own"):
            compare_speed([tiny_onnx], engines=("onnxruntime",), channels_last=True, **QUICK)


class TestTraining:
    def test_a_step_is_forward_backward_and_optimiser(self, monkeypatch):
        monkeypatch.setattr(training, "LEARNING_RATE", 0.1)
        module = Tiny()
        before = {name: p.clone() for name, p in module.named_parameters()}
        training.make_step(module, module, (torch.randn(2, 3, 8, 8),), "fp32")()
        assert module.training
        changed = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
        assert changed == set(before)

    def test_the_last_step_is_as_the_first(self):
        module = Tiny()
        before = {name: p.clone() for name, p in module.named_parameters()}
        step = training.make_step(module, module, (torch.randn(2, 3, 8, 8),), "fp32")
        for _ in range(3):
            step()
        assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
        assert all(p.grad is not None for p in module.parameters())

    def test_it_is_timed_in_train_mode_with_gradients(self, witness):
        (run,) = compare_speed([witness], train=True, batches=(2,), **SMALL).runs
        assert run.train
        assert seen("training")
        assert seen("grad")
        assert not seen("autocast")
        assert (run.bandwidth_share, run.arithmetic_share) == (None, None)
        compare_speed([witness], **SMALL)
        assert not seen("training")
        assert not seen("grad")

    def test_half_precision_is_autocast(self, witness):
        compare_speed([witness], train=True, precisions=("bf16",), **SMALL)
        assert seen("autocast")
        assert seen("weight") == torch.float32

    @pytest.mark.parametrize("shape", [(2, 5), (2, 5, 3, 3)])
    def test_every_output_counts_in_the_loss(self, shape):
        outputs = {
            "a": torch.randn(shape, requires_grad=True),
            "b": [torch.randn(2, 3).requires_grad_()],
        }
        training.loss_of(outputs).backward()
        assert outputs["a"].grad.any()
        assert outputs["b"][0].grad.any()

    def test_refusals(self, tiny_onnx):
        with pytest.raises(BadOption, match="onnxruntime cannot train; leave it or --train out"):
            compare_speed([tiny_onnx], engines=("onnxruntime",), train=True, **QUICK)
        with pytest.raises(BadOption, match="nothing to train"):
            training.make_step(nn.ReLU(), nn.ReLU(), (), None)
        with pytest.raises(BadOption, match="--per-site measures inference"):
            compare_speed([Residual()], train=True, per_site=True, **QUICK)

    def test_what_cannot_be_trained_on_says_what_to_do(self):
        class Normed(nn.Sequential):
            pass

        net = Normed(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))
        options = {**SMALL, "example": IMAGE, "train": True}
        words = "Normed does not run a step of training on a batch of 1: .*give a larger --batch"
        with pytest.raises(HostUnusable, match=words) as caught:
            compare_speed([net], **options)
        assert "\n" not in str(caught.value)
        assert compare_speed([net], batches=(2,), **options).runs


class TestBatch:
    def test_a_network_that_takes_one_image_only_says_so(self):
        class Single(nn.Module):
            def forward(self, x):
                return x.mean((2, 3)).view(1, 3)

        words = "Single does not run on a batch of 2: .*; give a --batch that it takes"
        for engine in ("eager", "torchscript"):
            with pytest.raises(HostUnusable, match=words) as caught:
                compare_speed([Single()], engines=(engine,), batches=(1, 2), **SMALL, example=IMAGE)
            assert "\n" not in str(caught.value)
            assert [run.batch for run in measured_before(caught.value).runs] == [1]

    @pytest.mark.parametrize("train", [False, True])
    @pytest.mark.parametrize("error", [TypeError, IndexError, KeyError])
    def test_whatever_the_network_raises(self, error, train):
        class Refuses(Residual):
            def forward(self, x):
                if len(x) > 1:
                    raise error("one image please")
                return super().forward(x)

        with pytest.raises(HostUnusable, match="batch of 2: .*one image please.*; give a --batch"):
            compare_speed([Refuses()], batches=(2,), train=train, example=IMAGE, **SMALL)

    @pytest.mark.parametrize(
        ("error", "train"), [(RuntimeError, False), (KeyError, False), (KeyError, True)]
    )
    def test_what_an_engine_alone_cannot_do_stays_a_bug(self, monkeypatch, error, train):
        def breaks(*args):
            raise error("broken")

        monkeypatch.setattr(ready, "_make_ready", breaks)
        with pytest.raises(error, match="broken"):
            compare_speed([Residual()], train=train, example=IMAGE, **SMALL)


class TestLargest:
    @pytest.mark.parametrize("most", [0, 1, 5, 300])
    def test_it_is_found(self, most):
        tried = []

        def attempt(batch):
            tried.append(batch)
            if batch > most:
                raise MemoryError

        fits, too_large = largest.find_largest(attempt, lambda batch: None)
        assert fits <= most < too_large
        assert too_large - fits <= max(1, fits // largest.FINE)
        assert fits == 0 or fits in tried  # never guessed
        assert too_large in tried

    def test_another_error_comes_through(self):
        def attempt(batch):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            largest.find_largest(attempt, lambda batch: None)

    def test_it_becomes_the_batch(self, monkeypatch):
        make = lineup.make_inputs

        def scarce(example, batch, device):
            if batch > 5:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return make(example, batch, device)

        monkeypatch.setattr(lineup, "make_inputs", scarce)
        report = compare_speed([Tiny()], batches=("max",), **SMALL)
        assert [run.batch for run in report.runs] == [5]
        assert "largest batch that fits on eager: 5 (6 does not)" in report.environment["notes"]

    def test_a_batch_that_is_asked_for_as_well_is_timed_once(self, monkeypatch):
        monkeypatch.setattr(lineup, "find_largest", lambda attempt, tell: (2, 3))
        report = compare_speed([Tiny()], batches=("max", 2), **SMALL)
        assert [run.batch for run in report.runs] == [2]
        assert "largest batch that fits on eager: 2 (3 does not)" in report.environment["notes"]

    def test_moving_has_to_fit_as_well(self, monkeypatch):
        moved = []
        prepare = engines.engine._registry.get("eager").prepare

        def tight(target, inputs, place):
            def move():
                moved.append(inputs[0].shape[0])
                if inputs[0].shape[0] > 4:
                    raise MemoryError

            return dataclasses.replace(prepare(target, inputs, place), move=move)

        monkeypatch.setitem(
            engines.engine._registry._things, "eager", engines.Engine(tight, lambda device: None)
        )
        report = compare_speed([Tiny()], batches=("max",), **SMALL)
        assert [run.batch for run in report.runs] == [4]

    def test_other_words_are_refused(self):
        with pytest.raises(BadOption, match="--batch takes whole numbers or max, not 'most'"):
            compare_speed([Tiny()], batches=("most",), **SMALL)


class Greedy(nn.Module):
    """Asks for a gigabyte per image, of which it uses one number."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        held = torch.empty(x.shape[0], 2**28)
        return x.mean((2, 3)) * self.scale + held.shape[0]


class TestMemory:
    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds it")
    def test_the_rest_goes_on(self, monkeypatch):
        monkeypatch.setattr(memory, "free_memory", lambda: 3 * 2**30)
        report = compare_speed([Greedy()], batches=(1, 64, 2), **SMALL)
        assert [run.batch for run in report.runs] == [1, 2]
        (failure,) = report.failures
        assert failure.reason == "out of memory: batch 64 does not fit on eager, fp32"
        assert report.to_json()["failures"][0]["batch"] == 64

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds it")
    def test_nothing_fits(self, monkeypatch):
        monkeypatch.setattr(memory, "free_memory", lambda: 3 * 2**30)
        with pytest.raises(BadOption, match="batch 64 does not fit.*give a smaller --batch"):
            compare_speed([Greedy()], batches=(64,), **SMALL)

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds it")
    def test_the_bound_is_given_back(self, monkeypatch):
        import resource

        before = resource.getrlimit(resource.RLIMIT_DATA)
        monkeypatch.setattr(memory, "free_memory", lambda: 2**30)
        with memory.bounded_memory(torch.device("cpu")):
            assert resource.getrlimit(resource.RLIMIT_DATA) != before
        assert resource.getrlimit(resource.RLIMIT_DATA) == before

    @pytest.mark.parametrize(
        ("error", "is_lack"),
        [
            (MemoryError(), True),
            (torch.OutOfMemoryError("CUDA out of memory"), True),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
            (RuntimeError("std::bad_alloc"), True),
            (RuntimeError("Failed to allocate memory for requested buffer of size 9"), True),
            (RuntimeError("shapes do not fit"), False),
            (ValueError(), False),
        ],
    )
    def test_engines_word_it_otherwise(self, error, is_lack):
        wrapped = RuntimeError("inside")
        wrapped.__cause__ = error
        assert memory.is_out_of_memory(error) == memory.is_out_of_memory(wrapped) == is_lack

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
    def test_the_peak_holds_weights_and_maps(self):
        class Wide(nn.Module):
            def __init__(self, mib):
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(mib * 2**18))
                self.mib = mib

            def forward(self, x):
                return x.mean((2, 3)) + torch.ones(self.mib * 2**18).sum()

        small, large = compare_speed([Wide(8), Wide(128)], **SMALL).runs
        # the allocator keeps some of what was freed, so that the system sees a little less
        assert 0.85 < (large.peak_host_bytes - small.peak_host_bytes) / (2 * 120 * 2**20) < 1.15
        assert large.peak_device_bytes is None


class TestTimm:
    def test_a_network_of_timm(self):
        pytest.importorskip("timm")
        report = compare_speed(["timm:resnet10t"], **{**SMALL, "input_size": (32, 32)})
        assert report.runs[0].target == "timm:resnet10t"
        assert report.runs[0].weights == "random"

    def test_an_unknown_one(self):
        pytest.importorskip("timm")
        with pytest.raises(UnknownName, match="no model of timm is called 'seresnet5'; did you"):
            compare_speed(["timm:seresnet5"], **SMALL)

    def test_without_timm(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)
        with pytest.raises(MissingPackage, match="timm is not installed, .*pip install timm"):
            compare_speed(["timm:seresnet50"], **SMALL)


class TestInterrupt:
    def test_what_was_measured_is_kept(self):
        def stop(text, share):
            if text.startswith("eager, batch 2"):
                raise KeyboardInterrupt

        with pytest.raises(BenchInterrupted) as caught:
            compare_speed([Tiny(), Tiny()], batches=(1, 2), progress=stop, **SMALL)
        report = caught.value.report
        assert [run.batch for run in report.runs] == [1, 1]
        assert len(report.comparisons) == 1
        assert json.loads(json.dumps(report.to_json()))["interrupted"]

    @pytest.mark.parametrize("place", ["job.gates_doubt", "session.release_memory"])
    def test_what_was_timed_is_kept_wherever_it_comes_after(self, monkeypatch, place):
        def stop(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(f"attnsurgeon.bench.{place}", stop)
        with pytest.raises(BenchInterrupted) as caught:
            compare_speed([Tiny(), Tiny()], batches=(1, 2), **SMALL)
        assert [run.batch for run in caught.value.report.runs] == [1, 1]
        assert len(caught.value.report.comparisons) == 1

    def test_one_that_a_library_wraps_counts_as_well(self, monkeypatch):
        def wrapped(*args):
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as stop:
                raise RuntimeError("worker died") from stop

        def second(text, share):
            if text.startswith("eager, batch 2"):
                monkeypatch.setattr(lineup, "send_inputs", wrapped)

        with pytest.raises(BenchInterrupted) as caught:
            compare_speed([Tiny()], batches=(1, 2), progress=second, **SMALL)
        assert [run.batch for run in caught.value.report.runs] == [1]

    def test_a_race_that_had_begun_counts(self):
        told = []

        def stop(text, share):
            told.append(text)
            if "measuring: " in text:  # after two rounds
                raise KeyboardInterrupt

        with pytest.raises(bench.BenchInterrupted) as caught:
            compare_speed([Tiny(), Tiny()], progress=stop, **SMALL)
        assert len(caught.value.report.comparisons) == 1
        assert not any("batch 2" in text for text in told)


def test_places_tell_the_engine_what_to_do(tmp_path):
    place = engines.Place(torch.device("cpu"), 1, tmp_path, "bf16", train=True)
    (target,) = targets.read_targets([Tiny()])
    runner = engines.get("eager").prepare(target, (IMAGE,), place)
    assert runner.is_training
    assert runner.call().dtype == torch.bfloat16
