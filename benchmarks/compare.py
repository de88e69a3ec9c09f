"""`python -m benchmarks compare A B`: what changed from one run of the benchmarks to another.

Times of two runs are compared with care: another day is another machine. Each run has its rivals beside it,
so the ratio to a rival that did not change is what counts; times are printed as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import Benchmark, load, load_revision, machine_name


@dataclass(frozen=True)
class Change:
    """Of one race: seconds and ratios rival over ours, before and after.

    `certain` where the intervals of the two ratios do not meet.
    """

    benchmark: str
    rival: str
    seconds: tuple[float, float]
    ratios: tuple[float, float]
    certain: bool

    @property
    def factor(self) -> float:
        """How many times better the second run stands against the rival."""
        return self.ratios[1] / self.ratios[0]


def changes(before: Iterable[Benchmark], after: Iterable[Benchmark]) -> list[Change]:
    """Of the races that both have, largest change first."""
    earlier = {(b.name, rival): row for b in before for rival, row in b.races()}
    found = []
    for benchmark in after:
        for rival, row in benchmark.races():
            old = earlier.get((benchmark.name, rival))
            if old is not None:
                apart = row["low"] > old["high"] or row["high"] < old["low"]
                seconds = (old["ours_seconds"], row["ours_seconds"])
                ratios = (old["ratio"], row["ratio"])
                found.append(Change(benchmark.name.removeprefix("test_"), rival, seconds, ratios, apart))
    return sorted(found, key=lambda change: -max(change.factor, 1 / change.factor))


def markdown(before: Sequence[Benchmark], after: Sequence[Benchmark], everything: bool) -> str:
    """The changes as a table: those alone whose intervals do not meet, or everything."""
    found = changes(before, after)
    certain = [change for change in found if change.certain]
    lines = [f"A: {w}" for w in dict.fromkeys(b.where for b in before)]
    lines += [f"B: {w}" for w in dict.fromkeys(b.where for b in after)]
    lines.append("")
    better = sum(change.factor > 1 for change in certain)
    lines.append(
        f"{len(found)} races in both: {better} better in B, {len(certain) - better} worse, "
        f"{len(found) - len(certain)} without a difference outside of their 95 % intervals."
    )
    for what, mine, other in (("A", before, after), ("B", after, before)):
        names = {b.name for b in other}
        missing = [b.name.removeprefix("test_") for b in mine if b.name not in names]
        if missing:
            lines.append(f"In {what} alone: {', '.join(missing)}.")
    shown = found if everything else certain
    if shown:
        lines += [
            "",
            "| benchmark | rival | ours, A | ours, B | rival over ours, A | B | B over A |",
            "|---|---|---|---|---|---|---|",
        ]
    for change in shown:
        times = " | ".join(f"{s * 1e3:.3f} ms" for s in change.seconds)
        ratios = " | ".join(f"{r:.2f}" for r in change.ratios)
        mark = "" if change.certain else " (within the intervals)"
        lines.append(
            f"| {change.benchmark} | {change.rival} | {times} | {ratios} | {change.factor:.2f}{mark} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    for which in ("A", "B"):
        parser.add_argument(which, help="a results file, a folder of them, or a commit that has some")
    parser.add_argument("--machine", help="folder of the results in a commit (this machine's)")
    parser.add_argument("--all", action="store_true", help="also what lies within the intervals")
    options = parser.parse_args(arguments)
    try:
        before, after = (
            load(Path(given))
            if Path(given).exists()
            else load_revision(given, options.machine or machine_name())
            for given in (options.A, options.B)
        )
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    print(markdown(before, after, options.all))
    return 0


if __name__ == "__main__":
    sys.exit(main())
