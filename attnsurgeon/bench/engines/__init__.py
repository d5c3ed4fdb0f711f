"""What can run a network. A new engine is one new function in this folder, registered by name."""

from __future__ import annotations

import importlib
import pkgutil

from attnsurgeon.bench.engines.engine import Engine, Place, get, names

__all__ = ["Engine", "Place", "get", "names"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
