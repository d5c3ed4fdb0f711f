"""Where a network, its code or a file takes one size only, the axis is named, and why."""

import onnx
import pytest
import torch
from torch import nn

import attnsurgeon
from attnsurgeon.card import HostCard, give_card
from attnsurgeon.errors import ExportDiffers, ExportRefused, HostUnusable
from attnsurgeon.export import verify_export
from attnsurgeon.export.axes import fixed_by_file, fixed_by_network
from attnsurgeon.export.format import format_for
from attnsurgeon.export.inputs import batch_of, size_of, trials
from attnsurgeon.export.program import export_program
from tests import exports

PAIR = torch.zeros(2, 3, 32, 32)


class OneSize(exports.Tiny):
    """As a ViT, whose positions are counted: another size is refused, another batch is not."""

    def forward(self, x):
        torch._assert(x.shape[2] == 32, "wrong height")
        torch._assert(x.shape[3] == 32, "wrong width")
        return super().forward(x)


class OneImage(exports.Tiny):
    def forward(self, x):
        features = self.blocks(self.stem(x))
        return self.head(features.reshape(1, 16, *features.shape[2:]).mean((2, 3)))


class Counted(exports.Tiny):
    """Its code makes a number of the height."""

    def forward(self, x):
        return super().forward(x) * float(torch.tensor(x.shape[2]).item())


class Pairs(exports.Tiny):
    """Its code makes a number of the batch, and takes any all the same."""

    def forward(self, x):
        return super().forward(x).reshape(2, -1).reshape(-1, 10)


def tiny(kind):
    torch.manual_seed(0)
    return kind().eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "x.onnx"
    return path, attnsurgeon.export_model(tiny(OneSize), path, example=exports.EXAMPLE)


class TestByTheNetwork:
    def test_they_stay_fixed_and_are_named(self, exported):
        path, artifact = exported
        assert artifact.fixed == ("height", "width")
        assert not artifact.dynamic
        assert artifact.notices == (
            "the file takes height 32 and width 32 only, as OneSize itself does "
            "(wrong height; wrong width)",
        )
        (image,) = onnx.load(path).graph.input
        dims = [dim.dim_param or dim.dim_value for dim in image.type.tensor_type.shape.dim]
        assert dims == ["batch", 3, 32, 32]
        assert [check.batch for check in artifact.checks] == [1, 2, 5]

    def test_verified_later_at_every_batch(self, exported):
        model = tiny(OneSize)
        give_card(model, HostCard(None, "OneSize", input_shapes=((1, 3, 32, 32),)))
        checks = verify_export(exported[0], model).checks
        assert [check.batch for check in checks] == [1, 2, 5]

    def test_the_batch(self, tmp_path):
        path = tmp_path / "x.pt"
        artifact = attnsurgeon.export_model(tiny(OneImage), path, example=exports.EXAMPLE)
        assert artifact.fixed == ("batch",)
        assert "takes batch 1 only, as OneImage itself does (shape" in artifact.notices[0]
        assert [check.batch for check in artifact.checks] == [1, 1, 1]
        assert len({check.size for check in artifact.checks}) == 3

    def test_a_program(self, tmp_path):
        path = tmp_path / "x.pt2"
        artifact = attnsurgeon.export_model(tiny(OneSize), path, example=exports.EXAMPLE)
        assert artifact.fixed == ("height", "width")
        assert format_for(path).open(path).fixed_axes == ("x.height", "x.width")

    def test_static_says_nothing(self, tmp_path):
        artifact = attnsurgeon.export_model(
            tiny(OneSize), tmp_path / "x.pt2", example=exports.EXAMPLE, static=True
        )
        assert artifact.fixed == ("batch", "height", "width")
        assert artifact.notices == ()

    def test_another_one_asked_for(self, tmp_path):
        with pytest.raises(
            HostUnusable, match=r"40x32 .*not of this height \(wrong height\); give"
        ):
            attnsurgeon.export_model(
                tiny(OneSize), tmp_path / "x.pt", example=exports.EXAMPLE, input_size=(40, 32)
            )

    def test_a_batch_that_files_are_not_checked_on(self, tmp_path):
        class Four(exports.Tiny):
            def forward(self, x):
                torch._assert(x.shape[0] == 4, "four of them")
                return super().forward(x)

        with pytest.raises(HostUnusable, match=r"a batch of 4 only \(four of them\).*any size"):
            attnsurgeon.export_model(
                tiny(Four), tmp_path / "x.pt", example=torch.zeros(4, 3, 32, 32)
            )

    def test_most_take_any(self):
        model = tiny(exports.Tiny)
        batches = trials(model, (exports.EXAMPLE,))
        assert [(batch_of(b), size_of(b)) for b in batches] == [
            (1, (32, 32)),
            (2, (64, 96)),
            (5, (96, 64)),
        ]
        assert fixed_by_network(model, batches) == {}
        kept = trials(model, (exports.EXAMPLE,), fixed=("height",))
        assert [(batch_of(b), size_of(b)) for b in kept] == [
            (1, (32, 32)),
            (2, (32, 96)),
            (5, (32, 64)),
        ]


class TestByTheCode:
    def test_torch_export_names_it(self):
        with pytest.raises(
            ExportRefused, match="Pairs: its code fixes the batch to 2; give --stat"
        ):
            export_program(tiny(Pairs), (PAIR,), free=("batch", "height", "width"))
        assert export_program(tiny(Pairs), (PAIR,), free=("height", "width"))

    def test_the_file_of_a_tracer(self, tmp_path):
        with pytest.raises(
            ExportDiffers, match=r"the height of the onnx file's input came out fix"
        ):
            attnsurgeon.export_model(
                tiny(Counted),
                tmp_path / "x.onnx",
                example=exports.EXAMPLE,
                exporter="torchscript",
            )

    def test_a_trace(self, tmp_path):
        class Listed(exports.Tiny):
            def forward(self, x, *unused):
                features = self.blocks(self.stem(x))
                rows = torch.ones(features.shape[2:]).tolist()
                return self.head((features * torch.tensor(rows)).mean((2, 3)))

        with pytest.raises(ExportRefused, match="takes the height that it was made with only"):
            attnsurgeon.export_model(tiny(Listed), tmp_path / "x.pt", example=exports.EXAMPLE)


class TestByTheFile:
    @pytest.mark.parametrize(("axis", "place"), [("batch", 0), ("height", 2), ("width", 3)])
    def test_one_axis(self, axis, place):
        found = fixed_by_file(
            lambda inputs: inputs[0].shape[place] == PAIR.shape[place],
            tiny(exports.Tiny),
            (PAIR,),
            ("batch", "height", "width"),
        )
        assert found == axis

    @pytest.mark.parametrize("agrees", [True, False])
    def test_none_is_to_blame(self, agrees):
        free = ("batch", "height", "width")
        assert fixed_by_file(lambda _: agrees, tiny(exports.Tiny), (PAIR,), free) is None

    def test_only_what_was_to_stay_free(self):
        found = fixed_by_file(lambda i: len(i[0]) == 2, nn.Identity(), (PAIR,), ("height",))
        assert found is None
