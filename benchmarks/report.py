"""`python -m benchmarks report [FOLDER ...]`: results as Markdown and charts, in the folder of the machine.

Without folders, those of all machines in benchmarks/results. What is slower than a rival comes first.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import charts
from benchmarks.race import LIMITS
from benchmarks.results import (
    RESULTS,
    Benchmark,
    by_group,
    digits,
    exponent,
    growth,
    largest,
    load,
    tokens_that_fit,
)

SCHEMES = "fusions as the number of tokens grows"
# In the order of the report; others follow.
TITLES = {
    "cpu": "Whole models on the CPU, each rival in a process of its own",
    "model": "Whole models in one process, inference and training",
    SCHEMES: "The paper's fusions as the number of tokens grows",
    "fusion of both branches": "The fusion of both branches of crossvit_18",
    "cross_attention": "The operation: cross-attention of one query",
}
_PERCENTILES = ("p50", "p90", "p99")


def redraw(folder: Path) -> None:
    """report.md and charts of a folder of results: all are written beside, then all are renamed.

    Raises:
        ValueError: the folder has no results.
    """
    benchmarks = load(folder)
    pictures = {
        name: figure for name, draw in charts.CHARTS.items() if (figure := draw(benchmarks)) is not None
    }
    text = markdown(folder.name, benchmarks, pictures)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".drawing") as name:
        drawn = Path(name)
        for picture, figure in pictures.items():
            figure.savefig(drawn / picture, format="png", dpi=110)
        (drawn / "report.md").write_text(text)
        for path in drawn.iterdir():
            os.replace(path, folder / path.name)


def markdown(machine: str, benchmarks: Sequence[Benchmark], pictures: Iterable[str] = ()) -> str:
    """The whole report."""
    parts = [f"# Benchmarks on {machine}", _where(benchmarks), *_slower(benchmarks)]
    groups = by_group(benchmarks)
    for group in sorted(groups, key=lambda name: [*TITLES, name].index(name)):
        rows = groups[group]
        parts.append(f"## {TITLES.get(group, group[:1].upper() + group[1:])}")
        parts += [f"![{name}]({name})" for name in pictures if charts.GROUP_OF[name] == group]
        if any("rivals" in row.info for row in rows):
            parts += _tables_of_rivals(rows)
            continue
        if group == SCHEMES:
            parts += _growth(rows)
        parts += _races(rows)
        parts += _limits(rows)
        parts += _latencies(rows)
        parts += _measured(rows)
    return "\n\n".join(parts) + "\n"


def _where(benchmarks: Sequence[Benchmark]) -> str:
    """The runs, and how to read them."""
    lines = [f"- {file}: {where}." for file, where in dict.fromkeys((b.file, b.where) for b in benchmarks)]
    return "\n".join(
        [
            *lines,
            "",
            "Ratios are the rival's time over this package's, medians of rounds taken in turn, with 95 %",
            "intervals (of fewer than six rounds, their range): above 1 this package is faster. An interval",
            "that holds 1 is no difference. Of fewer than 100 calls, the latency at 99 % is the slowest's.",
        ]
    )


def _slower(benchmarks: Sequence[Benchmark]) -> Iterator[str]:
    races = [
        (b, rival, row)
        for b in benchmarks
        for rival, row in b.races()
        if b.group != SCHEMES and rival != "all-attention"
    ]
    slower = [race for race in races if race[2]["high"] < 1]
    faster = sum(row["low"] > 1 for _, _, row in races)
    yield "## Where this package is slower"
    yield (
        f"Of {len(races)} races this package wins {faster}, loses {len(slower)}, and "
        f"{len(races) - faster - len(slower)} show no difference. Other fusions make other models: they have "
        "their own section."
    )
    if slower:
        slower.sort(key=lambda race: race[2]["ratio"])
        yield _table(
            ("benchmark", "rival", "ours", "rival's", "ratio"),
            ((f"{b.group}: {b.label}", rival, *_times(row), _ratio(row)) for b, rival, row in slower),
        )


def _times(row: dict[str, float]) -> tuple[str, str]:
    return _duration(row["ours_seconds"]), _duration(row["rival_seconds"])


def _duration(seconds: float) -> str:
    return _with_unit(seconds * 1e6, ((1e6, "s"), (1e3, "ms"), (1, "µs")))


def _size(size: float) -> str:
    return _with_unit(size, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")))


def _with_unit(value: float, units: Sequence[tuple[float, str]]) -> str:
    """In the largest unit of which there is one, after rounding."""
    unit, name = next((pair for pair in units if value >= 0.9995 * pair[0]), units[-1])
    return f"{digits(value / unit)} {name}"


def _ratio(row: dict[str, float]) -> str:
    return f"{row['ratio']:.2f} ({row['low']:.2f}-{row['high']:.2f})"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rivals(benchmarks: Iterable[Benchmark]) -> list[str]:
    found = dict.fromkeys(rival for b in benchmarks for rival, _ in b.races(own=True))
    missing = (
        key.removeprefix("not run ") for b in benchmarks for key in b.info if key.startswith("not run ")
    )
    out = {"ours", *LIMITS}
    return [*found, *(name for name in dict.fromkeys(missing) if name not in found and name not in out)]


def _races(benchmarks: Sequence[Benchmark]) -> Iterator[str]:
    """Times, then memory."""
    rivals = _rivals(benchmarks)
    if not rivals and not any("not run ours" in b.info for b in benchmarks):
        return

    def cells(benchmark: Benchmark) -> Iterator[str]:
        for rival in rivals:
            row = benchmark.info.get(f"against {rival}")
            yield _ratio(row) if row else str(benchmark.info.get(f"not run {rival}", ""))

    def ours(benchmark: Benchmark) -> str:
        times = [row["ours_seconds"] for _, row in benchmark.races(own=True)]
        times.append(benchmark.info.get("ours_seconds"))
        return _duration(times[0]) if times[0] else str(benchmark.info.get("not run ours", ""))

    yield _table(("time", "this package", *rivals), ((b.label, ours(b), *cells(b)) for b in benchmarks))
    for key, title in (
        ("peak_bytes", "peak memory"),
        ("saved_bytes", "kept for backward"),
        ("joules", "energy"),
        ("graphs", "time, captured graphs with a cold cache"),
    ):
        rows = [b for b in benchmarks if isinstance(b.info.get(key), dict)]
        if rows:
            write = {"joules": _joules, "graphs": _duration}.get(key, _size)
            yield _table(
                (title, "this package", *rivals),
                ((b.label, *_of_each(b.info[key], ["ours", *rivals], write)) for b in rows),
            )


def _of_each(values: dict[str, Any], names: Iterable[str], write: Callable[[float], str]) -> Iterator[str]:
    for name in names:
        yield write(values[name]) if values.get(name) is not None else ""


def _joules(energy: float) -> str:
    return f"{energy:.3g} J"


def _limits(benchmarks: Sequence[Benchmark]) -> Iterator[str]:
    """How much of the time the hardware needs at least."""
    rows = []
    for benchmark in benchmarks:
        row = benchmark.info.get("against bytes once")
        if row:
            rows.append(
                (benchmark.label, _duration(row["ours_seconds"]), "bytes, once", f"{row['ratio']:.0%}")
            )
        limits = benchmark.info.get("limits")
        if limits:
            binding = max(limits, key=limits.__getitem__)
            seconds = benchmark.info["seconds"]["ours"]
            rows.append((benchmark.label, _duration(seconds), binding, f"{limits[binding] / seconds:.0%}"))
    if rows:
        yield _table(
            ("share of the least time that hardware allows", "this package", "what binds", "share"), rows
        )


def _latencies(benchmarks: Sequence[Benchmark]) -> Iterator[str]:
    rows = []
    for benchmark in benchmarks:
        for name, values in benchmark.info.get("latency", {}).items():
            images = benchmark.info.get("images")
            rate = digits(images / values["p50"]) if images else ""
            times = (_duration(values[p]) for p in _PERCENTILES)
            rows.append((benchmark.label, "this package" if name == "ours" else name, *times, rate))
    if rows:
        yield _table(("latency of single calls", "", "median", "90 %", "99 %", "images/s"), rows)


def _measured(benchmarks: Sequence[Benchmark]) -> Iterator[str]:
    """What has no rival."""
    rows = [(what, _duration(s)) for b in benchmarks for what, s in b.info.get("measured", {}).items()]
    if rows:
        yield _table(("alone", "time"), rows)


def _growth(benchmarks: Sequence[Benchmark]) -> Iterator[str]:
    """Exponents, and where each fusion would fill the memory."""
    memory = benchmarks[0].memory
    for (what, mode), curves in growth(benchmarks).items():
        rows = []
        for name, points in curves.items():
            larger = largest(points)
            if len(larger) < 2:
                continue
            last = max(larger)
            bytes_of = {n: size for n, (_, size) in larger.items() if size > 0}
            power = f"{exponent(bytes_of):.2f}" if len(bytes_of) > 1 else ""
            fits = f"{tokens_that_fit(bytes_of, memory):,.0f}" if memory and power else ""
            times = f"{exponent({n: s for n, (s, _) in larger.items()}):.2f}"
            most = f"{last:,}: {_duration(larger[last][0])}, {_size(larger[last][1])}"
            rows.append((name, times, power, most, fits))
        if rows:
            yield f"{what}, {mode}; powers of the number of tokens, fitted from a fifth of the most on:"
            limit = f"tokens that {_size(memory)} hold (extrapolated)" if memory else "tokens that fit"
            yield _table(("fusion", "time", "peak memory", "with the most tokens", limit), rows)


def _tables_of_rivals(benchmarks: Sequence[Benchmark]) -> Iterator[str]:
    """Of benchmarks/test_cpu.py: for each model and number of threads, rivals by precision and batch."""
    runs = {(b.info["model"], b.info["threads"], b.info["batch"]): b.info for b in benchmarks}
    for model, threads in dict.fromkeys(key[:2] for key in runs):
        batches = sorted(key[2] for key in runs if key[:2] == (model, threads))
        columns = [(p, runs[model, threads, b]) for p in ("fp32", "bf16") for b in batches]
        names = [f"{p}, batch {run['batch']}" for p, run in columns]
        rivals = dict.fromkeys(name.rpartition(" ")[0] for _, run in columns for name in run["rivals"])
        load = max(run.get("load", 0.0) for _, run in columns)
        yield (
            f"{model}, threads: {threads}; least milliseconds an image (median of the ratios to frozen); "
            f"load of the machine in the minute before {load:.1f}"
        )
        yield _table(
            ("", *names),
            [
                *((rival, *(_cell(run, f"{rival} {p}") for p, run in columns)) for rival in rivals),
                ("peak, GFLOP/s", *(_peak(run, p) for p, run in columns)),
                ("frozen, share of it", *(_share(run, p) for p, run in columns)),
            ],
        )
        rows = [pair for _, run in columns for pair in run["rivals"].items()]
        reasons = {name: row["not_run"] for name, row in rows if "not_run" in row}
        yield from (f"{name} was not run: {reason}." for name, reason in reasons.items())
        for key, title, write in (
            ("latency", "latency of single calls, median / 90 % / 99 %, ms", _percentiles),
            ("resident_bytes", "memory of the process beyond that of its libraries", _size),
            ("joules", "energy of an image, the whole CPU's", _joules),
        ):
            kept = [
                [run["rivals"].get(f"{rival} {p}", {}).get(key) for p, run in columns] for rival in rivals
            ]
            rows = [
                (rival, *("" if value is None else write(value) for value in values))
                for rival, values in zip(rivals, kept, strict=True)
            ]
            if any(cell for row in rows for cell in row[1:]):
                yield title + ":"
                yield _table(("", *names), rows)


def _percentiles(latency: Any) -> str:
    return " / ".join(digits(latency[p] * 1e3) for p in _PERCENTILES)


def _share(run: dict[str, Any], precision: str) -> str:
    share = run["rivals"].get(f"frozen {precision}", {}).get("share_of_peak")
    return "" if share is None else f"{share:.0%}"


def _peak(run: dict[str, Any], precision: str) -> str:
    peak = run["peak_gflops"].get(precision)
    return "" if peak is None else f"{peak:.0f}"


def _cell(run: dict[str, Any], rival: str) -> str:
    row, race = run["rivals"].get(rival), run.get(f"against {rival}")
    if row is None or "not_run" in row:
        return ""
    time = f"{row['least'] / run['batch'] * 1e3:.1f}"
    return time if race is None else f"{time} ({race['ratio']:.2f})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="folders of results (all machines')")
    options = parser.parse_args(arguments)
    # The hardware command's files are its own.
    folders = options.folders or sorted({p.parent for p in RESULTS.glob("*/*.json")} - {RESULTS / "hardware"})
    try:
        for folder in folders:
            redraw(folder)
            print(folder / "report.md")
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
