"""What the tests cost and what they are worth.

    python -m tests.worth seconds   runs tests and writes their times to tests/seconds.json
    python -m tests.worth lines     lines and branches of the GPU kernels that each test touches
    python -m tests.worth faults    which tests notice which seeded faults

What follows goes to pytest, but for files of results (pytest --junitxml), which are read instead of a run.
`seconds` decides what `make test` takes (tests/tiers.py). `lines` and `faults` print tables: a function that
touches nothing, and catches nothing, that no other does may be merged with one, or left to the shards.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tests import tiers

ROOT = Path(__file__).parent.parent
LEAST = 0.3  # seconds of a case that is worth a line
ALL = "not (packaging or sanitized or exhaustive)"


def _pytest(arguments: Iterable[str], **environment: str) -> Path:
    """Run tests on all cores; the file of results, in a folder of its own."""
    file = Path(tempfile.mkdtemp(prefix="crossvit-worth-"), "junit.xml")
    workers = str(os.cpu_count() or 1)
    command = [sys.executable, "-m", "pytest", "-n", workers, "--dist", "worksteal", f"--junitxml={file}"]
    subprocess.run([*command, *arguments], cwd=ROOT, env={**os.environ, **environment}, check=False)
    return file


def cases_of(file: Path) -> Iterator[tuple[str, str, ElementTree.Element]]:
    """(test function, "[case]", element) of each test in a file of results."""
    for case in ElementTree.parse(file).iter("testcase"):
        module, name = case.get("classname", "").replace(".", "/"), case.get("name", "")
        function, bracket, rest = name.partition("[")
        yield f"{module}.py::{function}", bracket + rest, case


def merged(known: Mapping[str, Mapping[str, float]], files: Iterable[Path]) -> dict[str, dict[str, float]]:
    """Times with those of new runs in the place of older ones; short cases are left out."""
    found = {name: dict(cases) for name, cases in known.items()}
    for file in files:
        for name, case, element in cases_of(file):
            if element.find("skipped") is None and element.find("failure") is None:
                found.setdefault(name, {})[case] = round(float(element.get("time", 0)), 1)
    kept = {name: {k: s for k, s in sorted(c.items()) if s >= LEAST} for name, c in sorted(found.items())}
    return {name: cases for name, cases in kept.items() if cases}


def seconds(arguments: list[str]) -> None:
    files = [Path(x) for x in arguments if x.endswith(".xml")]
    found = merged(tiers.seconds_of_cases(), files or [_pytest(arguments or ["tests", "-m", ALL])])
    part = tiers.SECONDS.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(part, tiers.SECONDS)
    total = sum(s for cases in found.values() for s in cases.values())
    print(
        f"{len(found)} test functions with cases of {LEAST} s and more, {total / 60:.1f} minutes of one core"
    )


def lines(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _pytest(["-p", "tests.kernel_lines", *(arguments or ["tests", "-m", ALL])], KERNEL_LINES=folder)
        touched: dict[str, set[str]] = defaultdict(set)
        for file in Path(folder).iterdir():
            for row in map(json.loads, file.read_text().splitlines()):
                touched[row["test"].partition("[")[0]].update(row["touched"])
    times = tiers.seconds_of_cases()
    print(f"{'seconds':>8s} {'lines':>6s} {'branches':>8s} {'alone':>6s}  test function")
    for name, own in sorted(touched.items(), key=lambda pair: -len(pair[1])):
        others = set().union(*(x for other, x in touched.items() if other != name))
        branches = sum(x.startswith("branch ") for x in own)
        spent = sum(times.get(name, {}).values())
        print(f"{spent:8.1f} {len(own) - branches:6d} {branches:8d} {len(own - others):6d}  {name}")


def noticed(files: Iterable[Path]) -> dict[str, set[str]]:
    """Test functions by the faults that they notice, of runs of tests/test_seeded_faults.py."""
    found: dict[str, set[str]] = {}
    for file in files:
        for _, case, element in cases_of(file):
            for entry in element.iter("property"):
                if entry.get("name") == "caught by":
                    found[case[1:-1]] = {re.sub(r"\[.*", "", x) for x in entry.get("value", "").split()}
    return found


def faults(arguments: list[str]) -> None:
    files = [Path(x) for x in arguments if x.endswith(".xml")]
    found = noticed(files or [_pytest(["tests", "-m", "fault", *arguments], CROSSVIT_EVERY_TEST="1")])
    tests = sorted({test for by in found.values() for test in by})
    print(f"{'faults':>6s} {'alone':>6s}  test function, of {len(found)} faults")
    for test in sorted(tests, key=lambda t: -sum(t in by for by in found.values())):
        alone = [fault for fault, by in found.items() if by == {test}]
        print(f"{sum(test in by for by in found.values()):6d} {len(alone):6d}  {test}")
        for fault in alone:
            print(f"{'':15s}{fault}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.worth", description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["seconds", "lines", "faults"])
    arguments, rest = parser.parse_known_args()
    {"seconds": seconds, "lines": lines, "faults": faults}[arguments.what](rest)


if __name__ == "__main__":
    main()
