"""Whether the contract can fail: faults put into the kernels' source, one at a time, have to be caught.

A run takes a few of them, drawn by FAULT_SEED, which `make test` prints; `make test-exhaustive` takes all.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.contract import needs_module
from tests.cuda_faults import CUDA_FAULTS
from tests.native_builds import build, copy_project, run_tests
from tests.program_faults import PROGRAM_FAULTS
from tests.seeded_faults import FAULTS, Fault
from tests.triton_faults import ATTENTION_FAULTS, TRITON_FAULTS

SAMPLE = 3
GPU_SAMPLE = 2
SEED = int(os.environ.get("FAULT_SEED", "0"))
WRONG_RESULTS = [fault for fault in FAULTS if not fault.memory]
# What is run against a fault: the contract of one instruction set.
CONTRACT = ["tests/test_contract.py", "-k", "cpu-baseline"]
PROGRAMS = [
    *(f"tests/test_{name}.py" for name in ("linear", "self_attention", "patch_embed", "program", "frozen")),
    "-k",
    "not frozen or every_shape or bytes or batches or threads",
]
TELLING = "(every_kernel or everything or more_than_one or 16_bits or nearly or tf32)"
GPU_TESTS = {
    "triton": ["tests/test_gpu_kernels.py", "-k", f"triton and {TELLING}"],
    "self_attention": ["tests/test_triton_attention.py", "-m", "not interpreted"],
    "cuda": ["tests/test_cuda.py", "tests/test_gpu_kernels.py", "-k", f"cuda and {TELLING} or not_finite"],
}


def catches(
    fault: Fault | None, root: Path, monkeypatch: pytest.MonkeyPatch, tests: Sequence[str] = CONTRACT
) -> tuple[bool, str]:
    """Whether `tests` fail with this fault in the kernels, and what was printed."""
    copy_project(root, fault)
    build(root, monkeypatch, "-O1", baseline_only=True)
    done = run_tests(root, tests, CROSSVIT_ISA="baseline")
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    return done.returncode == 1, done.stdout


@needs_module
@pytest.mark.parametrize("tests", [CONTRACT, PROGRAMS], ids=["contract", "programs"])
def test_the_kernels_as_they_are_pass(tests, tmp_path, monkeypatch):
    """Otherwise the faults below would be caught by anything."""
    caught, output = catches(None, tmp_path, monkeypatch, tests)
    assert not caught, output[-2000:]
    assert " passed" in output


@needs_module
@pytest.mark.parametrize("index", range(SAMPLE))
def test_a_fault_is_caught(index, tmp_path, monkeypatch):
    fault = random.Random(SEED).sample(WRONG_RESULTS, SAMPLE)[index]
    caught, _ = catches(fault, tmp_path, monkeypatch)
    assert caught, f"no test noticed that {fault.what} (FAULT_SEED={SEED})"


@needs_module
def test_a_fault_of_the_programs_is_caught(tmp_path, monkeypatch):
    fault = random.Random(SEED).choice(PROGRAM_FAULTS)
    caught, _ = catches(fault, tmp_path, monkeypatch, PROGRAMS)
    assert caught, f"no test noticed that {fault.what} (FAULT_SEED={SEED})"


@needs_module
@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", [*WRONG_RESULTS, *PROGRAM_FAULTS], ids=lambda fault: fault.what)
def test_every_fault_is_caught(fault, tmp_path, monkeypatch):
    tests = PROGRAMS if fault in PROGRAM_FAULTS else CONTRACT
    caught, _ = catches(fault, tmp_path, monkeypatch, tests)
    assert caught, f"no test noticed that {fault.what}"


def fault_is_noticed(fault: Fault, root: Path) -> bool:
    copy_project(root, fault)
    tests = "cuda" if fault in CUDA_FAULTS else "triton" if fault in TRITON_FAULTS else "self_attention"
    done = run_tests(root, GPU_TESTS[tests])
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    return done.returncode == 1


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("faults", "index"),
    [(faults, i) for faults in (TRITON_FAULTS, CUDA_FAULTS) for i in range(GPU_SAMPLE)],
    ids=[f"{backend}-{i}" for backend in ("triton", "cuda") for i in range(GPU_SAMPLE)],
)
def test_a_fault_of_the_gpu_kernels_is_caught(faults, index, tmp_path):
    fault = random.Random(SEED).sample(faults, GPU_SAMPLE)[index]
    assert fault_is_noticed(fault, tmp_path), f"no test noticed that {fault.what} (FAULT_SEED={SEED})"


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "fault", [*TRITON_FAULTS, *CUDA_FAULTS, *ATTENTION_FAULTS], ids=lambda fault: fault.what
)
def test_every_fault_of_the_gpu_kernels_is_caught(fault, tmp_path):
    assert fault_is_noticed(fault, tmp_path), f"no test noticed that {fault.what}"
