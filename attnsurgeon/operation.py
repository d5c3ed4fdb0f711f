"""The operation: plan, cut, and hold the result to the promises before anybody gets it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from attnsurgeon.card import HostCard, card_of, give_card
from attnsurgeon.origin import fingerprints, give_origin, origin_of
from attnsurgeon.plan import Plan, make_plan
from attnsurgeon.sites import as_inputs, find_sites
from attnsurgeon.surgery import apply_plan
from attnsurgeon.verify import Liveness, Verdict, keep_promises, probe_inputs


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
        IdentityBroken: it did, or a gate cannot learn; the model is not to be used then.
    """
    inputs = probe_inputs(model, example)
    verdict, liveness = keep_promises(model, lambda: apply_plan(model, plan), inputs)
    give_certificate(
        model, Certificate(verdict.exact, verdict.inputs, liveness.gates, liveness.live)
    )
    return verdict, liveness


def insert_attention(
    model: nn.Module,
    block: str,
    *,
    at: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    stage: int | Iterable[int] = (),
    every: int = 1,
    placement: str = "post",
    example: Any = None,
    seed: int = 0,
    stack: bool = False,
    **options: Any,
) -> nn.Module:
    """Return a copy of a model with attention at its residual blocks, behind closed gates.

    The copy computes bit for bit what the model computes, which is left untouched; its original
    keys are the model's. New parts join in the mode, dtype and device of their block.

    Args:
        model: any network with residual blocks.
        block: name of the attention: se, cbam, sk, gc, or another of blocks.names().
        at: shell patterns on the dotted path of a block; each must match.
        exclude: shell patterns of blocks to leave out.
        stage: stages to choose from, numbered from 1 by feature size.
        every: take each `every`-th of the chosen sites.
        placement: post, standard, pre, identity, conv or replace.
        example: an input, or a tuple of inputs; by default that of the network's card, or a
            (1, C, 224, 224) image batch.
        seed: of the new weights; the same seed gives the same weights.
        stack: put it behind the same block at the same place too, instead of refusing that.
        **options: of the block, such as reduction=8.

    Raises:
        AttnSurgeonError: see make_plan and find_sites.
        IdentityBroken: an output changed or a gate cannot learn.

    Example:
        >>> import torch, torchvision, attnsurgeon
        >>> host = torchvision.models.resnet18(weights=None).eval()
        >>> operated = attnsurgeon.insert_attention(host, "se", at="layer3.*", reduction=8)
        >>> image = torch.randn(1, 3, 64, 64)
        >>> torch.equal(host(image), operated(image))
        True
    """
    inputs = as_inputs(model, example)
    sites = find_sites(model, inputs)
    plan = make_plan(
        model,
        sites,
        block,
        at=at,
        exclude=exclude,
        stages=(stage,) if isinstance(stage, int) else stage,
        every=every,
        placement=placement,
        options=options,
        seed=seed,
        stack=stack,
    )
    operated = copy.deepcopy(model)
    if origin_of(model) is None:
        give_origin(operated, fingerprints(model))
    operate(operated, plan, inputs)
    remember_input(operated, inputs)
    return operated


def remember_input(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Note in the model's card, if it has none, its class and the shapes of its inputs."""
    shapes = tuple(tuple(part.shape) for part in inputs if isinstance(part, Tensor))
    card = card_of(model) or HostCard(name=None, class_name=type(model).__name__)
    give_card(model, replace(card, input_shapes=shapes))
