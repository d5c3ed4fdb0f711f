"""The equations of each block's paper, computed anew and plainly from the weights of a block."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def dense(layer, vectors):
    """Apply a 1x1 convolution to vectors (N, C)."""
    return F.linear(vectors, layer.weight.flatten(1), layer.bias)


def pixelwise(layer, x):
    """Apply a 1x1 convolution to a map by a product of matrices."""
    out = torch.einsum("oc,nchw->nohw", layer.weight.flatten(1), x)
    return out if layer.bias is None else out + layer.bias[:, None, None]


def normed(norm, x):
    """Apply a BatchNorm in eval mode, by its definition."""
    shape = (1, -1) + (1,) * (x.ndim - 2)
    centred = (x - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
    return centred * norm.weight.view(shape) + norm.bias.view(shape)


def spread(vectors):
    return vectors[:, :, None, None]


def se(block, x, scale_activation="sigmoid"):
    """Equations 2 to 4 of arXiv:1709.01507."""
    logits = dense(block.excite, F.relu(dense(block.squeeze, x.mean((2, 3)))))
    if scale_activation == "hardsigmoid":  # of MobileNet V3, arXiv:1905.02244: ReLU6(x + 3) / 6
        return x * spread((logits + 3).clamp(0, 6) / 6)
    return x * spread(torch.sigmoid(logits))


def cbam(block, x):
    """Equations 1 to 3 of arXiv:1807.06521, in the order of the released code."""
    first, _, last = block.channel.mlp

    def mlp(v):
        return dense(last, F.relu(dense(first, v)))

    pooled = mlp(F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0])
    pooled = pooled + mlp(F.adaptive_max_pool2d(x, 1)[:, :, 0, 0])
    x1 = x * spread(torch.sigmoid(pooled))
    return x1 * neighbours(block.spatial.map, x1)


def neighbours(layers, x):
    """Equation 3 of arXiv:1807.06521: a map of the positions of x."""
    both = torch.stack((x.max(1).values, x.mean(1)), 1)
    k = layers.conv.weight.shape[-1]
    return torch.sigmoid(normed(layers.norm, F.conv2d(both, layers.conv.weight, padding=k // 2)))


def sk(block, x, dilated=True):
    """Equations 1 to 6 of arXiv:1903.06586, with x itself as the first branch."""
    conv, norm, _ = block.paths[0]
    reach = {"padding": 2, "dilation": 2 if dilated else 1}
    assert conv.weight.shape[-1] == (3 if dilated else 5)
    u1 = F.relu(normed(norm, F.conv2d(x, conv.weight, groups=32, **reach)))
    z = F.relu(normed(block.norm, dense(block.squeeze, (x + u1).mean((2, 3)))))
    logits = dense(block.select, z).view(x.shape[0], 2, -1)
    a, b = torch.softmax(logits, 1).unbind(1)
    return spread(a) * x + spread(b) * u1


def context(pool, x):
    """The sum of the positions, weighed by a softmax over them."""
    n, c = x.shape[:2]
    flat = x.view(n, c, -1)
    alpha = torch.softmax((pool.mask.weight.view(1, c) @ flat) + pool.mask.bias, 2)
    return (flat * alpha).sum(2)


def gc(block, x):
    """The global context block of arXiv:1904.11492."""
    first, norm, _, last = block.fuse[0].transform
    hidden = dense(first, context(block.pool, x))
    hidden = F.layer_norm(hidden, hidden.shape[1:], norm.weight.view(-1), norm.bias.view(-1))
    return x + spread(dense(last, F.relu(hidden)))


def snl(block, x):
    """The simplified non-local block of arXiv:1904.11492, Wv taken out of the sum."""
    return x + spread(dense(block.transform, context(block.pool, x)))


def nonlocal_block(block, x, pairwise="embedded_gaussian", subsample=False, norm=False):
    """Equations 1, 3, 4 and 6 of arXiv:1711.07971, one position after the other."""
    theta, phi, g = (pixelwise(layer, x) for layer in (block.theta, block.phi, block.g))
    if subsample:
        phi, g = (F.max_pool2d(part, 2) for part in (phi, g))
    out = torch.empty_like(theta)
    for row in range(x.shape[2]):
        for column in range(x.shape[3]):
            f = torch.einsum("nc,nchw->nhw", theta[:, :, row, column], phi)
            if pairwise == "embedded_gaussian":
                f = f.exp()
                weights = f / f.sum((1, 2), keepdim=True)
            else:
                weights = f / (phi.shape[2] * phi.shape[3])
            out[:, :, row, column] = torch.einsum("nhw,nchw->nc", weights, g)
    restored = pixelwise(block.restore, out)
    return x + (normed(block.norm, restored) if norm else restored)


def eca(block, x):
    """Sections 3.2.2 and 3.2.3 of arXiv:1910.03151, with the kernel for 32 channels."""
    k = 3  # |log2(32) / 2 + 1 / 2| = 3
    w = block.conv.weight.flatten()
    assert w.numel() == k
    y = F.pad(x.mean((2, 3)), (k // 2, k // 2))
    logits = sum(w[i] * y[:, i : i + x.shape[1]] for i in range(k))
    return x * spread(torch.sigmoid(logits))


def ese(block, x, scale_activation="sigmoid"):
    """A_eSE of arXiv:1911.06667, and its released code."""
    logits = dense(block.excite, x.mean((2, 3)))
    hard = scale_activation == "hardsigmoid"
    return x * spread((logits + 3).clamp(0, 6) / 6 if hard else torch.sigmoid(logits))


def bam(block, x, form="paper"):
    """Equations 1 to 4 of arXiv:1807.06514, or the authors' code."""
    spread_out = {"padding": 4, "dilation": 4}
    pooled = x.mean((2, 3))
    if form == "paper":
        first, _, last, norm = block.channel
        channel = normed(norm, dense(last, F.relu(dense(first, pooled))))
        f0, _, f1, _, f2, _, f3, norm = block.spatial
        y = F.relu(pixelwise(f0, x))
        y = F.relu(F.conv2d(y, f1.weight, f1.bias, **spread_out))
        y = F.relu(F.conv2d(y, f2.weight, f2.bias, **spread_out))
        attention = torch.sigmoid(spread(channel) + normed(norm, pixelwise(f3, y)))
        return x + x * attention
    first, norm, _, last = block.channel
    channel = dense(last, F.relu(normed(norm, dense(first, pooled))))
    f0, n0, _, f1, n1, _, f2, n2, _, f3 = block.spatial
    y = F.relu(normed(n0, pixelwise(f0, x)))
    y = F.relu(normed(n1, F.conv2d(y, f1.weight, f1.bias, **spread_out)))
    y = F.relu(normed(n2, F.conv2d(y, f2.weight, f2.bias, **spread_out)))
    return x * (1 + torch.sigmoid(spread(channel) * pixelwise(f3, y)))


def scse(block, x, fusion="add"):
    """Section 2 of arXiv:1803.02579: both halves and their sum; the maximum in arXiv:1808.08127."""
    first, _, last, _ = block.channel
    channel = x * spread(torch.sigmoid(dense(last, F.relu(dense(first, x.mean((2, 3)))))))
    spatial = x * torch.sigmoid(pixelwise(block.spatial[0], x))
    return torch.maximum(channel, spatial) if fusion == "max" else channel + spatial


def ge(block, x, extent=0, extra_params=False, mlp=False):
    """Sections 2 and 3 of arXiv:1810.12348."""
    size = x.shape[2:]
    if extra_params:
        gathered = x
        layers = list(block.gather)
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.Conv2d):
                gathered = F.conv2d(gathered, layer.weight, stride=2, padding=1, groups=x.shape[1])
                gathered = normed(layers[i + 1], gathered)
                gathered = gathered if i + 2 == len(layers) else F.relu(gathered)
        assert gathered.shape[2] == math.ceil(size[0] / extent)
    elif extent:
        gathered = x.new_zeros(*x.shape[:2], *(math.ceil(s / extent) for s in size))
        for u in range(gathered.shape[2]):
            for v in range(gathered.shape[3]):  # the neighbourhood of section 2
                rows = range(max(0, extent * u - extent + 1), min(size[0], extent * u + extent))
                columns = range(max(0, extent * v - extent + 1), min(size[1], extent * v + extent))
                gathered[:, :, u, v] = x[:, :, rows][:, :, :, columns].mean((2, 3))
    else:
        gathered = x.mean((2, 3), keepdim=True)
    if mlp:
        first, _, last = block.mlp
        gathered = pixelwise(last, F.relu(pixelwise(first, gathered)))
    if extent:
        nearest = [torch.arange(s) * g // s for s, g in zip(size, gathered.shape[2:], strict=True)]
        gathered = gathered[:, :, nearest[0]][:, :, :, nearest[1]]
    return x * torch.sigmoid(gathered)


def coord(block, x):
    """Equations 4 to 9 of arXiv:2103.02907."""
    layer, norm, _ = block.shared

    def shared(z):  # (N, C, positions); the same layer for rows and columns
        y = torch.einsum("oc,ncp->nop", layer.weight.flatten(1), z) + layer.bias[:, None]
        y = normed(norm, y)
        return y * (y + 3).clamp(0, 6) / 6

    def restored(layer, y):
        y = torch.einsum("oc,ncp->nop", layer.weight.flatten(1), y) + layer.bias[:, None]
        return torch.sigmoid(y)

    rows = restored(block.rows, shared(x.mean(3)))
    columns = restored(block.columns, shared(x.mean(2)))
    return x * rows[:, :, :, None] * columns[:, :, None, :]


def simam(block, x, regularizer=1e-4):
    """Equation 5 of PMLR 139:11863, in float64: E = 4 (v + λ) / ((t - μ)² + 2 v + 2 λ)."""
    t = x.double()
    mean = t.mean((2, 3), keepdim=True)
    v = t.var((2, 3), correction=1, keepdim=True)
    energy = 4 * (v + regularizer) / ((t - mean) ** 2 + 2 * v + 2 * regularizer)
    return x * torch.sigmoid(1 / energy).float()


def triplet(block, x, no_spatial=False):
    """Section 3.2 of arXiv:2010.03045: attend each rotated tensor, rotate back, average."""
    along_h, (along_w, *along_c) = block.first, block.others
    turned = x.permute(0, 2, 1, 3)
    parts = [(turned * neighbours(along_h.map, turned)).permute(0, 2, 1, 3)]
    turned = x.permute(0, 3, 2, 1)
    parts.append((turned * neighbours(along_w.map, turned)).permute(0, 3, 2, 1))
    if not no_spatial:
        parts.append(x * neighbours(along_c[0].map, x))
    return sum(parts) / len(parts)


PUBLISHED = {
    "se": se,
    "cbam": cbam,
    "sk": sk,
    "gc": gc,
    "snl": snl,
    "nonlocal": nonlocal_block,
    "eca": eca,
    "ese": ese,
    "bam": bam,
    "scse": scse,
    "ge": ge,
    "coord": coord,
    "simam": simam,
    "triplet": triplet,
}
FORMS = [
    *((name, {}) for name in PUBLISHED),
    ("se", {"scale_activation": "hardsigmoid"}),
    ("sk", {"dilated": False}),
    ("nonlocal", {"pairwise": "dot_product"}),
    ("nonlocal", {"subsample": True}),
    ("nonlocal", {"pairwise": "dot_product", "subsample": True, "norm": True}),
    ("ese", {"scale_activation": "hardsigmoid"}),
    ("bam", {"form": "released"}),
    ("scse", {"fusion": "max"}),
    ("ge", {"extent": 2}),
    ("ge", {"extent": 8}),
    ("ge", {"extent": 4, "extra_params": True}),
    ("ge", {"extent": 2, "extra_params": True, "mlp": True}),
    ("ge", {"mlp": True}),
    ("simam", {"regularizer": 0.1}),
    ("triplet", {"no_spatial": True}),
]
"""Every form of a block that a paper or its authors' code gives."""
