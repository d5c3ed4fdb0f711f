"""Every network of torchvision: what is found in it, and the operation at every site it has."""

import re

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torchvision.models.video import mvit

from attnsurgeon import blocks, survey
from attnsurgeon.borrow import borrowed_buffers
from attnsurgeon.example import as_inputs
from attnsurgeon.gate import Gate, named_gates
from attnsurgeon.host import DIGITS, host_names, load_host, load_outline
from attnsurgeon.liveness import _weighted_sum
from attnsurgeon.plan import Plan, make_plan
from attnsurgeon.probes import arguments_in, probe_inputs, small_resizes
from attnsurgeon.sites import find_sites
from attnsurgeon.surgery import apply_plan, attention_paths, is_new_key, remove_attention
from attnsurgeon.verify import Verdict, compare, record

ROWS = survey.shipped_rows()
NAMES = sorted(set(host_names()) - {DIGITS})
LARGE = sorted(NAMES, key=lambda name: ROWS[name].parameters)[-6:]
"""The six largest are left to `pytest -m large` and to tests/benchmarks/every_host.py."""
WANTED = (("se", "post"), ("se", "standard"), ("gc", "standard"))

# Arguments that make a network smaller, without changing its wiring.
SMALLER = {
    r"vit_h_14": {"image_size": 56},
    r"vit_": {"image_size": 64},
    r"(faster|mask|keypoint)rcnn": {
        "box_detections_per_img": 5,
        "box_score_thresh": 0.0,
        "box_batch_size_per_image": 16,
        "rpn_pre_nms_top_n_train": 100,
        "rpn_pre_nms_top_n_test": 100,
        "rpn_post_nms_top_n_train": 20,
        "rpn_post_nms_top_n_test": 20,
    },
    r"ssd": {"detections_per_img": 5, "score_thresh": 0.0, "num_classes": 3},
    r"retinanet|fcos": {"detections_per_img": 5, "score_thresh": 0.0},
}
"""Without thresholds, so that an untrained detector finds boxes, which can then be compared."""
CLIP = (1, 3, 8, 64, 64)
"""What a network takes that is built for one size of clip."""


def smaller(name):
    return next((options for key, options in SMALLER.items() if re.match(key, name)), {})


def built(name):
    """Return a small network of random weights, and what it is watched with.

    To draw and scale weights as their authors do takes longer than all that is done with them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mvit, "MViT", small_mvit)
        model = load_outline(name, smaller(name))
    if name == "s3d":
        model.avgpool.kernel_size = (1, 2, 2)  # of a full clip there is more to average
    pool = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    made = {}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and (parameter.is_meta or not parameter.any()):
                if id(parameter) not in made:
                    made[id(parameter)] = drawn(parameter, f"{path}.{key}", pool)
                module._parameters[key] = made[id(parameter)]
    return model, as_inputs(model, torch.zeros(CLIP) if name.startswith("mvit") else None)


def small_mvit(*, kind=mvit.MViT, **settings):
    """Build for smaller clips what takes clips of one size alone, which no builder is told."""
    return kind(**{**settings, "temporal_size": CLIP[2], "spatial_size": CLIP[3:]})


def drawn(parameter, name, pool):
    """Return a parameter with numbers of the pool: no map dies or grows on its way by them.

    What a detector says of a box is small, lest all of them are moved out of the image.
    """
    numbers = torch.empty(parameter.shape)
    for part in numbers.view(-1).split(len(pool)):
        part.copy_(pool[: len(part)])
    if re.search(r"\.(cls_|bbox_)", name):
        numbers *= 0.01
    elif parameter.ndim > 1:
        numbers *= parameter[0].numel() ** -0.5
    else:
        numbers *= 0.1
        numbers += name.endswith(".weight")
    return torch.nn.Parameter(numbers, parameter.requires_grad)


def test_the_survey_is_complete():
    assert sorted(ROWS) == sorted(host_names())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_shipped_is_what_is_observed(name):
    assert survey.to_line(survey.observe_host(name)) == survey.to_line(ROWS[name])


def test_the_survey_has_teeth(monkeypatch):
    """One site that is not found, or one placement lost, is another line."""
    found = survey.find_sites
    monkeypatch.setattr(survey, "find_sites", lambda model: found(model)[:-1])
    assert survey.to_line(survey.observe_host("resnet18")) != survey.to_line(ROWS["resnet18"])


@pytest.mark.parametrize("family", ["resnet50", "vit_b_16", "densenet121", "r3d_18", "vgg11"])
def test_what_fits_is_what_can_be_planned(family):
    sites = find_sites(load_host(family, weights="none"))
    served = {name for site in sites for name in site.blocks}
    assert sorted(served) == ROWS[family].fitting()


def joined_plan(model, sites):
    """Plan SE after and in every site that can be served, and GC in it, all at once."""
    cuts = []
    for kind in sorted({site.kind for site in sites}):
        for block, placement in WANTED:
            able = [
                site.path
                for site in sites
                if site.kind == kind
                and placement in site.spots
                and site.spots[placement].serves in blocks.get(block).layouts
            ]
            if able:
                plan = make_plan(model, sites, block, at=able, placement=placement, kind=kind)
                assert len(plan.cuts) == len(able)
                cuts += plan.cuts
    return Plan(tuple(_apart(cuts)))


def _apart(cuts):
    """Give each attention at one place of one block a name of its own."""
    from dataclasses import replace

    taken = set()
    for cut in cuts:
        child, number = cut.splice.child, 1
        while (cut.path, child) in taken:
            number += 1
            child = f"{cut.splice.child}_{number}"
        taken.add((cut.path, child))
        yield replace(cut, splice=replace(cut.splice, child=child))


def live_gates(model, inputs):
    """Return the gates that one backward pass reaches, in eval or in train mode."""
    gates = named_gates(model)
    live = set()
    for mode in ("train", "eval"):
        model.train(mode == "train")
        if live == set(gates):
            break
        loss = _weighted_sum(model(*arguments_in(mode, model, inputs)))
        if loss.requires_grad:
            found = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
            live |= {
                name
                for name, gradient in zip(gates, found, strict=True)
                if gradient is not None and gradient.isfinite().all() and gradient.any()
            }
    return live


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.large] * (n in LARGE)) for n in NAMES]
)
def test_every_site_of_every_network(name):
    operate_everywhere(name)


def operate_everywhere(name):
    torch.manual_seed(0)
    model, example = built(name)
    sites = find_sites(model, example)
    plan = joined_plan(model, sites)
    served = {site.path for site in sites if {"post", "standard"} & set(site.spots)}
    assert {cut.path for cut in plan.cuts} == served
    inputs = probe_inputs(model, example, most=1)
    classes = [type(module) for module in model.modules()]
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with small_resizes(model):
        before = record(model, inputs)
        assert all(leaf.numel() for run in before for leaf in tree_leaves(run.leaves))
        apply_plan(model, plan)
        verdict = compare(before, model)
        assert verdict.exact, verdict.differences[:3]
        with borrowed_buffers(model):
            assert live_gates(model, inputs[0]) == set(named_gates(model))
    kept = model.state_dict()
    paths = attention_paths(model)
    assert [key for key in kept if not is_new_key(key, paths)] == list(state)
    assert all(torch.equal(kept[key], state[key]) for key in state)
    bare = remove_attention(model)
    assert list(bare.state_dict()) == list(state)
    assert [type(module) for module in bare.modules()] == classes


@pytest.mark.parametrize(
    "answer",
    [
        lambda gate, attention, x: 1.001 + 0 * gate.openness * attention,  # another output
        lambda gate, attention, x: torch.ones_like(attention),  # a gate without a gradient
    ],
)
def test_the_operation_has_teeth(answer, monkeypatch):
    monkeypatch.setattr(Gate, "forward", answer)
    with pytest.raises(AssertionError):
        operate_everywhere("squeezenet1_1")


def test_a_changed_weight_is_caught(monkeypatch):
    operate = apply_plan

    def careless(model, plan):
        operate(model, plan)
        with torch.no_grad():
            model.features[0].bias[0] = -model.features[0].bias[0]

    monkeypatch.setattr(f"{__name__}.compare", lambda before, model: Verdict(True, ()))
    operate_everywhere("squeezenet1_1")
    monkeypatch.setattr(f"{__name__}.apply_plan", careless)
    with pytest.raises(AssertionError):
        operate_everywhere("squeezenet1_1")


def test_one_probe_is_the_first_of_several():
    model = load_host("digits")
    example = as_inputs(model, None)
    (only,), several = probe_inputs(model, example, most=1), probe_inputs(model, example)
    assert len(several) == 2
    assert torch.equal(only[0], several[0][0])


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "swin_t"])
def test_saved_loaded_and_verified(run, folder, name):
    """Of every kind of input; the first computes with its weights while it is built."""
    done = run(
        "insert", name, "--weights", "none", "--block", "se", "--every", "5", "-o", "x.safetensors"
    )
    assert done.code == 0, done.err
    assert run("verify", "x.safetensors", "--json").code == 0
    assert run("sites", "x.safetensors", "--json").code == 0
