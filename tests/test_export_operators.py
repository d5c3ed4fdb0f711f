"""The operators of each block in an ONNX file: only standard ones, that any runtime can take."""

import onnx
import pytest

from attnsurgeon.export.inputs import resized
from attnsurgeon.export.onnx import write_onnx
from tests import exports

HOST = {"Conv", "Relu", "Add", "ReduceMean", "Gemm", "Shape", "Reshape"}
GOLDEN = {
    "se": {"GlobalAveragePool", "Sigmoid", "Sub", "Mul"},
    "cbam": {
        *{"GlobalAveragePool", "GlobalMaxPool", "ReduceMax", "MatMul", "Concat"},
        *{"Sigmoid", "Sub", "Mul"},
    },
    "sk": {"GlobalAveragePool", "Softmax", "Sub", "Mul", "Gather"},
}


@pytest.mark.parametrize("block", GOLDEN)
def test_operators(block, tmp_path):
    write_onnx(exports.tiny(block), resized((exports.EXAMPLE,), 2, (32, 32)), tmp_path / "x.onnx")
    graph = onnx.load(tmp_path / "x.onnx").graph
    assert {node.domain for node in graph.node} == {""}
    assert {node.op_type for node in graph.node} - HOST == GOLDEN[block]
    # Each map is pooled by one node: a pool of a known size would fix the size of the input.
    pools = [node.op_type for node in graph.node if node.op_type.startswith("Global")]
    assert pools.count("GlobalAveragePool") == 3 * {"se": 1, "cbam": 1, "sk": 2}[block]
    assert pools.count("GlobalMaxPool") == 3 * (block == "cbam")
