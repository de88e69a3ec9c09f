"""Whether the tests can fail: faults put into the kernels' source, one at a time, have to be caught.

`make test-faults` draws some by SEED; `make test-exhaustive` takes all.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from crossvit_kernels import native
from tests.block_faults import (
    ATTENTION_FAULTS,
    BLOCK_FAULTS,
    FROZEN_FAULTS,
    LINEAR_FAULTS,
    PATCH_FAULTS,
)
from tests.cuda_faults import CUDA_FAULTS
from tests.native_builds import build, copy_project, run_tests
from tests.program_faults import PROGRAM_FAULTS
from tests.seeded_faults import FAULTS, Fault
from tests.triton_faults import TRITON_FAULTS

# What is run against a fault: the contract of one instruction set.
CONTRACT = ("tests/test_contract.py", "-k", "cpu-baseline")
PROGRAMS = (
    *(f"tests/test_{name}.py" for name in ("linear", "self_attention", "patch_embed", "program", "frozen")),
    *("-k", "not frozen or every_shape or bytes or batches or threads"),
)
TELLING = "(every_kernel or everything or more_than_one or 16_bits or nearly or tf32)"


@dataclass(frozen=True)
class Kernels:
    """Faults of some kernels, and the tests that have to notice them."""

    faults: Sequence[Fault]
    tests: Sequence[str]
    native: bool = False  # the faults are in C++


def _interpreted(name: str, *options: str) -> tuple[str, ...]:
    return f"tests/test_{name}.py", "-m", "not sweep", *options


KERNELS = {
    "native": Kernels([fault for fault in FAULTS if not fault.memory], CONTRACT, native=True),
    "programs": Kernels(PROGRAM_FAULTS, PROGRAMS, native=True),
    "triton": Kernels(TRITON_FAULTS, ("tests/test_gpu_kernels.py", "-k", f"triton and {TELLING}")),
    "cuda": Kernels(
        CUDA_FAULTS,
        ("tests/test_cuda.py", "tests/test_gpu_kernels.py", "-k", f"cuda and {TELLING} or not_finite"),
    ),
    "self_attention": Kernels(ATTENTION_FAULTS, _interpreted("triton_attention")),
    "linear": Kernels(LINEAR_FAULTS, _interpreted("triton_linear")),
    "patch_embed": Kernels(PATCH_FAULTS, _interpreted("triton_patches")),
    "transformer_block": Kernels(BLOCK_FAULTS, _interpreted("triton_block")),
    "frozen": Kernels(FROZEN_FAULTS, _interpreted("frozen_gpu", "-k", "not compiling")),
}
# The kernels as they are have to pass, or the faults would be caught by anything.
CASES = [(name, None) for name, kernels in KERNELS.items() if kernels.native]
CASES += [(name, fault) for name, kernels in KERNELS.items() for fault in kernels.faults]


def run_against(
    kernels: Kernels, fault: Fault | None, root: Path, monkeypatch: pytest.MonkeyPatch, *options: str
) -> subprocess.CompletedProcess:
    """The tests of the kernels in a copy of the project that has the fault."""
    copy_project(root, fault)
    settings = {}
    if kernels.native:
        build(root, monkeypatch, "-O1", baseline_only=True)
        settings = {"CROSSVIT_ISA": "baseline"}
    done = run_tests(root, [*kernels.tests, *options], **settings)
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.mark.exhaustive
@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "fault"), CASES, ids=lambda x: x if isinstance(x, str) else x.what if x else "as they are"
)
def test_a_fault_is_caught_and_nothing_else(name, fault, tmp_path, monkeypatch, record_property):
    kernels = KERNELS[name]
    if kernels.native and native.load_error() is not None:
        pytest.skip(f"the native module is not here: {native.load_error()}")
    done = run_against(kernels, fault, tmp_path, monkeypatch)
    if fault is None:
        assert done.returncode == 0, done.stdout[-2000:]
        assert " passed" in done.stdout
    else:
        assert done.returncode == 1, f"no test noticed that {fault.what}"
        record_property("caught by", " ".join(re.findall(r"^FAILED (\S+?)(?:\[| - |$)", done.stdout, re.M)))
