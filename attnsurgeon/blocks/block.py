"""What every attention block is: a module of a known width that keeps the shape of its input."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import nn

from attnsurgeon.blocks.options import option_types
from attnsurgeon.errors import BadOption

AROUND = ("post", "standard", "pre", "identity", "conv")
"""Placements of a block that reads one feature map and returns its like."""

DIMS = {"NLC": 1, "NCHW": 2, "NHWC": 2, "NCDHW": 3, "NDHWC": 3}
"""Layout of a host's feature map -> how many spatial axes it has."""
EVERYWHERE = ("NCHW", "NHWC", "NLC", "NCDHW", "NDHWC")
"""Layouts of a block that pools over all positions, or treats each alike."""
MAPS = ("NCHW", "NHWC", "NCDHW", "NDHWC")
"""Layouts of a block that looks at neighbours, which a sequence of tokens does not keep."""
IMAGES = ("NCHW", "NHWC")
"""Layouts of a block that is two-dimensional by its paper."""


@dataclass(frozen=True)
class Place:
    """The measured width of the spot a block is built for, and of the convolution it stands beside.

    `in_channels`, `stride` and `dilation` differ from their defaults only where a block replaces
    a convolution. `dims` counts the spatial axes: 1, 2 or 3.
    """

    channels: int
    in_channels: int | None = None
    stride: tuple[int, ...] = (1, 1)
    dilation: int = 1
    dims: int = 2

    def to_json(self) -> dict[str, Any]:
        """Return plain values; two spatial axes go without saying, as in all older recipes."""
        values = asdict(self)
        if self.dims == 2:
            del values["dims"]
        return values


class AttentionBlock(nn.Module):
    """Base of all blocks: (N, C, *spatial) -> the same shape, exactly its input while gates are 0.

    A block always sees channels first; maps of other layouts are permuted for it and back.
    `layouts` are those of the hosts' maps that it can serve so.
    """

    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    placements: ClassVar[tuple[str, ...]] = AROUND
    layouts: ClassVar[tuple[str, ...]] = IMAGES
    convex: ClassVar[bool] = False
    """Whether its gate mixes branches, and so must stay in [0, 1]."""

    @classmethod
    def build(cls, place: Place, **options: Any) -> AttentionBlock:
        """Construct the block for a place in a network; `options` are those of the constructor.

        Raises:
            BadOption: an option out of range, or more or fewer spatial axes than it can serve.
        """
        served = sorted({DIMS[layout] for layout in cls.layouts})
        if place.dims not in served:
            known = " or ".join(str(dims) for dims in served)
            raise BadOption(f"it serves maps of {known} spatial axes, not of {place.dims}")
        return cls(place.channels, **cls.measured(place), **options)

    @classmethod
    def measured(cls, place: Place) -> dict[str, Any]:
        """Return what the constructor is told of a place beside its channels.

        Two axes are every constructor's default, so that a block for images need not name them.
        """
        return {} if place.dims == 2 else {"dims": place.dims}

    @classmethod
    def option_types(cls) -> dict[str, Any]:
        """Return option -> annotated type of what a user may set: keyword-only arguments.

        Raises:
            BadOption: an annotation cannot be read.
        """
        return option_types(cls.__init__, cls.measured(Place(1, dims=3)))


def hidden_width(channels: int, reduction: int, ratio: float | None) -> int:
    """Return the bottleneck width: C // reduction, or int(C * ratio) where a ratio is given.

    Never below 1: a layer of no units builds without a word and yields a constant map.

    Raises:
        BadOption: `reduction` is below 1 or `ratio` not in (0, 1].
    """
    if ratio is None:
        if reduction < 1:
            raise BadOption(f"reduction must be at least 1, not {reduction}")
        return max(1, channels // reduction)
    if not 0 < ratio <= 1:
        raise BadOption(f"ratio must be above 0 and at most 1, not {ratio}")
    return max(1, int(channels * ratio))


def one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    """Return `value` if it is a known choice of the option `name`.

    Raises:
        BadOption: it is not.
    """
    if value not in known:
        raise BadOption(f"{name} must be one of {', '.join(known)}, not {value!r}")
    return value


def some_of(name: str, values: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """Return `values` if there is at least one, all are known choices and none stands twice.

    Raises:
        BadOption: otherwise.
    """
    if isinstance(values, str):
        values = (values,)
    if not values or len(set(values)) != len(values):
        raise BadOption(f"{name} must be different choices out of {', '.join(known)}, at least one")
    return tuple(one_of(name, value, known) for value in values)
