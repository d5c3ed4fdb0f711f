"""A network small enough to be exported in each test, and ways to spoil what is written."""

import functools
from dataclasses import replace

import onnx
import torch
from torch import nn

import attnsurgeon
from attnsurgeon.card import HostCard, give_card
from attnsurgeon.export import onnx as onnx_format

EXAMPLE = torch.zeros(1, 3, 32, 32)


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(x)))


class Tiny(nn.Module):
    """Three residual blocks, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(16), Block(16), Block(16))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@functools.cache
def tiny(block="se", **options):
    """Return the same small operated network each time; nothing may change it."""
    torch.manual_seed(0)
    options = {"reduction": 4} if block in ("se", "cbam") else options
    operated = attnsurgeon.insert_attention(Tiny().eval(), block, example=EXAMPLE, **options)
    give_card(operated, HostCard(None, "Tiny", input_shapes=((1, 3, 32, 32),)))
    return operated


def edit_onnx(path, edit):
    model = onnx.load(path)
    edit(model.graph)
    onnx.save(model, path)


def shift_a_weight(graph):
    weights = max(graph.initializer, key=lambda tensor: len(tensor.raw_data))
    array = onnx.numpy_helper.to_array(weights).copy()
    array.flat[::2] *= 1.05
    weights.CopyFrom(onnx.numpy_helper.from_array(array, weights.name))


def flatten_attention(graph):
    for tensor in graph.initializer:
        if "excite" in tensor.name:
            array = onnx.numpy_helper.to_array(tensor) * 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def fix_the_batch(graph):
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def cross_two_gates(graph):
    first, second = [t.name for t in graph.initializer if t.name.endswith("gate.openness")][:2]
    other = {first: second, second: first}
    for node in graph.node:
        node.input[:] = [other.get(name, name) for name in node.input]


def crossed(gates):
    names = list(gates)
    return {a: gates[b] for a, b in zip(names, names[1:] + names[:1], strict=True)}


class Planted:
    """Spoil what a draft writes; tells which gates the first refused check had."""

    @staticmethod
    def after_writing(monkeypatch, edit):
        write = onnx_format.OnnxDraft.write

        def spoiled(self, path, gates):
            write(self, path, gates)
            edit_onnx(path, edit)

        monkeypatch.setattr(onnx_format.OnnxDraft, "write", spoiled)

    @staticmethod
    def gates(monkeypatch, draft):
        write = draft.write
        monkeypatch.setattr(
            draft, "write", lambda self, path, gates: write(self, path, crossed(gates))
        )

    @staticmethod
    def axes(monkeypatch, kind):
        opened = kind.open

        def turned(self, path, gates=None):
            file = opened(self, path, gates)
            return replace(file, run=lambda inputs: file.run((inputs[0].transpose(2, 3),)))

        monkeypatch.setattr(kind, "open", turned)
