"""Blocks over one, two and three spatial axes: the same mathematics, exact, and exportable."""

import copy

import pytest
import torch
from torch import nn

from attnsurgeon import blocks
from attnsurgeon.blocks.block import DIMS, EVERYWHERE, IMAGES, MAPS, Place
from attnsurgeon.errors import BadFile, BadOption
from attnsurgeon.export.onnx import Onnx, write_onnx
from attnsurgeon.export.torchscript import make_torchscript
from attnsurgeon.gate import named_gates
from attnsurgeon.plan import Cut

CHANNELS = 32
SIZES = {1: (60,), 2: (6, 10), 3: (4, 3, 5)}


def served(name):
    return sorted({DIMS[layout] for layout in blocks.get(name).layouts})


CASES = [(name, dims) for name in blocks.names() for dims in served(name)]
EVERYWHERE_NAMES = [name for name in blocks.names() if blocks.get(name).layouts == EVERYWHERE]


def build(name, dims, **options):
    torch.manual_seed(7)
    return blocks.get(name).build(Place(CHANNELS, dims=dims), **options).eval()


def features(dims, batch=2):
    return torch.randn(batch, CHANNELS, *SIZES[dims], generator=torch.Generator().manual_seed(dims))


def opened(block):
    with torch.no_grad():
        for gate in named_gates(block).values():
            gate.fill_(0.7)
    return block


def randomised(block):
    """Give norms statistics of their own, so that they are seen."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in block.state_dict().values():
            if tensor.is_floating_point() and tensor.numel() > 1:
                tensor.copy_(tensor + 0.1 * torch.rand(tensor.shape, generator=generator))
    return block


@pytest.mark.parametrize("name", blocks.names())
def test_layouts_are_one_of_three_kinds(name):
    assert blocks.get(name).layouts in (EVERYWHERE, MAPS, IMAGES)
    assert 2 in served(name)


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_closed_it_is_nothing_and_opened_it_keeps_the_shape(name, dims):
    block, x = build(name, dims), features(dims)
    assert torch.equal(block(x), x)
    assert torch.equal(block.train()(x), x)
    out = opened(block.eval())(x)
    assert out.shape == x.shape
    assert not torch.allclose(out, x, atol=1e-4)


@pytest.mark.parametrize("name", EVERYWHERE_NAMES)
@pytest.mark.parametrize("dims", [1, 3])
def test_where_positions_are_alike_their_arrangement_changes_nothing(name, dims):
    image, other = opened(randomised(build(name, 2))), opened(build(name, dims))
    state = {
        key: tensor.reshape(other.state_dict()[key].shape)
        for key, tensor in image.state_dict().items()
    }
    other.load_state_dict(state)
    x = features(2)
    expected = image(x).flatten(2)
    # Sums over the same numbers in another order: float32 rounding.
    rearranged = other(x.reshape(2, CHANNELS, *SIZES[dims])).flatten(2)
    torch.testing.assert_close(rearranged, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in blocks.names() if 3 in served(name)])
def test_a_volume_of_one_slice_is_an_image(name):
    image, volume = opened(randomised(build(name, 2))), opened(build(name, 3))
    flat = image.state_dict()
    state = {key: _centred(flat[key], tensor) for key, tensor in volume.state_dict().items()}
    volume.load_state_dict(state)
    x = features(2)
    out = volume(x.unsqueeze(2)).squeeze(2)
    # A padded convolution sums zeros besides: float32 rounding.
    torch.testing.assert_close(out, image(x), rtol=1e-5, atol=1e-5)


def _centred(flat, like):
    """Return a kernel of a volume that is the image's in its middle slice and zero elsewhere."""
    if flat.numel() == like.numel():
        return flat.reshape(like.shape)
    deep = torch.zeros_like(like)
    deep[:, :, like.shape[2] // 2] = flat
    return deep


class Beside(nn.Module):
    """Run many blocks on one input, so that all of them are exported at once."""

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x):
        outs = []
        for member in self.members:
            outs.append(member(x))
        return outs


def all_opened(dims):
    names = [name for name in blocks.names() if dims in served(name)]
    return names, Beside(opened(randomised(build(name, dims))) for name in names).eval()


@pytest.mark.parametrize("dims", [1, 2, 3])
class TestEverySort:
    @pytest.mark.filterwarnings("ignore:.torch.jit.trace(_method)?. is deprecated:FutureWarning")
    def test_scripts_and_traces(self, dims):
        model, x = all_opened(dims)[1], features(dims)
        scripted = make_torchscript(model, (x,))
        assert isinstance(scripted, torch.jit.RecursiveScriptModule)
        other = features(dims, batch=3)
        for a, b in zip(scripted(other), model(other), strict=True):
            assert torch.equal(a, b)
        for member in model.members:
            with torch.no_grad():
                traced = torch.jit.trace(member, x, check_trace=False)
            assert torch.equal(traced(x), member(x))

    def test_copies(self, dims):
        model, x = all_opened(dims)[1], features(dims)
        for a, b in zip(copy.deepcopy(model)(x), model(x), strict=True):
            assert torch.equal(a, b)

    def test_exports_to_onnx(self, dims, tmp_path):
        names, model = all_opened(dims)
        write_onnx(model, (features(dims),), tmp_path / "x.onnx")
        run = Onnx().open(tmp_path / "x.onnx")
        other = features(dims, batch=5)
        if dims < 3:  # another size too; of a volume, the last axis is not among the free ones
            other = torch.cat([other, other], -1)
        for name, a, b in zip(names, run((other,)), model(other), strict=True):
            # Another engine: float32 rounding.
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n} {m}")


@pytest.mark.parametrize("name", blocks.names())
def test_other_axes_are_refused(name):
    for dims in {0, 1, 2, 3, 4} - set(served(name)):
        with pytest.raises(BadOption, match=f"spatial axes, not of {dims}"):
            blocks.get(name).build(Place(CHANNELS, dims=dims))


class TestStride:
    """Selective Kernel beside a strided convolution of each sort."""

    @pytest.mark.parametrize(
        ("dims", "stride", "out"),
        [(2, (2, 1), (3, 10)), (3, (1, 1, 2), (4, 3, 3)), (3, (2, 2), (2, 2, 3))],
    )
    def test_it_reads_at_the_pace_of_the_convolution(self, dims, stride, out):
        place = Place(CHANNELS, 16, stride, 1, dims)
        block = opened(blocks.get("sk").build(place).eval())
        first = torch.randn(2, CHANNELS, *out)
        assert block(torch.randn(2, 16, *SIZES[dims]), first).shape == first.shape

    def test_numbers_that_fit_no_axes_are_refused(self):
        with pytest.raises(BadOption, match="stride has 2 numbers for 3 axes"):
            blocks.get("sk").build(Place(CHANNELS, 16, (1, 2), 1, 3))


class TestRecipe:
    """A place with two axes reads and writes as before there were others."""

    cut = {
        "path": "layer1.0",
        "placement": "post",
        "block": "se",
        "options": {},
        "place": {"channels": 64, "in_channels": None, "stride": [1, 1], "dilation": 1},
        "shape": [1, 64, 8, 8],
        "splice": {"child": "attention_post", "placement": "post"},
        "seed": 0,
    }

    def test_without_dims_it_means_two(self):
        cut = Cut.from_json(self.cut)
        assert cut.place == Place(64)
        assert cut.to_json()["place"] == self.cut["place"] | {"stride": (1, 1)}

    def test_others_are_written_and_read(self):
        place = self.cut["place"] | {"dims": 3, "stride": [1, 2, 2]}
        splice = self.cut["splice"] | {"layout": "NCDHW"}
        changes = {"place": place, "splice": splice, "shape": [1, 64, 4, 8, 8]}
        cut = Cut.from_json(self.cut | changes)
        assert cut.place == Place(64, stride=(1, 2, 2), dims=3)
        assert Cut.from_json(cut.to_json()) == cut

    def test_what_is_no_number_is_refused(self):
        with pytest.raises(BadFile, match="dims"):
            Cut.from_json(self.cut | {"place": self.cut["place"] | {"dims": "3"}})
