"""What each of two processes runs for tests/test_distributed.py; torchrun starts it.

All parallel forms train the same network for the same steps, each process on its half of every
batch; what they end with is written for the tests to compare with one process on whole batches.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from PIL import Image
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import attnsurgeon
from attnsurgeon import digits
from attnsurgeon.errors import BadOption, HostUnusable
from attnsurgeon.host import load_host
from examples import finetune
from tests import hosts, sync_batchnorm_on_cpu

STEPS = 5
BATCH = 8
BLOCKS = ("se", "cbam", "gc", "sk")


def network():
    """Return the digits network with one of each block, in float64, where sums agree closely."""
    model = load_host("digits")
    for block in BLOCKS:
        model = attnsurgeon.insert_attention(model, block, at="features.6")
    return model.double().eval()  # batches are halved: no norm may look at them


def optimizer_of(model):
    groups = attnsurgeon.parameter_groups(model, lr=0.02, attention_lr=0.1, weight_decay=1e-3)
    return torch.optim.SGD(groups, momentum=0.9)


def train(model, share=slice(None)):
    """Train for STEPS on a share of each batch; return the optimiser, the last gradients held."""
    images, labels = digits.held_out()
    optimizer = optimizer_of(model)
    attnsurgeon.check_optimizer(model, optimizer)
    schedule = attnsurgeon.GateSchedule(model, check_every=1)
    for step in range(STEPS):
        batch = slice(step * BATCH, (step + 1) * BATCH)
        optimizer.zero_grad()
        logits = model(images[batch][share].double())
        cross_entropy(logits, labels[batch][share]).backward()
        optimizer.step()
        schedule.step()
    return optimizer


def results(model):
    """Return the weights and the last gradients of a network, whole on every process."""
    return {
        "weights": {name: _whole(p.detach()) for name, p in model.named_parameters()},
        "gradients": {name: _whole(p.grad) for name, p in model.named_parameters()},
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
    }


def _whole(tensor):
    gather = getattr(tensor, "full_tensor", None)
    return (tensor if gather is None else gather()).clone()


def data_parallel(start, share, **options):
    model = copy.deepcopy(start)
    train(DistributedDataParallel(model, **options), share)
    return results(model)


def sharded(start, share, folder):
    model = copy.deepcopy(start)
    for block in model.features:
        fully_shard(block)
    fully_shard(model)
    optimizer = train(model, share)
    with pytest.raises(HostUnusable, match="sharded"):
        attnsurgeon.save_model(model, folder / "never.safetensors")
    state, steps = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": steps}, checkpoint_id=folder / "sharded")
    return results(model)


def in_train_mode(model):
    """Return a copy whose norms look at their batch, and which draws no random numbers."""
    model = copy.deepcopy(model).train()
    model.classifier[0].p = 0.0
    return model


def synchronised(start, share):
    sync_batchnorm_on_cpu.install()
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(in_train_mode(start))
    train(DistributedDataParallel(model), share)
    return results(model)


def frozen(start, share):
    model = attnsurgeon.freeze_host(copy.deepcopy(start))
    wrapped = DistributedDataParallel(model)
    wrapped.train()
    assert not any(m.training for m in model.features[0].modules() if hasattr(m, "running_mean"))
    wrapped.eval()
    train(wrapped, share)
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert all(".attention_post" in name for name in trained)
    return {"weights": {name: p.detach().clone() for name, p in model.named_parameters()}}


def at_every_placement(rank):
    """Return the gradients of a network with attention at all placements, of half a batch."""
    model = hosts.operate("resnet18", opened=False)  # in eval mode: equal shares
    wrapped = DistributedDataParallel(model)  # held until the gradients are there
    images = hosts.image(4)[2 * rank : 2 * rank + 2]
    cross_entropy(wrapped(images), torch.tensor([1, 2])).backward()
    return {"gradients": {name: p.grad.clone() for name, p in model.named_parameters()}}


def finetune_on(folder):
    """Run the example in the group there is: a second one in the same processes would hang."""
    sys.argv = ["finetune.py", str(folder / "operated.safetensors"), "--data", "digits"]
    sys.argv += ["--output", str(folder / "finetuned"), "--ema", "0.5", "--epochs", "1"]
    sys.argv += ["--steps", "2", "--batch-size", "8", "--workers", "0"]
    finetune.run(finetune.parse_arguments())


def finetune_on_too_few(folder):
    """Run the example on fewer images than fill a batch in each process; all of them refuse."""
    for part in ("train", "val"):
        for kind in ("cat", "dog"):
            (folder / "few" / part / kind).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32)).save(folder / "few" / part / kind / f"{dist.get_rank()}.png")
    dist.barrier()
    sys.argv = ["finetune.py", str(folder / "operated.safetensors"), "--data", str(folder / "few")]
    sys.argv += ["--output", str(folder / "refused"), "--batch-size", "3"]
    with pytest.raises(BadOption) as refused:
        finetune.run(finetune.parse_arguments())
    print(f"refused: {refused.value}", flush=True)


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    finetune_on(folder)
    finetune_on_too_few(folder)
    rank = dist.get_rank()
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    start = attnsurgeon.load_model(folder / "start.safetensors")
    found = {
        "ddp": data_parallel(start, half),
        "static_graph": data_parallel(start, half, static_graph=True),
        "fully_shard": sharded(start, half, folder),
        "frozen": frozen(start, half),
        "sync_batchnorm": synchronised(start, half),
        "placements": at_every_placement(rank),
    }
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
