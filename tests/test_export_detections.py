"""What detectors find is compared as a set: only an order made by rounding is free.

Those of torchvision are tried by tests/benchmarks/detectors.py.
"""

import copy

import pytest
import torch
from torch import nn
from torchvision.ops import batched_nms, nms

import attnsurgeon
from attnsurgeon.borrow import borrowed_randomness
from attnsurgeon.errors import ExportDiffers, ExportRefused
from attnsurgeon.export import calm, heads, lending, onnx_traced, opening, verify_export
from attnsurgeon.export import onnx as onnx_format
from attnsurgeon.export.detections import Detections, outputs_of
from attnsurgeon.export.inputs import example_inputs, resized, size_of, trials
from attnsurgeon.export.onnx_file import read_file
from attnsurgeon.export.opening import open_gates
from attnsurgeon.export.precision import PRECISIONS
from attnsurgeon.export.proof import compare_outputs, gate_values, run_with_gates
from tests import exports
from tests.exports import Planted, shift_a_weight

IMAGES = [torch.full((3, 40, 48), 0.5), torch.full((3, 48, 40), 0.2)]


class Detector(nn.Module):
    """Boxes on a grid of features, their scores, and what overlaps less than others."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1), exports.Block(8))
        self.scores = nn.Conv2d(8, 3, 1)
        self.boxes = nn.Conv2d(8, 4, 1)

    def forward(self, images: list[torch.Tensor]):
        return [self.find(self.features(image[None])) for image in images]

    def find(self, features: torch.Tensor):
        corners = self.boxes(features)[0].flatten(1).sigmoid().t() * 20
        boxes = torch.cat((corners[:, :2], corners[:, :2] + corners[:, 2:]), 1)
        scores, labels = self.scores(features)[0].flatten(1).softmax(0).max(0)
        kept = torch.where(scores > 0.5)[0]
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        kept = batched_nms(boxes, scores, labels, 0.5)
        return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}


class Ranked(Detector):
    """Every place of the grid is an object, of one kind: nothing hangs on rounding."""

    def find(self, features: torch.Tensor):
        boxes = self.boxes(features)[0].flatten(1).t()
        scores = self.scores(features)[0, 0].flatten()
        return {"boxes": boxes, "scores": scores, "labels": torch.zeros_like(scores).long()}


class Fading(Ranked):
    """Finds less the wider an image is, so that an opened gate can leave nothing of it."""

    def find(self, features: torch.Tensor):
        found = super().find(features)
        kept = torch.where(found["scores"] > features.shape[-1] / 12)[0]
        return {name: part[kept] for name, part in found.items()}


class Leaving(Detector):
    """Leaves early where it finds nothing, as the heads of torchvision's R-CNNs do."""

    def find(self, features: torch.Tensor):
        scores = self.scores(features)[0].flatten(1).softmax(0).amax(0)
        if not (scores > 0.5).any():
            nothing = scores.new_zeros(0)
            return {"boxes": nothing.view(0, 4), "scores": nothing, "labels": nothing.long()}
        return super().find(features)


def detector():
    torch.manual_seed(0)
    return Detector().eval()


def filled(model, given):
    """Return a detector that says a lot about such images."""
    fill(model, given, gate_values(model))
    return model


def fill(model, given, gates):
    """Fill all weights behind the backbone, with these gates."""
    layers = heads.layers_behind(model, given)
    own = {name: value for name, value in model.named_parameters() if value.ndim > 1}
    heads.fill_heads(model, layers, own, given, gates, 0)


def fading(scale):
    """Return one whose scores fall below what is kept, and what it is run on."""
    torch.manual_seed(0)
    model = attnsurgeon.insert_attention(
        Fading().eval(), "se", example=(IMAGES,), at="features.1", reduction=4
    )
    batches = runs(model)
    filled(model, batches[0])
    with torch.no_grad():
        model.scores.weight.mul_(scale)
    return model, batches


def runs(model):
    """Return what the model is compared on."""
    return trials(model, example_inputs(model, IMAGES, None))


def found(count=6):
    """Return what was found in two images; the first two objects of each score alike."""
    torch.manual_seed(count)
    corners = torch.rand(count, 2) * 50
    scores = torch.rand(count).sort(descending=True).values
    scores[1] = scores[0]
    image = {
        "boxes": torch.cat((corners, corners + 10 + torch.rand(count, 2) * 40), 1),
        "labels": torch.arange(count) % 3,
        "scores": scores,
    }
    return outputs_of([image, {name: part[1:] for name, part in image.items()}])


def changed(outputs, field, edit):
    """Return the tensors with one field of the first image changed."""
    at = outputs.fields[0].index(field)
    return [edit(part.clone()) if i == at else part for i, part in enumerate(outputs)]


def exchange(part):
    part[[0, 1]] = part[[1, 0]]
    return part


def add(value, row):
    def edit(part):
        part[row] += value
        return part

    return edit


class TestComparer:
    def test_equal_scores_come_in_any_order(self):
        want = found()
        have = [exchange(part.clone()) for part in want[:3]] + list(want[3:])
        assert compare_outputs(want, have, 1e-4) == (0.0, 0.0, pytest.approx(1.0), 1.0, True)
        assert not compare_outputs(list(want), have, 1e-4)[-1]  # as plain tensors they differ

    @pytest.mark.parametrize(
        ("field", "edit"),
        [
            ("labels", exchange),
            ("boxes", exchange),
            ("boxes", add(0.05, 3)),
            ("scores", add(-0.001, 4)),
            ("labels", add(1, 5)),
            ("boxes", add(float("nan"), 2)),
        ],
    )
    def test_one_object_that_differs(self, field, edit):
        assert not compare_outputs(found(), changed(found(), field, edit), 1e-4)[-1]

    def test_one_object_too_few(self):
        want = found()
        assert not compare_outputs(want, [*[part[:-1] for part in want[:3]], *want[3:]], 1e-4)[-1]

    def test_one_object_twice_and_another_not(self):
        want = found()
        twice = torch.tensor([0, 1, 2, 3, 4, 4])
        assert not compare_outputs(want, [*[part[twice] for part in want[:3]], *want[3:]], 1e-4)[-1]

    def test_nothing_on_both_sides_is_no_agreement(self):
        want = found()
        empty = Detections([part[:0] for part in want], want.fields)
        assert not compare_outputs(empty, list(empty), 1e-4)[-1]

    def test_scores_are_not_measured_by_the_size_of_boxes(self):
        """Over the largest coordinate, 100 times any score, a score 1 % off would pass."""
        have = changed(found(), "scores", add(-0.005, 0))
        assert compare_outputs(list(found()), have, 1e-4)[1] < 1e-4
        assert compare_outputs(found(), have, 1e-4)[1] > 1e-4


class TestLending:
    def test_a_detector_that_writes_to_its_images(self):
        model = detector()
        model.register_forward_pre_hook(lambda _, given: [image.mul_(2) for image in given[0]])
        kept = [image.clone() for image in IMAGES]
        heads.layers_behind(model, (IMAGES,))
        assert all(map(torch.equal, IMAGES, kept))

    def test_what_the_file_does_not_hold_is_left_alone(self):
        model = detector()
        before = copy.deepcopy(model.state_dict())
        layers = heads.layers_behind(model, (IMAGES,))
        own = {"scores.weight": model.scores.weight}
        heads.fill_heads(model, layers, own, (IMAGES,), gate_values(model), 0)
        after = model.state_dict()
        changed = [name for name in after if not torch.equal(after[name], before[name])]
        assert changed == ["scores.weight"]

    def test_a_head_of_another_form(self):
        """Given its features by name, it returns two maps; of an image without any, none."""

        class Head(nn.Module):
            def __init__(self):
                super().__init__()
                self.scores = nn.Parameter(torch.zeros(8, 1))
                self.boxes = nn.Parameter(torch.zeros(8, 4))

            def forward(self, features):
                return features @ self.scores, features @ self.boxes

        class Several(Ranked):
            def __init__(self):
                super().__init__()
                self.head = Head()

            def find(self, features):
                rows = features[0].flatten(1).t()
                self.head(features=rows[:0])
                scores, boxes = self.head(features=rows)
                return {"boxes": boxes, "scores": scores[:, 0], "labels": scores.argmax(1)}

        torch.manual_seed(0)
        model = filled(Several().eval(), (IMAGES,))
        boxes, scores, _, *_ = run_with_gates(model, {}, (IMAGES,))
        assert max(part.abs().max().item() for part in (boxes, scores)) == pytest.approx(
            heads.LARGEST
        )

    def test_the_layers_behind_the_backbone(self):
        found = heads.layers_behind(detector(), (IMAGES,))
        assert found == {"scores": heads.LARGEST, "boxes": heads.FINE_LARGEST}

    def test_weights_that_say_nothing(self, tmp_path):
        """Everything scores alike, so that it is chance what is kept; nothing is left changed."""
        model = detector()
        nn.init.zeros_(model.scores.weight)
        nn.init.zeros_(model.boxes.weight)
        before = copy.deepcopy(model.state_dict())
        for name, extra in (("x.onnx", {"exporter": "torchscript"}), ("x.pt", {})):
            made = attnsurgeon.export_model(model, tmp_path / name, example=IMAGES, **extra)
            assert all(check.passed for check in made.checks)
            assert "held random numbers during the check" in made.notices[-1]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_what_finds_nothing_is_not_traced_on_its_way_out(self, tmp_path, monkeypatch):
        torch.manual_seed(0)
        model = Leaving().eval()
        nn.init.zeros_(model.scores.weight)
        nn.init.zeros_(model.scores.bias)
        path = tmp_path / "x.onnx"
        made = attnsurgeon.export_model(model, path, example=IMAGES, exporter="torchscript")
        assert all(check.passed for check in made.checks)
        assert read_file(path).holds({"scores.weight": model.scores.weight}) == {"scores.weight"}
        assert not model.scores.weight.any()
        monkeypatch.setattr(onnx_traced, "_give_back", lambda *_: None)
        with pytest.raises((ExportDiffers, ExportRefused)):
            attnsurgeon.export_model(
                model, path, example=IMAGES, exporter="torchscript", force=True
            )

    def test_weights_that_say_enough_are_left_alone(self, tmp_path):
        model = filled(detector(), runs(detector())[0])
        made = attnsurgeon.export_model(model, tmp_path / "x.pt", example=IMAGES)
        assert not any("random" in notice for notice in made.notices)

    @pytest.mark.parametrize(("share", "is_lent"), [(0.3, False), (0.5, True)])
    def test_what_rounding_moves_by_much_of_what_is_allowed(self, share, is_lent, monkeypatch):
        model, moved = filled(Ranked().eval(), (IMAGES,)), iter([share, 0.0])
        monkeypatch.setattr(lending, "steadiest", lambda model, gates, given: (given, next(moved)))
        with lending.lent_to(model, [(IMAGES,)], set) as lent:
            assert bool(lent) is is_lent

    def test_scores_that_are_equal(self, tmp_path):
        """Of what overlaps each engine keeps another; moving the images does not show it."""
        model = filled(detector(), (IMAGES,))  # grey: in noise, scores are exactly 1
        batch = runs(model)[1]
        scores = run_with_gates(model, {}, batch).field("scores")
        assert all(len(each.unique()) < len(each) - 5 for each in scores)
        assert calm.steadiest(model, {}, batch)[1] > 1
        made = attnsurgeon.export_model(model, tmp_path / "x.pt", example=IMAGES)
        assert "scores.weight and 1 other tensors held random numbers" in made.notices[-1]

    def test_gates_are_opened_less_where_nothing_would_be_found(self):
        model, batches = fading(0.55)
        far = opening.open_gates(model, batches[0]).values
        assert calm.steadiest(model, gate_values(model), batches[1])[1] < lending.SHAKY
        assert calm.steadiest(model, far, batches[1])[1] == float("inf")
        near = opening.open_gates(model, batches[0], batches=batches).values
        assert calm.all_tell(model, near, batches)
        assert all(near[name].abs() < value.abs() for name, value in far.items())

    def test_weights_that_say_nothing_with_gates_open(self, tmp_path):
        model, batches = fading(0.525)
        assert calm.all_tell(model, gate_values(model), batches)
        with pytest.raises(ExportRefused, match="moves no output visibly"):
            opening.open_gates(model, batches[0], batches=batches)
        path = tmp_path / "x.onnx"
        made = attnsurgeon.export_model(model, path, example=IMAGES, exporter="torchscript")
        assert [check.gates for check in made.checks] == ["closed"] * 3 + ["open"] * 3
        assert "scores.weight and 1 other tensors held random numbers" in made.notices[-1]
        assert len(verify_export(path, model).checks) == 6

    def test_signals_are_made_as_large_as_they_are_with_gates_open(self):
        """Else a part that opened gates leave behind would be among the best of nothing."""
        model, batches = fading(1)
        gates = {name: torch.full_like(gate, 3) for name, gate in gate_values(model).items()}
        fill(model, batches[0], gates)
        given = []
        model.scores.register_forward_hook(lambda *call: given.append(call[-1].abs().max().item()))
        run_with_gates(model, gates, batches[0])
        run_with_gates(model, gate_values(model), batches[0])
        assert given[0] == pytest.approx(heads.LARGEST, rel=0.01)  # the layer keeps its bias
        assert given[len(given) // 2] > 2 * heads.LARGEST  # closed: these fade as gates open

    def test_numbers_are_lent_for_opened_gates(self, monkeypatch):
        model, batches = fading(0.525)
        opener, given = opening.Opener(model, batches, PRECISIONS["fp32"]), []
        fill = heads.fill_heads

        def watched(model, layers, own, inputs, gates, seed):
            given.append(gates)
            fill(model, layers, own, inputs, gates, seed)

        monkeypatch.setattr(lending, "fill_heads", watched)
        with lending.lent_to(model, batches, set, opener) as lent:
            assert lent
        assert all(gate.any() for gate in given[0].values())

    def test_the_number_farthest_from_zero_keeps_its_sign(self):
        parts = [torch.tensor([1.0, -3.0]), torch.zeros(0), torch.tensor([[2]])]
        assert heads._farthest_from_zero(parts) == -3
        assert heads._farthest_from_zero(parts[1:2]) == 0

    def test_a_wrong_weight_in_the_place_of_which_another_was_lent(self, tmp_path, monkeypatch):
        model = detector()
        nn.init.zeros_(model.scores.weight)
        write = onnx_format.OnnxDraft.write

        def spoiled(self, path, gates):
            wrong = torch.ones(3, 8, 1, 1)
            write(self, path, {**gates, "scores.weight": wrong})

        monkeypatch.setattr(onnx_format.OnnxDraft, "write", spoiled)
        with pytest.raises((ExportDiffers, ExportRefused)):
            attnsurgeon.export_model(
                model, tmp_path / "x.onnx", example=IMAGES, exporter="torchscript"
            )
        assert list(tmp_path.iterdir()) == []

    def test_a_wrong_weight_before_them(self, tmp_path, monkeypatch):
        Planted.after_writing(monkeypatch, shift_a_weight)
        with pytest.raises(ExportDiffers, match="gates closed, batch 2"):
            attnsurgeon.export_model(
                detector(), tmp_path / "x.onnx", example=IMAGES, exporter="torchscript"
            )

    def test_gates_are_opened_too(self, tmp_path):
        operated = attnsurgeon.insert_attention(
            detector(), "se", example=(IMAGES,), at="features.1", reduction=4
        )
        made = attnsurgeon.export_model(
            operated, tmp_path / "x.onnx", example=IMAGES, exporter="torchscript"
        )
        assert [check.gates for check in made.checks] == ["closed"] * 3 + ["open"] * 3

    def test_gates_of_a_network_that_finds_nothing_move_nothing(self):
        operated = attnsurgeon.insert_attention(
            detector(), "se", example=(IMAGES,), at="features.1", reduction=4
        )
        nn.init.zeros_(operated.scores.weight)
        values = opening.plain_openings(operated)
        assert set(opening._shifts(operated, values, (IMAGES,)).values()) == {0.0}

    def test_boxes_of_many_pixels_hide_no_gate_that_scores_show(self):
        class Located(nn.Module):
            def __init__(self, pixels):
                super().__init__()
                torch.manual_seed(0)
                self.net, self.pixels = Ranked().eval(), pixels

            def forward(self, images):
                found = self.net(images)
                return [{**one, "boxes": 0 * one["boxes"] + self.pixels} for one in found]

        shifts = []
        for pixels in (1.0, 1e4):
            operated = attnsurgeon.insert_attention(
                Located(pixels), "se", example=(IMAGES,), at="net.features.1", reduction=4
            )
            values = opening.plain_openings(operated)
            shifts += opening._shifts(operated, values, (IMAGES,)).values()
        assert shifts[0] > 0
        assert shifts == pytest.approx([shifts[0]] * 2, rel=1e-3)

    def test_in_other_numbers(self, tmp_path, monkeypatch):
        """What is lent to the model is lent to its cast copy too, and the file holds it cast."""
        torch.manual_seed(0)
        model = attnsurgeon.insert_attention(
            Ranked().eval(), "se", example=(IMAGES,), at="features.1", reduction=4
        )
        nn.init.zeros_(model.scores.weight)
        noisy = []

        def watched(model, inputs, precision, cast, batches):
            own, rounded = model.scores.weight, cast.scores.weight
            noisy.append((own.half().equal(rounded), bool(own.any())))
            return open_gates(model, inputs, precision, cast, batches)

        monkeypatch.setattr("attnsurgeon.export.opening.open_gates", watched)
        path = tmp_path / "x.pt"
        made = attnsurgeon.export_model(model, path, example=IMAGES, precision="fp16")
        assert [check.gates for check in made.checks] == ["closed"] * 3 + ["open"] * 3
        assert "scores.weight and 1 other tensors held random numbers" in made.notices[-1]
        assert len(verify_export(path, model).checks) == 6
        assert noisy == [(True, True)] * 2
        assert not model.scores.weight.any()

    def test_a_classifier_runs_no_more_often(self, monkeypatch):
        monkeypatch.setattr(heads, "run_with_gates", None)
        monkeypatch.setattr(calm, "run_with_gates", None)
        model, batches = nn.Linear(2, 2), [(torch.zeros(1, 2),)]
        assert calm.steady(model, {}, batches[0]) is batches[0]
        assert calm.all_tell(model, {}, batches)
        with lending.lent_to(model, batches, set) as lent:
            assert lent == {}

    def test_an_overlap_on_the_edge_is_seen(self):
        boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5.001]])  # 0.5001 of it in common
        scores = torch.tensor([0.9, 0.8])
        kept = []
        for way in (1, -1):
            with calm._ShakenRanks(way):
                kept.append(len(nms(boxes, scores, 0.5)))
        assert kept == [2, 1]

    @pytest.mark.parametrize("rank", [torch.topk, lambda scores, _: torch.sort(scores)])
    def test_of_equal_scores_another_is_first_the_second_time(self, rank):
        firsts = set()
        for way in (1, -1):
            with borrowed_randomness(0), calm._ShakenRanks(way):
                firsts.add(int(rank(torch.ones(2), 1)[1][0]))
        assert firsts == {0, 1}

    def test_images_are_shaken_both_ways(self):
        one, other = (calm.shaken((torch.ones(8),), way)[0] - 1 for way in (100, -100))
        assert one.any()
        assert torch.allclose(one, -other, atol=1e-7)

    def test_findings_are_held_to_images_shaken_either_way(self, monkeypatch):
        ways = []

        def watched(inputs, roundings, most):
            ways.append(roundings)
            return inputs

        monkeypatch.setattr(calm, "shaken", watched)
        calm.steady(Ranked().eval(), {}, (IMAGES,))
        assert ways == [calm.AS_ENGINES, -calm.AS_ENGINES]

    def test_images_in_half_precision_are_shaken_by_no_more_than_is_allowed(self):
        """A hundred roundings of bfloat16 are 78 % of a number: whatever is found would move."""
        model = filled(Ranked().eval(), (IMAGES,))
        assert calm.steadiest(model, {}, (IMAGES,))[1] < lending.SHAKY
        images = [image.bfloat16() for image in IMAGES]
        assert 0 < calm.steadiest(model.bfloat16(), {}, (images,))[1] < 1

    def test_images_are_redrawn_until_rounding_decides_nothing(self, monkeypatch):
        model, moved = detector(), iter([1.0, 1.0, 3e-5, 3e-5, 0.5, 1e-7, 1e-7, 0.0])

        def compare(want, have, tolerance):
            return 0.0, next(moved), 1.0, 1.0, True

        monkeypatch.setattr(calm, "compare_outputs", compare)
        monkeypatch.setattr(calm, "tells", lambda outputs: True)
        drawn = calm.steady(model, {}, (IMAGES,))
        assert torch.equal(drawn[0][0], calm._redrawn((IMAGES,), 3)[0][0])
        monkeypatch.setattr(calm, "DRAWS", 0)
        assert calm.steady(model, {}, (IMAGES,)) == (IMAGES,)


def test_every_second_image_lies_on_its_side():
    (images,) = resized((IMAGES,), 2, (64, 96))
    assert [tuple(image.shape) for image in images] == [(3, 64, 96), (3, 96, 64)]
    assert size_of((images,)) == (64, 96)
