"""Which tests a run takes, and in which order.

`make test` takes what is not marked `drawn`: of each test function a set of cases in which every pair of
values occurs, of one that would take too long every value, of one that still would the shortest case. The
others run in shards: `--shard I/N` takes the I-th of N parts of whatever is selected, a part of each
function, so that N runs take all.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# Seconds of the cases of each test function, where they matter: `python -m tests.worth seconds`.
SECONDS = Path(__file__).with_name("seconds.json")
# Seconds that a test function may take in `make test`, and those that its shortest case may.
BUDGET, LONGEST = 3.0, 10.0
# Not part of `make test`, nor of its cover.
ELSEWHERE = ("drawn", "packaging", "sanitized", "exhaustive")

Case = frozenset[tuple[Hashable, Hashable]]  # (parameter, value), ...


def values_of(params: Mapping[str, Any]) -> Case:
    """The values of a case; one that has `axes` (an operation on a backend) counts as several."""
    return frozenset(
        ((name, i), _hashable(part))
        for name, value in params.items()
        for i, part in enumerate(getattr(value, "axes", (value,)))
    )


def _hashable(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


def cover(cases: Sequence[Case], strength: int) -> set[int]:
    """Places of cases in which every combination of `strength` values occurs that occurs at all.

    Greedy: always the first of those with the most new combinations.
    """
    ordered = [sorted(case, key=repr) for case in cases]
    new = [set(itertools.combinations(case, min(strength, len(case)))) for case in ordered]
    chosen = set()
    while any(new):
        best = max(range(len(new)), key=lambda i: len(new[i]))
        chosen.add(best)
        seen = new[best].copy()
        for combinations in new:
            combinations -= seen
    return chosen


def _by_function(items: Iterable[pytest.Item]) -> Iterator[tuple[str, list[pytest.Item]]]:
    found: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        found[item.nodeid.partition("[")[0]].append(item)
    yield from found.items()


def mark_drawn(items: Iterable[pytest.Item]) -> None:
    """Marks the cases that `make test` leaves to the shards.

    The marker `each(strength)` of a function demands that every so many values occur together, however long
    that takes.
    """
    for name, cases in _by_function(i for i in items if not any(map(i.get_closest_marker, ELSEWHERE))):
        kept = _kept(cases, [_seconds_of(name, case) for case in cases])
        for place, item in enumerate(cases):
            if place not in kept:
                item.add_marker(pytest.mark.drawn)


def _kept(cases: Sequence[pytest.Item], seconds: Sequence[float]) -> set[int]:
    """The places of the cases of a function that are not drawn."""
    values = [values_of(x.callspec.params) if hasattr(x, "callspec") else frozenset() for x in cases]
    if each := cases[0].get_closest_marker("each"):
        return cover(values, each.args[0])
    for strength in (2, 1):
        kept = cover(values, strength) if len(cases) > 1 else {0}
        if sum(seconds[i] for i in kept) <= BUDGET:
            return kept
    shortest = min(range(len(cases)), key=seconds.__getitem__)
    return {shortest} if seconds[shortest] <= LONGEST else set()


def _seconds_of(name: str, item: pytest.Item) -> float:
    return seconds_of_cases().get(name, {}).get(item.nodeid[len(name) :], 0.0)


@cache
def seconds_of_cases() -> dict[str, dict[str, float]]:
    """Seconds by test function and case ("[a-b]"); what is not there takes next to nothing."""
    return json.loads(SECONDS.read_text()) if SECONDS.exists() else {}


def shard(items: Sequence[pytest.Item], part: int, parts: int) -> list[pytest.Item]:
    """The cases of each function in turn, from another first one for each function."""
    kept = {
        item
        for name, cases in _by_function(items)
        for place, item in enumerate(cases)
        if (place + zlib.crc32(name.encode())) % parts == part % parts
    }
    return [item for item in items if item in kept]


def longest_first(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """Long tests before the others, dealt out to the workers, which begin with a part of the list each."""
    ordered = sorted(items, key=_length, reverse=True)
    return [item for worker in range(workers) for item in ordered[worker::workers]]


def shortest_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """For runs that end at the first failure."""
    return sorted(items, key=_length)


def _length(item: pytest.Item) -> float:
    return _seconds_of(item.nodeid.partition("[")[0], item)
