"""What a state dict notes beside its tensors: the forms of its gates, which no key tells.

A gate of the form `mix` and one of `centred` have the same keys and shapes, and so have stripped
ones and those of `layer`. The note is an entry of the metadata that torch carries with a state
dict, through torch.save as well: no key is new, and a state without notes is loaded as ever.
"""

from __future__ import annotations

from typing import Any

from torch import nn

NOTE = "gate"
"""Its name among what torch notes of a module."""


class Noted(nn.Module):
    """A module whose form is noted, and refused where a state dict notes another.

    Attributes:
        form: what tells its computation from that of others with the same keys.
    """

    form: str

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][NOTE] = self.form

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *told: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *told)
        *_, errors = told  # missing keys, unexpected keys, messages
        found = local_metadata.get(NOTE, self.form)
        if found != self.form:
            errors.append(
                f"the gate {prefix[:-1]} is of the form {self.form!r}, that of the state dict "
                f"{found!r}: the same numbers mean something else in it"
            )
