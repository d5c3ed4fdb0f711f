"""Engines: each runs what it says it runs, or fails."""

import dataclasses

import onnxruntime
import pytest
import torch

import attnsurgeon
from attnsurgeon import bench, compare_speed
from attnsurgeon.bench import engines, environment, exported, inputs, ready, targets
from attnsurgeon.bench.engines import onnx_runtime
from attnsurgeon.bench.request import check_request
from attnsurgeon.cli import bench as cli_bench
from attnsurgeon.cost import multiply_adds
from attnsurgeon.errors import (
    BadOption,
    EngineUnavailable,
    HostUnusable,
)
from attnsurgeon.export.onnx import write_onnx
from attnsurgeon.export.torchscript import make_torchscript
from tests.networks import IMAGE, QUICK, SIZES, Residual, Tiny


class TestExportedFiles:
    def test_onnx_alone(self, tiny_onnx):
        report = compare_speed([tiny_onnx], engines=("onnxruntime",), **QUICK, input_size=(20, 24))
        (run,) = report.runs
        assert report.comparisons == ()
        assert run.provider == "CPUExecutionProvider"
        assert run.file_bytes >= tiny_onnx.stat().st_size
        model = Tiny()
        assert run.macs == multiply_adds(model, (torch.zeros(1, 3, 20, 24),))
        own = sum(p.numel() for p in model.parameters())
        assert own <= run.parameters <= own + 8  # constants of the graph
        assert "Relu" in run.uncounted
        assert "Conv" not in run.uncounted
        assert run.bandwidth_share > 0
        assert run.arithmetic_share > 0
        assert "gates, if it has any, as they are in the file" in report.environment["notes"][0]

    def test_data_beside_the_file_counts(self, tmp_path):
        import onnx

        path = tmp_path / "apart.onnx"
        write_onnx(Tiny().eval(), (torch.randn(2, 3, 20, 24),), path)
        onnx.save(
            onnx.load(path), path, save_as_external_data=True, location="apart.data",
            size_threshold=200,
        )  # fmt: skip
        report = compare_speed([path], engines=("onnxruntime",), input_size=(8, 8), **QUICK)
        both = path.stat().st_size + (tmp_path / "apart.data").stat().st_size
        assert report.runs[0].file_bytes == both > path.stat().st_size

    def test_torchscript_tells_its_size(self, tiny_script):
        report = compare_speed([tiny_script], engines=("torchscript",), **QUICK)
        (run,) = report.runs
        model = Tiny()
        assert run.macs == multiply_adds(model, (torch.zeros(1, 3, 20, 24),))
        assert run.parameters == sum(p.numel() for p in model.parameters())
        assert run.provider is None

    def test_gates_of_our_own_torchscript_are_opened(self, tmp_path):
        operated = attnsurgeon.insert_attention(Residual(), "se", example=IMAGE)
        scripted = make_torchscript(operated.eval(), (IMAGE,))
        for recipe, is_open in (("{}", True), ("", False)):
            path = tmp_path / f"{is_open}.pt"
            scripted.save(str(path), _extra_files={"attnsurgeon": recipe, "input_size": SIZES})
            (target,) = targets.read_targets([path])
            gates = [p for n, p in target.module.named_parameters() if n.endswith(".openness")]
            assert [bool(gate.any()) for gate in gates] == [is_open]
            assert not is_open or 0.25 <= gates[0].item() <= 0.75
            request = check_request(("torchscript",), "cpu", (1,), 1, 1.0, None)
            notes = environment.describe(request, [target], [], "")["notes"]
            assert any("gates, if it has any, as they are" in note for note in notes) != is_open

    def test_gates_of_our_own_onnx_file_are_opened(self, tmp_path):
        operated = attnsurgeon.insert_attention(Residual(), "se", example=IMAGE)
        path = tmp_path / "own.onnx"
        attnsurgeon.export_model(operated, path)
        before = path.read_bytes()
        (target,) = targets.read_targets([path])
        assert target.is_opened
        assert len(target.patches) == len(attnsurgeon.gates(operated)) > 0
        place = engines.engine.Place(torch.device("cpu"), threads=1, folder=tmp_path)
        targets._open(attnsurgeon.gates(operated).values())
        closed = dataclasses.replace(target, patches=())
        found, shut = (
            onnx_runtime.run_onnxruntime(each, (IMAGE,), place).first()[0]
            for each in (target, closed)
        )
        with torch.no_grad():
            wanted = operated.eval()(IMAGE)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(shut, wanted, rtol=1e-3, atol=1e-4)
        assert path.read_bytes() == before

    def test_a_file_of_another_author_keeps_its_gates(self, tmp_path):
        operated = attnsurgeon.insert_attention(Residual(), "se", example=IMAGE)
        write_onnx(operated.eval(), (torch.cat([IMAGE, IMAGE]),), tmp_path / "other.onnx")
        (target,) = targets.read_targets([tmp_path / "other.onnx"])
        assert not target.is_opened
        assert target.patches == ()

    def test_a_network_against_its_export(self, tiny_onnx):
        report = compare_speed([tiny_onnx, Tiny()], engines=("onnxruntime",), **QUICK)
        assert [run.provider for run in report.runs] == ["CPUExecutionProvider"] * 2
        assert len(report.comparisons) == 1

    def test_a_size_that_one_of_them_knows_goes_for_all(self, tiny_script):
        known, guessed = (
            targets.Target("x", (torch.zeros(1, 3, *size),), "file", is_sized=is_sized)
            for size, is_sized in (((20, 24), True), ((224, 224), False))
        )
        for pair in ([known, guessed], [guessed, known]):
            assert inputs.common_example(pair, None)[0].shape == (1, 3, 20, 24)

    def test_fixed_axes(self, tmp_path):
        path = tmp_path / "fixed.onnx"
        write_onnx(Tiny().eval(), (torch.randn(1, 3, 20, 24),), path, dynamic=False)
        ort = {"engines": ("onnxruntime",), **QUICK}
        assert compare_speed([path], **ort).runs[0].batch == 1
        for wrong, says in (
            ({"batches": (1, 2)}, "takes batches of 1 only, not 2; give --batch 1"),
            ({"batches": ("max",)}, "takes batches of 1 only, not max; give --batch 1"),
            ({"input_size": (24, 24)}, "takes inputs of 1x3x20x24 only, not 1x3x24x24"),
        ):
            with pytest.raises(BadOption, match=says):
                compare_speed([path], **ort, **wrong)

    def test_a_batch_that_is_fixed_at_more_than_one_image(self, tmp_path):
        path = tmp_path / "four.onnx"
        write_onnx(Tiny().eval(), (torch.randn(4, 3, 20, 24),), path, dynamic=False)
        (run,) = compare_speed([path], engines=("onnxruntime",), batches=(4,), **QUICK).runs
        assert run.batch == 4
        assert run.macs == multiply_adds(Tiny(), (torch.zeros(1, 3, 20, 24),))


class TestOnnxRuntime:
    def test_idle_sessions_hold_still_and_threads_are_set(self, tiny_onnx):
        options = exported.session_for(tiny_onnx, threads=2).get_session_options()
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"
        assert options.intra_op_num_threads == 2

    def test_a_move_makes_a_new_session(self, tiny_onnx, monkeypatch):
        made, ran = [], []

        class Session:
            def __init__(self, path, **options):
                made.append(options)
                self.number = len(made)

            def get_providers(self):
                return ["CPUExecutionProvider"]

            def get_inputs(self):
                return []

            def io_binding(self):
                return self.number

            def get_outputs(self):
                return []

            def run_with_iobinding(self, number):
                ran.append(number)

        (target,) = targets.read_targets([tiny_onnx])
        monkeypatch.setattr(onnx_runtime, "session_for", Session)
        place = engines.Place(torch.device("cpu"), 3, tiny_onnx.parent)
        runner = engines.get("onnxruntime").prepare(target, (), place)
        runner.call()
        runner.move()
        runner.call()
        assert ran == [1, 2]
        assert [(one["threads"], one["provider"]) for one in made] == [
            (3, "CPUExecutionProvider")
        ] * 2

    def test_a_fallback_fails(self, tiny_onnx, monkeypatch):
        monkeypatch.setattr(
            onnxruntime.InferenceSession, "get_providers", lambda self: ["AzureExecutionProvider"]
        )
        with pytest.raises(EngineUnavailable, match="fell back to AzureExecutionProvider"):
            compare_speed([tiny_onnx], engines=("onnxruntime",), **QUICK)

    def test_a_product_on_another_provider_is_a_fallback(self):
        class Node:
            op_type = "Conv"

        class Part:
            ep_name = "CPUExecutionProvider"

            def get_nodes(self):
                return [Node, Node]

        class Session:
            def get_providers(self):
                return ["CUDAExecutionProvider", "CPUExecutionProvider"]

            def get_provider_graph_assignment_info(self):
                return [Part()]

        with pytest.raises(EngineUnavailable, match="fell back to CPUExecutionProvider for 2 Conv"):
            onnx_runtime.check_assigned(Session(), "CUDAExecutionProvider")
        Node.op_type = "Shape"  # those are meant to run there
        onnx_runtime.check_assigned(Session(), "CUDAExecutionProvider")

    def test_not_installed(self, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(EngineUnavailable, match="not installed: pip install onnxruntime"):
            engines.get("onnxruntime").check(torch.device("cpu"))

    def test_tensorrt_is_not_installed(self):
        if onnx_runtime.TENSORRT in onnxruntime.get_available_providers():
            pytest.skip("it is")
        with pytest.raises(EngineUnavailable, match="pip install tensorrt"):
            engines.get("onnxruntime-tensorrt").check(torch.device("cuda", 0))

    def test_providers_get_their_options(self):
        cpu = exported._providers("CPUExecutionProvider", 0, False)
        cuda = exported._providers("CUDAExecutionProvider", 1, True)
        both = exported._providers(onnx_runtime.TENSORRT, 1, False)
        assert cpu == ["CPUExecutionProvider"]
        assert cuda == [("CUDAExecutionProvider", {"device_id": 1, "use_tf32": "1"})]
        assert [name for name, _ in both] == [onnx_runtime.TENSORRT, "CUDAExecutionProvider"]

    def test_no_bfloat16(self):
        with pytest.raises(EngineUnavailable, match="no bfloat16 from Python: leave Tiny"):
            compare_speed(
                [Tiny().bfloat16()], engines=("onnxruntime",), input_size=(16, 16), **QUICK
            )

    def test_no_cuda_provider(self):
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("onnxruntime-gpu is installed")
        with pytest.raises(EngineUnavailable, match="pip install onnxruntime-gpu"):
            engines.get("onnxruntime").check(torch.device("cuda", 0))

    def test_all_batches_run_one_export(self, monkeypatch):
        written = []

        def counted(model, inputs, path):
            written.append(path)
            write_onnx(model, inputs, path)

        monkeypatch.setattr(onnx_runtime, "write_onnx", counted)
        report = compare_speed(
            [Tiny(), Tiny()], engines=("onnxruntime",), batches=(1, 3), input_size=(20, 24), **QUICK
        )
        assert len(report.runs) == 4
        assert len(set(written)) == len(written) == 2


class TestCompile:
    @pytest.mark.parametrize(
        ("engine", "mode"), [("compile", None), ("compile-max-autotune", "max-autotune")]
    )
    def test_the_mode_reaches_the_compiler(self, engine, mode, monkeypatch):
        asked = []

        def spy(function, **options):
            asked.append(options)
            return compile_(function, **{**options, "mode": None}, backend="eager")

        compile_ = torch.compile
        monkeypatch.setattr(torch, "compile", spy)
        for train in (False, True):
            (run,) = compare_speed(
                [Tiny()], engines=(engine,), input_size=(8, 8), train=train, **QUICK
            ).runs
            assert run.first_run_ms > run.median_ms  # it compiles then
        assert asked == [{"dynamic": False, "mode": mode}] * 2

    def test_it_compiles_once_and_is_timed(self):
        from torch._dynamo.utils import counters

        before = counters["stats"]["unique_graphs"]
        try:
            report = compare_speed(
                [Tiny(), Tiny()], engines=("compile",), input_size=(8, 8), **QUICK
            )
        except EngineUnavailable as error:
            pytest.skip(str(error))
        assert len(report.runs) == 2
        assert counters["stats"]["unique_graphs"] == before + 2  # moving compiles nothing anew

    def test_a_network_left_uncompiled_fails(self):
        class Shy(Tiny):
            @torch.compiler.disable
            def forward(self, x):
                return super().forward(x)

        with pytest.raises(EngineUnavailable, match=r"Shy (uncompiled)?"):
            compare_speed([Shy()], engines=("compile",), input_size=(8, 8), **QUICK)

    def test_no_compiler(self, monkeypatch):
        def broken(function, **options):
            def raises(*inputs):
                raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

            return raises

        monkeypatch.setattr(torch, "compile", broken)
        with pytest.raises(EngineUnavailable, match=r"install g\+\+"):
            compare_speed([Tiny()], engines=("compile",), input_size=(8, 8), **QUICK)


@pytest.fixture(scope="module")
def exported_residual(tmp_path_factory):
    """Return an operated network, and the files that export wrote of it."""
    folder = tmp_path_factory.mktemp("exports")
    operated = attnsurgeon.insert_attention(Residual(), "se", example=IMAGE)
    for gate in attnsurgeon.gates(operated).values():
        torch.nn.init.constant_(gate, 0.5)
    for suffix in ("onnx", "pt", "pt2"):
        attnsurgeon.export_model(operated, folder / f"d.{suffix}", example=IMAGE)
    attnsurgeon.export_model(operated, folder / "frozen.pt", example=IMAGE, optimize=True)
    return operated, folder


class TestExports:
    """Every engine that takes a file, on files that export wrote."""

    @pytest.mark.parametrize(
        ("engine", "suffix"),
        [
            ("onnxruntime", "onnx"),
            ("torchscript", "pt"),
            ("torchscript-frozen", "pt"),
            ("eager", "pt2"),
        ],
    )
    def test_alone_and_against_the_network(self, exported_residual, engine, suffix):
        operated, folder = exported_residual
        path = folder / f"d.{suffix}"
        report = compare_speed([path, operated], engines=(engine,), **QUICK)
        assert [run.target for run in report.runs] == [str(path), "Residual"]
        assert {run.engine for run in report.runs} == {engine}
        assert all(run.median_ms > 0 for run in report.runs)
        assert not any("folded" in doubt for run in report.runs for doubt in run.doubts)

    def test_an_onnx_file_whose_attention_is_left_out_is_doubted(self, exported_residual):
        (target,) = targets.read_targets([exported_residual[1] / "d.onnx"])
        image = torch.randn(2, *IMAGE.shape[1:])
        shut = [(start, bytes(len(raw))) for start, raw in target.patches]
        opened, closed = (
            ready._outputs_of_file(target, (image,), patches) for patches in (target.patches, shut)
        )
        assert ready.gates_doubt(target, (image,), opened) is None
        assert "folded away" in ready.gates_doubt(target, (image,), closed)

    def test_a_batch_that_an_exporter_fixed_without_a_word(self, tmp_path):
        class Fixed(Tiny):
            def forward(self, x):
                return super().forward(x).view(1, 4)

        path = tmp_path / "one.pt"
        with pytest.warns((DeprecationWarning, FutureWarning)):
            torch.jit.trace(Fixed().eval(), torch.zeros(1, 3, 20, 24)).save(str(path))
        with pytest.raises(
            HostUnusable, match="does not run on a batch of 2: .*; give the --batch"
        ):
            compare_speed(
                [path], engines=("torchscript",), batches=(2,), input_size=(20, 24), **QUICK
            )

    def test_frozen_weights_are_counted(self, exported_residual):
        operated, folder = exported_residual
        (run,) = compare_speed([folder / "frozen.pt"], engines=("torchscript",), **QUICK).runs
        own = sum(p.numel() for p in operated.parameters())
        assert 0.9 * own < run.parameters < 1.1 * own
        assert run.macs == multiply_adds(operated, (IMAGE,))
        assert "equal" not in run.uncounted  # of the compiler, which compares constants

    def test_a_frozen_file_takes_the_channels_of_its_first_convolution(self, tmp_path):
        path = tmp_path / "grey.pt"
        scripted = make_torchscript(Tiny(channels=1).eval(), (torch.zeros(2, 1, 8, 8),))
        with pytest.warns(FutureWarning):
            torch.jit.freeze(scripted).save(str(path))
        (target,) = targets.read_targets([path])
        assert target.example[0].shape == (1, 1, 224, 224)


class TestFrozen:
    def test_weights_are_constants_and_a_move_renews_them(self, tmp_path):
        (target,) = targets.read_targets([Tiny()])
        image = (torch.randn(1, 3, 8, 8),)
        place = engines.Place(torch.device("cpu"), 1, tmp_path)
        runner = engines.get("torchscript-frozen").prepare(target, image, place)
        with torch.inference_mode():
            before = runner.call()
        runner.move()
        with torch.inference_mode():
            assert torch.allclose(runner.call(), before, atol=1e-6)
            assert torch.allclose(before, target.module(*image), atol=1e-5)


class TestAheadOfTime:
    def test_a_library_of_its_own(self, digits_file, tmp_path):
        """Of what `insert` wrote, with its gates open."""
        _, target = targets.read_targets([digits_file])
        inputs = (torch.randn(2, *target.example[0].shape[1:]),)
        place = engines.Place(torch.device("cpu"), 1, tmp_path)
        import torch._inductor.config as inductor

        try:
            with inductor.patch("aot_inductor.compile_wrapper_opt_level", "O0"):  # sooner done
                runner = engines.get("aotinductor").prepare(target, inputs, place)
        except EngineUnavailable as error:
            pytest.skip(str(error))
        with torch.inference_mode():
            before = runner.call()
            want = target.module(*inputs)
            assert (before - want).abs().max() <= 1e-6 * want.abs().max()
            assert not torch.allclose(
                before, attnsurgeon.load_model(digits_file)(*inputs), atol=1e-3
            )
        runner.move()
        with torch.inference_mode():
            assert torch.equal(runner.call(), before)
        assert list(tmp_path.glob("*.pt2"))

    def test_no_compiler(self, monkeypatch, tmp_path):
        def broken(*args, **options):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", broken)
        with pytest.raises(EngineUnavailable, match=r"AOTInductor needs a C\+\+ compiler"):
            compare_speed([Tiny()], engines=("aotinductor",), input_size=(8, 8), **QUICK)


class TestCudaGraphs:
    @pytest.mark.parametrize("name", ["cudagraphs", "compile-cudagraphs", "onnxruntime-tensorrt"])
    def test_they_need_cuda(self, name):
        with pytest.raises(EngineUnavailable, match=f"{name} needs a CUDA device"):
            compare_speed([Tiny()], engines=(name,), **QUICK)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("train", [False, True])
    def test_a_replay_computes_the_same(self, train, tmp_path):
        (target,) = targets.read_targets([Tiny()])
        inputs = (torch.randn(2, 3, 8, 8, device="cuda"),)
        place = engines.Place(torch.device("cuda", 0), 1, tmp_path, train=train)
        runner = engines.get("cudagraphs").prepare(target, inputs, place)
        output = runner.first()
        assert torch.allclose(output.cpu(), target.module(inputs[0].cpu()), atol=1e-3)
        runner.move()
        runner.call()


class TestEngines:
    def test_their_names(self):
        # the command line knows them without torch, whose import --help must not wait for
        assert sorted(cli_bench.ENGINES) == bench.engine_names()

    @pytest.mark.parametrize("name", ["eager", "torchscript"])
    def test_a_move_takes_new_memory_and_computes_the_same(self, name, tmp_path):
        (target,) = targets.read_targets([Tiny()])
        inputs = (torch.randn(1, 3, 20, 24),)
        place = engines.Place(torch.device("cpu"), 1, tmp_path)
        runner = engines.get(name).prepare(target, inputs, place)
        with torch.inference_mode():
            before = runner.call()
        places = {p.data_ptr() for p in target.module.parameters()}
        runner.move()
        assert places.isdisjoint({p.data_ptr() for p in target.module.parameters()})
        with torch.inference_mode():
            assert torch.equal(runner.call(), before)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("name", ["eager", "torchscript"])
    def test_cuda_is_timed_by_events(self, name, digits_file):
        report = compare_speed([digits_file], engines=(name,), device="cuda", seconds=0.3)
        assert {run.device for run in report.runs} == {"cuda:0"}
        assert all(run.median_ms > 0 for run in report.runs)
        assert report.environment["gpu"]
