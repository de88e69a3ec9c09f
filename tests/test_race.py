"""One function against rivals: what is measured of each; and energy."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import energy, race, report
from crossvit_kernels import measure
from tests.benchmark_results import benchmark, failing, table

CPU = torch.device("cpu")
ALLOCATOR = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried\nmore"
Make = Callable[..., Path]


@pytest.fixture
def quick(monkeypatch) -> None:
    """Two short rounds, and no energy, whatever the machine reports."""
    monkeypatch.setattr(race, "ROUNDS", 2)
    monkeypatch.setattr(race, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(race, "joules", lambda call, device: None)
    monkeypatch.setattr(measure, "_SAMPLE_SECONDS", 1e-4)


def test_a_race_keeps_memory_and_times(quick, monkeypatch):
    """4000 bytes of ours and 500 held, 12,000 of the rival's; 2, 1 and 4 s against 6, 3 and 8 s."""
    samples = {"ours": [2.0, 1.0, 4.0], "rival": [6.0, 3.0, 8.0]}
    monkeypatch.setattr(race, "interleaved", lambda calls, rounds, device: samples)
    rivals = {"rival": lambda: torch.zeros(3000)}
    found = race.run(lambda: torch.zeros(1000), rivals, CPU, held=lambda name: 500 if name == "ours" else 0)
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
def test_single_calls_last_a_second_each_and_are_twenty(seconds, calls, monkeypatch):
    monkeypatch.setattr(race, "_LATENCY_CALLS", 20)
    monkeypatch.setattr(race, "_LATENCY_SECONDS", 1.0)
    monkeypatch.setattr(race, "_seconds", lambda call, device: seconds)
    found = race.single_calls({"ours": lambda: None, "rival": lambda: None}, CPU)
    assert found == dict.fromkeys(("ours", "rival"), [seconds] * calls)


def test_single_calls_are_timed_one_by_one(monkeypatch):
    monkeypatch.setattr(race, "_LATENCY_CALLS", 6)
    monkeypatch.setattr(race, "_LATENCY_SECONDS", 0.05)
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        time.sleep(0.001 if len(calls) % 2 else 0.003)

    times = race.single_calls({"ours": call}, CPU)["ours"]
    assert len(times) == len(calls) >= 6
    assert 0.05 <= sum(times) < 0.05 + 2 * max(times)
    assert min(times[0::2]) >= 0.001
    assert min(times[1::2]) >= 0.003


def test_single_calls_take_turns(monkeypatch):
    monkeypatch.setattr(race, "_LATENCY_CALLS", 3)
    monkeypatch.setattr(race, "_LATENCY_SECONDS", 0.0)
    order: list[str] = []
    race.single_calls({name: (lambda name=name: order.append(name)) for name in "ab"}, CPU)
    assert order == ["a", "b"] * 3


def test_many_single_calls_cost_little_more_than_themselves(monkeypatch):
    """To add all times anew after each call took seconds for calls of 30 microseconds."""
    monkeypatch.setattr(race, "_LATENCY_SECONDS", 1.0)
    monkeypatch.setattr(race, "_seconds", lambda call, device: 2.0**-15)
    start = time.perf_counter()
    assert len(race.single_calls({"ours": lambda: None}, CPU)["ours"]) == 2**15
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


def test_the_time_of_ours_where_no_rival_fits(quick):
    found = race.run(lambda: time.sleep(0.002), {"timm": OUT_OF_MEMORY["of Python"]}, CPU)
    text = report.markdown("a-machine", [benchmark("test_a[x]", "first", found)])
    label, ours, timm = table(text, "time")[1]
    assert (label, timm) == ("x", race.BEYOND_MEMORY)
    assert float(ours.removesuffix(" ms")) >= 2


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
