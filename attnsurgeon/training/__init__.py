"""After the operation: what any training script needs, whatever its optimiser and its loop."""

from __future__ import annotations

from attnsurgeon.training.freezing import freeze_host, unfreeze_host
from attnsurgeon.training.groups import check_optimizer, parameter_groups
from attnsurgeon.training.schedule import GateSchedule, project_gates
from attnsurgeon.training.stripping import strip_gates

__all__ = [
    "GateSchedule",
    "check_optimizer",
    "freeze_host",
    "parameter_groups",
    "project_gates",
    "strip_gates",
    "unfreeze_host",
]
