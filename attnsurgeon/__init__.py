"""Insert attention into pretrained vision networks without changing a bit of what they compute."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it. Torch is imported when one of them is first used,
# so that `attnsurgeon --help` does not wait for it.
_PUBLIC = {
    "find_sites": "sites",
    "insert_attention": "operation",
    "insert_plan": "operation",
    "remove_attention": "surgery",
    "gates": "gate",
    "verify_unchanged": "verify",
    "parameter_groups": "training",
    "check_optimizer": "training",
    "freeze_host": "training",
    "unfreeze_host": "training",
    "GateSchedule": "training",
    "project_gates": "training",
    "strip_gates": "training",
    "save_model": "store",
    "load_model": "store",
    "naming_host": "host",
    "export_model": "export",
    "compare_speed": "bench",
    "Site": "sites",
    "Cut": "plan",
    "Plan": "plan",
    "Verdict": "verify",
    "Artifact": "export",
    "Timing": "bench",
    "AttnSurgeonError": "errors",
}
_DEFINED_AS = {"gates": "named_gates"}

__all__ = ["__version__", "blocks", *_PUBLIC]  # noqa: PLE0604 (the table is the one list)

if TYPE_CHECKING:
    from attnsurgeon import blocks as blocks
    from attnsurgeon.bench import Timing as Timing
    from attnsurgeon.bench import compare_speed as compare_speed
    from attnsurgeon.errors import AttnSurgeonError as AttnSurgeonError
    from attnsurgeon.export import Artifact as Artifact
    from attnsurgeon.export import export_model as export_model
    from attnsurgeon.gate import named_gates
    from attnsurgeon.host import naming_host as naming_host
    from attnsurgeon.operation import insert_attention as insert_attention
    from attnsurgeon.operation import insert_plan as insert_plan
    from attnsurgeon.plan import Cut as Cut
    from attnsurgeon.plan import Plan as Plan
    from attnsurgeon.sites import Site as Site
    from attnsurgeon.sites import find_sites as find_sites
    from attnsurgeon.store import load_model as load_model
    from attnsurgeon.store import save_model as save_model
    from attnsurgeon.surgery import remove_attention as remove_attention
    from attnsurgeon.training import GateSchedule as GateSchedule
    from attnsurgeon.training import check_optimizer as check_optimizer
    from attnsurgeon.training import freeze_host as freeze_host
    from attnsurgeon.training import parameter_groups as parameter_groups
    from attnsurgeon.training import project_gates as project_gates
    from attnsurgeon.training import strip_gates as strip_gates
    from attnsurgeon.training import unfreeze_host as unfreeze_host
    from attnsurgeon.verify import Verdict as Verdict
    from attnsurgeon.verify import verify_unchanged as verify_unchanged

    gates = named_gates


def __getattr__(name: str) -> Any:
    if name == "blocks":
        return importlib.import_module("attnsurgeon.blocks")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'attnsurgeon' has no attribute {name!r}")
    module = importlib.import_module(f"attnsurgeon.{_PUBLIC[name]}")
    return getattr(module, _DEFINED_AS.get(name, name))


def __dir__() -> list[str]:
    return sorted(__all__)
