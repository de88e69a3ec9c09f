"""Which tests a run takes: covers, shards, the order; and the tables of what tests cost and are worth."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest

from tests import tiers, worth


def cases(*values: int) -> list[tiers.Case]:
    """The full product of parameters that have so many values each."""
    return [
        tiers.values_of(dict(enumerate(case)))
        for case in itertools.product(*(range(count) for count in values))
    ]


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_a_cover_has_every_combination_of_values(strength):
    product = cases(3, 4, 2, 5)
    chosen = [product[i] for i in tiers.cover(product, strength)]
    for names in itertools.combinations(range(4), strength):
        seen, all_there_are = (
            {tuple(sorted(x for x in case if x[0][0] in names)) for case in part}
            for part in (chosen, product)
        )
        assert seen == all_there_are
    assert len(chosen) <= {1: 5, 2: 24, 3: 72}[strength]


def test_a_cover_takes_what_there_is():
    product = cases(3, 3, 3)
    some = [case for i, case in enumerate(product) if i % 4 != 1]
    pairs = set().union(*(set(itertools.combinations(sorted(c), 2)) for c in some))
    kept = [some[i] for i in tiers.cover(some, 2)]
    assert set().union(*(set(itertools.combinations(sorted(c), 2)) for c in kept)) == pairs
    assert tiers.cover([], 2) == set()
    assert tiers.cover([frozenset()], 2) == {0}, "a case without parameters"


class Item:
    """What tiers.py looks at of a pytest item."""

    def __init__(self, name: str, marks: dict[str, tuple] | None = None, **params: object) -> None:
        self.marks = {key: SimpleNamespace(args=args) for key, args in (marks or {}).items()}
        self.nodeid, self.originalname = name, name.partition("[")[0]
        if params:
            self.callspec = SimpleNamespace(params=params)

    def get_closest_marker(self, name: str) -> object:
        return self.marks.get(name)

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks[mark.name] = mark.mark


def drawn(items: list) -> list[bool]:
    tiers.mark_drawn(items)
    return [x.get_closest_marker("drawn") is not None for x in items]


def test_what_would_take_too_long_is_drawn(monkeypatch):
    times = {"slow": {"": 11.0}, "fair": {"": 9.0}, "many": {f"[{i}]": 2.0 + i for i in range(4)}}
    monkeypatch.setattr(tiers, "seconds_of_cases", lambda: times)
    assert drawn([Item("slow"), Item("fair"), Item("unknown")]) == [True, False, False]
    many = [Item(f"many[{i}]", value=i) for i in (2, 0, 1, 3)]
    assert drawn(many) == [True, False, True, True]
    demanded = [Item(f"many[{i}]", {"each": (1,)}, value=i) for i in range(4)]
    assert drawn(demanded) == [False] * 4
    quick = [Item(f"quick[{i}-{j}-{k}]", a=i, b=j, c=k) for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    assert sum(drawn(quick)) == 4
    assert drawn([Item("many[3]", {"exhaustive": ()}, value=3)]) == [False]


def test_shards_take_all_and_a_part_of_each_function():
    items = [Item(f"f{n}[{i}]", value=i) for n in range(5) for i in range(n * 7 + 1)]
    parts = [tiers.shard(items, i, 7) for i in range(7)]
    assert sorted(x.nodeid for part in parts for x in part) == sorted(x.nodeid for x in items)
    for n in range(5):
        counts = [sum(x.originalname == f"f{n}" for x in part) for part in parts]
        assert max(counts) - min(counts) <= 1
    assert tiers.shard(items, 9, 7) == parts[2]
    assert tiers.shard(items, 0, 1) == items


def test_each_worker_begins_with_a_long_test(monkeypatch):
    monkeypatch.setattr(tiers, "seconds_of_cases", lambda: {"f": {f"[{i}]": i / 2 for i in range(1, 7)}})
    items = [Item(f"f[{i}]", value=i) for i in range(7)]
    ordered = [int(x.nodeid[2:-1]) for x in tiers.longest_first(items, 2)]
    assert ordered == [6, 4, 2, 0, 5, 3, 1]
    assert [x.nodeid for x in tiers.shortest_first(items[::-1])] == [x.nodeid for x in items]


RESULTS = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_one[x-y]" time="2.34"><properties>
<property name="caught by" value="tests/b.py::test_two[1] tests/b.py::test_two[2]"/></properties></testcase>
<testcase classname="tests.test_a" name="test_one[z]" time="0.1"/>
<testcase classname="tests.test_a" name="test_three" time="5"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def test_tables_of_results(tmp_path, capsys):
    file = tmp_path / "junit.xml"
    file.write_text(RESULTS)
    known = {"tests/test_a.py::test_one": {"[z]": 3.0, "[w]": 1.0}, "tests/test_c.py::test_four": {"": 0.5}}
    assert worth.merged(known, [file]) == {
        "tests/test_a.py::test_one": {"[w]": 1.0, "[x-y]": 2.3},
        "tests/test_c.py::test_four": {"": 0.5},
    }
    assert worth.noticed([file]) == {"x-y": {"tests/b.py::test_two"}}
    worth.faults([str(file)])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "     1      1  tests/b.py::test_two",
        "               x-y",
    ]


def test_times_are_written_whole(tmp_path, monkeypatch):
    file = tmp_path / "junit.xml"
    file.write_text(RESULTS)
    monkeypatch.setattr(tiers, "SECONDS", tmp_path / "seconds.json")
    monkeypatch.setattr(tiers, "seconds_of_cases", dict)
    worth.seconds([str(file)])
    assert json.loads((tmp_path / "seconds.json").read_text()) == {
        "tests/test_a.py::test_one": {"[x-y]": 2.3}
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["junit.xml", "seconds.json"]
