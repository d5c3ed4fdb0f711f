"""Arguments of wrong types, given to the library: our own errors, which say what is taken."""

import inspect
import pickle
import typing

import pytest
import torch
from torch import nn

import attnsurgeon
from attnsurgeon.arguments import typed
from attnsurgeon.errors import BadOption, HostUnusable
from tests import exports

FUNCTIONS = [n for n in attnsurgeon.__all__ if inspect.isfunction(getattr(attnsurgeon, n))]


def taker(name):
    """Return what takes the arguments of a public name."""
    thing = getattr(attnsurgeon, name)
    return thing.__init__ if inspect.isclass(thing) else thing


@pytest.mark.parametrize("name", [*FUNCTIONS, "GateSchedule"])
def test_every_public_function_is_held_to_its_annotations(name):
    held = taker(name)
    assert held.__code__.co_filename == typed.__code__.co_filename
    assert (
        typing.get_type_hints(held).keys() - {"return"} <= inspect.signature(held).parameters.keys()
    )
    assert pickle.loads(pickle.dumps(held)) is held


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("insert_attention", {"block": 7}, "block of insert_attention takes str, not 7"),
        ("insert_attention", {"every": "1"}, "takes int, not '1'"),
        ("insert_attention", {"every": True}, "takes int, not True"),
        ("insert_attention", {"at": 3}, "takes str or several of str, not 3"),
        ("insert_attention", {"exclude": [None]}, "takes str or several of str, not list"),
        ("insert_attention", {"stage": "a"}, "takes int or several of int, not 'a'"),
        ("insert_attention", {"placement": None}, "takes str, not None"),
        ("insert_attention", {"kind": 3}, "takes str or None, not 3"),
        ("insert_attention", {"stack": "no"}, "takes bool, not 'no'"),
        (
            "insert_attention",
            {"example": "x"},
            "a tensor, or a tuple of inputs with one in it, not str",
        ),
        ("insert_plan", {"plan": [], "seed": "a"}, "seed of insert_plan takes int"),
        ("find_sites", {"named": "stem"}, "takes several of str, not 'stem'"),
        ("remove_attention", {"at": 3}, "takes str or several of str, not 3"),
        ("save_model", {"path": None}, "takes str or a path, not None"),
        ("export_model", {"output": 3}, "takes str or a path, not 3"),
        (
            "export_model",
            {"output": "x.pt", "input_size": 32},
            r"takes \(int, int\) or None, not 32",
        ),
        (
            "export_model",
            {"output": "x.pt", "input_size": (8, 8, 8)},
            r"takes \(int, int\) or None",
        ),
        ("export_model", {"output": "x.pt", "progress": 3}, "takes a function, not 3"),
        ("export_model", {"output": "x.pt", "example": [3]}, "a tuple of inputs with one in it"),
        ("verify_unchanged", {"after": exports.Tiny(), "inputs": []}, "at least one input"),
        ("parameter_groups", {"lr": "a"}, "takes float, not 'a'"),
        ("check_optimizer", {"optimizer": 3}, "takes Optimizer, not 3"),
        ("GateSchedule", {"anneal": 1.5}, "anneal of GateSchedule takes int or None, not 1.5"),
    ],
)
def test_a_wrong_type_is_refused_with_what_is_taken(name, arguments, says, folder):
    block = {"block": "se"} if name == "insert_attention" else {}
    with pytest.raises(BadOption, match=says):
        getattr(attnsurgeon, name)(exports.Tiny(), **{**block, **arguments})
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"targets": "digits"}, "targets of compare_speed takes several of str or a path or a net"),
        ({"engines": "eager"}, "takes several of str, not 'eager'"),
        ({"batches": [1.5]}, "takes several of int or str"),
        ({"seconds": "a"}, "takes float, not 'a'"),
        ({"device": 3}, "takes str, not 3"),
    ],
)
def test_of_a_comparison(arguments, says):
    with pytest.raises(BadOption, match=says):
        attnsurgeon.compare_speed(**{"targets": ["digits"], **arguments})


@pytest.mark.parametrize("name", ["load_model", "naming_host"])
def test_of_what_names_a_host(name):
    with pytest.raises(BadOption, match=f"of {name} takes"):
        getattr(attnsurgeon, name)(3)


@pytest.mark.parametrize("name", ["find_sites", "gates", "freeze_host", "strip_gates"])
def test_no_network(name):
    with pytest.raises(HostUnusable, match="this is int, no torch.nn.Module; pass the network"):
        getattr(attnsurgeon, name)(3)


def test_what_fits_goes_through_as_it_is():
    @typed
    def take(
        model: nn.Module, some: typing.Iterable[str] = (), *, rate: float = 0.0, **rest: int
    ) -> tuple[object, ...]:
        return model, some, rate, rest

    model = nn.ReLU()
    assert take(model) == (model, (), 0.0, {})
    assert take(model, {"a"}, rate=1, more="anything") == (model, {"a"}, 1, {"more": "anything"})
    assert take(model, (letter for letter in "ab"))[1] == ["a", "b"]
    with pytest.raises(TypeError, match=r"take\(\) missing 1 required positional argument"):
        take()


def test_patterns_that_can_be_read_once():
    at = (f"blocks.{i}" for i in (0, 2))
    operated = attnsurgeon.insert_attention(
        exports.Tiny().eval(), "se", at=at, example=torch.zeros(1, 3, 32, 32), reduction=4
    )
    assert len(attnsurgeon.gates(operated)) == 2
