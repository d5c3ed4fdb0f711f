"""What a watched pass showed: who joins paths, who convolves, who ran, in which shapes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Join:
    """Paths that meet in the own forward of the module at `path`, all coming from one input of it.

    Attributes:
        path: dotted path of the module.
        kind: `addition` of two maps of one shape, or `concatenation` along the channels.
        shape: of what came out.
        layout: what its axes are.
    """

    path: str
    kind: str
    shape: Shape
    layout: str


@dataclass(frozen=True)
class Convolution:
    """A 2-D or 3-D convolution as it ran: measured, not read from attributes."""

    path: str
    in_channels: int
    out_channels: int
    kernel: Shape
    stride: Shape
    padding: Shape
    dilation: Shape
    in_shape: Shape
    out_shape: Shape


@dataclass
class Visits:
    """How often a module ran, and what its first run saw.

    `widths` are the channels of what its runs returned, `operators` what it called itself;
    `is_read` tells whether anything reads the positions of what it returned, beside its tokens,
    `is_used` whether an output of the network was computed from it.
    """

    count: int = 0
    in_shape: Shape | None = None
    in_layout: str | None = None
    out_shape: Shape | None = None
    out_layout: str | None = None
    in_version: int = 0
    passed_through: bool = False
    is_read: bool = True
    is_used: bool = True
    widths: set[int] = field(default_factory=set)
    operators: set[str] = field(default_factory=set)


@dataclass
class Observation:
    """What one forward pass in eval mode showed, in the order of execution.

    Attributes:
        joins: additions and concatenations of paths.
        convolutions: as they ran.
        visits: of each module that ran, by path.
        scalings: modules that multiply a map by one number per channel or position of it: they
            are attention of the network's own.
        tokens: number of tokens in front of the positions of NLC maps.
        taken_apart: sequences whose modules others than themselves walk, count or slice.
        complete: whether the pass came to its end; on meta tensors one that asks for numbers
            cannot.
    """

    joins: list[Join] = field(default_factory=list)
    convolutions: list[Convolution] = field(default_factory=list)
    visits: dict[str, Visits] = field(default_factory=lambda: defaultdict(Visits))
    scalings: list[str] = field(default_factory=list)
    tokens: int = 0
    taken_apart: set[str] = field(default_factory=set)
    complete: bool = True
