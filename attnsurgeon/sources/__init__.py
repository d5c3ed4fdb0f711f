"""Where hosts come from, one file each: the package itself, torchvision, timm, your own code."""

from __future__ import annotations

from types import ModuleType

from attnsurgeon.sources import own, shipped, timm_models, torchvision_models

NO_WEIGHTS = "none"
DEFAULT_WEIGHTS = "DEFAULT"


def source_of(name: str) -> ModuleType:
    """Return the file that makes the hosts of such a name; torchvision's, if it is none of all.

    Each has `check(name, weights)`, which refuses before anything is built or fetched,
    `make(name, weights, arguments)`, which returns a network with its card and, where `weights`
    is `none`, fetches nothing, `takes(name, argument)`, and FETCHES: whether `weights` chooses what
    is fetched, and no argument does.
    """
    for source in (shipped, timm_models, own):
        if source.knows(name):
            return source
    return torchvision_models
