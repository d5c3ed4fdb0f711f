"""The bench: honest about noise, about what ran, and about what it was lent."""

import gc
import json
import os
import tempfile
import time

import numpy as np
import onnxruntime
import pytest
import torch

import attnsurgeon
from attnsurgeon import compare_speed
from attnsurgeon.bench import (
    environment,
    inputs,
    targets,
    timing,
)
from attnsurgeon.bench.request import check_request
from attnsurgeon.bench.schema import SCHEMA
from attnsurgeon.cost import multiply_adds
from attnsurgeon.errors import (
    BadOption,
)
from tests.networks import IMAGE, QUICK, Residual, Spy, Tiny


@pytest.fixture
def spied():
    Spy.seen = []
    return Spy()


@pytest.fixture
def cpu_clock(monkeypatch):
    """Count this thread's own work instead of the wall: others on the machine do not matter."""
    monkeypatch.setattr(timing, "clock_ns", time.thread_time_ns)


class TestReport:
    def test_json_has_exactly_the_promised_keys(self, digits_file):
        report = compare_speed([digits_file], **QUICK).to_json()
        assert json.loads(json.dumps(report, allow_nan=False)) == report
        assert set(report) == set(SCHEMA["required"])
        host, own = report["runs"]
        assert set(own) == set(SCHEMA["properties"]["runs"]["items"]["required"])
        assert host["target"] == "digits (untouched host)"
        assert own["target"] == str(digits_file)
        (comparison,) = report["comparisons"]
        assert set(comparison) == set(SCHEMA["properties"]["comparisons"]["items"]["required"])
        assert comparison["target"] == own["target"]
        assert comparison["baseline"] == host["target"]
        low, high = comparison["interval95"]
        assert low <= high
        assert own["p5_ms"] <= own["median_ms"] <= own["p95_ms"]
        assert own["median_ms"] == pytest.approx(np.median(own["samples_ms"]), abs=1e-4)

    def test_what_it_costs_on_paper_stands_beside_the_times(self, digits_file):
        host, own = compare_speed([digits_file], **QUICK).runs
        model = attnsurgeon.load_model(digits_file)
        assert own.parameters == sum(p.numel() for p in model.parameters()) > host.parameters
        assert own.macs == multiply_adds(model, (IMAGE,)) > host.macs > 0
        assert own.file_bytes == digits_file.stat().st_size
        assert host.file_bytes is None

    def test_of_several_targets_the_first_is_the_baseline(self, digits_file):
        report = compare_speed(["digits", digits_file, digits_file], **QUICK)
        assert [run.target for run in report.runs] == ["digits", *[str(digits_file)] * 2]
        assert [c.baseline for c in report.comparisons] == ["digits", "digits"]

    def test_a_plain_name_is_timed_alone_and_said_to_be_random(self):
        report = compare_speed(["digits"], **QUICK)
        assert report.comparisons == ()
        assert [run.weights for run in report.runs] == ["random"]
        assert "digits has random weights" in report.environment["notes"]

    def test_the_environment_says_where_it_ran(self):
        found = compare_speed(["digits"], **QUICK).environment
        assert found["torch"] == torch.__version__.partition("+")[0]
        assert found["onnxruntime"] == onnxruntime.__version__
        assert found["threads"] == 1
        assert found["device"] == "cpu"
        assert found["gpu"] is None
        assert found["cpu"]
        assert found["seconds"] == QUICK["seconds"]
        assert "0.25 to 0.75" in found["gates"]

    @pytest.mark.skipif(not hasattr(os, "getloadavg"), reason="the system does not tell its load")
    def test_a_busy_machine_is_said_to_be_one(self, monkeypatch):
        for load, doubts in ((0.0, 0), (99.0, 1)):
            monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0, 0))
            request = check_request(("eager",), "cpu", (1,), 1, 1.0, None)
            found = environment.describe(request, [], [], "")
            assert found["load_average"] == load
            assert len(found["notes"]) == doubts

    def test_a_call_is_told_with_what_was_given(self):
        found = compare_speed(["digits"], batches=[2], **QUICK).environment
        assert found["command"] == (
            "compare_speed(['digits'], device='cpu', batches=[2], threads=1, seconds=0.1)"
        )

    def test_progress_rises_from_0_to_1(self):
        told = []
        compare_speed(
            ["digits"], batches=(1, 2), **QUICK, progress=lambda *words: told.append(words)
        )
        shares = [share for _, share in told]
        assert shares == sorted(shares)
        assert (shares[0], shares[-1]) == (0.0, 1.0)
        texts = list(dict.fromkeys(text for text, _ in told))
        assert all(share <= 1 for share in shares)
        assert texts == [
            "reading the targets",
            "eager, batch 1: preparing digits",
            "eager, batch 1: measuring",
            "eager, batch 2: preparing digits",
            "eager, batch 2: measuring",
            "done",
        ]

    def test_an_interrupt_leaves_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

        def interrupt(text, share):
            if share > 0:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compare_speed(["digits"], **QUICK, progress=interrupt)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("cpu_clock")
class TestPlantedDifferences:
    def test_a_network_with_a_third_more_work_is_found_out(self):
        plain, slow = Tiny(work=12), Tiny(work=16)
        (found,) = compare_speed(
            [plain, slow], **{**QUICK, "seconds": 1}, input_size=(48, 48)
        ).comparisons
        assert found.interval95[0] > 1.1
        assert 1.2 < found.ratio < 1.45
        assert found.verdict.startswith("+")

    def test_and_the_other_way_round(self):
        slow, plain = Tiny(work=16), Tiny(work=12)
        (found,) = compare_speed(
            [slow, plain], **{**QUICK, "seconds": 1}, input_size=(48, 48)
        ).comparisons
        assert found.interval95[1] < 0.9
        assert found.verdict.startswith("-")

    def test_a_file_against_itself_is_the_same(self, digits_file):
        (found,) = compare_speed([digits_file, digits_file], **{**QUICK, "seconds": 1}).comparisons
        # A 95 % interval misses once in twenty times: a test may not, so it is given some air.
        low, high = found.interval95
        assert low - 0.05 < 1 < high + 0.05
        assert found.ratio == pytest.approx(1, abs=0.1)


class TestOptions:
    def test_batches(self, spied):
        report = compare_speed([spied], example=IMAGE, batches=(1, 3, 1), **QUICK)
        assert [run.batch for run in report.runs] == [1, 3]
        assert {seen["shape"] for seen in Spy.seen} == {(1, 3, 32, 32), (3, 3, 32, 32)}
        assert report.runs[0].macs == report.runs[1].macs

    def test_multiply_adds_are_for_one_image_whatever_the_first_batch(self, spied):
        runs = [
            compare_speed([spied], example=IMAGE, batches=b, **QUICK).runs for b in ((1,), (4,))
        ]
        assert runs[0][0].macs == runs[1][0].macs > 0

    def test_input_size(self, spied):
        small = compare_speed([spied], **QUICK, input_size=(16, 24))
        assert {seen["shape"] for seen in Spy.seen} == {(1, 3, 16, 24)}
        large = compare_speed([spied], **QUICK, input_size=(32, 24))
        assert large.runs[0].macs > small.runs[0].macs

    def test_threads_are_set_and_given_back(self, spied):
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            report = compare_speed([spied], example=IMAGE, **{**QUICK, "threads": 2})
            assert {seen["threads"] for seen in Spy.seen if not seen["grad"]} == {2}
            assert report.environment["threads"] == 2
            assert torch.get_num_threads() == 1
            assert compare_speed(["digits"], seconds=0.1).environment["threads"] == 1
        finally:
            torch.set_num_threads(before)

    def test_seconds(self, digits_file):
        short, long = (
            compare_speed([digits_file], **{**QUICK, "seconds": s}).runs[0] for s in (0.05, 0.8)
        )
        assert len(long.samples_ms) > len(short.samples_ms)

    def test_device(self):
        assert environment.find_device("cpu") == torch.device("cpu")
        expected = "cuda" if torch.cuda.is_available() else "cpu"
        assert environment.find_device("auto").type == expected
        report = compare_speed(["digits"], **QUICK)
        assert {run.device for run in report.runs} == {"cpu"}

    def test_example(self):
        report = compare_speed([Tiny(channels=5)], example=torch.zeros(1, 5, 9, 9), **QUICK)
        assert report.runs[0].macs == 9 * 9 * 9 * 8 * (5 + 8) + 8 * 4

    def test_every_engine_runs_each_batch(self):
        report = compare_speed(
            [Tiny()], engines=("torchscript", "eager", "eager"), batches=(1, 2),
            input_size=(20, 24), **QUICK,
        )  # fmt: skip
        assert [(run.engine, run.batch) for run in report.runs] == [
            *(("torchscript", 1), ("torchscript", 2), ("eager", 1), ("eager", 2))
        ]


class TestWhatIsLent:
    def test_a_module_stays_as_it_was(self):
        operated = attnsurgeon.insert_attention(Residual().train(), "gc", example=IMAGE)
        before = {key: tensor.clone() for key, tensor in operated.state_dict().items()}
        places = [p.data_ptr() for p in operated.parameters()]
        report = compare_speed([operated], engines=("eager", "torchscript"), **QUICK)
        assert report.runs[0].target == "Residual (untouched host)"
        assert report.runs[1].target == "Residual"
        assert report.runs[1].weights == "given"
        assert operated.training
        assert all(torch.equal(t, before[key]) for key, t in operated.state_dict().items())
        assert [p.data_ptr() for p in operated.parameters()] == places
        assert not any(gate.any() for gate in attnsurgeon.gates(operated).values())

    def test_random_state_grad_mode_and_collector(self, spied):
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        compare_speed([spied], example=IMAGE, **QUICK)
        assert torch.equal(torch.rand(3), expected)
        assert torch.is_grad_enabled()
        assert gc.isenabled()
        timed = Spy.seen[-1]
        assert timed == {
            **{"shape": (1, 3, 32, 32), "threads": 1, "grad": False},
            **{"collector": False, "training": False},
        }

    def test_threads_come_back_after_an_error_too(self):
        before = torch.get_num_threads()
        with pytest.raises(BadOption):
            compare_speed([Tiny(), Tiny(classes=5)], **{**QUICK, "threads": before + 1})
        assert torch.get_num_threads() == before


class TestTargets:
    def test_gates_are_open_and_each_time_the_same(self, digits_file):
        host, own = targets.read_targets([digits_file])
        again = targets.read_targets([digits_file])[1]
        values = [gate.item() for gate in attnsurgeon.gates(own.module).values()]
        assert values
        assert all(0.25 <= value <= 0.75 for value in values)
        assert len(set(values)) == len(values)
        assert values == [gate.item() for gate in attnsurgeon.gates(again.module).values()]
        assert attnsurgeon.gates(host.module) == {}

    def test_all_see_the_same_inputs(self):
        made = inputs.make_inputs((IMAGE, torch.arange(3)[None], None), 2, torch.device("cpu"))
        again = inputs.make_inputs((IMAGE, torch.arange(3)[None], None), 2, torch.device("cpu"))
        assert torch.equal(made[0], again[0])
        assert made[0].std() > 0.5
        assert made[1].tolist() == [[0, 1, 2], [0, 1, 2]]
        assert made[2] is None
        target = targets.Target("x", (IMAGE.half(), torch.zeros(1, 3).long(), None), "given")
        assert inputs.cast_inputs(made, target)[0].dtype == torch.float16

    def test_a_list_of_images_is_as_long_as_the_batch(self):
        """As detectors take them: images of sizes of their own."""
        seen = []

        class Listed(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.net = Tiny()

            def forward(self, images):
                seen.append([tuple(image.shape) for image in images])
                return torch.cat([self.net(image[None]) for image in images])

        sizes = [(3, 8, 8), (3, 8, 12)]
        example = ([torch.zeros(size) for size in sizes],)
        options = {**QUICK, "seconds": 0.02, "example": example}
        report = compare_speed([Listed()], batches=(1, 3), **options)
        assert seen[-1] == [*sizes, sizes[0]]
        assert seen[0] == sizes[:1]
        macs = sum(8 * channels * 9 * 64 for channels in (3, 8)) + 32
        assert {run.macs for run in report.runs} == {macs}
        with pytest.raises(BadOption, match="takes images of sizes of their own, Tiny takes"):
            compare_speed([Tiny(), "fasterrcnn_mobilenet_v3_large_320_fpn"], **QUICK)

    def test_the_host_has_the_files_own_weights(self, digits_file):
        host, own = targets.read_targets([digits_file])
        state = own.module.state_dict()
        assert all(torch.equal(t, state[key]) for key, t in host.module.state_dict().items())

    def test_half_precision_against_full(self):
        runs = compare_speed([Tiny(), Tiny().bfloat16()], input_size=(16, 16), **QUICK).runs
        assert len(runs) == 2
