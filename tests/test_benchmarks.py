"""The benchmarks' own machinery: races, energy, results files, the report, its charts, the comparison."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.colors import to_rgba

from benchmarks import __main__ as command
from benchmarks import charts, compare, energy, race, report, results
from benchmarks.results import Benchmark, exponent, load, load_revision, parse, tokens_that_fit
from crossvit_kernels import measure

CPU = torch.device("cpu")
ALLOCATOR = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried\nmore"
Make = Callable[..., Path]


def row(ratio: float, low: float, high: float, ours: float = 1e-3) -> dict[str, float]:
    """What a race leaves of a rival."""
    return {
        "rival_seconds": ours * ratio,
        "ours_seconds": ours,
        "ratio": ratio,
        "low": low,
        "high": high,
        "memory_ratio": 1.0,
    }


def benchmark(name: str, group: str, info: Mapping[str, Any], memory: int = 0) -> Benchmark:
    return Benchmark(name, group, dict(info), "a machine", memory, "all.json")


def file_text(rows: Mapping[str, Mapping[str, Any]], moment: str = "2026-01-02T10:00:00+00:00") -> str:
    """A results file with the information of each benchmark."""
    return json.dumps(
        {
            "machine_info": {
                "device": "a-machine",
                "versions": {"torch": "2.0", "cuda": None, "timm": "1.0"},
                "memory_bytes": 16_000,
            },
            "commit_info": {"id": "0123456789abcdef", "dirty": True},
            "datetime": moment,
            "benchmarks": [
                {"name": name, "group": "cross_attention", "extra_info": info} for name, info in rows.items()
            ],
        }
    )


def tables(text: str) -> list[list[list[str]]]:
    """Tables of a Markdown text, as cells, without the line below the header."""
    found = []
    for block in text.split("\n\n"):
        lines = block.strip().splitlines()
        if lines and lines[0].startswith("|"):
            assert set(lines.pop(1)) <= set("|- ")
            cells = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]
            assert {len(line) for line in cells} == {len(cells[0])}
            found.append(cells)
    return found


def sections(text: str) -> dict[str, str]:
    """Those of a Markdown text, by title."""
    return {part.partition("\n")[0]: part for part in text.split("\n## ")}


def table(text: str, corner: str) -> list[list[str]]:
    """The one table that has `corner` in its first cell."""
    (found,) = (cells for cells in tables(text) if cells[0][0] == corner)
    return found


# The race


@pytest.fixture
def quick(monkeypatch) -> None:
    """Two short rounds, and no energy, whatever the machine reports."""
    monkeypatch.setattr(race, "ROUNDS", 2)
    monkeypatch.setattr(race, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(race, "joules", lambda call, device: None)
    monkeypatch.setattr(measure, "_SAMPLE_SECONDS", 1e-4)


def failing(error: BaseException) -> race.Call:
    def call() -> None:
        raise error

    return call


def test_a_race_keeps_memory_and_times(quick, monkeypatch):
    """4000 bytes of ours and 500 held, 12,000 of the rival's; 2, 1 and 4 s against 6, 3 and 8 s."""
    samples = {"ours": [2.0, 1.0, 4.0], "rival": [6.0, 3.0, 8.0]}
    monkeypatch.setattr(race, "interleaved", lambda calls, rounds, device: samples)
    rivals = {"rival": lambda: torch.zeros(3000)}
    found = race.run(lambda: torch.zeros(1000), rivals, CPU, held=lambda: 500)
    assert found["peak_bytes"] == {"ours": 4500, "rival": 12_000}
    assert found["against rival"] == {
        "rival_seconds": 6.0,
        "ours_seconds": 2.0,
        "ratio": 3.0,
        "low": 2.0,
        "high": 3.0,
        "memory_ratio": 12_000 / 4500,
    }
    assert not {"graphs", "joules", "latency", "saved_bytes"} & set(found)
    assert list(rivals) == ["rival"]


def test_a_race_is_timed(quick):
    rivals = {"slow": lambda: time.sleep(0.02)}
    found = race.run(lambda: time.sleep(0.002), rivals, CPU)
    assert 2 < found["against slow"]["ratio"] < 20
    assert found["against slow"]["ours_seconds"] >= 0.002
    assert found["against slow"]["memory_ratio"] == 0, "no bytes of the rival's, and none of ours"


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 15), (1e-6, 15), (0.5, 8), (4.0, 5)])
def test_slow_calls_get_fewer_rounds(seconds, rounds, monkeypatch):
    """Two calls in at most 8 seconds, but at least 5 rounds and at most 15."""
    given = []

    def interleaved(calls: Mapping[str, race.Call], count: int, device: torch.device) -> dict[str, Any]:
        given.append(count)
        return {name: [1.0] for name in calls}

    monkeypatch.setattr(race, "ROUNDS", 15)
    monkeypatch.setattr(race, "LEAST_ROUNDS", 5)
    monkeypatch.setattr(race, "joules", lambda call, device: None)
    monkeypatch.setattr(race, "_seconds", lambda call, device: seconds)
    monkeypatch.setattr(race, "interleaved", interleaved)
    race.run(lambda: None, {"rival": lambda: None}, CPU)
    assert given == [rounds]


OUT_OF_MEMORY = {
    "of torch": failing(torch.OutOfMemoryError("CUDA out of memory")),
    "of its allocator": failing(RuntimeError(ALLOCATOR)),
    "of the system": lambda: torch.empty(1 << 60, dtype=torch.uint8),
    "of Python": failing(MemoryError("std::bad_alloc")),
    "without words": failing(MemoryError()),
}


@pytest.mark.parametrize("case", OUT_OF_MEMORY)
def test_a_rival_beyond_the_memory_is_not_run(case, quick):
    rivals = {"large": OUT_OF_MEMORY[case], "small": lambda: torch.zeros(10)}
    found = race.run(lambda: torch.zeros(10), rivals, CPU)
    assert found["not run large"] == race.BEYOND_MEMORY
    assert list(found["peak_bytes"]) == ["ours", "small"]
    assert {key for key in found if key.startswith("against")} == {"against small"}


def test_a_rival_that_fits_only_once_is_not_run(quick):
    """It is compiled at its first call, and needs more at its second."""
    calls = []

    def rival() -> None:
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    found = race.run(lambda: None, {"rival": rival}, CPU)
    assert found["not run rival"] == race.BEYOND_MEMORY
    assert len(calls) == 2


@pytest.mark.parametrize("case", OUT_OF_MEMORY)
def test_ours_beyond_the_memory_is_an_error(case, quick):
    rivals = {"rival": lambda: pytest.fail("nothing is left to be compared")}
    with pytest.raises(MemoryError, match=race.BEYOND_MEMORY) as error:
        race.run(OUT_OF_MEMORY[case], rivals, CPU)
    assert "\n" not in str(error.value)
    assert not str(error.value).endswith(": ")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("memory"), KeyboardInterrupt()])
def test_other_errors_are_not_hidden(error, quick):
    for ours, rival in ((failing(error), lambda: None), (lambda: None, failing(error))):
        with pytest.raises(type(error)) as raised:
            race.run(ours, {"rival": rival}, CPU)
        assert raised.value is error


def test_what_is_out_of_memory():
    assert race.is_out_of_memory(torch.OutOfMemoryError("x"))
    assert race.is_out_of_memory(MemoryError())
    assert race.is_out_of_memory(RuntimeError(ALLOCATOR))
    assert not race.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))
    assert not race.is_out_of_memory(RuntimeError())
    assert not race.is_out_of_memory(KeyError("memory"))


def test_saved_bytes_by_hand():
    """Storages of 4000 bytes: those of inputs are left out, one that is saved twice counts once."""
    x, y = (torch.rand(10, 100, requires_grad=True) for _ in range(2))

    def squared() -> None:
        once = x.exp()
        (once * once).sum()

    def thrice() -> None:
        for _ in range(3):
            x * (y + 1)

    assert race.saved_bytes(squared, [x]) == 4000
    assert race.saved_bytes(lambda: x * y, []) == 8000
    assert race.saved_bytes(lambda: x * y, [x]) == 4000
    assert race.saved_bytes(lambda: x * y, iter([x, y])) == 0
    assert race.saved_bytes(lambda: x[:1] * y.T[:100, :1].T, [y]) == 4000, "a view keeps its storage"
    assert race.saved_bytes(thrice, [x]) == 12_000, "one after the other, at addresses of their own"
    assert race.saved_bytes(lambda: x[:0].clone().exp(), []) == 0
    with torch.no_grad():
        assert race.saved_bytes(squared, []) == 0


def test_what_was_saved_is_let_go():
    x = torch.rand(1000, requires_grad=True)
    made = []
    assert race.saved_bytes(lambda: made.append(weakref.ref(x.exp())), [x]) == 4000
    assert made[0]() is None


def test_saved_bytes_in_a_race(quick):
    x = torch.rand(1000, requires_grad=True)
    rivals = {"twice": lambda: (x * x).exp().exp(), race.LIMITS[0]: lambda: x.exp()}
    found = race.run(lambda: x.exp(), rivals, CPU, given=(tensor for tensor in [x]))
    assert found["saved_bytes"] == {"ours": 4000, "twice": 8000}


def test_percentiles_by_hand():
    hundred = [float((37 * i) % 101) for i in range(1, 101)]
    assert sorted(hundred) == list(range(1, 101))
    assert race.percentiles(hundred) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert race.percentiles([3.0]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0}
    assert race.percentiles([2.0, 1.0]) == {"p50": 1.0, "p90": 2.0, "p99": 2.0}
    assert race.percentiles([float(i) for i in range(20)]) == {"p50": 9.0, "p90": 17.0, "p99": 19.0}


@pytest.mark.parametrize(("seconds", "calls"), [(0.25, 20), (1 / 16, 20), (1 / 64, 64)])
def test_single_calls_last_a_second_and_are_twenty(seconds, calls, monkeypatch):
    monkeypatch.setattr(race, "_LATENCY_CALLS", 20)
    monkeypatch.setattr(race, "_LATENCY_SECONDS", 1.0)
    monkeypatch.setattr(race, "_seconds", lambda call, device: seconds)
    assert race.single_calls(lambda: None, CPU) == [seconds] * calls


def test_single_calls_are_timed_one_by_one(monkeypatch):
    monkeypatch.setattr(race, "_LATENCY_CALLS", 6)
    monkeypatch.setattr(race, "_LATENCY_SECONDS", 0.05)
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        time.sleep(0.001 if len(calls) % 2 else 0.003)

    times = race.single_calls(call, CPU)
    assert len(times) == len(calls) >= 6
    assert 0.05 <= sum(times) < 0.05 + 2 * max(times)
    assert min(times[0::2]) >= 0.001
    assert min(times[1::2]) >= 0.003


def test_many_single_calls_cost_little_more_than_themselves(monkeypatch):
    """To add all times anew after each call took seconds for calls of 30 microseconds."""
    monkeypatch.setattr(race, "_LATENCY_SECONDS", 1.0)
    monkeypatch.setattr(race, "_seconds", lambda call, device: 2.0**-15)
    start = time.perf_counter()
    assert len(race.single_calls(lambda: None, CPU)) == 2**15
    assert time.perf_counter() - start < 1


def test_latency_and_energy_of_a_race(quick, monkeypatch):
    def ours() -> None:
        time.sleep(0.001)

    def rival() -> None:
        time.sleep(0.01)

    taken = {ours: 2.0, rival: 5.0}
    monkeypatch.setattr(race, "_LATENCY_SECONDS", 0.0)
    monkeypatch.setattr(race, "joules", lambda call, device: taken[call])
    found = race.run(ours, {"rival": rival}, CPU, latency=True)
    assert found["joules"] == {"ours": 2.0, "rival": 5.0}
    assert list(found["latency"]) == ["ours", "rival"]
    for name, least in (("ours", 0.001), ("rival", 0.01)):
        latency = found["latency"][name]
        assert least <= latency["p50"] <= latency["p90"] <= latency["p99"]
    assert found["latency"]["ours"]["p50"] < 0.01


# Energy


@pytest.fixture
def zone(tmp_path, monkeypatch) -> Make:
    """Writes a zone of the powercap folder, in microjoules."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)

    def write(number: str, value: int, kind: str = "package-0", limit: int = 1_000_000_000) -> Path:
        folder = tmp_path / f"intel-rapl:{number}"
        folder.mkdir(exist_ok=True)
        for name, content in (("name", kind), ("energy_uj", value), ("max_energy_range_uj", limit)):
            (folder / name).write_text(f"{content}\n")
        return folder

    (tmp_path / "intel-rapl").mkdir()
    (tmp_path / "intel-rapl-mmio:0").mkdir()
    return write


def test_energy_of_all_packages(zone):
    zone("0", 5_000_000)
    zone("1", 7_000_000, "package-1")
    read = energy.counter(CPU)
    assert read() == 0
    zone("0", 8_000_000)
    zone("1", 11_500_000, "package-1")
    assert read() == 7.5
    zone("0", 8_250_000)
    assert read() == 7.75


def test_parts_of_packages_are_not_counted_again(zone):
    zone("0", 0)
    zone("0:0", 0, "core")
    read = energy.counter(CPU)
    zone("0", 2_000_000)
    zone("0:0", 900_000_000, "core")
    assert read() == 2


def test_the_whole_platform_is_not_counted_beside_its_packages(zone):
    """Of laptops, which have its counter as a zone of its own."""
    zone("0", 0)
    zone("1", 0, "psys")
    read = energy.counter(CPU)
    zone("0", 2_000_000)
    zone("1", 5_000_000, "psys")
    assert read() == 2


def test_a_counter_begins_again_at_its_range(zone):
    zone("0", 998_000_000)
    zone("1", 10_000_000, "package-1", limit=20_000_000)
    read = energy.counter(CPU)
    zone("0", 1_500_000)
    zone("1", 9_000_000, "package-1", limit=20_000_000)
    assert read() == 2 + 1.5 + 10 + 9
    zone("0", 2_500_000)
    assert read() == 2 + 1.5 + 10 + 9 + 1


def test_no_energy_without_counters(zone, monkeypatch, tmp_path):
    assert energy.counter(CPU) is None
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "missing")
    assert energy.counter(CPU) is None
    assert energy.joules(lambda: pytest.fail("called in vain"), CPU) is None


@pytest.mark.parametrize("name", ["energy_uj", "max_energy_range_uj"])
def test_no_energy_where_one_counter_cannot_be_read(name, zone, monkeypatch):
    zone("0", 1)
    hidden = zone("1", 1, "package-1") / name
    assert energy.counter(CPU) is not None
    read_text = Path.read_text

    def refuse(path: Path, *arguments: Any, **options: Any) -> str:
        if path == hidden:
            raise PermissionError(13, "Permission denied")
        return read_text(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refuse)
        assert energy.counter(CPU) is None
    hidden.unlink()
    assert energy.counter(CPU) is None


def test_joules_of_one_call(monkeypatch):
    """Three a call; a hundred of the first one, which is not counted."""
    total, calls = 0.0, 0

    def call() -> None:
        nonlocal total, calls
        total += 3 if calls else 100
        calls += 1

    monkeypatch.setattr(energy, "_AT_LEAST", 0.002)
    monkeypatch.setattr(energy, "counter", lambda device: lambda: total)
    assert energy.joules(call, CPU) == 3
    assert calls > 2


def test_energy_of_a_gpu(monkeypatch):
    """NVIDIA's library counts millijoules."""
    now = [7000]
    library = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-12-ab": "handle"}[uuid],
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: {"handle": now[0]}[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-ab"))
    read = energy.counter(torch.device("cuda"))
    before = read()
    now[0] += 2500
    assert read() - before == 2.5
    library.nvmlInit = failing(RuntimeError("no driver"))
    assert energy.counter(torch.device("cuda")) is None


# Results files


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


# The report

RACES = [
    benchmark("test_a[slow]", "first", {"against eager": row(0.8, 0.7, 0.9), "against timm": row(2, 1.5, 3)}),
    benchmark("test_a[even]", "first", {"against eager": row(0.9, 0.8, 1.0), "against timm": row(1, 1, 3)}),
    benchmark(
        "test_b[x[1]-y_z]",
        "second",
        {
            "against eager": row(0.25, 0.2, 0.3, ours=8.0),
            "against bytes once": row(0.1, 0.1, 0.1),
            "against not frozen fp32": row(0.5, 0.5, 0.5),
            "against not frozen bf16": row(0.5, 0.5, 0.5),
        },
    ),
]


def test_what_is_slower_comes_first():
    """Of five races: 2 is won; 0.8 and 0.25 are lost; up to 1, and from 1 on, is no difference."""
    text = report.markdown("a-machine", RACES)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    slower = "## Where this package is slower"
    assert headings == ["# Benchmarks on a-machine", slower, "## First", "## Second"]
    assert "Of 5 races this package wins 1, loses 2, and 2 show no difference." in text
    before = text[: text.index(slower)]
    assert "|" not in before
    assert before.count("- all.json: a machine.") == 1
    assert tables(text)[0] == [
        ["benchmark", "rival", "ours", "rival's", "ratio"],
        ["second: x[1], y z", "eager", "8 s", "2 s", "0.25 (0.20-0.30)"],
        ["first: slow", "eager", "1 ms", "800 µs", "0.80 (0.70-0.90)"],
    ]


def test_other_fusions_are_no_races():
    """They make other models; they stand in the tables of their own sections alone."""
    slower, faster = row(0.5, 0.4, 0.6), row(2, 1.5, 3)
    info = {"against all-attention": slower, "against timm": faster}
    rows = [benchmark("test_a[x]", "model", info), fusion(400, {"cross": (1e-3, 1)})]
    rows[1].info.update({"against class": slower, "not run all": "no room"})
    text = report.markdown("a-machine", rows)
    assert "Of 1 races this package wins 1, loses 0, and 0 show no difference." in text
    assert "|" not in sections(text)["Where this package is slower"]
    of_models, of_fusions = (cells for cells in tables(text) if cells[0][0] == "time")
    assert of_models[1] == ["x", "1 ms", "0.50 (0.40-0.60)", "2.00 (1.50-3.00)"]
    assert of_fusions == [
        ["time", "this package", "class", "all"],
        ["fusion, forward, 400", "1 ms", "0.50 (0.40-0.60)", "no room"],
    ]


def test_the_order_of_the_sections():
    """The usual ones first, whatever was run first; others as they come."""
    groups = ["new", "cross_attention", "another", "model"]
    text = report.markdown("a-machine", [benchmark("test_a", group, {}) for group in groups])
    titles = [report.TITLES["model"], report.TITLES["cross_attention"], "New", "Another"]
    assert list(sections(text))[2:] == titles


def test_the_table_of_races():
    text = report.markdown("a-machine", RACES)
    first, second = (cells for cells in tables(text) if cells[0][0] == "time")
    assert first == [
        ["time", "this package", "eager", "timm"],
        ["slow", "1 ms", "0.80 (0.70-0.90)", "2.00 (1.50-3.00)"],
        ["even", "1 ms", "0.90 (0.80-1.00)", "1.00 (1.00-3.00)"],
    ]
    assert second == [["time", "this package", "eager"], ["x[1], y z", "8 s", "0.25 (0.20-0.30)"]]
    limits = table(text, "share of the least time that hardware allows")
    assert limits[1:] == [["x[1], y z", "1 ms", "bytes, once", "10%"]]


def test_a_report_without_losses_and_one_of_nothing():
    text = report.markdown("a-machine", [benchmark("test_a", "first", {"against timm": row(2, 1.5, 3)})])
    assert "Of 1 races this package wins 1, loses 0, and 0 show no difference." in text
    assert [cells[0][0] for cells in tables(text)] == ["time"]
    assert "Of 0 races this package wins 0, loses 0" in report.markdown("a-machine", [])


def test_what_was_not_run_is_said():
    info = {"against timm": row(2, 1.5, 3), "not run eager": "no room", "not run bytes once": "no room"}
    text = report.markdown(
        "a-machine",
        [
            benchmark("test_a[x]", "first", info),
            benchmark("test_a[y]", "first", {"not run ours": "too large"}),
        ],
    )
    assert table(text, "time") == [
        ["time", "this package", "timm", "eager"],
        ["x", "1 ms", "2.00 (1.50-3.00)", "no room"],
        ["y", "too large", "", ""],
    ]


def test_that_ours_was_not_run_is_said_without_rivals():
    text = report.markdown("a-machine", [benchmark("test_a[x]", "first", {"not run ours": "too large"})])
    assert table(text, "time")[1:] == [["x", "too large"]]


def test_the_time_of_ours_where_no_rival_fits(quick):
    found = race.run(lambda: time.sleep(0.002), {"timm": OUT_OF_MEMORY["of Python"]}, CPU)
    text = report.markdown("a-machine", [benchmark("test_a[x]", "first", found)])
    label, ours, timm = table(text, "time")[1]
    assert (label, timm) == ("x", race.BEYOND_MEMORY)
    assert float(ours.removesuffix(" ms")) >= 2


def test_memory_and_energy():
    info = {
        "against timm": row(2, 1.5, 3),
        "against eager": row(2, 1.5, 3),
        "not run compiled": "no room",
        "against bytes once": row(0.5, 0.5, 0.5),
        "peak_bytes": {"ours": 0, "timm": 1_500_000, "eager": 999, "bytes once": 123},
        "saved_bytes": {"ours": 2_000, "timm": 3_210_000_000, "eager": 1},
        "joules": {"ours": 0.25, "timm": 12.0, "eager": None, "bytes once": 1.0},
    }
    others = benchmark("test_a[y]", "first", {"against timm": row(2, 1.5, 3)})
    text = report.markdown("a-machine", [benchmark("test_a[x]", "first", info), others])
    names = ["this package", "timm", "eager", "compiled"]
    assert table(text, "peak memory") == [["peak memory", *names], ["x", "0 B", "1.5 MB", "999 B", ""]]
    assert table(text, "kept for backward")[1:] == [["x", "2 kB", "3.21 GB", "1 B", ""]]
    assert table(text, "energy")[1:] == [["x", "0.25 J", "12 J", "", ""]]


def test_limits_latency_and_what_has_no_rival():
    """Of 0.5 and 0.2 ms, the larger binds: half of our 1 ms. 256 images in 12.8 ms are 20,000 a second."""
    limits = {"products": 2e-4, "bytes, once": 5e-4}
    latency = {
        "ours": {"p50": 0.0128, "p90": 0.02, "p99": 1.5},
        "timm": {"p50": 2.0, "p90": 3.0, "p99": 4.0},
    }
    kernel = {"against PyTorch": row(2, 1.5, 3), "seconds": {"ours": 1e-3}, "limits": limits}
    model = {"against timm": row(2, 1.5, 3), "latency": latency, "images": 256}
    text = report.markdown(
        "a-machine",
        [
            benchmark("test_a[x]", "first", kernel),
            benchmark("test_b[y]", "second", model),
            benchmark("test_c", "third", {"measured": {"pip install": 61.25}}),
            benchmark("test_d[z]", "fourth", {"latency": {"ours": latency["timm"]}}),
        ],
    )
    assert table(text, "share of the least time that hardware allows")[1:] == [
        ["x", "1 ms", "bytes, once", "50%"]
    ]
    assert table(text, "alone") == [["alone", "time"], ["pip install", "61.2 s"]]
    (_, ours, timm), (_, without) = (c for c in tables(text) if c[0][0] == "latency of single calls")
    assert ours[:-1] == ["y", "this package", "12.8 ms", "20 ms", "1.5 s"]
    assert ours[-1] == "20,000"
    assert timm == ["y", "timm", "2 s", "3 s", "4 s", "128"]
    assert without[-1] == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0 µs"),
        (1.234e-5, "12.3 µs"),
        (9.99e-4, "999 µs"),
        (9.999e-4, "1 ms"),
        (1e-3, "1 ms"),
        (0.0566, "56.6 ms"),
        (0.9996, "1 s"),
        (1.0, "1 s"),
        (75.126, "75.1 s"),
        (3600.0, "3,600 s"),
    ],
)
def test_durations(seconds, words):
    assert report._duration(seconds) == words


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (12_340, "12.3 kB"),
        (999_900, "1 MB"),
        (1_000_000, "1 MB"),
        (999_700_000, "1 GB"),
        (16_700_000_000, "16.7 GB"),
        (1_536_000_000_000, "1,536 GB"),
    ],
)
def test_sizes(size, words):
    assert report._size(size) == words


def fusion(
    tokens: int, curves: Mapping[str, tuple[float, int]], mode: str = "forward", memory: int = 16_000_000_000
) -> Benchmark:
    """Seconds and bytes of fusions at a number of tokens."""
    info = {
        "what": "fusion",
        "mode": mode,
        "tokens": tokens,
        "seconds": {name: seconds for name, (seconds, _) in curves.items()},
        "bytes": {name: size for name, (_, size) in curves.items()},
    }
    return benchmark(f"test_schemes[fusion-{mode}-{tokens}]", report.SCHEMES, info, memory)


GROWTH = [
    # Those of 100 tokens are on no line, and the sizes are in no order.
    fusion(1600, {"cross": (16e-3, 4_000_000)}),
    fusion(100, {"cross": (1.0, 9_000_000), "all": (1.0, 9_000_000)}),
    fusion(400, {"cross": (1e-3, 1_000_000), "all": (1e-3, 1_000_000)}),
    fusion(800, {"cross": (4e-3, 2_000_000), "all": (8e-3, 4_000_000)}),
    fusion(400, {"cross": (1e-3, 1_000_000)}, "training"),
]


def test_growth_by_hand():
    """Time n^2 and n^3, memory n and n^2: 16 GB are 16,000 times the memory at 400 tokens.

    All-attention did not run with 1600 tokens.
    """
    text = report.markdown("a-machine", GROWTH)
    assert "fusion, forward; powers of the number of tokens, fitted from 400 tokens on:" in text
    assert "fusion, training" not in text, "one point has no power"
    header, cross, everything = table(text, "fusion")
    assert header[-1] == "tokens that 16 GB hold (extrapolated)"
    assert cross == ["cross", "2.00", "1.00", "1,600: 16 ms, 4 MB", "6,400,000"]
    assert everything == ["all", "3.00", "2.00", "800: 8 ms, 4 MB", f"{400 * math.sqrt(16_000):,.0f}"]


@pytest.mark.filterwarnings("ignore:Data has no positive values")
@pytest.mark.parametrize(
    ("sizes", "power", "fits"),
    [
        ((0, 0), "", ""),
        ((0, 1000), "", ""),
        ((1000, 0), "", ""),
        ((8000, 8000), "0.00", "1,600,000,000"),
        ((10**9, 10**9 + 1), "0.00", "12,800"),
    ],
)
def test_memory_without_a_power(sizes, power, fits):
    """No bytes, or as many for 800 tokens as for 400; 16 GB are 2,000,000 times 8 kB, and 16 times 1 GB."""
    rows = [fusion(n, {"cross": (n * 1e-6, size)}) for n, size in zip((400, 800), sizes, strict=True)]
    _, cells = table(report.markdown("a-machine", rows), "fusion")
    assert cells[:3] == ["cross", "1.00", power]
    assert cells[4] == fits
    figure = charts.growth_chart(rows)
    figure.savefig(io.BytesIO(), format="png", dpi=20)


def test_growth_where_the_memory_of_the_machine_is_not_known():
    rows = [fusion(n, {"cross": (n * 1e-6, n)}, memory=0) for n in (400, 800)]
    header, cells = table(report.markdown("a-machine", rows), "fusion")
    assert (header[4], cells[4]) == ("tokens that fit", "")


def cpu_run(batch: int, threads: int = 1) -> dict[str, Any]:
    """A tenth of a second an image of ours; timm takes twice as long; the others do not run."""
    info: dict[str, Any] = {"model": "crossvit_18_240", "batch": batch, "threads": threads}
    info["peak_gflops"] = {"fp32": 175.4}
    info["rivals"] = {
        "frozen fp32": {"least": 0.1 * batch, "share_of_peak": 0.87, "resident_bytes": 5_000_000},
        "frozen bf16": {"least": 0.05 * batch, "share_of_peak": None},
        "not frozen fp32": {"least": 0.1 * batch, "share_of_peak": 0.87},
        "timm fp32": {"least": 0.2 * batch, "latency": {"p50": 0.2, "p90": 0.25, "p99": 1.0}},
        "OpenVINO fp32": {"not_run": "its logits are wrong by 2.0e-01"},
    }
    info["against timm fp32"] = row(1.95, 1.9, 2.1)
    info["against not frozen fp32"] = row(0.5, 0.5, 0.5)
    return info


def test_the_tables_of_rivals_on_a_cpu():
    rows = [benchmark(f"test_cpu[{batch}]", "cpu", cpu_run(batch)) for batch in (8, 1)]
    text = report.markdown("a-machine", rows)
    assert "Of 2 races this package wins 2, loses 0" in text
    assert "crossvit_18_240, threads: 1; least milliseconds an image" in text
    times, latency, memory = tables(text)
    assert times[0] == ["", "fp32, batch 1", "fp32, batch 8", "bf16, batch 1", "bf16, batch 8"]
    cells = {line[0]: line[1:] for line in times[1:]}
    assert cells["frozen"] == ["100.0", "100.0", "50.0", "50.0"]
    assert cells["not frozen"] == ["100.0 (0.50)", "100.0 (0.50)", "", ""]
    assert cells["timm"] == ["200.0 (1.95)", "200.0 (1.95)", "", ""]
    assert "its logits are wrong by 2.0e-01" in text, "of a rival that did not run, why"
    assert cells["peak, GFLOP/s"] == ["175", "175", "", ""], "what was not measured is not 0"
    assert cells["frozen, share of it"] == ["87%", "87%", "", ""]
    assert ["timm", *["200 / 250 / 1,000"] * 2, "", ""] in latency
    assert ["frozen", *["5 MB"] * 2, "", ""] in memory
    assert sum(any(line[1:]) for line in (*latency[1:], *memory[1:])) == 2


def test_pictures_stand_in_their_groups():
    assert set(charts.CHARTS) == set(charts.GROUP_OF)
    rows = [*GROWTH, benchmark("test_a", "cross_attention", {"against eager": row(2, 1, 3)})]
    text = report.markdown("a-machine", rows, ["operation.png", "fusions.png"])
    found = sections(text)
    assert "![fusions.png](fusions.png)" in found[report.TITLES[report.SCHEMES]]
    assert "![operation.png](operation.png)" in found[report.TITLES["cross_attention"]]
    assert text.count("![") == 2
    assert "![" not in report.markdown("a-machine", rows)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Picture:
    """In the place of a figure."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    def savefig(self, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half of a picture")
        if self.error is not None:
            raise self.error
        Path(path).write_bytes(b"a picture")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Of a machine, with a result, an earlier report and an earlier chart; drawing is no work."""
    monkeypatch.setattr(charts, "CHARTS", {"operation.png": lambda rows: Picture(), "fusions.png": no_chart})
    path = tmp_path / "a-machine"
    path.mkdir()
    (path / "all.json").write_text(file_text({"test_a[x]": {"against eager": row(2, 1.5, 3)}}))
    (path / "report.md").write_text("earlier")
    (path / "operation.png").write_text("earlier")
    return path


def no_chart(rows: Sequence[Benchmark]) -> None:
    assert rows


def test_the_report_and_its_charts_are_written(folder):
    report.redraw(folder)
    found = contents(folder)
    assert set(found) == {"all.json", "report.md", "operation.png"}
    assert found["operation.png"] == b"a picture"
    text = found["report.md"].decode()
    assert text == report.markdown("a-machine", load(folder), ["operation.png"])
    assert text.startswith("# Benchmarks on a-machine\n")
    assert len({(folder / name).stat().st_mode for name in found}) == 1, "as readable as the results"


@pytest.mark.parametrize("error", [RuntimeError("x"), OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["drawing", "saving", "writing words", "writing the report", "renaming"])
def test_a_report_that_fails_leaves_the_earlier_one(where, error, folder, monkeypatch):
    before = contents(folder)
    with monkeypatch.context() as patch:
        if where == "drawing":
            patch.setitem(charts.CHARTS, "fusions.png", lambda rows: failing(error)())
        elif where == "saving":
            patch.setitem(charts.CHARTS, "operation.png", lambda rows: Picture(error))
        elif where == "writing words":
            patch.setattr(report, "markdown", lambda *arguments: failing(error)())
        elif where == "renaming":
            patch.setattr(report.os, "replace", lambda *paths: failing(error)())
        else:
            write_text = Path.write_text

            def half(path: Path, text: str, *arguments: Any, **options: Any) -> None:
                write_text(path, text[:10])
                raise error

            patch.setattr(Path, "write_text", half)
        with pytest.raises(type(error)):
            report.redraw(folder)
    assert contents(folder) == before


def test_a_folder_without_results_is_left_alone(tmp_path):
    with pytest.raises(ValueError):
        report.redraw(tmp_path)
    assert not contents(tmp_path)


def test_the_report_command(folder, tmp_path, capsys, monkeypatch):
    assert report.main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.md'}\n"
    (tmp_path / "empty").mkdir()
    assert report.main([str(tmp_path / "empty")]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("report: ")
    assert str(tmp_path / "empty") in err


def test_the_report_command_draws_all_machines(folder, tmp_path, monkeypatch):
    """Also one on which only some benchmarks were run; the hardware command has other results beside."""
    for name in ("another", "hardware", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "another" / "cpu.json").write_text((folder / "all.json").read_text())
    (tmp_path / "hardware" / "a-gpu.json").write_text('{"runs": {}, "entries": {}}')
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.main([]) == 0
    assert (folder / "report.md").read_text().startswith("# Benchmarks on a-machine")
    assert (tmp_path / "another" / "report.md").read_text().startswith("# Benchmarks on another")
    assert not (tmp_path / "empty" / "report.md").exists()


REAL = sorted({path.parent for path in results.RESULTS.glob("*/*.json") if path.parent.name != "hardware"})


def test_there_are_results_to_read():
    assert REAL


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_every_race_of_the_real_results_is_in_its_report(path):
    benchmarks = load(path)
    text = report.markdown(path.name, benchmarks)
    assert not re.search(r"\b(nan|inf)\b", text)
    races = [(b, rival, found) for b in benchmarks for rival, found in b.races()]
    assert races
    for b, rival, found in races:
        section = sections(text)[report.TITLES.get(b.group, b.group[:1].upper() + b.group[1:])]
        if "rivals" in b.info:
            name, _, precision = rival.rpartition(" ")
            title = f"{b.info['model']}, threads: {b.info['threads']};"
            cells = tables(section.partition(title)[2])[0]
            (line,) = (line for line in cells if line[0] == name)
            cell = line[cells[0].index(f"{precision}, batch {b.info['batch']}")]
            assert cell.endswith(f" ({found['ratio']:.2f})")
        else:
            cells = table(section, "time")
            at = cells[0].index(rival)
            interval = f"{found['ratio']:.2f} ({found['low']:.2f}-{found['high']:.2f})"
            assert interval in [line[at] for line in cells if line[0] == b.label]
    compared = [f for b, rival, f in races if b.group != report.SCHEMES and rival != "all-attention"]
    assert f"Of {len(compared)} races " in text
    slower = sorted(found["ratio"] for found in compared if found["high"] < 1)
    listed = [
        line[4] for cells in tables(sections(text)["Where this package is slower"]) for line in cells[1:]
    ]
    assert [ratio.split()[0] for ratio in listed] == [f"{ratio:.2f}" for ratio in slower]


# Charts


def test_there_are_no_charts_of_nothing():
    others = [
        benchmark("test_a[C224-H7-P400]", "cross_attention", {"against bytes once": row(1, 1, 1)}),
        benchmark("test_a[B64-C224-H7-P400]", "cross_attention", {"against eager": row(1, 1, 1)}),
        benchmark("test_a[C448-H7-P196]", "cross_attention", {"against eager": row(1, 1, 1)}),
        benchmark("test_b[C224-H7-P400]", "another", {"against eager": row(1, 1, 1)}),
        benchmark("test_cpu", "cpu", {**cpu_run(1), "model": "crossvit_9_240"}),
        benchmark("test_schemes", report.SCHEMES, {"not run ours": "too large"}),
    ]
    encoder = fusion(400, {"cross": (1e-3, 1)})
    encoder.info["what"] = "encoder"
    for draw in charts.CHARTS.values():
        assert draw([]) is None
        assert draw([*others, encoder]) is None


def test_the_chart_of_growth():
    figure = charts.growth_chart(GROWTH)
    time_axis, memory_axis, training_axis, _ = figure.axes
    assert [axis.get_xscale() for axis in figure.axes] == ["log"] * 4
    assert [axis.get_yscale() for axis in figure.axes] == ["log"] * 4
    assert (time_axis.get_ylabel(), memory_axis.get_ylabel()) == ("milliseconds", "peak memory, MB")
    assert time_axis.get_title().endswith("forward")
    assert training_axis.get_title().endswith("training")
    cross, everything = time_axis.lines
    assert list(cross.get_xdata()) == [100, 400, 800, 1600]
    assert list(time_axis.get_xticks()) == [100, 400, 800, 1600]
    assert list(cross.get_ydata()) == pytest.approx([1000, 1, 4, 16])
    assert (cross.get_label(), everything.get_label()) == ("cross, power 2.00", "all, power 3.00")
    assert cross.get_color() == charts.OURS != everything.get_color()
    cross, everything = memory_axis.lines
    assert list(cross.get_ydata()) == pytest.approx([9, 1, 2, 4])
    assert (cross.get_label(), everything.get_label()) == ("cross, power 1.00", "all, power 2.00")
    (one,) = training_axis.lines
    assert (one.get_label(), list(one.get_xdata())) == ("cross", [400])


def test_the_chart_of_the_operation():
    """Two rivals, the second one in the first row alone; other sizes, limits and own ways are left out."""
    info = {"against eager": row(4, 3, 5), "against timm": row(0.5, 0.4, 0.6)}
    rows = [
        benchmark("test_a[B1-C224-H7-P400-x]", "cross_attention", info),
        benchmark("test_a[B64-C224-H7-P400]", "cross_attention", info),
        benchmark("test_a[B1-C448-H7-P196]", "cross_attention", info),
        benchmark(
            "test_a[B8-C224-H7-P400_y]",
            "cross_attention",
            {"against eager": row(2, 1, 3), "against bytes once": row(9, 9, 9)},
        ),
    ]
    (axis,) = charts.operation_chart(rows).axes
    bars = {bar.get_label(): [patch.get_width() for patch in bar] for bar in axis.containers}
    assert bars == {"eager": [4, 2], "timm": [0.5]}
    eager, timm = axis.containers
    centres = [[patch.get_y() + patch.get_height() / 2 for patch in bar] for bar in (eager, timm)]
    *intervals, ours = axis.lines
    assert [list(line.get_xdata()) for line in intervals] == [[3, 5], [1, 3], [0.4, 0.6]]
    assert [line.get_ydata()[0] for line in intervals] == pytest.approx([*centres[0], *centres[1]])
    assert (list(ours.get_xdata()), ours.get_label()) == ([1, 1], "this package")
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "B1, C224, H7, P400, x",
        "B8, C224, H7, P400 y",
    ]
    assert axis.get_yticks()[0] == pytest.approx((centres[0][0] + centres[1][0]) / 2)
    assert axis.yaxis_inverted()
    assert axis.get_xscale() == "log"


def test_the_chart_of_models():
    """Ten images a second of ours, half as many of timm's, whatever the batch; panels by batch."""
    figure = charts.models_chart([benchmark("test_cpu", "cpu", cpu_run(batch)) for batch in (8, 1)])
    assert [axis.get_title() for axis in figure.axes] == [
        "fp32, batch 1, 1 thread",
        "fp32, batch 8, 1 thread",
        "bf16, batch 1, 1 thread",
        "bf16, batch 8, 1 thread",
    ]
    for axis, names, rates in zip(
        figure.axes,
        [["frozen", "not frozen", "timm"]] * 2 + [["frozen"]] * 2,
        [[10, 10, 5]] * 2 + [[20]] * 2,
        strict=True,
    ):
        assert [label.get_text() for label in axis.get_yticklabels()] == names
        assert [patch.get_width() for patch in axis.patches] == pytest.approx(rates)
        assert [text.get_text().strip() for text in axis.texts] == [str(rate) for rate in rates]
        assert axis.get_xlim()[1] > max(rates)
    own = [patch.get_facecolor() == to_rgba(charts.OURS) for patch in figure.axes[0].patches]
    assert own == [True, True, False]


def test_many_images_a_second_are_written_out():
    info = cpu_run(1, threads=64)
    info["rivals"]["frozen fp32"]["least"] = 1 / 1234
    axis = charts.models_chart([benchmark("test_cpu", "cpu", info)]).axes[0]
    assert axis.get_title() == "fp32, batch 1, 64 threads"
    assert float(axis.texts[0].get_text().replace(",", "")) == pytest.approx(1234, abs=5)
    assert "e" not in axis.texts[0].get_text()


def test_the_charts_are_drawn(tmp_path):
    """All three from one folder, as PNG files."""
    names = ("test_cross_attention[B1-C224-H7-P400]", "test_cpu[1]", "test_schemes[1]", "test_schemes[2]")
    infos = ({"against eager": row(2, 1, 3)}, cpu_run(1), GROWTH[2].info, GROWTH[3].info)
    whole = json.loads(file_text(dict(zip(names, infos, strict=True))))
    for found, group in zip(whole["benchmarks"][1:], ("cpu", report.SCHEMES, report.SCHEMES), strict=True):
        found["group"] = group
    (tmp_path / "all.json").write_text(json.dumps(whole))
    report.redraw(tmp_path)
    found = contents(tmp_path)
    assert set(found) == {"all.json", "report.md", *charts.CHARTS}
    for name in charts.CHARTS:
        assert found[name].startswith(b"\x89PNG")
        assert f"![{name}]({name})".encode() in found["report.md"]


# The comparison

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


# The commands


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
