"""Save and load an operated network: safetensors with the recipe; no pickle, no code."""

from __future__ import annotations

import copy
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attnsurgeon.builder import weights_on_meta
from attnsurgeon.card import HostCard, card_of, give_card
from attnsurgeon.checkpoint import check_readable, fit_state, load_state
from attnsurgeon.errors import (
    AttnSurgeonError,
    BadFile,
    CheckpointMismatch,
    HostUnusable,
    WeightsUnavailable,
)
from attnsurgeon.host import host_names, rebuild_host, recognise
from attnsurgeon.operation import Certificate, certificate_of, give_certificate
from attnsurgeon.origin import fingerprints, give_origin, origin_of
from attnsurgeon.outputs import atomic_output
from attnsurgeon.plan import Plan
from attnsurgeon.recipe import Recipe
from attnsurgeon.surgery import apply_plan, attention_paths, cuts_of, is_new_key, remove_attention
from attnsurgeon.training.delta import complete, select_moved
from attnsurgeon.training.stripping import take_gates, ungated

DEPLOYED = (".onnx", ".pt", ".pth", ".ckpt")
"""Suffixes that mean a file, though not one that a network is loaded from."""
KEY = "attnsurgeon"
"""The one metadata key; with two, their order in the file would be left to chance."""


def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    only: str | None = None,
    force: bool = False,
) -> Recipe:
    """Write an operated network to a safetensors file with its recipe.

    The original tensors stand under their original keys, byte for byte. The file is whole or
    not there; the same model gives the same bytes.

    Args:
        model: an operated network, not wrapped.
        path: to write, in .safetensors.
        only: "attention" leaves out the host's tensors that are what they were at the insertion:
            a small file for a host that was frozen, loaded onto the same host again.
        force: replace an existing file.

    Raises:
        HostUnusable: the model was not operated on, or with `only` its host was trained too.
        BadOption: `only` is something else.
        OutputRefused: the file cannot be written, or exists and `force` is not given.
    """
    recipe = make_recipe(model)
    state = model.state_dict()
    if only is not None:
        recipe, state = select_moved(model, recipe, only)
    with atomic_output(path, force=force) as part:
        save_file(_separate(state), part, metadata={KEY: recipe.dumps()})
    return recipe


def make_recipe(model: nn.Module) -> Recipe:
    """Return the recipe of an operated network as it stands.

    Raises:
        HostUnusable: the model was not operated on, is wrapped, or its tensors are sharded.
    """
    cuts = cuts_of(model)
    if not cuts and attention_paths(model):
        raise HostUnusable(
            f"this {type(model).__name__} wraps an operated network; save the network itself, such "
            "as model.module (of a compiled one model._orig_mod)"
        )
    if not cuts:
        raise HostUnusable(
            f"this {type(model).__name__} has no attention of attnsurgeon; insert_attention first"
        )
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise HostUnusable(
            f"the tensors of this {type(model).__name__} are sharded; gather them with "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), load "
            "them into load_model(FILE), and save that"
        )
    certificate = certificate_of(model)
    sha256 = fingerprints(model)
    origin = origin_of(model) or {}
    return Recipe(
        host=_host_card(model),
        cuts=cuts,
        certificate=certificate.to_json() if certificate else None,
        sha256=sha256,
        origin={key: was for key, was in origin.items() if sha256.get(key, was) != was},
        stripped=ungated(model),
    )


def _host_card(model: nn.Module) -> HostCard:
    """Return the model's card; a torchvision network without one is recognised by its build."""
    card = card_of(model) or HostCard(name=None, class_name=type(model).__name__)
    if card.name is None:
        known = recognise(_bare(model))
        if known is not None:
            known = HostCard(**{**known.__dict__, "input_shapes": card.input_shapes})
            give_card(model, known)
            return known
    return card


def _bare(model: nn.Module) -> nn.Module:
    """Return the network without its attention, its tensors on meta: only its build counts."""
    return remove_attention(model)


def _separate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors of which no two share memory, as safetensors demands."""
    seen: set[int] = set()
    apart = {}
    for key, tensor in state.items():
        plain = tensor.detach().contiguous()
        if plain.data_ptr() in seen and plain.numel():
            plain = plain.clone()
        seen.add(plain.data_ptr())
        apart[key] = plain
    return apart


def is_model_file(text: str | os.PathLike[str]) -> bool:
    """Tell whether a MODEL argument is meant as a file rather than as a host's name."""
    path = Path(text)
    is_file = path.suffix == ".safetensors" or path.suffix in DEPLOYED
    if is_file or str(text) in host_names():
        return is_file  # a file called like a model is meant as ./resnet50
    try:
        return path.is_file()
    except OSError:  # too long for a name of either
        return False


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Return the recipe of a file, without its tensors.

    Raises:
        BadFile: missing, empty, truncated, no safetensors, not of attnsurgeon, or too new.
    """
    file = Path(path)
    check_readable(file)
    if file.suffix in DEPLOYED:
        raise BadFile(
            f"{str(file)!r} is no file of `attnsurgeon insert`; give the .safetensors it was "
            "exported from, or weights by --checkpoint"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise BadFile(f"{str(file)!r} is not a whole safetensors file: {error}") from error
    if KEY not in metadata:
        raise BadFile(
            f"{str(file)!r} has no recipe: it was not written by attnsurgeon; "
            "weights alone are given with --checkpoint"
        )
    return Recipe.loads(metadata[KEY], repr(str(file)))


def load_model(path: str | os.PathLike[str], host: nn.Module | None = None) -> nn.Module:
    """Return the operated network of a file, in eval mode.

    No code of the file is run: its host is looked up in torchvision's registry only.

    Args:
        path: a file of save_model.
        host: the plain network, where it is one of your own; it is left untouched. For a file of
            the attention only, the network with the weights that the attention was trained on,
            unless those are published ones.

    Raises:
        BadFile: the file is damaged, of a newer format, or its recipe does not fit its tensors.
        HostUnusable: the host is your own and was not given, or another one was given: of
            another class, or for a file of the attention only with other tensors.
    """
    recipe = read_recipe(path)
    source = repr(str(path))
    try:
        state = _read_state(path, recipe, host)
        _rehearse(host, recipe, state, source)
        model = _new_host(host, recipe)
        apply_plan(model, Plan(recipe.cuts))
        take_gates(model, recipe.stripped)
        load_state(model, state, source)
    except SafetensorError as error:
        raise BadFile(f"{source} is damaged: {error}") from error
    except CheckpointMismatch as error:
        raise BadFile(f"the recipe of {source} does not fit its tensors: {error}") from error
    except AttnSurgeonError as error:
        if isinstance(error, HostUnusable | WeightsUnavailable):
            raise
        raise BadFile(f"the recipe of {source} does not fit: {error}") from error
    give_card(model, recipe.host)
    give_origin(model, {**recipe.sha256, **recipe.origin})
    if recipe.certificate is not None:
        give_certificate(model, Certificate(**recipe.certificate))
    return model.eval()


def _read_state(
    path: str | os.PathLike[str], recipe: Recipe, host: nn.Module | None
) -> dict[str, Tensor]:
    """Return all tensors of the operated network, the host's from the host if it must be so."""
    state = load_file(path)
    return state if recipe.only is None else complete(state, recipe, host, repr(str(path)))


def _rehearse(
    host: nn.Module | None, recipe: Recipe, state: dict[str, Tensor], source: str
) -> None:
    """Refuse a recipe that does not fit its tensors before it takes any memory it asks for.

    Raises:
        CheckpointMismatch: a tensor is missing, left over or of another shape.
        BadFile: the recipe has hashes of other tensors than the original ones.
        AttnSurgeonError: see rebuild_host and apply_plan.
    """
    with weights_on_meta():
        model = _new_host(host, recipe).to("meta")
        apply_plan(model, Plan(recipe.cuts))
        take_gates(model, recipe.stripped)
    fit_state(model, state, source)
    paths = attention_paths(model)
    if {key for key in state if not is_new_key(key, paths)} != set(recipe.sha256):
        raise BadFile("its hashes are not those of the original tensors")


def _new_host(host: nn.Module | None, recipe: Recipe) -> nn.Module:
    """Return a plain network to operate on: of the recipe's name, or a copy of the user's own."""
    if host is None:
        return rebuild_host(recipe.host)
    if type(host).__name__ != recipe.host.class_name:
        raise HostUnusable(
            f"the file was made from {recipe.host.class_name}, not from {type(host).__name__}"
        )
    return copy.deepcopy(host)


def load_plain(path: str | os.PathLike[str]) -> nn.Module:
    """Return the untouched host of a file with its original tensors.

    Raises:
        BadFile, HostUnusable, WeightsUnavailable: see load_model.
    """
    recipe = read_recipe(path)
    model = rebuild_host(recipe.host)
    keys = model.state_dict().keys()
    state = _read_state(path, recipe, None)
    load_state(model, {k: t for k, t in state.items() if k in keys}, repr(str(path)))
    return model.eval()
