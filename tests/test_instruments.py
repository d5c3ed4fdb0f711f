"""The scripts that judge the bench: they run, and a wrong instrument does not pass."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock, ResNet

import attnsurgeon
from attnsurgeon.bench import Comparison, Timing
from attnsurgeon.bench.interval import NOISE, Estimate
from attnsurgeon.bench.rounds import Race
from attnsurgeon.errors import EngineUnavailable
from attnsurgeon.surgery import cuts_of

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import attention_cost  # noqa: E402
import cost_table  # noqa: E402
import gpu  # noqa: E402
import gpu_table  # noqa: E402
import instrument  # noqa: E402
import other_clocks  # noqa: E402


def comparison(low, ratio, high, verdict=NOISE):
    return Comparison("a", "b", "eager", "cpu", 1, ratio, (low, high), verdict)


class TestInstrument:
    def test_intervals_that_miss_are_counted(self):
        good, bad = comparison(0.99, 1.0, 1.01), comparison(1.001, 1.01, 1.02)
        assert instrument.judge_holding([good] * 95 + [bad] * 5).passed
        assert not instrument.judge_holding([good] * 94 + [bad] * 6).passed

    def test_a_wide_interval_fails(self):
        assert instrument.judge_width(comparison(0.995, 1, 1.005), 30).passed
        assert not instrument.judge_width(comparison(0.98, 1, 1.02), 30).passed

    def test_a_planted_difference_has_to_be_found_at_its_size(self):
        found = "+3.0 % [2.5, 3.5]"
        assert instrument.judge_planted(comparison(1.025, 1.03, 1.035, found), 0.03).passed
        assert not instrument.judge_planted(comparison(0.98, 1.03, 1.08), 0.03).passed
        assert not instrument.judge_planted(comparison(1.05, 1.06, 1.07, "+6 %"), 0.03).passed
        assert instrument.judge_planted(comparison(0.999, 1.003, 1.007), 0.003).passed
        assert not instrument.judge_planted(comparison(1.002, 1.003, 1.004, "+"), 0.003).passed

    def test_a_bias_under_load_fails(self):
        assert instrument.judge_loaded(comparison(0.9, 1.015, 1.1)).passed
        assert not instrument.judge_loaded(comparison(0.9, 1.03, 1.1)).passed
        assert instrument.judge_loaded(comparison(0.9, 1.04, 1.1), 1.05).passed
        assert not instrument.judge_loaded(comparison(0.9, 1.0, 1.1), 1.05).passed

    def test_the_planted_work_is_so_many_runs(self):
        class Counting(nn.Module):
            runs = 0

            def forward(self, x):
                self.runs += 1
                return x

        net = Counting()
        assert instrument.Repeated(net, 21)(torch.zeros(1, 3, 16, 16)).shape[-1] == 4
        assert net.runs == 21

    def test_the_other_runtimes_tool_is_read(self, tmp_path):
        path = tmp_path / "x.onnx"
        attnsurgeon.export_model(nn.Conv2d(3, 4, 1), path, example=torch.zeros(1, 3, 8, 8))
        image = torch.zeros(1, 3, 8, 8)
        told = other_clocks.by_test_tool(path, image, 0.05)
        assert all(0 < ms < 1000 for ms in told)
        # However short the time is, there are quartiles.
        both = other_clocks.by_onnxruntime(path, image, 1e-9, 1)
        for times in (other_clocks.by_test_tool(path, image, 1e-9), *both):
            assert instrument._middle(times)[0] > 0

    def test_another_median_fails(self):
        ours = Timing("a", "eager", "cpu", 1, (10.0,), median95_ms=(9.9, 10.1))
        assert instrument.judge_median(ours, 10.2, 0.01, "x").passed
        assert not instrument.judge_median(ours, 11.5, 0.01, "x").passed

    def test_what_looking_costs_is_no_difference_and_nothing_else_is(self):
        ours = Timing("a", "eager", "cpu", 1, (10.0,), median95_ms=(9.9, 10.1))
        looking, none = Estimate(1.2, 1.19, 1.21), Estimate(1.0, 0.99, 1.01)
        found = instrument.judge_profiler(ours, [12.0, 12.1, 11.9], looking)
        assert found.passed
        assert "(12 ms, calls that it slows by 20.0 %)" in found.what
        assert not instrument.judge_profiler(ours, [12.0, 12.1, 11.9], none).passed
        assert not instrument.judge_profiler(ours, [10.0, 10.1, 9.9], looking).passed

    def test_the_profiler_is_read_and_its_cost_measured(self, tmp_path):
        path = tmp_path / "x.onnx"
        attnsurgeon.export_model(nn.Conv2d(3, 4, 1), path, example=torch.zeros(1, 3, 8, 8))
        told, cost = other_clocks.by_profiler(path, torch.zeros(1, 3, 8, 8), 0.1, 1)
        assert all(0 < ms < 1000 for ms in told)
        assert 0 < cost.low <= cost.ratio <= cost.high
        assert all(file.parent == tmp_path for file in tmp_path.rglob("*.json"))

    def test_another_clock_fails(self):
        assert instrument.judge_clock(10.1, 10.0).passed
        assert not instrument.judge_clock(9.7, 10.0).passed
        assert not instrument.judge_clock(10.3, 10.0).passed

    def test_the_planted_delay_is_a_share_of_the_call(self, monkeypatch):
        now = [0]

        def clock():
            now[0] += 1
            return now[0]

        class Slow(nn.Module):
            def forward(self, x):
                now[0] += 1000
                return x

        monkeypatch.setattr(instrument.time, "perf_counter_ns", clock)
        instrument.Delayed(Slow(), 0.5)(torch.zeros(1))
        assert 1500 <= now[0] <= 1510
        before = now[0]
        instrument.Delayed(Slow(), 0.0)(torch.zeros(1))
        assert now[0] - before <= 1010


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    small = ["--model", "resnet18", "--size", "64", "--batch", "1", "--engine", "eager"]
    words = small if torch.cuda.is_available() else []
    gpu.main([*words, "--block", "se", "--seconds", "0.1", "-o", str(path)])
    return json.loads(path.read_text())


class TestGpu:
    def test_it_runs_at_small_sizes_and_says_where(self, results):
        assert results["is_gpu"] == torch.cuda.is_available()
        assert results["is_gpu"] or "(CPU)" in results["machine"]
        (entry,) = results["entries"]
        assert all(check["exact"] and not check["dead"] for check in entry["checks"])
        assert {"fp32", "bf16", "autocast bf16"} <= {c["precision"] for c in entry["checks"]}
        assert entry["environment"]["eager"]["ceilings"]
        (row,) = [row for row in entry["rows"] if row["batch"] == 1][:1]
        assert row["timm"]["ratio"] > 0
        assert row["least_ratio"] > 1

    def test_the_table_is_made_from_the_file(self, results, tmp_path, capsys):
        path = tmp_path / "gpu.json"
        path.write_text(json.dumps(results))
        gpu.main(["--table", str(path)])
        out = capsys.readouterr().out
        assert results["machine"] in out
        assert "| resnet18 | se | eager" in out

    def test_what_a_file_has_is_not_measured_again(self, results, tmp_path, monkeypatch, capsys):
        path = tmp_path / "gpu.json"
        path.write_text(json.dumps(results))
        monkeypatch.setattr(gpu, "measure", lambda *args: pytest.fail("it was measured again"))
        monkeypatch.setattr(gpu, "write_readme", lambda *args: None)
        gpu.main(["--model", "resnet18", "--block", "se", "-o", str(path)])
        assert "| resnet18 | se | eager" in capsys.readouterr().out
        path.write_text(json.dumps({**results, "machine": "another"}))
        with pytest.raises(SystemExit, match="is of another, this is"):
            gpu.main(["--model", "resnet18", "--block", "se", "-o", str(path)])

    def test_the_readme_gets_the_table_between_its_marks(self, results, tmp_path):
        readme = tmp_path / "README.md"
        readme.write_text(f"before\n{gpu_table.BEGIN}old\n{gpu_table.END}after\n")
        for _ in range(2):
            gpu_table.write_readme(results, readme)
        text = readme.read_text()
        assert text.count("| resnet18 | se | eager") == len(results["entries"][0]["rows"])
        assert "old" not in text
        assert text.startswith(f"before\n{gpu_table.BEGIN}")
        assert text.endswith(f"{gpu_table.END}after\n")

    def test_the_readme_is_what_was_measured(self):
        text = gpu_table.README.read_text(encoding="utf-8")
        told = text.partition(gpu_table.BEGIN)[2].partition(gpu_table.END)[0].strip()
        if gpu.RESULTS.exists():
            assert told == gpu_table.table_of(json.loads(gpu.RESULTS.read_text())).strip()
        else:
            assert told.startswith("No GPU was at hand")
            assert "|" not in told

    def test_the_goal_is_judged(self, results):
        row = {**results["entries"][0]["rows"][0], "engine": "compile", "least_ratio": 1.02}
        rows = [
            {**row, "ours": {"ratio": ratio}, "timm": {"ratio": 1.06}} for ratio in (1.02, 1.05)
        ]
        entries = [{"block": "se", "rows": rows}, {"block": "gc", "rows": rows}]
        (told,) = gpu_table._goal({"entries": entries})
        assert "at most half of timm's in 1 of 2 runs" in told
        assert "must cost in 1." in told

    def test_an_engine_that_cannot_take_it_leaves_the_others(self, monkeypatch):
        def refuse(sides, engine, *rest):
            if engine == "compile":
                raise EngineUnavailable("torch.compile cannot take it")
            raise StopIteration

        monkeypatch.setattr(gpu, "time_sides", refuse)
        monkeypatch.setattr(gpu, "check_precisions", lambda *args: iter(()))
        words = argparse.Namespace(size=32, engine=["compile"])
        entry = gpu.measure("resnet18", "se", words, torch.device("cpu"))
        assert entry["failures"] == [
            {"engine": "compile", "reason": "torch.compile cannot take it"}
        ]

    @pytest.mark.parametrize(
        ("host", "placement"),
        [
            (lambda: ResNet(BasicBlock, [1, 1, 1, 1]), "replace"),
            (lambda: ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)]), "standard"),
        ],
    )
    def test_timms_own_stand_in_the_same_places(self, host, placement):
        pytest.importorskip("timm")
        image = torch.randn(1, 3, 32, 32)
        operated = gpu.insert(host().eval(), "sk", image)
        twin = gpu.with_timm(operated)
        kinds = [type(module).__name__ for module in twin.modules()]
        assert kinds.count("SelectiveKernel") == len(cuts_of(operated))
        assert {cut.placement for cut in cuts_of(operated)} == {placement}
        with torch.no_grad():
            assert twin(image).shape == (1, 1000)

    @pytest.mark.parametrize(
        ("gradient", "is_alive"),
        [(None, False), ([0.0], False), ([float("nan")], False), ([float("inf")], False),
         ([1e-3], True)],
    )  # fmt: skip
    def test_a_gradient_that_is_no_number_is_dead(self, gradient, is_alive):
        value = None if gradient is None else torch.tensor(gradient)
        assert gpu._is_alive(value) == is_alive

    def test_a_changed_output_is_noticed(self):
        class Net(nn.Module):
            def __init__(self, shift):
                super().__init__()
                self.shift = shift

            def forward(self, x):
                return x + self.shift

        image = torch.ones(1, 3, 4, 4, requires_grad=True)
        assert gpu._check([Net(0.0), Net(0.0)], image)["exact"]
        assert not gpu._check([Net(0.0), Net(1e-6)], image)["exact"]

    def test_the_least_a_block_can_cost(self):
        host = Timing("a", "eager", "cpu", 8, (10.0,))
        assert gpu._least(host, 1e6, 1e9) == pytest.approx(1 + 8 / 10)


class TestAttentionCost:
    @staticmethod
    def row(ours, **changed):
        values = {"block": "se", "engine": "onnxruntime", "batch": 1, "quotient": (ours, 0.1, 2.0)}
        return cost_table.Row(
            **{**values, **changed}, plain_ms=40.0, ours_ms=4 * ours, timm_ms=4.0, limit_ms=0.5
        )

    def test_the_target_is_judged(self, tmp_path):
        rows = [self.row(0.5), self.row(0.6), self.row(-0.1)]
        rows += [self.row(0.7, block="sk", engine="compile"), self.row(0.7, block="sk")]
        text = cost_table.table_of(rows, 2, 224, "wall time")
        assert "was reached in 3 of 5 rows" in text
        assert "| se | onnxruntime | 1 | 40.00 | +2.00 (+5.0 %) | +4.00 (+10.0 %) | 0.50" in text
        assert "| 4 × |" in text
        assert "-0.40 (-1.0 %)" in text
        page = tmp_path / "README.md"
        page.write_text(f"before\n{cost_table.BEGIN}old\n{cost_table.END}after\n")
        cost_table.write_readme(text, page)
        assert text in page.read_text()
        assert "old" not in page.read_text()

    def test_a_quotient_is_found_and_its_interval_holds_it(self):
        random, held = np.random.default_rng(0), 0
        for _ in range(60):
            rounds = tuple(
                tuple(
                    [ms * (1 + abs(random.normal(0, 0.02))) for ms in (40.0, 42.0, 44.0)]
                    for _ in range(12)
                )
                for _ in range(8)
            )
            ours, timms, (quotient, low, high) = attention_cost.judge(Race(((),) * 3, rounds))
            assert (ours, timms) == pytest.approx((0.05, 0.1), abs=0.01)
            assert quotient == pytest.approx(ours / timms)
            held += low <= 0.5 <= high
        assert held >= 54

    def test_the_readme_tells_every_row(self):
        page = cost_table.README.read_text(encoding="utf-8")
        told = page.partition(cost_table.BEGIN)[2].partition(cost_table.END)[0]
        cases = [
            (block, engine, batch)
            for block in ("se", "gc", "cbam", "sk")
            for engine in attention_cost.ENGINES
            for batch in (1, 8)
        ]
        rows = [line.split(" | ") for line in told.splitlines() if line.startswith("| ")][1:]
        assert [(cells[0][2:], cells[1], int(cells[2])) for cells in rows] == cases
        reached = 0
        for cells in rows:
            row = self.row(0.5, block=cells[0][2:], engine=cells[1])
            reached += float(cells[6].partition(" ")[0]) <= row.goal
        assert f"was reached in {reached} of {len(rows)} rows" in told
