"""Which tests a run takes, and in which order.

`make test` takes what is not marked. `drawn` tests run in shards: `--shard I/N` takes the I-th of N parts of
whatever is selected, a part of each test function, so that N runs take all. Parameters that multiply are
covered pairwise: a set of cases in which each pair of values occurs is not marked, the others are drawn.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

# Seconds of the longest case of each test function that has one of a second or more: `python -m tests.worth`.
SECONDS = Path(__file__).with_name("seconds.json")
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
    """Marks the cases of each test function that its cover leaves out.

    The marker `each(strength)` of a function says how many values at a time are covered, 2 where it is absent.
    """
    for _, cases in _by_function(i for i in items if not any(map(i.get_closest_marker, ELSEWHERE))):
        if not hasattr(cases[0], "callspec"):
            continue
        each = cases[0].get_closest_marker("each")
        chosen = cover([values_of(x.callspec.params) for x in cases], each.args[0] if each else 2)
        for place, item in enumerate(cases):
            if place not in chosen:
                item.add_marker(pytest.mark.drawn)


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
    """Long tests before the others, dealt out to the workers, each of which begins with its share of the list."""
    seconds = json.loads(SECONDS.read_text()) if SECONDS.exists() else {}
    length = {item: seconds.get(item.nodeid.partition("[")[0], 0.0) for item in items}
    ordered = sorted(items, key=length.__getitem__, reverse=True)
    return [item for worker in range(workers) for item in ordered[worker::workers]]
