"""`python -m benchmarks.report FILE...`: results files as Markdown tables; the README shows an excerpt."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def table(path: Path) -> str:
    """Markdown of every race in a results file, and a line that says where and when it was run."""
    results = json.loads(path.read_text())
    machine = results["machine_info"]
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
    commit, day = results["commit_info"]["id"][:10], results["datetime"][:10]
    where = f"{machine['device']}; {versions}; commit {commit}; {day}."
    if any("rivals" in bench["extra_info"] for bench in results["benchmarks"]):
        return "\n\n".join([where, *_tables_of_rivals(results["benchmarks"])])
    lines = [
        where,
        "",
        "| benchmark | rival | ours | rival | ratio (95 % interval) | memory, rival over ours |",
        "|---|---|---|---|---|---|",
    ]
    for bench in results["benchmarks"]:
        for key, race in bench["extra_info"].items():
            if not key.startswith("against "):
                continue
            name = bench["name"].removeprefix("test_").replace("[", ": ").rstrip("]").replace("_", " ")
            ratio = f"{race['ratio']:.2f} ({race['low']:.2f}-{race['high']:.2f})"
            times = (f"{race[which] * 1e3:.2f} ms" for which in ("ours_seconds", "rival_seconds"))
            memory = f"{race['memory_ratio']:.2f}" if "memory_ratio" in race else ""
            cells = (name, key.removeprefix("against "), *times, ratio, memory)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _tables_of_rivals(benchmarks: list[dict[str, Any]]) -> Iterator[str]:
    """Of benchmarks/test_cpu.py: for each model and number of threads, rivals by precision and batch."""
    runs = {}
    for bench in benchmarks:
        run = bench["extra_info"]
        if "rivals" in run:
            runs[run["model"], run["threads"], run["batch"]] = run
    for model, threads in dict.fromkeys(key[:2] for key in runs):
        batches = sorted(key[2] for key in runs if key[:2] == (model, threads))
        columns = [(p, runs[model, threads, b]) for p in ("fp32", "bf16") for b in batches]
        yield f"{model}, threads: {threads}; least milliseconds an image (median of the ratios to frozen)"
        names = [f"{p}, batch {run['batch']}" for p, run in columns]
        lines = [f"| | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
        rivals = dict.fromkeys(name.rpartition(" ")[0] for _, run in columns for name in run["rivals"])
        for rival in rivals:
            cells = " | ".join(_cell(run, f"{rival} {p}") for p, run in columns)
            lines.append(f"| {rival} | {cells} |")
        peaks = " | ".join(f"{run['peak_gflops'].get(p, 0):.0f}" for p, run in columns)
        shares = " | ".join(f"{run['rivals'][f'frozen {p}']['share_of_peak'] or 0:.0%}" for p, run in columns)
        yield "\n".join([*lines, f"| peak, GFLOP/s | {peaks} |", f"| frozen, share of it | {shares} |"])


def _cell(run: dict[str, Any], rival: str) -> str:
    row, race = run["rivals"].get(rival), run.get(f"against {rival}")
    if row is None or "not_run" in row:
        return ""
    time = f"{row['least'] / run['batch'] * 1e3:.1f}"
    return time if race is None else f"{time} ({race['ratio']:.2f})"


if __name__ == "__main__":
    print("\n\n".join(table(Path(name)) for name in sys.argv[1:]))
