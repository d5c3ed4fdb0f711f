"""A file written tensor by tensor is the message that onnx writes, and can be read without them."""

import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from attnsurgeon.errors import BadFile
from attnsurgeon.export.onnx_file import read_file, write_file


@pytest.fixture
def model():
    weights = {
        "long": torch.arange(200.0).reshape(2, 100),
        "gate": torch.zeros(1),
        "half": torch.randn(3).half(),
        "counts": torch.tensor([[1, 2], [3, 4]]),
        "none": torch.zeros(0, 4),
    }
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "gate"], ["y"], name="mul")],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 7, "width"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3, 7, "width"])],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(made, {"classes": "[]"})
    return made


def test_it_is_the_same_message(model, tmp_path):
    write_file(onnx_ir.from_proto(model), tmp_path / "x.onnx")
    onnx.checker.check_model(tmp_path / "x.onnx", full_check=True)
    written = onnx.load(tmp_path / "x.onnx")
    assert list(written.graph.initializer) == list(model.graph.initializer)
    assert written.graph.node == model.graph.node
    assert written.graph.input == model.graph.input
    assert written.metadata_props == model.metadata_props
    assert written.opset_import == model.opset_import


def test_writing_leaves_the_model_as_it_is(model, tmp_path):
    made = onnx_ir.from_proto(model)
    names = list(made.graph.initializers)
    write_file(made, tmp_path / "x.onnx")
    assert list(made.graph.initializers) == names


def test_what_the_header_says(model, tmp_path):
    onnx.save(model, tmp_path / "x.onnx")
    file = read_file(tmp_path / "x.onnx")
    assert file.opset == 18
    assert file.fixed_axes == ["x.height"]
    assert not file.header.graph.initializer
    start, end = file.spots["long"]
    held = (tmp_path / "x.onnx").read_bytes()[start:end]
    assert held == torch.arange(200.0).numpy().tobytes()


def test_other_values(model, tmp_path):
    onnx.save(model, tmp_path / "x.onnx")
    data = bytearray((tmp_path / "x.onnx").read_bytes())
    for start, raw in read_file(tmp_path / "x.onnx").patches({"gate": torch.tensor([0.5])}):
        data[start : start + len(raw)] = raw
    opened = onnx.ModelProto.FromString(bytes(data))
    values = {each.name: numpy_helper.to_array(each) for each in opened.graph.initializer}
    assert values["gate"] == 0.5
    assert values["long"].tolist() == torch.arange(200.0).reshape(2, 100).tolist()


@pytest.mark.parametrize(("name", "size"), [("gat", 1), ("gate", 2)])
def test_a_tensor_that_is_not_there(model, tmp_path, name, size):
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(BadFile, match=f"has no tensor '{name}'"):
        read_file(tmp_path / "x.onnx").patches({name: torch.zeros(size)})


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x3a\xff\x01", b"\x0b\x0b", b"\x80"])
def test_what_is_no_model(tmp_path, content):
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(BadFile, match=r"x\.onnx is no ONNX file"):
        read_file(tmp_path / "x.onnx")
