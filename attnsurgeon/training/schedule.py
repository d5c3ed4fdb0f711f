"""How the gates open: left to the optimiser, or led to 1, where the result is the published block.

In both cases the gates that must stay in [0, 1] are put back there, and one that stopped being a
number is named with its step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnsurgeon.arguments import typed
from attnsurgeon.blocks.block import AttentionBlock
from attnsurgeon.errors import BadOption, GateLost, HostUnusable
from attnsurgeon.gate import gate_numbers, named_gates


@typed
def project_gates(model: nn.Module) -> None:
    """Put the gates that mix branches (SK's) back into [0, 1]; call it after each step.

    Outside it the mix is no average of branches any more. Clamping inside the forward would
    leave a gate below 0 without a gradient for ever.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, AttentionBlock) and module.convex:
                for gate in named_gates(module).values():
                    _own_part(gate).clamp_(0, 1)


class GateSchedule:
    """What happens to the gates after each step of the optimiser: `schedule.step()`.

    Args:
        model: an operated network, wrapped or not.
        anneal: number of steps in which every gate is led from where it is to exactly 1, and
            then held there; the optimiser's own change of the gates is overwritten. None: free,
            the optimiser alone decides.
        delay: of these steps, leave the gates to the optimiser for so many first.
        check_every: look for gates that are no numbers each so many steps; on an accelerator
            looking waits for it. The step named is the exact one in any case.

    Raises:
        HostUnusable: the model has no gates.
        BadOption: numbers of steps that are not positive; annealing of gates without a number.
    """

    @typed
    def __init__(
        self,
        model: nn.Module,
        *,
        anneal: int | None = None,
        delay: int = 0,
        check_every: int = 10,
    ) -> None:
        if (anneal is not None and anneal < 1) or delay < 0 or check_every < 1:
            raise BadOption(
                f"anneal={anneal}, delay={delay}, check_every={check_every}: steps are counted "
                "from 1, a delay from 0"
            )
        self.model = model
        self.gates = named_gates(model)
        if not self.gates:
            raise HostUnusable(f"this {type(model).__name__} has no gates; insert_attention first")
        self.numbers = gate_numbers(model)
        if anneal is not None and not self.numbers:
            raise BadOption(
                "gates of the form 'layer' have no number to lead to 1: leave anneal out; they are "
                "the published block at every step, times 2 where it multiplies"
            )
        self.anneal = anneal
        self.delay = delay
        self.check_every = check_every
        self.steps = 0
        self._starts: dict[str, Tensor] = {}
        first = _own_part(next(iter(self.gates.values())))
        self._lost_at = torch.zeros(len(self.gates), dtype=torch.int64, device=first.device)

    @torch.no_grad()
    def step(self) -> None:
        """Lead, project and check the gates; call it after each step of the optimiser.

        Raises:
            GateLost: a gate became NaN or infinite; the message names it and the step.
        """
        self.steps += 1
        self._watch()
        if self.anneal is not None and self.steps > self.delay:
            self._lead((self.steps - self.delay) / self.anneal)
        project_gates(self.model)
        if self.steps % self.check_every == 0:
            self.check()

    def _lead(self, share: float) -> None:
        for name, gate in self.numbers.items():
            own = _own_part(gate)
            if share >= 1:
                own.fill_(1)
                continue
            start = self._starts.setdefault(name, own.detach().clone())
            own.copy_(torch.lerp(start.to(own), torch.ones_like(own), share))

    def _watch(self) -> None:
        """Note on the device, without waiting for it, at which step each gate was lost."""
        lost = torch.stack([~_own_part(gate).isfinite().all() for gate in self.gates.values()])
        self._lost_at = torch.where(lost & (self._lost_at == 0), self.steps, self._lost_at)

    def check(self) -> None:
        """Refuse to go on with a gate that is no number.

        Raises:
            GateLost: it names the first and the step at which it was lost.
        """
        steps = dict(zip(self.gates, self._lost_at.tolist(), strict=True))
        lost = {name: step for name, step in steps.items() if step}
        if lost:
            name = min(lost, key=lost.__getitem__)
            raise GateLost(
                f"the gate {name} became NaN or infinite at step {lost[name]}"
                f"{f' ({len(lost)} gates by now)' if len(lost) > 1 else ''}; go back to an "
                "earlier checkpoint, and lower the learning rates or clip the gradients"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from."""
        return {"steps": self.steps, "starts": dict(self._starts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.steps = state["steps"]
        self._starts = dict(state["starts"])


def _own_part(gate: Tensor) -> Tensor:
    """Return the gate, or of a sharded one the part that this process holds."""
    to_local = getattr(gate, "to_local", None)  # a DTensor, whose import takes its time
    return gate if to_local is None else to_local()
