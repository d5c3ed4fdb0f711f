"""The gate: the only place where "unchanged" is made true, and where its forms are defined.

A gate scales the attention *map*, never the features, which are multiplied by the result once. A
term that is added (`x + t`) is admitted instead. There are three forms, `FORMS`:

`mix`: `(1 - g) + g * a`, and `g * t`. At g = 0 the mixed map is exactly 1 whatever the (finite)
map holds, so `x * mix` is `x` bit for bit; at g = 1 it is exactly the published block. An added
zero leaves every value equal (only a zero's sign may change from - to +, which no comparison can
tell). The gradient with respect to g at g = 0 is `sum(dL/dy * x * (a - 1))`, in general not zero:
the gate learns at the first step, everything behind it from the second.

`centred`: the same with `2 * a`, for maps that are a sigmoid: where its logits are 0 the doubled
map is 1, so that opening the gate is not first of all a scale. At g = 1 it is the published block
times 2, which a norm before it can hold.

`layer`: no number. The map is `2 * a`, a term is `t` itself, and the last layer before it starts
at zero: sigmoid(0) is exactly 0.5 in every dtype, so the map is exactly 1 and the term 0. That
layer is the gate: its weights learn at the first step, everything behind it from the second. Of
terms it is the zero start that the papers publish.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnsurgeon.arguments import typed
from attnsurgeon.errors import BadOption, UnknownName
from attnsurgeon.noted import Noted


class Gate(Noted):
    """How far attention is let in: 0 is not at all, 1 is the published block. Of the form `mix`.

    Args:
        last: path, from the module that holds the gate, of the last layer before it: all of its
            weights at zero make the logits of the map, or the term, zero. Empty where there is
            none: it cannot have the form `layer` then.
        is_sigmoid: whether its map is a sigmoid, 0.5 where its logits are 0; `centred` needs one.
    """

    form = "mix"

    def __init__(self, last: str = "", *, is_sigmoid: bool = False) -> None:
        super().__init__()
        self.openness = nn.Parameter(torch.zeros(1))  # (1,): FSDP refuses scalar parameters
        self.last = last
        self.is_sigmoid = is_sigmoid

    def forward(self, attention: Tensor, features: Tensor) -> Tensor:
        """Mix a multiplicative map towards 1, in the dtype of the features it will multiply."""
        # Without the cast a float32 gate would promote the whole feature map under autocast.
        return ((1 - self.openness) + self.openness * attention).to(features.dtype)

    def admit(self, term: Tensor, features: Tensor) -> Tensor:
        """Scale a term towards 0, in the dtype of the features it will be added to."""
        return (self.openness * term).to(features.dtype)


class CentredGate(Gate):
    """A gate of the form `centred`: at 1 it is the published block times 2."""

    form = "centred"

    def forward(self, attention: Tensor, features: Tensor) -> Tensor:
        """Mix twice a sigmoid map towards 1, in the dtype of the features it will multiply."""
        return ((1 - self.openness) + self.openness * (2 * attention)).to(features.dtype)


class LayerGate(Noted):
    """A gate of the form `layer`: without a number, as the last layer before it starts at zero."""

    form = "layer"

    def __init__(self, last: str) -> None:
        super().__init__()
        self.last = last

    def forward(self, attention: Tensor, features: Tensor) -> Tensor:
        """Return twice a sigmoid map, in the dtype of the features it will multiply."""
        return (2 * attention).to(features.dtype)

    def admit(self, term: Tensor, features: Tensor) -> Tensor:
        """Return the term in the dtype of the features it will be added to."""
        return term.to(features.dtype)


@dataclass(frozen=True)
class Form:
    """One way for attention to be let in.

    Attributes:
        kind: the module that stands where a block has its `Gate`.
        formula: what becomes of a map a, of logits z, or of a term t.
        needs: what a block's gates must have for it, as a refusal says.
    """

    kind: type[nn.Module]
    formula: str
    needs: str = ""

    def takes(self, gate: Gate) -> bool:
        """Tell whether a gate can be given this form."""
        if self.kind is LayerGate:
            return bool(gate.last)
        return self.kind is Gate or gate.is_sigmoid

    def make(self, gate: Gate) -> nn.Module:
        """Return what stands in the place of a block's gate."""
        if self.kind is LayerGate:
            return LayerGate(gate.last)
        return self.kind(gate.last, is_sigmoid=gate.is_sigmoid)


DEFAULT_FORM = Gate.form
"""That of a block as it is built, and of files that name none."""
FORMS = {
    DEFAULT_FORM: Form(Gate, "(1 - g) + g·a, g·t"),
    CentredGate.form: Form(
        CentredGate, "(1 - g) + g·2σ(z)", "a map that is one sigmoid and multiplies the features"
    ),
    LayerGate.form: Form(
        LayerGate,
        "2σ(z), t, last layer zero",
        "a last layer whose zero leaves the features as they are",
    ),
}


def form_named(name: str) -> Form:
    """Return a form by its name.

    Raises:
        UnknownName: there is none of that name; the message gives the nearest.
    """
    if name not in FORMS:
        raise UnknownName("form of gate", name, FORMS)
    return FORMS[name]


def forms_of(attention: nn.Module) -> list[str]:
    """Return the names of the forms that a block, as it is built, can be given."""
    gates = [module for module in attention.modules() if isinstance(module, Gate)]
    return [name for name, form in FORMS.items() if all(form.takes(gate) for gate in gates)]


def give_form(attention: nn.Module, name: str) -> None:
    """Give the gates of a block, as it is built, another form; the last layers become zero.

    Raises:
        UnknownName: no form is called so.
        BadOption: a gate lacks what the form needs.
    """
    form = form_named(name)
    if name not in forms_of(attention):
        raise BadOption(
            f"gate {name!r} needs {form.needs}, which it does not have; it takes "
            f"{', '.join(forms_of(attention))}"
        )
    for module in list(attention.modules()):
        for child, gate in list(module.named_children()):
            if isinstance(gate, Gate) and name != DEFAULT_FORM:
                setattr(module, child, form.make(gate).train(gate.training))
                if form.kind is LayerGate:
                    _zero(module.get_submodule(gate.last))


def _zero(layer: nn.Module) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()


def gates_by_path(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return dotted path of each gate -> name -> what opens it, in the order of the modules.

    That is its number, or of the form `layer` the weights of the last layer, by their own names.
    """
    found: dict[str, dict[str, nn.Parameter]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Gate):
            found[path] = {_join(path, "openness"): module.openness}
        elif isinstance(module, LayerGate):
            layer = _join(path.rpartition(".")[0], module.last)
            found[path] = {
                _join(layer, name): parameter
                for name, parameter in model.get_submodule(layer).named_parameters()
            }
    return found


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@typed
def named_gates(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return dotted path -> what opens each gate, in the order of the modules; all start at 0.

    It is the learnable number of the gate, shape (1,); for one of the form `layer` the weight and
    bias of the last layer of its attention.
    """
    return {name: p for held in gates_by_path(model).values() for name, p in held.items()}


def gate_numbers(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return dotted path -> the number of each gate that has one; the form `layer` has none."""
    return {
        name: parameter
        for name, parameter in named_gates(model).items()
        if name.rpartition(".")[2] == "openness"
    }


def opened(gate: Tensor, low: float, high: float) -> Tensor:
    """Return random values that open a gate: numbers from `low` to `high`.

    The weights of a layer are drawn as layers start, by the count of what they read: of one sign
    they would add up and saturate what follows.
    """
    if gate.ndim < 2:
        return low + (high - low) * torch.rand(gate.shape)
    spread: float = (low + high) / 2 * (2 / gate[0].numel()) ** 0.5
    return spread * torch.randn(gate.shape)
