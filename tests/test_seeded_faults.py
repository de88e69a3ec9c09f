"""Whether the contract can fail: faults put into the kernels' source, one at a time, have to be caught.

A run takes a few of them, drawn by FAULT_SEED, which `make test` prints; `make test-exhaustive` takes all.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.block_faults import (
    ATTENTION_FAULTS,
    BLOCK_FAULTS,
    FROZEN_FAULTS,
    LINEAR_FAULTS,
    PATCH_FAULTS,
)
from tests.contract import needs_module
from tests.cuda_faults import CUDA_FAULTS
from tests.native_builds import build, copy_project, run_tests
from tests.program_faults import PROGRAM_FAULTS
from tests.seeded_faults import FAULTS, Fault
from tests.triton_faults import TRITON_FAULTS

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
# Faults of the GPU kernels, and what is run against them.
GPU_FAULTS = {
    "triton": (TRITON_FAULTS, ["tests/test_gpu_kernels.py", "-k", f"triton and {TELLING}"]),
    "cuda": (
        CUDA_FAULTS,
        ["tests/test_cuda.py", "tests/test_gpu_kernels.py", "-k", f"cuda and {TELLING} or not_finite"],
    ),
    "self_attention": (ATTENTION_FAULTS, ["tests/test_triton_attention.py", "-m", "not interpreted"]),
    "linear": (LINEAR_FAULTS, ["tests/test_triton_linear.py", "-m", "not interpreted"]),
    "patch_embed": (PATCH_FAULTS, ["tests/test_triton_patches.py", "-m", "not interpreted"]),
    "transformer_block": (BLOCK_FAULTS, ["tests/test_triton_block.py", "-m", "not interpreted"]),
    "frozen": (FROZEN_FAULTS, ["tests/test_frozen_gpu.py", "-m", "not interpreted", "-k", "not compiling"]),
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


def fault_is_noticed(fault: Fault, root: Path, tests: Sequence[str]) -> bool:
    copy_project(root, fault)
    done = run_tests(root, tests)
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    return done.returncode == 1


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("kernels", "index"), [(kernels, i) for kernels in GPU_FAULTS for i in range(GPU_SAMPLE)]
)
def test_a_fault_of_the_gpu_kernels_is_caught(kernels, index, tmp_path):
    faults, tests = GPU_FAULTS[kernels]
    fault = random.Random(SEED).sample(faults, GPU_SAMPLE)[index]
    noticed = fault_is_noticed(fault, tmp_path, tests)
    assert noticed, f"no test noticed that {fault.what} (FAULT_SEED={SEED})"


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kernels", "fault"),
    [(kernels, fault) for kernels, (faults, _) in GPU_FAULTS.items() for fault in faults],
    ids=lambda x: x if isinstance(x, str) else x.what,
)
def test_every_fault_of_the_gpu_kernels_is_caught(kernels, fault, tmp_path):
    noticed = fault_is_noticed(fault, tmp_path, GPU_FAULTS[kernels][1])
    assert noticed, f"no test noticed that {fault.what}"
