"""A file is no larger than a plain export of the host plus the weights of the attention.

The margin is what else the attention is in a file: the recipe, and the nodes of its graph.
"""

import io

import pytest
import torch

import attnsurgeon
from attnsurgeon.export.torchscript import make_torchscript
from attnsurgeon.store import make_recipe
from tests import exports

KIB = 2**10
GRAPH = {".onnx": 2 * KIB, ".pt": 8 * KIB, ".pt2": 18 * KIB}
"""Per attention: nodes with their names; of .pt2 also what JSON says about each value."""


@pytest.fixture(scope="module")
def host():
    torch.manual_seed(0)
    return exports.Tiny().eval()


def plain_bytes(host, suffix):
    """Return the size of what a script of three lines writes."""
    image, memory = torch.zeros(2, 3, 32, 32), io.BytesIO()
    if suffix == ".pt":
        return len(make_torchscript(host, (image,)).save_to_buffer())
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(host, (image,), dynamic_shapes=({0: free, 2: free, 3: free},))
    if suffix == ".pt2":
        torch.export.save(program, memory)
        return len(memory.getbuffer())
    made = torch.onnx.export(program, dynamo=True, verbose=False)
    return made.model_proto.ByteSize()


@pytest.mark.parametrize("suffix", GRAPH)
def test_no_more_than_the_attention(host, tmp_path, suffix):
    operated, path = exports.tiny(), tmp_path / f"x{suffix}"
    written = attnsurgeon.export_model(operated, path).bytes
    new = {key: t for key, t in operated.state_dict().items() if ".attention_" in key}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in new.values())
    recipe = len(make_recipe(operated).dumps().encode())
    margin = recipe + len(attnsurgeon.gates(operated)) * GRAPH[suffix]
    assert written <= plain_bytes(host, suffix) + weights + margin
    if suffix != ".pt":  # whose classes are named by the files that they are from
        held = path.read_bytes()  # nothing tells of the machine that it was made on
        assert b"site-packages" not in held
        assert __file__.rpartition("/")[0].encode() not in held
