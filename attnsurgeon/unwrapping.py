"""Take a state dict out of what training scripts put around it: mappings, and prefixes of keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from attnsurgeon.errors import BadFile, UnknownName
from attnsurgeon.noted import NOTE

NESTS = ("state_dict", "model", "model_state_dict", "model_ema", "ema")
"""Where training scripts keep the state dict inside what they save; the first found is taken."""
WRAPPERS = ("module.", "_orig_mod.")
"""What DataParallel (also of an average of weights) and torch.compile put before every key."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file, and what they were wrapped in.

    Attributes:
        source: the file, as errors name it.
        state: the tensors by key.
        unwrapped: keys and prefixes that were taken off, from the outside in.
        beside: keys of other state dicts that the file holds, for --checkpoint-key.
        dropped: entries that are no part of a network, such as the counter of an average.
        forms: path -> form of the gates that the state dict has a note of.
        metadata: what a safetensors file says of itself.
    """

    source: str
    state: Mapping[str, Tensor]
    unwrapped: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    forms: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def unwrap_checkpoint(loaded: Any, source: str, key: str | None) -> Checkpoint:
    """Take the state dict out of the mappings that training scripts put around it.

    Args:
        loaded: whatever a file holds.
        source: the file, as errors name it.
        key: see read_checkpoint.

    Raises:
        UnknownName: nothing has that key.
        BadFile: what is there is no plain mapping of names to tensors.
    """
    unwrapped: list[str] = []
    beside: tuple[str, ...] = ()
    if key is not None:
        loaded = _at(loaded, key, source)
        unwrapped.append(key)
    seen: set[int] = set()
    while isinstance(loaded, Mapping) and id(loaded) not in seen:
        seen.add(id(loaded))
        nests = [name for name in NESTS if isinstance(loaded.get(name), Mapping)]
        if not nests:
            break
        beside = beside or tuple(nests[1:])
        unwrapped.append(nests[0])
        loaded = loaded[nests[0]]
    items = loaded.items() if isinstance(loaded, Mapping) else ()
    if not items or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in items):
        raise BadFile(
            f"{source} holds no state dict{_place(unwrapped)}: no plain mapping of names to "
            f"tensors{_elsewhere(loaded)}"
        )
    forms = _noted_forms(loaded)
    return Checkpoint(source, dict(loaded), tuple(unwrapped), beside, forms=forms)


def _noted_forms(state: Any) -> Mapping[str, str]:
    """Return path -> form of each gate that torch noted beside a state dict."""
    noted = getattr(state, "_metadata", None)
    held = noted.items() if isinstance(noted, Mapping) else ()
    return {
        path: form
        for path, entry in held
        if isinstance(path, str)
        and isinstance(entry, Mapping)
        and isinstance(form := entry.get(NOTE), str)
    }


def _place(unwrapped: list[str]) -> str:
    return f" at {'.'.join(unwrapped)}" if unwrapped else ""


def _elsewhere(loaded: Any) -> str:
    """Name the mappings in a mapping, one of which may be the state dict."""
    held = loaded.items() if isinstance(loaded, Mapping) else ()
    names = [str(name) for name, value in held if isinstance(value, Mapping) and value][:5]
    return f"; --checkpoint-key chooses among {', '.join(names)}" if names else ""


def _at(held: Any, key: str, source: str) -> Any:
    """Return what stands at a dotted key: down mappings, or all names that begin with the rest.

    Raises:
        UnknownName: nothing does.
    """
    rest = key
    if not key:
        raise UnknownName(f"key in {source}", key, ())
    while rest and isinstance(held, Mapping):
        names = [name for name in held if isinstance(name, str)]
        step = max((n for n in names if f"{rest}.".startswith(f"{n}.")), key=len, default=None)
        if step is None:
            part = {n.removeprefix(f"{rest}."): held[n] for n in names if n.startswith(f"{rest}.")}
            if not part:
                firsts = dict.fromkeys(n.partition(".")[0] for n in names)
                raise UnknownName(f"key in {source}", key, firsts)
            return part
        held, rest = held[step], rest[len(step) + 1 :]
    return held


def bare_checkpoint(held: Checkpoint, own: Collection[str]) -> Checkpoint:
    """Take off the prefixes that parallel, averaged or compiled networks give to every key.

    Args:
        held: as it was read.
        own: the keys of the network; a prefix that is one of its own stays.
    """
    state, unwrapped, dropped = dict(held.state), list(held.unwrapped), list(held.dropped)
    forms = dict(held.forms)
    if "n_averaged" in state and "n_averaged" not in own and len(state) > 1:
        del state["n_averaged"]  # how many models an AveragedModel is the mean of
        dropped.append("n_averaged")
    while state:
        prefix = next((p for p in WRAPPERS if all(name.startswith(p) for name in state)), None)
        if prefix is None:
            break
        bare = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        is_own = any(name.startswith(prefix) for name in own)
        if is_own and len(bare.keys() & set(own)) <= len(state.keys() & set(own)):
            break
        state = bare
        forms = {path.removeprefix(prefix): form for path, form in forms.items()}
        unwrapped.append(prefix)
    inner = f".{WRAPPERS[1]}"  # of a part that was compiled alone
    if any(inner in name for name in state) and not any(inner in name for name in own):
        state = {name.replace(inner, "."): tensor for name, tensor in state.items()}
        forms = {path.replace(inner, "."): form for path, form in forms.items()}
        unwrapped.append(inner)
    return replace(
        held, state=state, unwrapped=tuple(unwrapped), dropped=tuple(dropped), forms=forms
    )
