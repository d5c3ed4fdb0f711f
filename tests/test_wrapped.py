"""Networks that come compiled, parallel, averaged, scripted, quantized, sharded or parametrized."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm
from torch.optim.swa_utils import AveragedModel
from torchvision.models import get_model
from torchvision.models.resnet import BasicBlock, ResNet

import attnsurgeon
from attnsurgeon.errors import HostUnusable
from attnsurgeon.network import plain_network
from attnsurgeon.sites import find_sites
from tests import hosts

IMAGE = hosts.image(2, (32, 32))


def resnet():
    torch.manual_seed(0)
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10).eval()


@pytest.fixture
def alone(tmp_path):
    """Return after making this process the only one of a group."""
    dist.init_process_group("gloo", (tmp_path / "store").as_uri(), world_size=1, rank=0)
    yield
    dist.destroy_process_group()


def insert(model, **options):
    return attnsurgeon.insert_attention(
        model, "se", at="layer4.*", example=torch.zeros(1, 3, 32, 32), **options
    )


def check_taken_out(wrapped, kind):
    """Hold that insertion works on the network inside, says so, and leaves the wrapper alone."""
    inner = plain_network(wrapped)[0]
    before = {key: tensor.clone() for key, tensor in inner.state_dict().items()}
    with pytest.warns(UserWarning, match=f"taken out of {kind} .*wrap the result again"):
        operated = insert(wrapped)
    assert type(operated) is type(inner)
    assert operated is not inner
    assert torch.equal(operated(IMAGE), inner(IMAGE))
    assert len(attnsurgeon.gates(operated)) == 1
    assert not attnsurgeon.gates(inner)
    assert all(torch.equal(inner.state_dict()[key], t) for key, t in before.items())
    assert [s.path for s in find_sites(wrapped)] == [s.path for s in find_sites(inner)]


class TestTakenOut:
    def test_of_a_compiled_one(self):
        check_taken_out(torch.compile(resnet(), backend="eager"), "OptimizedModule")

    def test_of_data_parallel(self):
        check_taken_out(nn.DataParallel(resnet()), "DataParallel")

    def test_of_an_average(self):
        check_taken_out(AveragedModel(resnet()), "AveragedModel")

    @pytest.mark.usefixtures("alone")
    def test_of_distributed_data_parallel(self):
        check_taken_out(nn.parallel.DistributedDataParallel(resnet()), "DistributedDataParallel")

    def test_of_one_in_the_other(self):
        compiled = torch.compile(nn.DataParallel(resnet()), backend="eager")
        inner, notices = plain_network(compiled)
        assert inner is compiled._orig_mod.module
        assert len(notices) == 2

    def test_a_bare_one_is_itself_and_nothing_is_said(self):
        model = resnet()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert plain_network(model) == (model, ())
            insert(model)

    def test_to_be_saved(self, tmp_path):
        small = nn.Sequential(resnet())  # of a class of its own: no registry makes it
        operated = attnsurgeon.insert_attention(small, "se", at="0.layer4.*")
        attnsurgeon.save_model(operated, tmp_path / "bare.safetensors")
        wrapped = torch.compile(nn.DataParallel(operated), backend="eager")
        attnsurgeon.save_model(wrapped, tmp_path / "wrapped.safetensors")
        files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("bare", "wrapped")]
        assert files[0] == files[1]

    def test_as_the_host_of_a_file(self, tmp_path):
        small = nn.Sequential(resnet())
        operated = attnsurgeon.insert_attention(small, "se", at="0.layer4.*")
        attnsurgeon.save_model(operated, tmp_path / "x.safetensors")
        again = attnsurgeon.load_model(tmp_path / "x.safetensors", nn.DataParallel(small))
        assert torch.equal(again(IMAGE), small(IMAGE))


def quantized():
    model = resnet()
    model.fc = torch.ao.nn.quantized.dynamic.Linear(512, 10)
    return model


def with_quantized_tensor():
    model = resnet()
    packed = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    model.register_buffer("packed", packed)
    return model


def scripted_part():
    model = resnet()
    model.relu = torch.jit.script(nn.ReLU())
    return model


def compiled_part():
    model = resnet()
    model.layer1 = torch.compile(model.layer1, backend="eager")
    return model


def compiled_in_place():
    model = resnet()
    model.compile(backend="eager")
    return model


def pruned():
    model = resnet()
    prune.l1_unstructured(model.layer1[0].conv1, "weight", 0.3)
    return model


def old_weight_norm():
    model = resnet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in what people have
        torch.nn.utils.weight_norm(model.layer1[0].conv1)
    return model


def old_spectral_norm():
    model = resnet()
    spectral_norm(model.layer1[0].conv1)
    return model


def lazy():
    model = resnet()
    model.fc = nn.LazyLinear(10)
    return model


class TestRefused:
    @pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
    @pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda: torch.jit.script(resnet()), "TorchScript already; operate on it before"),
            (scripted_part, "its relu is TorchScript already"),
            (quantized, "its fc is quantized .Linear.; operate on the float network"),
            (with_quantized_tensor, "holds packed as Tensor of torch.qint8"),
            (compiled_part, "its layer1 is wrapped in OptimizedModule by itself"),
            (compiled_in_place, "compiled in place; pass copy.deepcopy"),
            (pruned, r"its layer1.0.conv1 has a weight that a hook computes .*prune.remove"),
            (old_weight_norm, r"WeightNorm.*remove_weight_norm.*parametrizations.weight_norm"),
            (old_spectral_norm, r"SpectralNorm.*parametrizations.spectral_norm"),
            (lazy, "its fc is not initialised; run the network once"),
            (lambda: {"model": resnet()}, "this is dict, no torch.nn.Module"),
            (lambda: resnet().state_dict(), "this is OrderedDict, no torch.nn.Module"),
        ],
    )
    def test_with_the_remedy(self, make, says):
        model = make()
        for refuse in (insert, find_sites):
            with pytest.raises(HostUnusable, match=says):
                refuse(model)

    @pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
    def test_but_not_one_that_could_be_quantized(self):
        model = get_model("quantized_resnet18", weights=None, quantize=False).eval()
        assert len(find_sites(model, torch.zeros(1, 3, 32, 32))) == 8
        assert plain_network(model)[0] is model
        done = get_model("quantized_resnet18", weights=None, quantize=True)
        with pytest.raises(HostUnusable, match="is quantized"):
            find_sites(done)

    @pytest.mark.parametrize(
        ("make", "remedy"),
        [
            (compiled_in_place, copy.deepcopy),
            (pruned, lambda m: prune.remove(m.layer1[0].conv1, "weight") and m),
            (old_weight_norm, lambda m: torch.nn.utils.remove_weight_norm(m.layer1[0].conv1) and m),
        ],
    )
    def test_and_the_remedy_helps(self, make, remedy):
        model = make()
        healed = remedy(model)
        healed = healed if type(healed) is type(resnet()) else model
        assert torch.equal(insert(healed)(IMAGE), healed(IMAGE))

    @pytest.mark.parametrize("call", [insert, find_sites, lambda m: attnsurgeon.compare_speed([m])])
    def test_in_inference_mode(self, call):
        says = r"torch.inference_mode\(\) is on, .*outside of it"
        with torch.inference_mode(), pytest.raises(HostUnusable, match=says):
            call(resnet())

    @pytest.mark.usefixtures("alone")
    def test_fully_sharded(self):
        from torch.distributed.fsdp import fully_shard

        model = resnet()
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh)
        with pytest.raises(HostUnusable, match="sharded by FSDP; operate on it before"):
            insert(model)


class Doubled(nn.Module):
    """A parametrization: twice the weight."""

    def forward(self, weight):
        return 2 * weight


SMALL = torch.linspace(-1, 1, 4 * 64).reshape(1, 4, 8, 8)


class ScaledBlock(nn.Module):
    """A residual block with a parameter of its own, as ConvNeXt's."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.full((4, 1, 1), 0.5))

    def forward(self, x):
        return x + self.scale * self.conv(x)


class TestParametrized:
    """torch.nn.utils.parametrize computes a weight where it is read: nothing stands in the way."""

    @pytest.mark.parametrize(
        ("change", "placement"),
        [
            (lambda m: parametrize.register_parametrization(m, "weight", Doubled()), "post"),
            (parametrizations.weight_norm, "standard"),
            (parametrizations.spectral_norm, "conv"),
        ],
    )
    def test_is_exact(self, change, placement):
        model = resnet()
        for block in model.layer4:
            change(block.conv1)
            change(block.conv2)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        operated = insert(model, placement=placement)
        assert torch.equal(operated(IMAGE), model(IMAGE))
        for network in (model, operated):
            network.train()
        torch.manual_seed(0)
        assert torch.equal(operated(IMAGE), model(IMAGE))
        kept = operated.state_dict()
        original = {key: tensor for key, tensor in before.items() if "running" not in key}
        assert kept.keys() > original.keys()
        assert parametrize.is_parametrized(operated.layer4[0].conv1)
        for gate in attnsurgeon.gates(operated).values():
            gate.data.fill_(0.5)
        assert not torch.equal(operated.eval()(IMAGE), model.eval()(IMAGE))

    def test_is_saved_and_loaded(self, tmp_path):
        model = nn.Sequential(ScaledBlock(), nn.Flatten(), nn.Linear(4 * 64, 5)).eval()
        parametrizations.weight_norm(model[0].conv)
        operated = attnsurgeon.insert_attention(model, "se", example=SMALL)
        attnsurgeon.save_model(operated, tmp_path / "x.safetensors")
        again = attnsurgeon.load_model(tmp_path / "x.safetensors", host=model)
        assert torch.equal(again(SMALL), model(SMALL))
        with pytest.raises(HostUnusable, match="your own Sequential"):
            attnsurgeon.load_model(tmp_path / "x.safetensors")

    @pytest.mark.parametrize("placement", ["post", "standard", "conv"])
    def test_a_parametrized_block_itself(self, placement):
        model = nn.Sequential(ScaledBlock(), nn.Flatten(), nn.Linear(4 * 64, 5)).eval()
        parametrize.register_parametrization(model[0], "scale", Doubled())
        operated = attnsurgeon.insert_attention(model, "se", placement=placement, example=SMALL)
        before = model(SMALL)
        assert torch.equal(operated(SMALL), before)
        for network in (model, operated):  # it is still computed from what is trained
            network[0].parametrizations.scale.original.data.fill_(0.3)
        assert torch.equal(operated(SMALL), model(SMALL))
        assert not torch.equal(model(SMALL), before)
        bare = attnsurgeon.remove_attention(operated)
        assert torch.equal(bare(SMALL), model(SMALL))
        assert parametrize.is_parametrized(bare[0], "scale")
