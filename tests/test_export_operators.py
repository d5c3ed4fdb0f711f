"""The operators of each block in an ONNX file: only standard ones, that any runtime can take.

`operators.txt` is the golden list; a new block gets its line there.
"""

import copy
from pathlib import Path

import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import attnsurgeon
from attnsurgeon import blocks
from attnsurgeon.blocks.block import Place
from attnsurgeon.export.onnx import write_onnx
from attnsurgeon.export.onnx_shapes import constant_shape, write_constant_shapes

GOLDEN = {
    name: set(operators.split())
    for line in (Path(__file__).parent / "operators.txt").read_text("utf-8").splitlines()
    for name, _, operators in [line.partition(":")]
}
POOLS = {"bam": 1, "cbam": 4, "eca": 1, "ese": 1, "ge": 1, "scse": 1, "se": 1, "sk": 2}
"""Poolings over positions or channels by the papers, which must be as many nodes."""
IMAGE, CHANNELS = 3, 16


class Side(nn.Module):
    """Every block on the same map, beside one another: one export shows all."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(IMAGE, CHANNELS, 1)
        built = {name: blocks.get(name).build(Place(CHANNELS)) for name in blocks.names()}
        self.blocks = nn.ModuleDict({f"{name}_": block for name, block in built.items()})

    def forward(self, x):
        x = self.stem(x)
        return tuple(block(x) for block in self.blocks.values())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = Side().eval()
    for i, gate in enumerate(attnsurgeon.gates(made).values()):
        gate.data.fill_(0.3 + 0.02 * i)
    return made


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    target = tmp_path_factory.mktemp("operators") / "x.onnx"
    write_onnx(copy.deepcopy(model), (torch.randn(2, 3, 10, 14),), target)
    return target


@pytest.fixture(scope="module")
def graph(path):
    return onnx.load(path).graph


def nodes_of(graph, name):
    """Return the nodes that the output of a block is computed by, from the shared map on."""
    makers = {output: node for node in graph.node for output in node.output}
    wanted = [graph.output[blocks.names().index(name)].name]
    shared = next(node.output[0] for node in graph.node if "stem.weight" in node.input)
    found, seen = [], {shared}
    while wanted:
        value = wanted.pop()
        if value in seen or value not in makers:
            continue
        node = makers[value]
        found.append(node)
        seen.update(node.output)
        wanted += node.input
    return found


def test_the_list_is_of_all_blocks():
    assert list(GOLDEN) == blocks.names()


@pytest.mark.parametrize("block", blocks.names())
def test_operators(block, graph):
    nodes = nodes_of(graph, block)
    assert {node.domain for node in nodes} == {""}
    assert {node.op_type for node in nodes} == GOLDEN[block]


@pytest.mark.parametrize("block", POOLS)
def test_each_pooling_is_one_node(block, graph):
    """A pool of a known size would fix the size of the input; a mean of channels is a product."""
    kinds = [node.op_type for node in nodes_of(graph, block)]
    whole = [kind for kind in kinds if kind.startswith(("ReduceM", "Global", "MatMul"))]
    assert len(whole) == POOLS[block]
    assert not {"AveragePool", "MaxPool"} & set(kinds)


@pytest.mark.parametrize("block", blocks.names())
def test_no_shape_is_a_number_of_python(block, graph):
    held = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    nodes = nodes_of(graph, block)
    constant = [
        held[node.input[1]].tolist()
        for node in nodes
        if node.op_type in ("Reshape", "Expand") and node.input[1] in held
    ]
    assert all(shape[0] in (0, -1) for shape in constant)  # the batch stays free
    lengths = {0, -1, 1, 2, IMAGE, CHANNELS, CHANNELS // 2}
    assert all(set(shape) <= lengths for shape in constant)


def test_any_batch_and_size_as_the_model_computes_it(model, path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 8, 12), (3, 3, 11, 9)):
        image = torch.randn(shape)
        with torch.no_grad():
            expected = model(image)
        found = session.run(None, {"input": image.numpy()})
        for name, want, have in zip(blocks.names(), expected, found, strict=True):
            torch.testing.assert_close(torch.from_numpy(have), want, rtol=1e-4, atol=1e-5, msg=name)


class TestConstantShapes:
    @pytest.mark.parametrize(
        ("before", "after", "shape"),
        [
            (["n", 16, "h", "w"], ["n", 16, "h*w"], [0, 16, -1]),
            (["n", 16, "h", "w"], ["n", 2, 8, "h", "w"], None),
            (["n", 16, "h"], ["n", 2, 8, "h"], [0, 2, 8, -1]),
            (["n", "k"], ["n*k"], [-1]),
            (["n", 16, "h*w"], ["n", 16, "h", "w"], None),
            (["n", 4], [2, "m"], [2, -1]),
            (["n", 0], ["n", 0], None),
            ([None, 4], [None, 2, 2], [-1, 2, 2]),
            ([None, 4], [None, None], None),
        ],
    )
    def test_zero_stays_and_one_is_left(self, before, after, shape):
        assert constant_shape(before, after) == shape

    def test_what_computed_it_goes(self):
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, "h", "w"])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, "hw"])
        nodes = [
            helper.make_node("Shape", ["x"], ["n"], start=0, end=1),
            helper.make_node("Concat", ["n", "rest"], ["shape"], axis=0),
            helper.make_node("Reshape", ["x", "shape"], ["y"], allowzero=1),
        ]
        rest = helper.make_tensor("rest", TensorProto.INT64, [2], [4, -1])
        made = helper.make_model(helper.make_graph(nodes, "g", [x], [y], [rest]))
        model = onnx_ir.from_proto(made)
        assert write_constant_shapes(model) == 1
        written = onnx_ir.to_proto(model)
        onnx.checker.check_model(written, full_check=True)
        assert [node.op_type for node in written.graph.node] == ["Reshape"]
        assert not written.graph.node[0].attribute
        assert write_constant_shapes(model) == 0
