"""Means and maxima become the operators that runtimes are fastest at, and stay what they are."""

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import nn

from attnsurgeon.export import pools
from attnsurgeon.export.onnx import write_onnx
from attnsurgeon.export.pools import rewrite_pools

IMAGE = torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(0))
GLOBAL_MEAN, GLOBAL_MAX = "GlobalAveragePool", "GlobalMaxPool"


class Reduced(nn.Module):
    def __init__(self, kind, axes, keep):
        super().__init__()
        self.kind, self.axes, self.keep = kind, axes, keep

    def forward(self, x):
        reduce = torch.mean if self.kind == "mean" else torch.amax
        return reduce(x.sin(), self.axes, keepdim=self.keep) + 1


def written(tmp_path, kind, axes, keep):
    model = Reduced(kind, axes, keep)
    write_onnx(model, (IMAGE,), tmp_path / "x.onnx")
    graph = onnx.load(tmp_path / "x.onnx").graph
    return model, graph, {node.op_type for node in graph.node}


@pytest.mark.parametrize(
    ("kind", "axes", "keep", "becomes"),
    [
        ("mean", [2, 3], True, GLOBAL_MEAN),
        ("mean", [-1, -2], True, GLOBAL_MEAN),
        ("max", [2, 3], True, GLOBAL_MAX),
        ("mean", [1], True, "MatMul"),
        ("max", [1], True, "ReduceMax"),
        ("mean", [2], True, "ReduceMean"),
        ("mean", [2, 3], False, "ReduceMean"),
        ("mean", [1], False, "ReduceMean"),
    ],
)
def test_what_becomes_of_it(tmp_path, kind, axes, keep, becomes):
    model, graph, kinds = written(tmp_path, kind, axes, keep)
    reductions = {GLOBAL_MEAN, GLOBAL_MAX, "MatMul", "ReduceMax", "ReduceMean"}
    assert kinds & reductions == {becomes}
    read = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= read
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    for image in (IMAGE, IMAGE[:1, :, :3]):  # its batch and size stay free
        (found,) = session.run(None, {"input": image.numpy()})
        np.testing.assert_allclose(found, model(image).numpy(), rtol=1e-5, atol=1e-6)


def test_a_wrong_pool_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "_POOLS", {"ReduceMean": GLOBAL_MAX, "ReduceMax": GLOBAL_MEAN})
    model, _, _ = written(tmp_path, "mean", [2, 3], keep=True)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    (found,) = session.run(None, {"input": IMAGE.numpy()})
    assert np.abs(found - model(IMAGE).numpy()).max() > 0.1


def test_maps_of_other_ranks_stay():
    source = onnx_ir.val("x", dtype=onnx_ir.DataType.FLOAT, shape=onnx_ir.Shape([2, 6, 5]))
    axes = onnx_ir.val("axes", const_value=onnx_ir.tensor(np.array([1]), name="axes"))
    node = onnx_ir.node("ReduceMean", [source, axes])
    graph = onnx_ir.Graph([source], node.outputs, nodes=[node], initializers=[axes])
    assert rewrite_pools(onnx_ir.Model(graph, ir_version=10)) == 0
