"""The operation: plan, cut, and hold the result to the promises before anybody gets it."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from attnsurgeon.arguments import typed
from attnsurgeon.card import HostCard, card_of, give_card
from attnsurgeon.example import as_inputs
from attnsurgeon.gate import DEFAULT_FORM
from attnsurgeon.liveness import Liveness
from attnsurgeon.network import check_has_numbers, plain_network
from attnsurgeon.origin import fingerprints, give_origin, origin_of
from attnsurgeon.plan import Plan
from attnsurgeon.probes import probe_inputs
from attnsurgeon.selection import as_patterns
from attnsurgeon.steps import Step, load_steps, plan_steps, read_steps
from attnsurgeon.surgery import apply_plan
from attnsurgeon.verify import Verdict, keep_promises


@dataclass(frozen=True)
class Certificate:
    """What was shown at an insertion: exact outputs on which inputs, how many gates are alive."""

    exact: bool
    inputs: tuple[dict[str, Any], ...]
    gates: int
    live: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a recipe."""
        return asdict(self)


def certificate_of(model: nn.Module) -> Certificate | None:
    """Return what was shown at the last insertion into this model, or None."""
    certificate: Certificate | None = model.__dict__.get("_attnsurgeon_certificate")
    return certificate


def give_certificate(model: nn.Module, certificate: Certificate) -> None:
    """Let the certificate travel with the model, through copies and pickles."""
    model.__dict__["_attnsurgeon_certificate"] = certificate


def operate(model: nn.Module, plan: Plan, example: tuple[Any, ...]) -> tuple[Verdict, Liveness]:
    """Make the cuts of a plan in this very model, and prove that nothing changed.

    Raises:
        HostUnusable: the model does not run.
        IdentityBroken: it did, or a gate cannot learn; the model is not to be used then.
    """
    inputs = probe_inputs(model, example)
    verdict, liveness = keep_promises(model, lambda: apply_plan(model, plan), inputs)
    give_certificate(
        model, Certificate(verdict.exact, verdict.inputs, liveness.gates, liveness.live)
    )
    return verdict, liveness


@typed
def insert_attention(
    model: nn.Module,
    block: str,
    *,
    at: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    stage: int | Iterable[int] = (),
    every: int = 1,
    kind: str | None = None,
    placement: str = "post",
    example: Any = None,
    seed: int = 0,
    stack: bool = False,
    gate: str = DEFAULT_FORM,
    **options: Any,
) -> nn.Module:
    """Return a copy of a model with attention at its sites, behind closed gates.

    The copy computes bit for bit what the model computes, which is left untouched; its original
    keys are the model's. New parts join in the mode, dtype and device of their block.

    Args:
        model: any network; see find_sites. One that is compiled or wrapped for parallel training
            is taken out of that, with a warning, and so the copy is neither.
        block: name of the attention: se, cbam, sk, gc, or another of blocks.names(); a class of
            your own as path/to/file.py:Class; a layer of timm as timm:NAME.
        at: shell patterns on the dotted path of a block; each must match.
        exclude: shell patterns of blocks to leave out.
        stage: stages to choose from, numbered from 1 by feature size.
        every: take each `every`-th of the chosen sites.
        kind: residual, merge, layer or plain; by default residual, or merge where there is no
            residual block. A module named in full in `at` is taken whatever it is.
        placement: post, standard, pre, identity, conv or replace.
        example: an input, or a tuple of inputs; by default that of the network's card, or a
            (1, C, 224, 224) image batch.
        seed: of the new weights; the same seed gives the same weights.
        stack: put it behind the same block at the same place too, instead of refusing that.
        gate: how it is let in: mix, centred or layer; see gate.FORMS.
        **options: of the block, such as reduction=8.

    Raises:
        AttnSurgeonError: see Step.checked, make_plan and find_sites.
        IdentityBroken: an output changed or a gate cannot learn.

    Example:
        >>> import torch, torchvision, attnsurgeon
        >>> host = torchvision.models.resnet18(weights=None).eval()
        >>> operated = attnsurgeon.insert_attention(host, "se", at="layer3.*", reduction=8)
        >>> image = torch.randn(1, 3, 64, 64)
        >>> torch.equal(host(image), operated(image))
        True
    """
    step = Step(
        block,
        at=tuple(as_patterns(at)),
        exclude=tuple(as_patterns(exclude)),
        stage=(stage,) if isinstance(stage, int) else tuple(stage),
        every=every,
        kind=kind,
        placement=placement,
        options=options,
        seed=seed,
        stack=stack,
        gate=gate,
    )
    return _insert(model, (step.checked(),), example)


@typed
def insert_plan(model: nn.Module, plan: Any, *, example: Any = None, seed: int = 0) -> nn.Module:
    """Return a copy of a model with several attentions, each where its step of a plan says.

    It is what inserting step by step would give; see insert_attention for what is promised.

    Args:
        model: see insert_attention.
        plan: a list of mappings such as {"at": "layer3.*", "block": "se", "placement": "standard",
            "options": {"reduction": 8}}, in the order of insertion; the JSON that `attnsurgeon
            insert --dry-run --json` prints, as Python values; or the path of such a file.
        example: see insert_attention.
        seed: of the new weights of steps that name none.

    Raises:
        AttnSurgeonError: see load_steps, read_steps, make_plan and find_sites.
        IdentityBroken: an output changed or a gate cannot learn.

    Example:
        >>> import torchvision, attnsurgeon
        >>> host = torchvision.models.resnet18(weights=None).eval()
        >>> steps = [{"at": "layer3.*", "block": "se"}, {"at": "layer4.1", "block": "gc"}]
        >>> len(attnsurgeon.gates(attnsurgeon.insert_plan(host, steps)))
        3
    """
    is_file = isinstance(plan, str | os.PathLike)
    return _insert(model, load_steps(plan, seed) if is_file else read_steps(plan, seed), example)


def _insert(model: nn.Module, steps: tuple[Step, ...], example: Any) -> nn.Module:
    model, notices = plain_network(model)
    check_has_numbers(model)
    for notice in notices:
        warnings.warn(notice, stacklevel=4)
    inputs = as_inputs(model, example)
    plan = plan_steps(model, inputs, steps)
    operated = copy.deepcopy(model)
    if origin_of(model) is None:
        give_origin(operated, fingerprints(model))
    operate(operated, plan, inputs)
    remember_input(operated, inputs)
    return operated


def remember_input(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Note the inputs in the model's card; one without a card gets one with its class."""
    card = card_of(model) or HostCard(name=None, class_name=type(model).__name__)
    give_card(model, card.with_example(inputs, next(iter(model.parameters()), None)))
