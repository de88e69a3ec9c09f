"""`python -m benchmarks.report FILE...`: results files as Markdown tables; the README shows an excerpt."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def table(path: Path) -> str:
    """Markdown of every race in a results file, and a line that says where and when it was run."""
    results = json.loads(path.read_text())
    machine = results["machine_info"]
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
    commit, day = results["commit_info"]["id"][:10], results["datetime"][:10]
    lines = [
        f"{machine['device']}; {versions}; commit {commit}; {day}.",
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


if __name__ == "__main__":
    print("\n\n".join(table(Path(name)) for name in sys.argv[1:]))
