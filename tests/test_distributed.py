"""Training goes on unchanged under every wrapper of PyTorch, in one process and in two."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import attnsurgeon
from attnsurgeon import digits
from attnsurgeon.store import save_model
from tests import hosts, parallel

IMAGES, LABELS = (part[:16] for part in digits.held_out())
# The sums of two halves against one sum, in float64, over five steps.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(scope="module")
def start():
    return parallel.network()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def two_processes(folder, start, digits_file):
    """Return what two processes printed; they are started once for all tests."""
    save_model(start, folder / "start.safetensors")
    shutil.copy(digits_file, folder / "operated.safetensors")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, "-m", "tests.parallel", str(folder)],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shares(two_processes, folder):
    """Return what each of the two ended with."""
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(start):
    model = copy.deepcopy(start)
    parallel.train(model)
    return parallel.results(model)


@pytest.fixture(scope="module")
def alone_in_train_mode(start):
    model = parallel.in_train_mode(start)
    parallel.train(model)
    return parallel.results(model)


class TestTwoProcesses:
    @pytest.mark.parametrize("form", ["ddp", "static_graph", "fully_shard"])
    @pytest.mark.parametrize("what", ["weights", "gradients"])
    def test_they_agree_with_one(self, shares, alone, form, what):
        self.agree([share[form][what] for share in shares], alone[what])

    @pytest.mark.parametrize("what", ["weights", "gradients", "buffers"])
    def test_synchronised_norms_agree_with_those_of_one(self, shares, alone_in_train_mode, what):
        self.agree([share["sync_batchnorm"][what] for share in shares], alone_in_train_mode[what])

    def agree(self, both, alone):
        assert both[0].keys() == alone.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(both[0][name], tensor, **CLOSE, msg=name)
            assert torch.equal(both[0][name], both[1][name]), name

    def test_at_every_placement_they_agree_with_one(self, shares):
        both = [share["placements"]["gradients"] for share in shares]
        alone = hosts.operate("resnet18", opened=False)
        cross_entropy(alone(hosts.image(4)), torch.tensor([1, 2, 1, 2])).backward()
        for name, parameter in alone.named_parameters():
            assert torch.equal(both[0][name], both[1][name]), name
            # One sum over the batch against the mean of two, in float32.
            torch.testing.assert_close(both[0][name], parameter.grad, rtol=1e-3, atol=1e-5)

    def test_that_means_something(self, start, alone, shares):
        """Every gate and nearly every weight moved by far more than the tolerance."""
        before = dict(start.named_parameters())
        moved = {n: (alone["weights"][n] - p).abs().max().item() for n, p in before.items()}
        assert all(moved[name] > 1e-6 for name in attnsurgeon.gates(start))
        assert sum(change > 1e-6 for change in moved.values()) > 0.9 * len(moved)
        one_half = copy.deepcopy(start)
        parallel.train(one_half, slice(0, parallel.BATCH // 2))
        weights = parallel.results(one_half)["weights"]
        with pytest.raises(AssertionError):
            self.agree([shares[0]["ddp"]["weights"]] * 2, weights)

    def test_a_frozen_host_stays(self, start, shares):
        weights = shares[0]["frozen"]["weights"]
        for name, before in start.named_parameters():
            assert torch.equal(weights[name], before) != (name in attnsurgeon.gates(start)) or (
                ".attention_post" in name
            )

    @pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # which is meant here
    def test_a_sharded_checkpoint_loads_into_one_process(self, start, shares, folder):
        model = copy.deepcopy(start)
        optimizer = parallel.optimizer_of(model)
        model(IMAGES.double()).sum().backward()
        optimizer.step()
        state, steps = get_state_dict(model, optimizer)
        read = {"model": state, "optimizer": steps}
        dcp.load(read, checkpoint_id=folder / "sharded")
        set_state_dict(
            model, optimizer, model_state_dict=read["model"], optim_state_dict=read["optimizer"]
        )
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, shares[0]["fully_shard"]["weights"][name]), name
        assert optimizer.state[next(iter(attnsurgeon.gates(model).values()))][
            "momentum_buffer"
        ].any()

    def test_a_sharded_network_is_not_saved_as_it_is(self, shares, folder):
        assert not (folder / "never.safetensors").exists()

    def test_the_example(self, two_processes, folder):
        assert two_processes.count("epoch 1/1: loss") == 1  # the first process alone tells
        trained = attnsurgeon.load_model(folder / "finetuned" / "trained.safetensors")
        assert all(gate.item() != 0 for gate in attnsurgeon.gates(trained).values())

    def test_the_example_refuses_more_processes_than_the_data_fill(self, two_processes, folder):
        says = "refused: 4 training images do not fill one batch of 3 in each of 2 processes"
        assert two_processes.count(says) == 2
        assert not (folder / "refused").exists()


class TestOneProcess:
    """Three steps under a wrapper; what they end with is what they end with without it."""

    def end(self, model, forward, steps=3):
        optimizer = parallel.optimizer_of(model)
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(forward(IMAGES.double()), LABELS).backward()
            optimizer.step()
        return {name: p.detach() for name, p in model.named_parameters()}

    @pytest.fixture
    def plain(self, start):
        model = copy.deepcopy(start)
        return self.end(model, model)

    def test_gradient_checkpointing(self, start, plain):
        model = copy.deepcopy(start)

        def forward(x):
            for block in model.features:
                x = checkpoint(block, x, use_reentrant=False)
            return model.classifier(x.mean((2, 3)))

        for name, tensor in self.end(model, forward).items():
            torch.testing.assert_close(tensor, plain[name], **CLOSE)

    def test_compiled(self, start):
        """Of a part of the network, since compiling all of it takes long and shows no more."""
        maps = torch.randn(16, 24, 8, 8, generator=torch.manual_seed(0), dtype=torch.float64)
        ends = []
        for backend in (None, "aot_eager"):
            part = copy.deepcopy(start).features[6:7]
            whole = part
            if backend is not None:
                whole = torch.compile(part, backend=backend, fullgraph=True)
            optimizer = parallel.optimizer_of(whole)
            attnsurgeon.check_optimizer(whole, optimizer)
            for _ in range(3):
                optimizer.zero_grad()
                cross_entropy(whole(maps).mean((2, 3)), LABELS).backward()
                optimizer.step()
            ends.append(dict(part.named_parameters()))
        for name, tensor in ends[0].items():
            torch.testing.assert_close(ends[1][name], tensor, **CLOSE, msg=name)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_and_grad_scaler(self, start, dtype):
        model = copy.deepcopy(start).float()
        groups = attnsurgeon.parameter_groups(model, lr=1e-3, attention_lr=1e-2)
        optimizer = torch.optim.SGD(groups)
        images = IMAGES + 0.5 * torch.randn(IMAGES.shape, generator=torch.manual_seed(0))
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        before = cross_entropy(model(images), LABELS)
        for _ in range(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = cross_entropy(model(images), LABELS)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 64.0  # no step was left out
        assert loss < before
        for gate in attnsurgeon.gates(model).values():
            assert gate.dtype == torch.float32
            assert gate.item() != 0

    def test_averaged_weights(self, start, tmp_path):
        model = copy.deepcopy(start)
        averaged = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
        )
        averaged.update_parameters(model)
        self.end(model, model, steps=1)
        averaged.update_parameters(model)
        gates = attnsurgeon.gates(model)
        for name, gate in attnsurgeon.gates(averaged.module).items():
            assert gate.item() == pytest.approx(0.5 * gates[name].item())
            assert gate.item() != 0
        save_model(averaged, tmp_path / "ema.safetensors")
        again = attnsurgeon.load_model(tmp_path / "ema.safetensors")
        assert torch.equal(again(IMAGES.double()), averaged.module.eval()(IMAGES.double()))
