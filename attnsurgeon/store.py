"""Save and load an operated network: safetensors with the recipe; no pickle, no code."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attnsurgeon.arguments import typed
from attnsurgeon.borrow import on_meta
from attnsurgeon.builder import weights_on_meta
from attnsurgeon.card import HostCard, card_of, give_card
from attnsurgeon.checkpoint import check_readable, fit_state, load_state
from attnsurgeon.errors import (
    AttnSurgeonError,
    BadFile,
    CheckpointMismatch,
    HostUnusable,
    MissingPackage,
    WeightsUnavailable,
)
from attnsurgeon.host import Given, given_host, host_names, host_of
from attnsurgeon.network import unwrap
from attnsurgeon.operation import Certificate, certificate_of, give_certificate
from attnsurgeon.origin import fingerprints, give_origin, origin_of
from attnsurgeon.outputs import atomic_output
from attnsurgeon.plan import Plan
from attnsurgeon.recipe import KEY, Recipe
from attnsurgeon.sources import timm_models, torchvision_models
from attnsurgeon.surgery import apply_plan, attention_paths, cuts_of, is_new_key, remove_attention
from attnsurgeon.training.delta import complete, select_moved
from attnsurgeon.training.stripping import take_gates, ungated

DEPLOYED = (".onnx", ".pt", ".pth", ".ckpt")
"""Suffixes that mean a file, though not one that a network is loaded from."""
STORABLE = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
}
"""Kinds of numbers that safetensors has."""


@typed
def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    only: str | None = None,
    force: bool = False,
) -> Recipe:
    """Write an operated network to a safetensors file with its recipe.

    The original tensors stand under their original keys, byte for byte. The file is whole or
    not there; the same model gives the same bytes. Of a compiled or parallel one, that inside.

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
    model, _ = unwrap(model)
    check_storable(model)
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
        HostUnusable: the model was not operated on, or its tensors are sharded.
    """
    cuts = cuts_of(model)
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
    """Return the model's card; a registered network without one is recognised by its build."""
    card = card_of(model) or HostCard(name=None, class_name=type(model).__name__)
    if card.name is None:
        bare = remove_attention(model)
        known = torchvision_models.recognise(bare) or timm_models.recognise(bare)
        if known is not None:
            known = replace(
                known,
                input_shapes=card.input_shapes,
                input_dtypes=card.input_dtypes,
                listed=card.listed,
            )
            give_card(model, known)
            return known
    return card


def _separate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors of which no two share memory, as safetensors demands."""
    seen: set[int] = set()
    apart = {}
    for key, tensor in state.items():
        plain = tensor.detach().contiguous()
        memory = plain.untyped_storage().data_ptr()
        if memory in seen and plain.numel():
            plain = plain.clone()
        seen.add(memory)
        apart[key] = plain
    return apart


def check_storable(model: nn.Module) -> None:
    """Refuse a network whose state a safetensors file cannot hold.

    Raises:
        HostUnusable: an entry is no tensor, is sparse or quantized, or of a dtype that it lacks.
    """
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            found = f"a {type(value).__name__}"
        elif value.layout != torch.strided or value.is_quantized:
            found = f"a tensor of layout {str(value.layout).removeprefix('torch.')}"
        elif value.dtype not in STORABLE:
            found = f"of dtype {str(value.dtype).removeprefix('torch.')}"
        else:
            continue
        raise HostUnusable(
            f"{key} of {type(model).__name__} is {found}, which a .safetensors file cannot hold; "
            "keep it out of the state dict (persistent=False)"
        )


def is_model_file(text: str | os.PathLike[str]) -> bool:
    """Tell whether a MODEL argument is meant as a file rather than as a host's name."""
    path = Path(text)
    is_file = path.suffix == ".safetensors" or path.suffix in DEPLOYED
    if is_file or str(text) in host_names() or path.suffix == ".py":
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


@typed
def load_model(path: str | os.PathLike[str], host: Given | None = None) -> nn.Module:
    """Return the operated network of a file, in eval mode.

    No code is run because the file names it: its host is looked up in torchvision's and timm's
    registries only, or given again.

    Args:
        path: a file of save_model.
        host: where it is a network of your own: the network (it is left untouched), what returns
            it with the arguments that the file records, or the text that names that, as
            `path/to/file.py:factory` or `package.module:factory`. It is checked against the
            file: class, keys, shapes and kinds of numbers. For a file of the attention only, the
            network with the weights that the attention was trained on, unless those are
            published ones.

    Raises:
        BadFile: the file is damaged, of a newer format, or its recipe does not fit its tensors.
        HostUnusable: the host is your own and was not given, or another one was given: of
            another class, or for a file of the attention only with other tensors.
        MissingPackage: the host is timm's, which is not installed.
        WeightsUnavailable: the published weights of a file of the attention only.
    """
    recipe = read_recipe(path)
    source = repr(str(path))
    host = given_host(recipe.host, host)
    plain = None if host is None else host_of(recipe.host, host)
    try:
        state = _read_state(path, recipe, plain)
        _rehearse(plain, recipe, state, source)
        model = _new_host(plain, recipe)
        apply_plan(model, Plan(recipe.cuts))
        take_gates(model, recipe.stripped)
        load_state(model, state, source)
    except SafetensorError as error:
        raise BadFile(f"{source} is damaged: {error}") from error
    except (HostUnusable, MissingPackage, WeightsUnavailable):
        raise
    except AttnSurgeonError as error:
        raise _unfit(error, source, plain) from error
    give_card(model, recipe.host)
    give_origin(model, {**recipe.sha256, **recipe.origin})
    if recipe.certificate is not None:
        give_certificate(model, Certificate(**recipe.certificate))
    return model.eval()


def _unfit(error: AttnSurgeonError, source: str, plain: nn.Module | None) -> AttnSurgeonError:
    """Return what is wrong: the host that was given, or else the file."""
    if plain is not None:
        kind = type(plain).__name__
        return HostUnusable(
            f"this {kind}, given by --host or host=, is not the one that {source} was made from: "
            f"{error}"
        )
    if isinstance(error, CheckpointMismatch):
        return BadFile(f"the recipe of {source} does not fit its tensors: {error}")
    return BadFile(f"the recipe of {source} does not fit: {error}")


def _read_state(
    path: str | os.PathLike[str], recipe: Recipe, host: nn.Module | None
) -> dict[str, Tensor]:
    """Return all tensors of the operated network, the host's from the host if it must be so."""
    state = load_file(path)
    return state if recipe.only is None else complete(state, recipe, host, repr(str(path)))


def _rehearse(
    plain: nn.Module | None, recipe: Recipe, state: dict[str, Tensor], source: str
) -> None:
    """Refuse a recipe that does not fit its tensors before it takes any memory it asks for.

    Raises:
        CheckpointMismatch: a tensor is missing, left over or of another shape.
        BadFile: the recipe has hashes of other tensors than the original ones.
        AttnSurgeonError: see rebuild_host and apply_plan.
    """
    if plain is None:
        model = host_of(recipe.host, weightless=True).to("meta")
    else:
        with on_meta(plain):
            model = copy.deepcopy(plain)
    with weights_on_meta():
        apply_plan(model, Plan(recipe.cuts))
        take_gates(model, recipe.stripped)
    fit_state(model, state, source)
    paths = attention_paths(model)
    if {key for key in state if not is_new_key(key, paths)} != set(recipe.sha256):
        raise BadFile("its hashes are not those of the original tensors")


def _new_host(plain: nn.Module | None, recipe: Recipe) -> nn.Module:
    """Return a network to operate on: a rebuilt one, or a copy of what was given.

    A factory may well return the same network each time.
    """
    return host_of(recipe.host) if plain is None else copy.deepcopy(plain)


def load_plain(path: str | os.PathLike[str], host: Given | None = None) -> nn.Module:
    """Return the untouched host of a file with its original tensors.

    Raises:
        BadFile, HostUnusable, MissingPackage, WeightsUnavailable: see load_model.
    """
    recipe = read_recipe(path)
    host = given_host(recipe.host, host)
    model = _new_host(None if host is None else host_of(recipe.host, host), recipe)
    keys = model.state_dict().keys()
    state = _read_state(path, recipe, model if host is not None else None)
    load_state(model, {k: t for k, t in state.items() if k in keys}, repr(str(path)))
    give_card(model, recipe.host)
    return model.eval()
