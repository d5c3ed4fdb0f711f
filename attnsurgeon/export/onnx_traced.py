"""Translate a network to ONNX by torch's older exporter, which traces it.

It takes what torch.export refuses, detection networks above all, and writes opset 17 and older
ones; what depends on data or sizes in Python code is fixed as it was when traced.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attnsurgeon.errors import ExportRefused, first_line
from attnsurgeon.export.inputs import Inputs, free_axes, tensors_of
from attnsurgeon.export.lending import REMEDY, lent_to
from attnsurgeon.export.onnx_dynamo import input_names
from attnsurgeon.export.proof import gates_at
from attnsurgeon.gate import named_gates

OLDEST_OPSET, NEWEST_OPSET = 17, 20
"""Below 17 some operators of the blocks do not exist; above 20 the exporter knows none."""

APART = 2.0**-16
"""Between gates while a network is traced; half precision tells two thousand multiples apart."""


def translate(model: nn.Module, inputs: Inputs, *, free: Collection[str], opset: int | None) -> Any:
    """Return the network as an onnx_ir.Model, not optimised yet.

    A detector that finds nothing leaves its way at `if boxes:`, and a trace would leave it for
    good: it is traced once more while it is lent numbers, and the file is given its own.

    Raises:
        ExportRefused: it cannot be traced, has an operation that the exporter does not know, or
            finds nothing whatever it is lent.
    """
    held = {name for name, _ in model.named_parameters()}
    for _ in range(2):  # the second time without what was fused into something else
        with lent_to(model, [inputs], partial(_both, held)) as lent:
            made = _trace(model, inputs, free, opset)
        held = _found(made, lent)
        if held == lent.keys():
            _give_back(made, {name: model.get_parameter(name) for name in lent})
            return made
    raise ExportRefused(f"{type(model).__name__} finds nothing while it is traced; {REMEDY}")


def _both(held: set[str], wanted: Mapping[str, Tensor]) -> set[str]:
    return held & wanted.keys()


def _found(made: Any, lent: Mapping[str, Tensor]) -> set[str]:
    """Return the names of the tensors that stand in a file as they were lent."""
    held = {name: value.const_value for name, value in made.graph.initializers.items()}
    return {
        name
        for name, value in lent.items()
        if held.get(name) is not None and np.array_equal(held[name].numpy(), value.cpu().numpy())
    }


def _give_back(made: Any, own: Mapping[str, Tensor]) -> None:
    """Put a network's own numbers where those stand that it was lent."""
    import onnx_ir

    for name, value in own.items():
        numbers = onnx_ir.tensor(value.detach().cpu().numpy(), name=name)
        made.graph.initializers[name].const_value = numbers


def _trace(model: nn.Module, inputs: Inputs, free: Collection[str], opset: int | None) -> Any:
    import onnx
    import onnx_ir

    names, memory = input_names(inputs), io.BytesIO()
    axes = {
        name: free_axes(part.ndim, free)
        for name, part in zip(names, tensors_of(inputs), strict=True)
    }
    # Parameters of one value become one in the file: gates, all closed, are told apart for a while.
    # By little, so that the network still finds what it finds, and is traced on that way.
    apart = {
        gate: torch.full_like(value, APART * i)
        for i, (gate, value) in enumerate(named_gates(model).items(), start=1)
    }
    with gates_at(model, apart), torch.no_grad(), _plainly():
        try:
            torch.onnx.export(
                model,
                inputs,
                memory,  # type: ignore[arg-type]  # it takes what can be written to
                dynamo=False,
                opset_version=min(opset or OLDEST_OPSET, NEWEST_OPSET),
                input_names=names,
                dynamic_axes=axes if free else None,
                do_constant_folding=False,  # it would fold gates away
            )
        except Exception as error:  # of the network's own code, or a dozen classes of the exporter
            raise ExportRefused(
                f"the TorchScript-based exporter cannot take {type(model).__name__}: "
                f"{first_line(error)}"
            ) from error
    return onnx_ir.from_proto(onnx.ModelProto.FromString(memory.getvalue()))


@contextmanager
def _plainly() -> Iterator[None]:
    """Have attention of torch's own traced operator by operator, and the exporter say nothing.

    It would warn that it is deprecated and doubt what it traces, and print the graph on stdout
    where it fails; the fused operator of attention has no ONNX counterpart.
    """
    was_fused = torch.backends.mha.get_fastpath_enabled()
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(was_fused)
