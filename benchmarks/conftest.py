"""What the benchmarks share: options, the race of rivals, and where results go.

`pytest benchmarks --benchmark-only` runs on the GPU where there is one, else on the CPU; `--full` adds the
large sizes. Each run leaves benchmarks/results/<machine>.json unless --benchmark-json names another file.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import crossvit_kernels
from crossvit._timm import import_timm
from crossvit_kernels import native
from crossvit_kernels.measure import compare, interleaved, peak_bytes

RESULTS = Path(__file__).parent / "results"
ROUNDS = 15
THREADS_OF_MACHINE = torch.get_num_threads()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="add the large sizes (tens of minutes on two cores)")


def machine_name() -> str:
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        import cpuinfo

        name = f"{cpuinfo.get_cpu_info().get('brand_raw', 'cpu')} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: a large size, run with --full only")
    if getattr(config.option, "benchmark_json", None) is None and not config.option.collectonly:
        RESULTS.mkdir(exist_ok=True)
        # A run of some of them (-k) leaves the results of all alone.
        some = re.sub(r"[^a-z0-9]+", "-", config.option.keyword.lower()).strip("-")
        config._crossvit_results = RESULTS / f"{machine_name()}{some and '-' + some}.json"
        # Written beside and renamed at the end: an interrupted run leaves the earlier results.
        config.option.benchmark_json = str(config._crossvit_results.with_suffix(".json.part"))


def pytest_unconfigure(config: pytest.Config) -> None:
    target: Path | None = getattr(config, "_crossvit_results", None)
    if target is None:
        return
    part = target.with_suffix(".json.part")
    if part.exists() and part.stat().st_size > 0:
        os.replace(part, target)
    part.unlink(missing_ok=True)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)
    machine_info["device"] = machine_name()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["versions"] = {
        "crossvit-kernels": crossvit_kernels.__version__,
        "torch": torch.__version__,
        "timm": import_timm().__version__,
        "cuda": torch.version.cuda,
    }
    machine_info["native"] = native.build_report()


@pytest.fixture(autouse=True, scope="session")
def _large_process() -> None:
    """Frees 31 MB once, as processes with a model in them have done: from then on glibc keeps freed memory.

    A process that never did returns some sizes to the system at each call and pays for new pages at the next.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Parametrised indirectly with "one thread" or "all threads" of PyTorch on the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.param == "one thread" else before)
    yield torch.get_num_threads()
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def large(*values: object) -> Any:
    """A parameter set that only --full runs."""
    return pytest.param(*values, marks=pytest.mark.full)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


Race = Callable[[Callable[[], object], Mapping[str, Callable[[], object]]], None]
_lines: list[str] = []


@pytest.fixture
def race(benchmark: Any, device: torch.device, request: pytest.FixtureRequest) -> Race:
    """Times a function against rivals, in turn, and keeps ratios and peak memory in extra_info."""

    def run(ours: Callable[[], object], rivals: Mapping[str, Callable[[], object]]) -> None:
        samples = interleaved({"ours": ours, **rivals}, ROUNDS, device)
        memory = {name: peak_bytes(call, device) for name, call in {"ours": ours, **rivals}.items()}
        benchmark.extra_info["peak_bytes"] = memory
        for name in rivals:
            comparison = compare(samples["ours"], samples[name])
            benchmark.extra_info[f"against {name}"] = {
                "rival_seconds": comparison.rival.median,
                "ours_seconds": comparison.ours.median,
                "ratio": comparison.ratio.median,
                "low": comparison.ratio.low,
                "high": comparison.ratio.high,
                "memory_ratio": memory[name] / max(memory["ours"], 1),
            }
            times = f"{comparison.ours.median * 1e3:9.3f} ms {comparison.rival.median * 1e3:9.3f} ms"
            sizes = f"{memory['ours'] / 1e6:8.2f} MB {memory[name] / 1e6:8.2f} MB"
            _lines.append(f"{request.node.name:70s} {name:14s} {times} {sizes}  {comparison.words()}")
        benchmark.pedantic(ours, rounds=5, warmup_rounds=1)

    return run


_printed: list[str] = []


def print_line(line: str) -> None:
    """Into the summary at the end."""
    _printed.append(line)


def progress(what: str, done: int, of: int) -> None:
    """A bar on the terminal, over the one before; none where there is no terminal."""
    terminal = sys.__stderr__
    if terminal is None or not terminal.isatty():
        return
    bar = "#" * (20 * done // of)
    terminal.write(f"\r\033[K[{bar:20s}] {what}" if what else "\r\033[K")
    terminal.flush()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if _printed:
        terminalreporter.section("rivals on the CPU, each in its own process; intervals are 95 %")
        for line in _printed:
            terminalreporter.write_line(line)
    if _lines:
        terminalreporter.section("races: this package, rival, then peak memory of both; intervals are 95 %")
        for line in _lines:
            terminalreporter.write_line(line)
    target = getattr(config, "_crossvit_results", None)
    if target is not None:
        terminalreporter.write_line(f"results in {target}")


def assert_close(got: Sequence[Tensor], want: Sequence[Tensor], bound: float) -> None:
    """A benchmark of a wrong result is worth nothing: compared before anything is timed.

    Each tensor's error is taken relative to its own largest value, but not below a thousandth of the largest
    of all: a gradient that is zero (that of the key's bias) has no scale of its own.
    """
    floor = 1e-3 * max(x.double().abs().max().item() for x in want)
    for mine, other in zip(got, want, strict=True):
        assert torch.isfinite(mine).all()
        scale = max(other.double().abs().max().item(), floor)
        error = (mine.double() - other.double()).abs().max().item() / scale
        assert error < bound, f"relative error {error:.1e}, allowed {bound:.0e}"
