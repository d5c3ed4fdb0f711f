"""An operated network is a module like any other, for every tool that takes modules."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.ao.quantization import fuse_modules
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.fx.experimental.optimization import fuse

import attnsurgeon
from attnsurgeon.surgery import attention_paths, is_new_key
from tests import hosts
from tests.hosts import operate

HOSTS = ("resnet18", "efficientnet_b0")


@pytest.fixture(params=HOSTS)
def operated(request):
    return operate(request.param)


@pytest.fixture
def image():
    return hosts.image(2)


def test_all_at_once_is_exact(image):
    for name in HOSTS:
        assert torch.equal(operate(name, opened=False)(image), hosts.host(name)(image))


def test_deepcopy_is_independent(operated, image):
    before = operated(image)
    twin = copy.deepcopy(operated)
    assert torch.equal(twin(image), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(operated(image), before)


def test_pickle(operated, image):
    twin = pickle.loads(pickle.dumps(operated))
    assert torch.equal(twin(image), operated(image))
    assert [type(m).__name__ for m in twin.modules()] == [
        type(m).__name__ for m in operated.modules()
    ]
    memory = io.BytesIO()
    torch.save(operated, memory)
    memory.seek(0)
    assert torch.equal(torch.load(memory, weights_only=False)(image), operated(image))


def test_blocks_keep_their_class():
    block = operate("resnet18").layer1[0]
    assert isinstance(block, type(hosts.host("resnet18").layer1[0]))
    assert type(block).__name__ == "BasicBlock"


def test_functional_call_with_natural_names(operated, image):
    state = {**dict(operated.named_parameters()), **dict(operated.named_buffers())}
    assert state.keys() == operated.state_dict().keys()
    assert torch.equal(torch.func.functional_call(operated, state, (image,)), operated(image))
    silent = {key: tensor * 0 for key, tensor in state.items()}
    assert not torch.equal(torch.func.functional_call(operated, silent, (image,)), operated(image))


def test_conv_bn_fusion_keeps_the_attention(operated, image):
    fused = fuse(operated)
    # Folding a norm into a convolution rounds differently.
    torch.testing.assert_close(fused(image), operated(image), rtol=1e-3, atol=1e-5)
    closed = copy.deepcopy(operated)
    for gate in attnsurgeon.gates(closed).values():
        gate.data.zero_()
    assert not torch.allclose(fused(image), closed(image), rtol=1e-3, atol=1e-5)


def test_eager_fusion_by_name(image):
    operated = operate("resnet18")
    names = [["layer1.0.conv2", "layer1.0.bn2"], ["layer1.0.conv1", "layer1.0.bn1"]]
    fused = fuse_modules(operated, names)
    torch.testing.assert_close(fused(image), operated(image), rtol=1e-3, atol=1e-5)
    assert isinstance(fused.layer1[0].bn2, nn.Identity)


def test_sync_batchnorm_conversion_keeps_the_attention(operated, image):
    before = operated(image)
    paths = attention_paths(operated)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(operated)).eval()
    assert attention_paths(converted) == paths
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    assert torch.equal(converted(image), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moves_dtype(dtype, image):
    host = copy.deepcopy(hosts.host("resnet18")).to(dtype)
    operated = operate("resnet18", opened=False).to(dtype)
    assert torch.equal(operated(image.to(dtype)), host(image.to(dtype)))


def test_moves_device():
    operated = operate("resnet18").to("meta")
    assert operated(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)


def test_channels_last(image):
    host = copy.deepcopy(hosts.host("resnet18")).to(memory_format=torch.channels_last)
    operated = operate("resnet18", opened=False).to(memory_format=torch.channels_last)
    last = image.contiguous(memory_format=torch.channels_last)
    assert torch.equal(operated(last), host(last))


def test_autocast_is_exact(image):
    host, operated = hosts.host("resnet18"), operate("resnet18", opened=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(operated(image), host(image))


@pytest.mark.parametrize(("name", "trains"), [("resnet18", True), ("efficientnet_b0", False)])
def test_compiles(name, trains, image):
    """Of the smaller network with the graph of its gradients too, which takes as long again."""
    operated = operate(name)
    compiled = torch.compile(operated, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(trains):
        found = compiled(image)
        assert found.requires_grad == trains
        torch.testing.assert_close(found, operated(image), rtol=1e-4, atol=1e-5)


def test_torch_export(operated, image):
    exported = torch.export.export(operated, (image,)).module()
    torch.testing.assert_close(exported(image), operated(image), rtol=1e-4, atol=1e-5)


def test_symbolic_trace(operated, image):
    assert torch.equal(torch.fx.symbolic_trace(operated)(image), operated(image))


def test_trains_as_its_host_at_the_first_step(image):
    """The first gradient of every original weight is the host's own, bit for bit."""
    host, operated = copy.deepcopy(hosts.host("resnet18")), operate("resnet18", opened=False)
    gradients = []
    for model in (host, operated):
        model.train()
        nn.functional.cross_entropy(model(image), torch.tensor([1, 2])).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert all(torch.equal(gradients[1][name], g) for name, g in gradients[0].items())
    assert all(gradients[1][name].any() for name in attnsurgeon.gates(operated))


def test_training_moves_every_new_parameter(image):
    operated = operate("resnet18", opened=False).train()
    start = {name: p.detach().clone() for name, p in operated.named_parameters()}
    optimizer = torch.optim.SGD(operated.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(operated(image), torch.tensor([1, 2])).backward()
        optimizer.step()
    paths = attention_paths(operated)
    still = [
        n
        for n, p in operated.named_parameters()
        if is_new_key(n, paths) and torch.equal(p, start[n])
    ]
    # A constant added to all logits of a softmax changes nothing.
    assert [name for name in still if not name.endswith("pool.mask.bias")] == []


def test_new_parts_join_in_mode_and_dtype():
    host = copy.deepcopy(hosts.host("resnet18")).double().train()
    host.layer1.eval()
    host.requires_grad_(False)
    operated = attnsurgeon.insert_attention(
        host, "cbam", example=torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    )
    assert not operated.layer1[0].attention_post.training
    assert operated.layer2[0].attention_post.training
    assert {p.dtype for p in operated.parameters()} == {torch.float64}
    assert all(p.requires_grad for p in operated.layer1[0].attention_post.parameters())
    assert not operated.layer1[0].conv1.weight.requires_grad


def test_distributed_state_dicts():
    operated = operate("resnet18")
    optimizer = torch.optim.SGD(operated.parameters(), lr=0.1, momentum=0.9)
    operated(hosts.image(2)).sum().backward()
    optimizer.step()
    state, steps = get_state_dict(operated, optimizer)
    assert state.keys() == operated.state_dict().keys()
    twin = operate("resnet18", opened=False)
    set_state_dict(
        twin,
        torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9),
        model_state_dict=state,
        optim_state_dict=steps,
    )
    assert torch.equal(twin(hosts.image(2)), operated(hosts.image(2)))
