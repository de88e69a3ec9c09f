"""Results of benchmarks, made up, and reports read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from benchmarks import race
from benchmarks.results import Benchmark


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


def failing(error: BaseException) -> race.Call:
    def call() -> None:
        raise error

    return call
