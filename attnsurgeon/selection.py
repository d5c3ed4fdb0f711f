"""Choose sites by kind, shell pattern, stage and step; every pattern and stage must match."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from attnsurgeon.errors import NoSites, PatternUnmatched, nearest
from attnsurgeon.sites import Site, default_kind


def as_patterns(patterns: str | Iterable[str]) -> list[str]:
    """Return one pattern or many as a list."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


def literals(patterns: str | Iterable[str]) -> list[str]:
    """Return the patterns that name one path in full."""
    return [p for p in as_patterns(patterns) if not any(character in p for character in "*?[")]


def named_layers(at: str | Iterable[str], kind: str | None) -> list[str]:
    """Return the patterns by which find_sites is to offer modules as layers, whatever they do."""
    if kind == "layer":
        return [pattern for pattern in as_patterns(at) if pattern != "*"]
    return literals(at)


def select_sites(
    sites: Sequence[Site],
    *,
    at: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    stages: Iterable[int] = (),
    every: int = 1,
    kind: str | None = None,
) -> list[Site]:
    """Return the sites that match, in their order. See make_plan.

    Raises:
        PatternUnmatched: a pattern or stage that no site of the kind has.
        NoSites: nothing is left, or the network has neither residual blocks nor merges.
    """
    wanted, unwanted = as_patterns(at) or ["*"], as_patterns(exclude)
    named = {name for name in literals(wanted) if any(_is_called(site, name) for site in sites)}
    if kind is None and named != set(wanted):
        kind = default_kind(sites)
    pool = [s for s in sites if s.kind == kind or any(_is_called(s, name) for name in named)]
    if not pool:
        raise NoSites(f"the network has no site of kind {kind}; `attnsurgeon sites` shows them")
    _check_patterns(pool, [name for name in (*wanted, *unwanted) if name not in named], kind)
    known = {site.stage for site in pool}
    numbers = list(stages)
    for number in numbers:
        if number not in known:
            raise PatternUnmatched(f"there is no stage {number}; the stages are 1 to {max(known)}")
    chosen = [
        site
        for site in pool
        if any(_matches(site, pattern) for pattern in wanted)
        and not any(_matches(site, pattern) for pattern in unwanted)
        and (not numbers or site.stage in numbers)
    ][::every]
    if not chosen:
        raise NoSites("no site is left after --at, --stage and --exclude; loosen one of them")
    return chosen


def _is_called(site: Site, name: str) -> bool:
    return name in (site.path, *site.also)


def _matches(site: Site, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for path in (site.path, *site.also))


def _check_patterns(pool: Sequence[Site], patterns: Sequence[str], kind: str | None) -> None:
    """Refuse patterns that match no site.

    Raises:
        PatternUnmatched: one does not; the message gives the nearest path.
    """
    paths = [site.path for site in pool]
    for pattern in patterns:
        if not any(_matches(site, pattern) for site in pool):
            hint = nearest(pattern, paths) or f"; the first is {paths[0]!r}" if paths else ""
            which = "sites" if kind in (None, "residual") else f"sites of kind {kind}"
            raise PatternUnmatched(f"{pattern!r} matches none of the {len(paths)} {which}{hint}")
