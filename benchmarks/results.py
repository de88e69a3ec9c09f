"""Results files of pytest-benchmark, read: which benchmarks there are, where and when each was run."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.race import LIMITS, OWN

RESULTS = Path(__file__).parent / "results"


def machine_name() -> str:
    """Of the GPU, where there is one, else of the CPU with its threads; the name of its folder of results."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        import cpuinfo

        name = f"{cpuinfo.get_cpu_info().get('brand_raw', 'cpu')} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def memory_bytes() -> int:
    """Of the GPU, where there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return psutil.virtual_memory().total


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of a run.

    Attributes:
        name: its test's name with parameters. group: the question that it answers.
        info: what the test left in extra_info, see `race.run`.
        where: machine, versions, commit and day. memory: bytes of the machine, or 0 where it was not kept.
        file: the name of the results file. datetime: when the run ended.
    """

    name: str
    group: str
    info: dict[str, Any]
    where: str
    memory: int
    file: str
    datetime: str = ""

    @property
    def label(self) -> str:
        """Its parameters in words."""
        parameters = self.name.partition("[")[2].removesuffix("]") or self.name.removeprefix("test_")
        return parameters.replace("_", " ").replace("-", ", ")

    @property
    def curve(self) -> tuple[str, str] | None:
        """What of, and the mode, where it is a point of the growth with the number of tokens."""
        return (self.info["what"], self.info["mode"]) if "tokens" in self.info else None

    def races(self, own: bool = False) -> Iterator[tuple[str, dict[str, float]]]:
        """Rivals, and what `race.comparison` says of each; with `own`, other ways of this package as well."""
        for key, row in self.info.items():
            name = key.removeprefix("against ")
            if name != key and name not in LIMITS and (own or name not in OWN):
                yield name, row


def parse(text: str, file: str) -> list[Benchmark]:
    """Of a results file.

    Raises:
        ValueError: the text is no results file of these benchmarks.
    """
    try:
        results = json.loads(text)
        datetime = results["datetime"]
        machine, commit = results["machine_info"], results["commit_info"]["id"][:10]
        changed = " with changes" if results["commit_info"].get("dirty") else ""
        versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
        where = f"{machine['device']}; {versions}; commit {commit}{changed}; {datetime[:10]}"
        memory = machine.get("memory_bytes", 0)
        return [
            Benchmark(row["name"], row["group"] or "", row["extra_info"], where, memory, file, datetime)
            for row in results["benchmarks"]
        ]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no results file of these benchmarks: {error!r}") from None


def load(path: Path) -> list[Benchmark]:
    """Of a results file, or of a folder of them, where the newest run of each benchmark counts.

    Raises:
        ValueError: there are none.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"{path} is neither a results file nor a folder with some: run the benchmarks first")
    return _newest(parse(file.read_text(), file.name) for file in files)


def _newest(runs: Iterable[list[Benchmark]]) -> list[Benchmark]:
    """One of each name; but all points of a curve are of one run, that with the most of them."""
    every = sorted((b for run in runs for b in run), key=lambda b: b.datetime)
    points = Counter((b.file, b.curve) for b in every if b.curve)
    ranked = sorted(every, key=lambda b: points[b.file, b.curve])  # stable: the newest of as many comes last
    return list({b.name: b for b in ranked}.values())


def load_revision(revision: str, machine: str) -> list[Benchmark]:
    """Of the folder of a machine as a commit has it.

    Raises:
        ValueError: there is no such commit, or it has no results of the machine.
    """
    folder = f"benchmarks/results/{machine}"
    listed = _git("ls-tree", "--name-only", f"{revision}:{folder}")
    if listed is None:
        raise ValueError(f"{revision!r} is neither a file nor a folder nor a commit that has {folder}")
    names = [name for name in listed.splitlines() if name.endswith(".json")]
    if not names:
        raise ValueError(f"{folder} of {revision} has no results")
    return _newest(parse(_git("show", f"{revision}:{folder}/{name}") or "", name) for name in names)


def _git(*arguments: str) -> str | None:
    done = subprocess.run(("git", *arguments), capture_output=True, text=True, cwd=RESULTS.parent.parent)
    return done.stdout if done.returncode == 0 else None


def growth(benchmarks: Iterable[Benchmark]) -> dict[tuple[str, str], dict[str, dict[int, tuple[float, int]]]]:
    """(what, mode) -> fusion -> tokens -> (seconds, bytes)."""
    found: dict[tuple[str, str], dict[str, dict[int, tuple[float, int]]]] = {}
    for benchmark in benchmarks:
        info = benchmark.info
        for name, seconds in info["seconds"].items() if "tokens" in info and "seconds" in info else ():
            curves = found.setdefault((info["what"], info["mode"]), {})
            curves.setdefault(name, {})[info["tokens"]] = seconds, info["bytes"][name]
    return {
        key: {name: dict(sorted(c.items())) for name, c in curves.items()} for key, curves in found.items()
    }


def exponent(points: Mapping[float, float]) -> float:
    """p of y = c x^p: the slope of a line through the logarithms, by least squares.

    Raises:
        ValueError: there are fewer than two points, or a value is not positive.
    """
    if len(points) < 2 or min([*points, *points.values()]) <= 0:
        raise ValueError(f"an exponent needs two points or more, all positive, got {dict(points)}")
    xs, ys = ([math.log(v) for v in values] for values in zip(*points.items(), strict=True))
    mean = sum(xs) / len(xs)
    return sum((x - mean) * y for x, y in zip(xs, ys, strict=True)) / sum((x - mean) ** 2 for x in xs)


def largest(points: Mapping[int, Any]) -> dict[int, Any]:
    """Those from a fifth of the largest number of tokens on, where fixed costs count least."""
    return {n: value for n, value in points.items() if 5 * n >= max(points)}


def tokens_that_fit(points: Mapping[float, float], memory: float) -> float:
    """Where a power law through the last two points (tokens, bytes) meets the memory: extrapolated.

    The power is at least 1: tokens themselves take memory, whatever else has not grown yet.
    """
    (x0, y0), (x1, y1) = sorted(points.items())[-2:]
    return x1 * (memory / y1) ** (1 / max(1.0, exponent({x0: y0, x1: y1})))


def digits(value: float) -> str:
    """Three of them, and no powers of ten."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def by_group(benchmarks: Iterable[Benchmark]) -> dict[str, list[Benchmark]]:
    groups: dict[str, list[Benchmark]] = {}
    for benchmark in benchmarks:
        groups.setdefault(benchmark.group, []).append(benchmark)
    return groups
