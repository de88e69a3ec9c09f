"""What the benchmarks share: options, the race of rivals, and where results go.

`pytest benchmarks --benchmark-only` runs on the GPU where there is one, else on the CPU; `--full` adds the
large sizes. Each run that ends leaves benchmarks/results/<machine>/: all.json, or where some were selected a
file named after that, report.md and charts; with --benchmark-json, that file alone.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

import crossvit_kernels
from benchmarks import race as races
from benchmarks.report import redraw
from benchmarks.results import RESULTS, machine_name, memory_bytes
from crossvit._timm import import_timm
from crossvit_kernels import native

THREADS_OF_MACHINE = torch.get_num_threads()
# Where the results of a smoke test go, and the benchmarks that it leaves out: they start other processes.
SMOKE = Path(__file__).parent.parent / "out" / "smoke"
SLOW = ("test_cpu", "test_install", "test_first_call_of_crossvit_18")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="add the large sizes (tens of minutes on two cores)")
    parser.addoption("--smoke", action="store_true", help="a case of each, few rounds, results in out/smoke")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: a large size, run with --full only")
    if getattr(config.option, "benchmark_json", None) is None and not config.option.collectonly:
        folder = (SMOKE if config.option.smoke else RESULTS) / machine_name()
        folder.mkdir(parents=True, exist_ok=True)
        config._crossvit_results = folder / f"{_selected(config)}.json"
        config.option.benchmark_json = str(config._crossvit_results.with_suffix(".json.part"))


def _selected(config: pytest.Config) -> str:
    """A name for what is run, so that a run of some benchmarks leaves the results of all alone."""
    here = Path(__file__).parent
    places = [a for a in config.args if Path(a.partition("::")[0]).resolve() not in (here, here.parent)]
    options = config.option
    parts = [*("full" for _ in range(options.full)), options.keyword, options.markexpr, *map(_last, places)]
    if getattr(options, "lf", False):
        parts.append("last failed")
    return "-".join(filter(None, (re.sub(r"[^a-z0-9]+", "-", p.lower()).strip("-") for p in parts))) or "all"


def _last(place: str) -> str:
    return place.replace(".py", "").rpartition("/")[2]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config._crossvit_interrupted = exitstatus == pytest.ExitCode.INTERRUPTED


def pytest_unconfigure(config: pytest.Config) -> None:
    target: Path | None = getattr(config, "_crossvit_results", None)
    if target is None:
        return
    part = target.with_suffix(".json.part")
    if part.exists() and part.stat().st_size > 0 and not getattr(config, "_crossvit_interrupted", True):
        os.replace(part, target)
        redraw(target.parent)
    part.unlink(missing_ok=True)
    if not any(target.parent.iterdir()):
        target.parent.rmdir()


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
    machine_info["memory_bytes"] = memory_bytes()
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
    left_out = [x for x in items if x.get_closest_marker("full") and not config.getoption("--full")]
    if config.getoption("--smoke"):
        first = {item.originalname: item for item in reversed(items) if item not in left_out}
        left_out = [x for x in items if x is not first.get(x.originalname) or x.originalname in SLOW]
        races.ROUNDS = races.LEAST_ROUNDS
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


class Race(Protocol):
    def __call__(
        self,
        ours: Callable[[], object],
        rivals: Mapping[str, Callable[[], object]],
        given: Iterable[Tensor] | None = None,
        latency: bool = False,
        held: Callable[[str], int] = lambda name: 0,
    ) -> None: ...


_lines: list[str] = []


@pytest.fixture
def race(benchmark: Any, device: torch.device, request: pytest.FixtureRequest) -> Race:
    """Times a function against rivals, in turn, and keeps what `race.run` finds in extra_info."""

    def run(
        ours: Callable[[], object],
        rivals: Mapping[str, Callable[[], object]],
        given: Iterable[Tensor] | None = None,
        latency: bool = False,
        held: Callable[[str], int] = lambda name: 0,
    ) -> None:
        try:
            found = races.run(ours, rivals, device, given, latency, held)
        except MemoryError as error:
            benchmark.extra_info["not run ours"] = races.BEYOND_MEMORY
            benchmark.pedantic(lambda: None, rounds=1)
            _lines.append(f"{request.node.name:70s} not run: {error}")
            return
        benchmark.extra_info |= found
        memory = found["peak_bytes"]
        for name in rivals:
            if f"against {name}" not in found:
                _lines.append(f"{request.node.name:70s} {name:14s} not run: {races.BEYOND_MEMORY}")
                continue
            row = found[f"against {name}"]
            times = f"{row['ours_seconds'] * 1e3:9.3f} ms {row['rival_seconds'] * 1e3:9.3f} ms"
            sizes = f"{memory['ours'] / 1e6:8.2f} MB {memory[name] / 1e6:8.2f} MB"
            words = f"{row['ratio']:.2f} ({row['low']:.2f}-{row['high']:.2f})"
            _lines.append(f"{request.node.name:70s} {name:14s} {times} {sizes}  {words}")
        benchmark.pedantic(ours, rounds=3, warmup_rounds=1)

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
        terminalreporter.section(
            "races: this package, rival, peak memory of both, ratio of the times with its 95 % interval"
        )
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
