"""The contract on a native module built with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract import needs_module
from tests.native_builds import build, copy_project, run_tests
from tests.seeded_faults import FAULTS

pytestmark = [
    pytest.mark.sanitized,
    needs_module,
    pytest.mark.skipif(sys.platform != "linux", reason="preloads the runtime as Linux does"),
]
FLAGS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
CONTRACT = ["tests/test_contract.py", "-k", "cpu"]


def runtime() -> str:
    """What has to be loaded first: the sanitizer, and libstdc++, whose exceptions it wraps."""
    compiler = os.environ.get("CXX", "c++").split()
    found = []
    for library in ("libasan.so", "libstdc++.so.6"):
        command = [*compiler, f"-print-file-name={library}"]
        path = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if not Path(path).is_absolute():
            pytest.skip(f"{compiler[0]} has no {library}")
        found.append(path)
    return " ".join(found)


def run(root: Path, arguments: list[str]) -> subprocess.CompletedProcess:
    # Uncaptured, or a report would end with the process; Python frees little at its end.
    return run_tests(root, [*arguments, "--capture=no"], LD_PRELOAD=runtime(), ASAN_OPTIONS="detect_leaks=0")


FORWARD = [f"tests/test_{name}.py" for name in ("linear", "self_attention", "patch_embed")]


@pytest.mark.parametrize(
    "arguments",
    [
        CONTRACT,
        ["tests/test_random_calls.py", "-k", "random_calls[0] or random_calls[1]"],
        [*FORWARD, "-k", "odd_sizes or gaps or layout or option"],
    ],
    ids=["contract", "random calls", "forward alone"],
)
def test_no_access_outside_and_nothing_undefined(arguments, tmp_path, monkeypatch):
    copy_project(tmp_path)
    build(tmp_path, monkeypatch, FLAGS, baseline_only=False)
    done = run(tmp_path, arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.memory], ids=lambda fault: fault.what)
def test_faults_of_memory_are_caught(fault, tmp_path, monkeypatch):
    copy_project(tmp_path, fault)
    build(tmp_path, monkeypatch, FLAGS, baseline_only=True)
    done = run(tmp_path, ["tests/test_contract.py", "-k", "cpu-baseline and head_attention"])
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer" in done.stdout + done.stderr, done.stdout[-2000:]
