"""Results as files, their schema, two days' results against each other, and the command line."""

import copy
import csv
import io
import json
import re
import sys
from html.parser import HTMLParser

import pytest
import typer
from rich.console import Console

from attnsurgeon import compare_speed, gates
from attnsurgeon.bench import job, per_site, regression, session
from attnsurgeon.bench.interval import Estimate
from attnsurgeon.bench.results import Comparison
from attnsurgeon.bench.schema import SCHEMA, VERSION, misfit
from attnsurgeon.bench.session import BenchInterrupted
from attnsurgeon.bench.targets import read_targets
from attnsurgeon.errors import (
    BadFile,
    BadOption,
    EngineUnavailable,
    MissingPackage,
    OutputRefused,
    TooSlow,
)
from attnsurgeon.report import charts
from attnsurgeon.report.files import write_results
from attnsurgeon.report.live import live_progress
from attnsurgeon.report.wording import doubts_of_runs, short_names, sums_in_words
from attnsurgeon.surgery import cuts_of

QUICK = ("--seconds", "0.1", "--threads", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def report(digits_file):
    return compare_speed(
        [digits_file], seconds=0.1, threads=1, device="cpu", per_site=True, profile=True
    )


@pytest.fixture(scope="module")
def results(report):
    return report.to_json()


@pytest.fixture
def measured(monkeypatch, report):
    monkeypatch.setattr("attnsurgeon.bench.compare.compare_speed", lambda *args, **options: report)


class TestSchema:
    def test_results_fit_it(self, results):
        assert misfit(results) is None
        assert results["schema"] == VERSION

    def test_no_key_is_undocumented(self, results):
        def undocumented(value, kind, where=""):
            if isinstance(value, dict):
                known = kind.get("properties", {})
                yield from (f"{where}.{key}" for key in set(value) - set(known))
                for key in set(value) & set(known):
                    yield from undocumented(value[key], known[key], f"{where}.{key}")
            elif isinstance(value, list):
                for one in value:
                    yield from undocumented(one, kind["items"], f"{where}[]")

        assert set(undocumented(results, SCHEMA)) == set()

    @pytest.mark.parametrize(
        ("path", "value", "words"),
        [
            (("runs", 0, "batch"), "1", "results.runs[0].batch is no integer"),
            (("runs", 0, "batch"), True, "results.runs[0].batch is no integer"),
            (("runs", 0, "samples_ms", 0), None, "results.runs[0].samples_ms[0] is no number"),
            (("comparisons",), {}, "results.comparisons is no array"),
            (("interrupted",), 0, "results.interrupted is no boolean"),
        ],
    )
    def test_a_wrong_value_is_found(self, results, path, value, words):
        broken = copy.deepcopy(results)
        inside = broken
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = value
        assert misfit(broken) == words

    def test_a_missing_key_is_found(self, results):
        broken = copy.deepcopy(results)
        del broken["runs"][1]["median_ms"]
        assert misfit(broken) == "results.runs[1].median_ms is missing"

    def test_the_command_prints_it(self, run):
        outcome = run("bench", "--schema")
        assert json.loads(outcome.out) == SCHEMA


def other(results, *, ratio=None, times=1.0):
    """Return results in which the one ratio, or all times, are others."""
    changed = copy.deepcopy(results)
    for found in changed["comparisons"]:
        found["ratio"], found["interval95"] = ratio, [ratio - 0.005, ratio + 0.005]
    for one in changed["runs"]:
        for key in ("median_ms", "p5_ms", "p95_ms"):
            one[key] *= times
        one["median95_ms"] = [0.999 * one["median_ms"], 1.001 * one["median_ms"]]
    return changed


class TestRegression:
    def test_ratios_are_compared(self, results):
        found = regression.compare_results(other(results, ratio=1.02), other(results, ratio=1.09))
        (change,) = found.changes
        assert change.change.ratio == pytest.approx(1.09 / 1.02)
        assert change.change.low == pytest.approx(1.09 / 1.02 - 0.0073, abs=5e-4)
        assert change.verdict.startswith("+6.9 %")
        with pytest.raises(TooSlow, match=r"slower by more than 3 %: \+6.9 %") as caught:
            found.check(0.03)
        assert caught.value.exit_code == 5
        found.check(0.08)

    def test_faster_times_of_both_sides_change_nothing(self, results):
        old = other(results, ratio=1.05)
        new = other(results, ratio=1.05, times=0.5)
        (change,) = regression.compare_results(old, new).changes
        assert change.verdict == "not distinguishable from noise"

    def test_noise_is_no_regression(self, results):
        wide = other(results, ratio=1.10)
        wide["comparisons"][0]["interval95"] = [0.98, 1.22]
        regression.compare_results(other(results, ratio=1.02), wide).check(0.03)

    def test_lone_targets_are_compared_on_one_machine_only(self, results):
        def lone(**changes):
            changed = other(results, ratio=1.0, **changes)
            return {**changed, "comparisons": [], "runs": changed["runs"][:1]}

        found = regression.compare_results(lone(), lone(times=1.1))
        assert found.changes[0].change.ratio == pytest.approx(1.1)
        assert "load" in found.notes[0]
        elsewhere = lone()
        elsewhere["environment"]["cpu"] = "another"
        with pytest.raises(BadOption, match="times of two machines cannot be compared"):
            regression.compare_results(lone(), elsewhere)

    def test_what_one_file_has_alone_is_told(self, results):
        old = other(results, ratio=1.0)
        new = copy.deepcopy(old)
        new["comparisons"].append({**new["comparisons"][0], "batch": 8})
        found = regression.compare_results(old, new)
        assert len(found.changes) == 1
        assert found.unmatched[0].endswith("batch 8, fp32: new only")
        new["comparisons"] = new["comparisons"][1:]
        with pytest.raises(BadOption, match="no run in common"):
            regression.compare_results(old, new)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "is empty"),
            ("[1", "is no JSON"),
            ("[]", "holds no results"),
            ('{"runs": []}', "has no schema"),
            ('{"runs": [], "schema": 99}', "has schema 99, and this attnsurgeon reads schema 1"),
            ('{"runs": [], "schema": "1"}', "has schema '1', and this attnsurgeon reads schema 1"),
            ('{"runs": [], "schema": 1}', "is damaged: results.environment is missing"),
        ],
    )
    def test_other_files_are_refused(self, tmp_path, text, words):
        path = tmp_path / "old.json"
        path.write_text(text)
        with pytest.raises(BadFile, match=words):
            regression.read_results(path)

    @pytest.mark.parametrize(
        ("kind", "wrong"),
        [
            ("comparisons", {"ratio": 0}),
            ("comparisons", {"ratio": -1.0}),
            ("comparisons", {"ratio": float("nan")}),
            ("comparisons", {"ratio": float("inf"), "interval95": [1.0, float("inf")]}),
            ("comparisons", {"ratio": 10**400, "interval95": [1.0, 10**401]}),
            ("comparisons", {"ratio": 1e308, "interval95": [1e307, 1.7e308]}),
            ("comparisons", {"ratio": 1e-320, "interval95": [1e-320, 1.0]}),
            ("comparisons", {"ratio": 1.0, "interval95": [0.0, 2.0]}),
            ("comparisons", {"ratio": 1.5, "interval95": [2.0, 1.0]}),
            ("comparisons", {"interval95": [1.0]}),
            ("runs", {"median_ms": 0}),
            ("runs", {"median95_ms": []}),
        ],
    )
    def test_figures_that_cannot_be_are_refused(self, results, tmp_path, kind, wrong):
        path = tmp_path / "old.json"
        broken = copy.deepcopy(results)
        broken[kind][0].update(wrong)
        path.write_text(json.dumps(broken))
        with pytest.raises(BadFile, match=rf"is damaged: results.{kind}\[0\]"):
            regression.read_results(path)

    def test_the_outermost_figures_are_compared(self, results):
        sides = [copy.deepcopy(results) for _ in range(2)]
        for side, ends in zip(sides, [(1e-60, 1e-60, 1e60), (1e-60, 1e60, 1e60)], strict=True):
            side["comparisons"][0].update(ratio=ends[1], interval95=[ends[0], ends[2]])
            assert regression._unsound(side) is None
        for old, new in (sides, sides[::-1]):
            assert regression.compare_results(old, new).changes[0].verdict

    def test_a_tiny_ratio_is_not_written_as_none(self):
        found = Comparison("a", "b", "eager", "cpu", 1, 3.14159e-5, (3.1e-5, 3.2e-5), "-100 %")
        written = found.to_json()
        assert written["ratio"] == 3.142e-05
        assert written["interval95"] == [3.1e-5, 3.2e-5]

    def test_files_of_one_name_in_two_folders_are_kept_apart(self, results):
        old = other(results, ratio=1.02)
        twin = {**old["comparisons"][0], "target": "elsewhere/" + old["comparisons"][0]["target"]}
        old["comparisons"].append(twin)
        new = copy.deepcopy(old)
        new["comparisons"][0]["ratio"] = 1.2
        new["comparisons"][0]["interval95"] = [1.19, 1.21]
        first, second = regression.compare_results(old, new).changes
        assert first.change.ratio == pytest.approx(1.2 / 1.02)
        assert second.what == f"{first.what} (2)"
        with pytest.raises(TooSlow):
            regression.compare_results(old, new).check(0.03)

    def test_figures_have_the_digits_that_their_intervals_support(self, run, folder, results):
        vague = other(results, ratio=1.2345)
        vague["comparisons"][0]["interval95"] = [1.0, 1.4]
        for name in ("old.json", "new.json"):
            (folder / name).write_text(json.dumps(vague))
        out = run("bench", "--compare", "old.json", "new.json").out
        assert "1.23" in out
        assert "1.234" not in out

    def test_the_command(self, run, folder, results, refused):
        for name, ratio in (("old.json", 1.02), ("new.json", 1.09)):
            (folder / name).write_text(json.dumps(other(results, ratio=ratio)))
        files = ("--compare", "old.json", "new.json")
        assert "+6.9 %" in run("bench", *files).out
        assert run("bench", *files, "--fail-above", "10%").code == 0
        outcome = run("bench", *files, "--fail-above", "3%", "--json")
        assert outcome.code == 5
        assert json.loads(outcome.out)["changes"][0]["change"] == pytest.approx(1.0686, abs=1e-4)
        assert outcome.error.startswith("error: ")
        refused("bench", "--compare", "old.json", says=["takes two results files"], at_once=True)
        refused("bench", "old.json", "--fail-above", "3%", says=["goes with --compare"])
        for wrong in ("three", "-1", "nan"):
            refused("bench", *files, "--fail-above", wrong, says=["takes per cent, such as 3%"])


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag == "path"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


class TestFiles:
    def test_json(self, results, tmp_path):
        write_results(results, tmp_path / "r.json")
        assert json.loads((tmp_path / "r.json").read_text()) == results

    def test_csv(self, results, tmp_path):
        write_results(results, tmp_path / "r.csv")
        rows = list(csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text())))
        assert [row["target"] for row in rows] == [run["target"] for run in results["runs"]]
        assert float(rows[1]["ratio"]) == results["comparisons"][0]["ratio"]
        assert rows[0]["ratio"] == ""

    def test_a_file_against_itself_has_one_ratio_in_csv(self, results, tmp_path):
        twice = copy.deepcopy(results)
        for run in twice["runs"]:
            run["target"] = twice["comparisons"][0]["target"]
        write_results(twice, tmp_path / "r.csv")
        rows = list(csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text())))
        assert [bool(row["ratio"]) for row in rows] == [False, True]

    def test_markdown(self, results, tmp_path):
        results = copy.deepcopy(results)
        results["runs"][0]["doubts"] = ["spread: 20 %"]
        write_results(results, tmp_path / "r.md")
        text = (tmp_path / "r.md").read_text()
        assert results["comparisons"][0]["verdict"] in text
        assert results["environment"]["command"] in text
        assert "`features.5`" in text
        assert ": spread: 20 %" in text
        together, added = sums_in_words(results["sites"][0])
        assert f"| sum of all |  | {added} | all together: {together} |" in text
        assert "interrupted" not in text

    def test_markdown_tells_what_the_reader_has_to_know(self, results, tmp_path):
        results = copy.deepcopy(results)
        results["environment"]["notes"] = ["largest batch that fits: 8"]
        results["interrupted"] = True
        write_results(results, tmp_path / "r.md")
        text = (tmp_path / "r.md").read_text()
        assert "- note: largest batch that fits: 8\n" in text
        assert "- interrupted, or ended by an error: the rest was not measured\n" in text

    def test_html_is_whole_and_fetches_nothing(self, results, tmp_path):
        results = copy.deepcopy(results)
        results["runs"][0]["target"] = "<b>&"
        results["interrupted"] = True
        write_results(results, tmp_path / "r.html")
        page = _Page()
        page.feed((tmp_path / "r.html").read_text(encoding="utf-8"))
        assert page.open == []
        assert page.links == []
        text = " ".join(page.text)
        assert "Interrupted, or ended by an error" in text
        assert "<b>&" in text
        for heading in (
            "Time over the baseline",
            "Distributions",
            "Cost along the depth",
            "Operators",
        ):
            assert heading in text

    def test_no_percentage_leaves_the_page(self, results, tmp_path):
        write_results(results, tmp_path / "r.html")
        places = re.findall(r"left:(-?[\d.]+)%", (tmp_path / "r.html").read_text(encoding="utf-8"))
        assert places
        assert all(0 <= float(place) <= 100 for place in places)

    def test_no_axis_begins_before_zero(self):
        run = {"target": "a", "engine": "eager", "device": "cpu", "batch": 1, "precision": "fp32"}
        run |= {"channels_last": False, "train": False, "samples_ms": [0.1, 100.0]}
        page = "".join(charts.draw_distributions([run | {"p5_ms": 0.1, "p99_ms": 100}], {"a": "a"}))
        assert "<span>0 ms</span>" in page
        assert charts._Axis([{"interval95": (0.01, 9.0)}]).low == -100

    def test_targets_are_told_by_their_names_without_folders(self, results, tmp_path):
        write_results(results, tmp_path / "r.html")
        page = (tmp_path / "r.html").read_text(encoding="utf-8").partition("</pre>")[2]
        target = results["comparisons"][0]["target"]
        assert target not in page
        assert target.rpartition("/")[2] in page

    def test_names_keep_what_tells_them_apart(self):
        runs = [{"target": name} for name in ("a/x.pt", "b/x.pt", "c/y.pt", "timm:z")]
        assert short_names({"runs": runs, "comparisons": []}) == {
            **{"a/x.pt": "a/x.pt", "b/x.pt": "b/x.pt", "c/y.pt": "y.pt", "timm:z": "timm:z"}
        }

    def test_every_target_has_a_colour_of_its_own(self):
        colours = [charts._colour(number) for number in range(9)]
        assert len(set(colours)) == 9

    def test_columns_without_figures_are_left_out(self, results, tmp_path):
        write_results(results, tmp_path / "r.html")
        page = (tmp_path / "r.html").read_text(encoding="utf-8")
        assert "host MiB" in page
        assert "GPU MiB" not in page

    @pytest.mark.parametrize("form", ["png", "svg"])
    def test_pictures(self, results, tmp_path, form):
        pytest.importorskip("matplotlib")
        path = tmp_path / f"r.{form}"
        write_results(results, path)
        assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")

    def test_pictures_need_matplotlib(self, monkeypatch, refused, digits_file):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        refused("bench", digits_file, "-o", "r.png", says=["attnsurgeon[plot]"], at_once=True)

    def test_outputs_are_checked_first(self, refused, folder, digits_file):
        refused("bench", digits_file, "-o", "r.txt", says=["no form of results"], at_once=True)
        (folder / "r.json").write_text("x")
        refused("bench", digits_file, "-o", "r.json", says=["--force"], at_once=True)

    def test_one_that_is_named_twice_is_written_once(self, run, folder, digits_file):
        outcome = run("bench", digits_file, *QUICK, "-o", "r.json", "-o", "./r.json")
        assert outcome.code == 0
        assert json.loads((folder / "r.json").read_text())["runs"]

    def test_what_was_measured_is_shown_though_it_cannot_be_written(
        self, run, folder, digits_file, monkeypatch
    ):
        def full(*args, **options):
            raise OutputRefused("no space left")

        monkeypatch.setattr("attnsurgeon.report.files.write_results", full)
        outcome = run("bench", digits_file, *QUICK, "-o", "r.json", "--json")
        assert outcome.code == 2
        assert "no space left" in outcome.err
        assert len(json.loads(outcome.out)["runs"]) == 2

    def test_one_that_cannot_be_written_leaves_the_others_theirs(
        self, run, folder, measured, monkeypatch
    ):
        def picky(results, path, **options):
            if path.name == "a.json":
                raise OutputRefused("no space left")
            write_results(results, path, **options)

        monkeypatch.setattr("attnsurgeon.report.files.write_results", picky)
        outcome = run("bench", "digits", "-o", "a.json", "-o", "b.json", "-o", "c.csv")
        assert outcome.code == 2
        assert "no space left" in outcome.err
        assert misfit(json.loads((folder / "b.json").read_text())) is None
        assert (folder / "c.csv").read_text().count("\n") == 3

    @pytest.mark.parametrize("words", [(), ("--json",)])
    def test_a_reader_that_has_seen_enough_leaves_the_files_theirs(
        self, run, folder, measured, monkeypatch, words
    ):
        def ended(*things):
            raise typer.Exit(141)

        monkeypatch.setattr("attnsurgeon.cli.bench.say", ended)
        monkeypatch.setattr("attnsurgeon.cli.bench.say_json", ended)
        assert run("bench", "digits", *words, "-o", "r.json").code == 141
        assert misfit(json.loads((folder / "r.json").read_text())) is None

    def test_several_at_once(self, run, folder, digits_file):
        outcome = run("bench", digits_file, *QUICK, "-o", "r.json", "-o", "r.html")
        assert outcome.code == 0
        data = json.loads((folder / "r.json").read_text())
        words = data["environment"]["command"]
        assert words.startswith(f"attnsurgeon bench {digits_file} --seconds 0.1")
        assert data["comparisons"][0]["verdict"] in " ".join(outcome.out.split())
        assert (folder / "r.html").is_file()


class TestCommand:
    def test_axes_reach_the_bench(self, run, digits_file, monkeypatch):
        seen = {}

        def spy(targets, **options):
            seen.update(options)
            raise BadOption("seen")

        monkeypatch.setattr("attnsurgeon.bench.compare.compare_speed", spy)
        run(
            *("bench", digits_file, "--batch", "1", "8", "max", "--precision", "fp32", "bf16"),
            *("--channels-last", "--train", "--per-site", "--profile", "--engine", "eager"),
            *("--input-size", "32,48", "--threads", "2", "--seconds", "3", "--device", "cpu"),
        )
        del seen["progress"], seen["command"]
        assert seen == {
            "engines": ("eager",),
            "device": "cpu",
            "batches": (1, 8, "max"),
            "threads": 2,
            "seconds": 3.0,
            "input_size": (32, 48),
            "precisions": ("fp32", "bf16"),
            "channels_last": True,
            "train": True,
            "per_site": True,
            "profile": True,
        }

    def test_what_goes_wrong_is_one_line(self, refused, digits_file):
        for words, says in (
            (("--batch", "0"), "--batch must be at least 1, not 0"),
            (("--batch", "-1"), "--batch must be at least 1, not -1"),
            (("--batch", "many"), "--batch takes whole numbers or max, not 'many'"),
            (("--threads", "0"), "--threads must be at least 1"),
            (("--seconds", "-2"), "--seconds must be above 0"),
            (("--seconds", "inf"), "--seconds must be above 0 and finite, not inf"),
            (("--engine", "eager", "onnx"), "no engine is called 'onnx'; did you mean"),
            (("--precision", "fp8"), "no precision is called 'fp8'"),
            (("--engine", "cudagraphs", "--device", "cpu"), "cudagraphs needs a CUDA device"),
        ):
            refused("bench", digits_file, *words, says=[says], at_once=True)
        refused("bench", says=["name at least one target"], at_once=True)

    @pytest.mark.parametrize(
        "words", [("-o", "r.json"), ("--seconds", "3"), ("--engine", "eager"), ("--train",)]
    )
    def test_options_that_a_comparison_leaves_unused_are_refused(self, refused, words):
        says = ["is of a measurement; leave it or --compare out"]
        refused("bench", "--compare", "old.json", "new.json", *words, says=says, at_once=True)

    def test_an_interrupt_keeps_what_was_measured(self, run, folder, digits_file, monkeypatch):
        report = compare_speed([digits_file], seconds=0.1, threads=1, device="cpu")

        def stop(*args, **options):
            raise BenchInterrupted(report)

        monkeypatch.setattr("attnsurgeon.bench.compare.compare_speed", stop)
        outcome = run("bench", digits_file, "-o", "r.json")
        assert outcome.code == 130
        assert "what was measured before stands above and is in r.json" in outcome.err
        assert "error" not in outcome.err
        assert report.comparisons[0].verdict in " ".join(outcome.out.split())
        assert misfit(json.loads((folder / "r.json").read_text())) is None

    @pytest.mark.parametrize("error", [EngineUnavailable("it fell back"), KeyError("a bug")])
    def test_an_error_keeps_what_was_measured(self, run, folder, digits_file, monkeypatch, error):
        own = session.run_job

        def breaks(lineup, wanted, *args):
            if wanted.engine == "torchscript":
                raise error
            own(lineup, wanted, *args)

        monkeypatch.setattr(session, "run_job", breaks)
        words = ("--engine", "eager", "torchscript", "--seconds", "0.05", "-o", "r.json")
        if isinstance(error, EngineUnavailable):
            outcome = run("bench", digits_file, *words)
            assert outcome.code == 2
            assert "what was measured before stands above and is in r.json" in outcome.err
        else:
            with pytest.raises(KeyError, match="a bug"):
                run("bench", digits_file, *words)
        kept = json.loads((folder / "r.json").read_text())
        assert misfit(kept) is None
        assert kept["interrupted"]
        assert {one["engine"] for one in kept["runs"]} == {"eager"}

    def test_an_error_at_once_leaves_nothing(self, run, folder, digits_file, monkeypatch):
        def breaks(*args):
            raise EngineUnavailable("eager is not there")

        monkeypatch.setattr(session, "run_job", breaks)
        outcome = run("bench", digits_file, "-o", "r.json")
        assert outcome.code == 2
        assert outcome.err.splitlines()[-1] == "error: eager is not there"
        assert not (folder / "r.json").exists()


class TestLive:
    def test_a_terminal_shows_the_ratio_so_far(self):
        page = io.StringIO()
        console = Console(file=page, force_terminal=True, width=120)
        with live_progress(pytest.fail, console) as tell:
            tell("eager, batch 1: measuring: +6.2 % [5.1, 7.4]", 0.5)
        assert "+6.2 % [5.1, 7.4]" in page.getvalue()
        assert "50%" in page.getvalue()

    def test_a_file_gets_one_line_for_each_step(self):
        said = []
        with live_progress(said.append, Console(file=io.StringIO())) as tell:
            for text, share in (
                ("eager, batch 1: preparing x", 0.0),
                ("eager, batch 1: measuring", 0.1),
                ("eager, batch 1: measuring: +6 %", 0.2),
                ("eager, batch 1: measuring: +5 %", 0.3),
                ("done", 1.0),
            ):
                tell(text, share)
        assert [line.split("% ")[1] for line in said] == [
            "eager, batch 1: preparing x",
            "eager, batch 1: measuring",
            "done",
        ]


class TestSites:
    def test_every_site_is_in_and_out(self, results, digits_file):
        (costs,) = results["sites"]
        assert [site["path"] for site in costs["sites"]] == ["features.5", "features.6"]
        assert {tuple(site["shape"]) for site in costs["sites"]} == {(24, 8, 8)}
        assert {site["block"] for site in costs["sites"]} == {"se"}
        alone = sum(site["alone_in"]["ratio"] - 1 for site in costs["sites"])
        assert costs["sum_alone_in"] == pytest.approx(alone, abs=2e-4)

    def test_an_interrupt_keeps_the_job_and_the_sites_before(self, digits_file):
        def stop(text, share):
            if text.endswith("site features.6"):
                raise KeyboardInterrupt

        with pytest.raises(BenchInterrupted) as caught:
            compare_speed(
                [digits_file], seconds=0.05, threads=1, device="cpu", per_site=True, progress=stop
            )
        report = caught.value.report
        assert len(report.runs) == 2
        assert len(report.comparisons) == 1
        (costs,) = report.sites
        assert [site.path for site in costs.sites] == ["features.5"]
        assert costs.doubts[0].startswith("incomplete: 1 of 2 sites were timed")

    def test_too_little_memory_for_the_sites_keeps_the_times(self, digits_file, monkeypatch):
        def scarce(*args):
            raise MemoryError

        monkeypatch.setattr(job, "cost_sites", scarce)
        report = compare_speed([digits_file], seconds=0.05, threads=1, device="cpu", per_site=True)
        assert len(report.comparisons) == 1
        assert report.failures[0].reason.endswith("eager, fp32, with --per-site or --profile")

    def test_what_is_timed_has_that_attention_alone_and_its_gates_open(self, digits_file):
        target = read_targets([digits_file])[1]
        both = ["features.5", "features.6"]
        rest = per_site._without(target, both[:1]).module
        assert [cut.path for cut in cuts_of(rest)] == both[1:]
        assert all(bool(gate.any()) for gate in gates(rest).values())
        assert cuts_of(per_site._without(target, both).module) == ()
        assert per_site._without(target, []) is target

    def test_a_plain_network_has_no_sites(self):
        with pytest.raises(BadOption, match="--per-site needs a network with attention"):
            compare_speed(["digits"], per_site=True, seconds=0.1, device="cpu")

    def test_the_sum_has_an_interval_of_its_own(self):
        def site(ratio, half):
            return {"alone_in": {"ratio": ratio, "interval95": [ratio - half, ratio + half]}}

        costs = {
            "whole": 0.07,
            "whole95": [0.06, 0.08],
            "sum_alone_in": 0.06,
            "sites": [site(1.03, 0.003), site(1.03, 0.004)],
        }
        assert sums_in_words(costs) == ("+7.0 % [6.0, 8.0]", "+6.0 % [5.5, 6.5]")


class TestProfile:
    def test_the_engines_own_operators(self, results):
        host, own = results["profiles"]
        names = {operator["name"] for operator in own["operators"]}
        assert "aten::sigmoid" in names - {operator["name"] for operator in host["operators"]}
        assert sum(o["share"] for o in own["operators"]) == pytest.approx(1, abs=0.01)
        costs = [operator["ms"] for operator in own["operators"]]
        assert costs == sorted(costs, reverse=True)

    def test_onnxruntime_has_its_own_profiler(self, tiny_onnx, capfd):
        report = compare_speed(
            [tiny_onnx], engines=("onnxruntime",), profile=True, seconds=0.1, device="cpu",
            input_size=(8, 8),
        )  # fmt: skip
        names = {operator.name for operator in report.profiles[0].operators}
        assert names & {"Conv", "FusedConv"}
        assert capfd.readouterr().err == ""


def test_doubts_that_the_ratio_told_are_not_told_again(results):
    changed = copy.deepcopy(results)
    for found in (*changed["comparisons"], *changed["runs"], *changed["sites"]):
        found["doubts"] = ["other load: 1"]
    changed["runs"][0]["doubts"].append("spread: 20 %")
    changed["sites"][0]["doubts"].append("not stable: at features.5")
    told = doubts_of_runs(changed)
    assert [doubt for _, doubt in told] == ["spread: 20 %", "not stable: at features.5"]
    assert told[1][0].startswith("sites of ")


def test_estimates_divide(results):
    quotient = regression._quotient(Estimate(1.1, 1.09, 1.11), Estimate(1.0, 0.99, 1.01))
    assert quotient.low < 1.1 < quotient.high


def test_matplotlib_is_asked_for_by_name(monkeypatch):
    from attnsurgeon.report.plot import check_matplotlib

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="pip install"):
        check_matplotlib()
