"""Results files of benchmarks, read and compared; the commands."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import compare, conftest, race, results
from benchmarks.results import exponent, load, load_revision, parse, tokens_that_fit
from tests.benchmark_results import benchmark, file_text, row, tables


def test_a_results_file():
    info = {"against eager": row(2, 1.5, 2.5), "images": 3}
    first, second = parse(file_text({"test_a[B1-x_y]": info, "test_b_c": {}}), "some.json")
    assert first.where == "a-machine; torch 2.0, timm 1.0; commit 0123456789 with changes; 2026-01-02"
    assert (first.name, first.group, first.info) == ("test_a[B1-x_y]", "cross_attention", info)
    assert (first.memory, first.file) == (16_000, "some.json")
    assert (first.label, second.label) == ("B1, x y", "b c")
    clean = json.loads(file_text({"test_a": {}}))
    clean["commit_info"]["dirty"] = False
    clean["benchmarks"][0]["group"] = None
    del clean["machine_info"]["memory_bytes"]
    (third,) = parse(json.dumps(clean), "some.json")
    assert third.where == "a-machine; torch 2.0, timm 1.0; commit 0123456789; 2026-01-02"
    assert (third.group, third.memory) == ("", 0)


def test_labels_and_brackets():
    for name, label in (("test_a[x[1]-y]", "x[1], y"), ("test_a[]]", "]"), ("test_a_b", "a b")):
        assert benchmark(name, "", {}).label == label


def test_limits_and_our_other_ways_are_no_rivals():
    info = {f"against {name}": row(2, 1, 3) for name in ("eager", *race.LIMITS, *race.OWN, "not frozen")}
    info |= {"not run timm": "why", "peak_bytes": {}, "seconds": {}}
    assert [rival for rival, _ in benchmark("test_a", "", info).races()] == ["eager", "not frozen"]


def without(*keys: str | int) -> str:
    """A results file where the last of the keys is missing."""
    whole = part = json.loads(file_text({"test_a": {}}))
    for key in keys[:-1]:
        part = part[key]
    del part[keys[-1]]
    return json.dumps(whole)


JUNK = ["", "{", "[]", "3", "null", '"text"', without("datetime"), without("commit_info", "id")]
JUNK += [without("machine_info", key) for key in ("device", "versions")]
JUNK += [without("benchmarks", 0, key) for key in ("name", "group", "extra_info")]
JUNK.append(re.sub(r'"versions": {.*?}', '"versions": ["2.0"]', file_text({"test_a": {}})))


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
def test_junk_is_an_error_in_words(junk, tmp_path):
    with pytest.raises(ValueError, match=r"^junk\.json is no results file"):
        parse(junk, "junk.json")
    (tmp_path / "fine.json").write_text(file_text({"test_a": {}}))
    (tmp_path / "junk.json").write_text(junk)
    for path in (tmp_path, tmp_path / "junk.json"):
        with pytest.raises(ValueError, match=r"^junk\.json is no results file"):
            load(path)
    assert len(load(tmp_path / "fine.json")) == 1


@pytest.mark.parametrize(("older", "newer"), [("a.json", "b.json"), ("b.json", "a.json")])
def test_the_newest_run_of_each_benchmark_counts(older, newer, tmp_path):
    old = {"test_a": {"run": "old"}, "test_b": {"run": "old"}}
    new = {"test_b": {"run": "new"}, "test_c": {"run": "new"}}
    (tmp_path / older).write_text(file_text(old, "2026-01-02T10:00:00.5+00:00"))
    (tmp_path / newer).write_text(file_text(new, "2026-01-02T11:00:00+00:00"))
    (tmp_path / "all.json.part").write_text("of a run that goes on")
    found = {b.name: (b.info["run"], b.file) for b in load(tmp_path)}
    assert found == {"test_a": ("old", older), "test_b": ("new", newer), "test_c": ("new", newer)}
    assert [b.name for b in load(tmp_path / older)] == ["test_a", "test_b"]


def test_all_points_of_a_curve_are_of_one_run(tmp_path):
    """That with the most of them, though another is newer; of others the newest counts."""

    def run(sizes: tuple[int, ...], moment: str, mark: int) -> str:
        point = {"what": "fusion", "mode": "forward", "mark": mark}
        rows = {f"test_a[{size}]": {**point, "tokens": size} for size in sizes}
        return file_text({**rows, "test_b": {"mark": mark}}, moment)

    (tmp_path / "full.json").write_text(run((1, 2, 3), "2026-01-01T00:00:00+00:00", 1))
    (tmp_path / "all.json").write_text(run((1, 2), "2026-01-02T00:00:00+00:00", 2))
    marks = {b.name: b.info["mark"] for b in load(tmp_path)}
    assert marks == {"test_a[1]": 1, "test_a[2]": 1, "test_a[3]": 1, "test_b": 2}


def test_where_there_are_no_results(tmp_path):
    for path in (tmp_path, tmp_path / "missing", tmp_path / "missing.json"):
        with pytest.raises(ValueError, match="neither a results file nor a folder with some") as error:
            load(path)
        assert str(path) in str(error.value)


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Callable[[Mapping[str, str]], None]:
    """Commits files of the folder of results in a repository of the test's own."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "benchmarks" / "results")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, "/dev/null")

    def git(*arguments: str) -> None:
        who = ("-c", "user.name=test", "-c", "user.email=test@localhost")
        subprocess.run(("git", *who, *arguments), cwd=tmp_path, check=True, capture_output=True)

    def commit(files: Mapping[str, str]) -> None:
        for name, text in files.items():
            path = results.RESULTS / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        git("add", ".")
        git("commit", "--quiet", "--message", "results")

    git("init", "--quiet")
    return commit


def test_results_of_a_commit(repository):
    early, late = "2026-01-02T10:00:00+00:00", "2026-01-02T11:00:00+00:00"
    repository({"one/all.json": file_text({"test_a": {"run": 0}}), "one/report.md": "# Report"})
    repository(
        {
            "one/all.json": file_text({"test_a": {"run": 2}, "test_b": {"run": 2}}, late),
            "one/some.json": file_text({"test_b": {"run": 1}, "test_c": {"run": 1}}, early),
            "other/all.json": file_text({"test_d": {"run": 3}}),
        }
    )
    (results.RESULTS / "one" / "all.json").write_text("not committed")
    found = {b.name: (b.info["run"], b.file) for b in load_revision("HEAD", "one")}
    assert found == {"test_a": (2, "all.json"), "test_b": (2, "all.json"), "test_c": (1, "some.json")}
    assert [b.name for b in load_revision("HEAD", "other")] == ["test_d"]
    assert [b.info["run"] for b in load_revision("HEAD~1", "one")] == [0]


def test_a_commit_that_has_no_results(repository):
    repository({"one/all.json": file_text({"test_a": {}}), "drawn/report.md": "# Report"})
    for revision, machine in (("unknown", "one"), ("HEAD", "missing"), ("HEAD~7", "one"), ("HEAD", "drawn")):
        with pytest.raises(ValueError, match=revision) as error:
            load_revision(revision, machine)
        assert f"benchmarks/results/{machine}" in str(error.value)


@pytest.mark.parametrize("junk", ["{", "[]", "{}", "null"])
def test_a_commit_with_junk(junk, repository):
    repository({"one/junk.json": junk})
    with pytest.raises(ValueError, match=r"junk\.json is no results file"):
        load_revision("HEAD", "one")


@pytest.mark.parametrize("power", [-1, 0, 0.5, 1, 2, 3])
def test_the_exponent_of_a_power_law(power):
    assert exponent({x: 3e-4 * x**power for x in (100, 230, 401, 1600)}) == pytest.approx(power, abs=1e-12)
    assert exponent({2: 7.0, 1: 7.0 / 2**power}) == pytest.approx(power, abs=1e-12)


def test_the_exponent_is_that_of_least_squares():
    """Logarithms 0, 1, 2 of x and 0, 1, 0 of y: slope 0; with 0, 0, 3, slope 3 / 2."""
    base = math.e
    assert exponent({1: 1, base: base, base**2: 1}) == pytest.approx(0, abs=1e-12)
    assert exponent({1: 1, base: 1, base**2: base**3}) == pytest.approx(1.5)


@pytest.mark.parametrize("points", [{}, {1: 1}, {1: 1, 2: 0}, {0: 1, 2: 1}, {1: 1, 2: -3}, {-1: 1, 2: 3}])
def test_an_exponent_needs_two_positive_points(points):
    with pytest.raises(ValueError, match="two points or more, all positive"):
        exponent(points)


@pytest.mark.parametrize("power", [1, 2, 3.5])
def test_tokens_that_fit_by_hand(power):
    """Of 5 x^p bytes, at 3000 tokens; the first point is off the line, and the last two count."""
    points = {800: 5 * 800**power, 400: 5 * 400**power, 100: 1e9}
    assert tokens_that_fit(points, 5 * 3000**power) == pytest.approx(3000)
    assert tokens_that_fit(points, 5 * 800**power) == pytest.approx(800)
    assert tokens_that_fit(points, 5 * 500**power) == pytest.approx(500)


@pytest.mark.parametrize("first", [1e8, 1e8 - 1, 9e7, 2e8])
def test_memory_that_hardly_grows_yet_grows_with_the_tokens(first):
    """As of a model whose packed weights are nearly all that it holds: 1000 times the bytes and tokens."""
    assert tokens_that_fit({400: first, 800: 1e8}, 1e11) == pytest.approx(800_000)


def test_the_largest_numbers_of_tokens():
    points = {199: "a", 1000: "b", 200: "c", 500: "d"}
    assert results.largest(points) == {1000: "b", 200: "c", 500: "d"}
    assert results.largest({3: "a"}) == {3: "a"}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (1.0, "1"),
        (12.34, "12.3"),
        (99.94, "99.9"),
        (99.96, "100"),
        (1234.4, "1,234"),
        (20_000_000, "20,000,000"),
    ],
)
def test_digits(value, words):
    assert results.digits(value) == words


@pytest.mark.parametrize(
    ("brand", "name"),
    [
        ("AMD EPYC 9B45", "amd-epyc-9b45-3-threads"),
        ("Intel(R) Core(TM) i7-1165G7 @ 2.80GHz", "intel-r-core-tm-i7-1165g7-2-80ghz-3-threads"),
        ("../Schnell™ [x]_y", "schnell-x-y-3-threads"),
        (None, "cpu-3-threads"),
    ],
)
def test_the_name_of_a_machine_is_that_of_a_folder(brand, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr("cpuinfo.get_cpu_info", lambda: {"brand_raw": brand} if brand else {})
    assert results.machine_name() == name


def test_the_name_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 (SXM)")
    assert results.machine_name() == "nvidia-h200-sxm"


def test_groups_keep_their_order():
    benchmarks = [benchmark(name, group, {}) for name, group in (("c", "y"), ("a", "x"), ("b", "y"))]
    groups = results.by_group(benchmarks)
    assert [(group, [b.name for b in members]) for group, members in groups.items()] == [
        ("y", ["c", "b"]),
        ("x", ["a"]),
    ]


BEFORE = [
    benchmark("test_a[x]", "", {"against eager": row(2, 1.9, 2.1), "against timm": row(4, 3.5, 4.5)}),
    benchmark("test_a[y]", "", {"against eager": row(3, 2.5, 3.5), "against gone": row(1, 1, 1)}),
    benchmark("test_a[old]", "", {"against eager": row(1, 1, 1)}),
]
AFTER = [
    benchmark("test_a[x]", "", {"against eager": row(3, 2.1, 3.9), "against timm": row(1, 0.9, 1.1, 2e-3)}),
    benchmark("test_a[y]", "", {"against eager": row(4.5, 3.6, 5), "against new": row(1, 1, 1)}),
    benchmark("test_a[new]", "", {"against eager": row(1, 1, 1)}),
]


def test_changes_by_hand():
    """To a quarter, and 1.5 times twice: 2.1 to 3.9 meets 1.9 to 2.1; 3.6 to 5 does not meet 2.5 to 3.5."""
    found = compare.changes(BEFORE, AFTER)
    assert [(c.benchmark, c.rival, c.factor, c.certain) for c in found] == [
        ("a[x]", "timm", 0.25, True),
        ("a[x]", "eager", 1.5, False),
        ("a[y]", "eager", 1.5, True),
    ]
    assert found[0].seconds == (1e-3, 2e-3)
    assert found[0].ratios == (4, 1)
    back = compare.changes(AFTER, BEFORE)
    assert [(c.factor, c.certain) for c in back] == [(4, True), (1 / 1.5, False), (1 / 1.5, True)]


def test_limits_and_our_other_ways_have_no_changes():
    info = {f"against {name}": row(2, 2, 2) for name in (*race.LIMITS, *race.OWN)}
    assert compare.changes([benchmark("test_a", "", info)], [benchmark("test_a", "", info)]) == []


def test_the_words_of_a_comparison():
    text = compare.markdown(BEFORE, AFTER, everything=False)
    assert text.count("A: a machine") == text.count("B: a machine") == 1
    assert "3 races in both: 1 better in B, 1 worse, 1 without a difference" in text
    assert "In A alone: a[old]." in text
    assert "In B alone: a[new]." in text
    (cells,) = tables(text)
    assert cells[1:] == [
        ["a[x]", "timm", "1.000 ms", "2.000 ms", "4.00", "1.00", "0.25"],
        ["a[y]", "eager", "1.000 ms", "1.000 ms", "3.00", "4.50", "1.50"],
    ]
    (everything,) = tables(compare.markdown(BEFORE, AFTER, everything=True))
    assert everything[2][-1] == "1.50 (within the intervals)"
    assert [everything[0], everything[1], everything[3]] == cells


def test_a_comparison_without_changes_has_no_table():
    text = compare.markdown(BEFORE, BEFORE, everything=False)
    assert "5 races in both: 0 better in B, 0 worse, 5 without a difference" in text
    assert not tables(text)
    assert "alone" not in text


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Two results files; B is faster."""
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, ratio in zip(paths, (2, 3), strict=True):
        path.write_text(file_text({"test_a[x]": {"against eager": row(ratio, ratio, ratio)}}))
    return paths


def test_the_compare_command(files, capsys):
    assert compare.main([*map(str, files)]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert "1 races in both: 1 better in B, 0 worse" in out
    assert "| a[x] | eager | 1.000 ms | 1.000 ms | 2.00 | 3.00 | 1.50 |" in out
    assert "within the intervals" not in out


def test_the_compare_command_with_all(files, capsys):
    assert compare.main(["--all", str(files[0]), str(files[0])]) == 0
    assert "| 2.00 | 2.00 | 1.00 (within the intervals) |" in capsys.readouterr().out


def test_the_compare_command_with_commits(files, repository, capsys):
    for path in files:
        repository({"one/all.json": path.read_text()})
    assert compare.main(["HEAD~1", "HEAD", "--machine", "one"]) == 0
    assert compare.main([str(files[0]), "HEAD", "--machine", "one"]) == 0
    assert capsys.readouterr().out.count("| 2.00 | 3.00 | 1.50 |") == 2


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("what", ["missing", "junk", "empty"])
def test_the_compare_command_says_what_is_wrong(what, which, files, tmp_path, repository, capsys):
    given = [*map(str, files)]
    given[which] = str(tmp_path / f"{what}.json")
    if what == "junk":
        Path(given[which]).write_text("[]")
    elif what == "empty":
        Path(given[which]).mkdir()
    assert compare.main([*given, "--machine", "one"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("compare: ")
    assert f"{what}.json" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        (["benchmarks"], {}, "all"),
        ([], {}, "all"),
        (["benchmarks"], {"full": True}, "full"),
        (["benchmarks"], {"keyword": "cpu or Model", "full": True}, "full-cpu-or-model"),
        (["benchmarks"], {"markexpr": "not full"}, "not-full"),
        (["benchmarks/test_cpu.py"], {}, "test-cpu"),
        (["benchmarks/test_start.py::test_import"], {}, "test-start-test-import"),
        (["benchmarks"], {"lf": True}, "last-failed"),
    ],
)
def test_a_run_of_some_benchmarks_has_a_file_of_its_own(arguments, options, name, monkeypatch):
    monkeypatch.chdir(results.RESULTS.parent.parent)
    defaults = {"full": False, "keyword": "", "markexpr": "", "lf": False}
    config = SimpleNamespace(args=arguments, option=SimpleNamespace(**{**defaults, **options}))
    assert conftest._selected(config) == name


@pytest.mark.parametrize(("status", "kept"), [(0, "new"), (1, "new"), (2, "earlier")])
def test_an_interrupted_run_leaves_the_earlier_results(status, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(conftest, "redraw", lambda folder: None)
    target = tmp_path / "all.json"
    target.write_text("earlier")
    target.with_suffix(".json.part").write_text("new")
    config = SimpleNamespace(_crossvit_results=target)
    conftest.pytest_sessionfinish(SimpleNamespace(config=config), status)
    conftest.pytest_unconfigure(config)
    assert target.read_text() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["all.json"]


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["--help"], ["reports", "report"]])
def test_an_unknown_command(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    assert command.main() == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("usage: python -m benchmarks ")
    assert all(name in err for name in ("report", "compare", "scale"))


def test_a_command_gets_what_follows_it(monkeypatch):
    given = []
    monkeypatch.setitem(command.COMMANDS, "report", lambda arguments: given.append(arguments) or 7)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "report", "one", "--two"])
    assert command.main() == 7
    assert given == [["one", "--two"]]


@pytest.mark.parametrize("name", ["report", "compare", "scale"])
def test_each_command_has_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", name, "--help"])
    with pytest.raises(SystemExit) as error:
        command.main()
    assert error.value.code == 0
    assert f"usage: python -m benchmarks {name}" in capsys.readouterr().out
