"""Copies of the project with a native module of their own, for tests that change it or instrument it."""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import setuptools

from crossvit_kernels import native
from tests import pytest_server
from tests.seeded_faults import Fault

ROOT = Path(__file__).parent.parent


def copy_project(root: Path, fault: Fault | None = None) -> None:
    """The packages, the sources and the tests, with the fault put in; the native module is left behind."""
    for name in ("crossvit", "crossvit_kernels", "csrc", "tests"):
        shutil.copytree(
            ROOT / name, root / name, ignore=shutil.ignore_patterns("_native*", "__pycache__", ".*")
        )
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    if fault is not None:
        file = root / fault.file
        source = file.read_text()
        assert source.count(fault.old) == 1, f"{fault.what}: its text must occur once in {fault.file}"
        file.write_text(source.replace(fault.old, fault.new))


def build(root: Path, monkeypatch: pytest.MonkeyPatch, flags: str, baseline_only: bool) -> None:
    """The copy's native module, by the functions of its setup.py, without CUDA.

    Objects come from the cache of compilations: a fault compiles what includes the changed file.
    """
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    launcher = [sys.executable, str(ROOT / "tests" / "compile_cache.py")]
    compiler = os.environ.get("CXX") or "c++"
    monkeypatch.setenv("CXX", f"{shlex.join(launcher)} {compiler}")
    names = runpy.run_path(str(root / "setup.py"))["build"].__globals__
    if baseline_only:
        names["INSTRUCTION_SETS"] = {"baseline": []}
    monkeypatch.setenv("CXXFLAGS", flags)
    cxx = names["find_cxx"]()
    output = root / "crossvit_kernels" / Path(native.load().__file__).name
    names["compile_module"](output, cxx, names["openmp_flags"](cxx), None, [])


def run_tests(root: Path, arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess:
    """pytest in the copy, until the first failure; with CROSSVIT_EVERY_TEST all tests."""
    stops = [] if os.environ.get("CROSSVIT_EVERY_TEST") else ["-x"]
    options = [*stops, "-q", "-p", "no:cacheprovider", *arguments]
    variables = {k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"}
    variables |= {"PYTHONPATH": str(root), **environment}
    if "LD_PRELOAD" in environment:  # libraries that a process must load first
        command = [sys.executable, "-m", "pytest", *options]
        return subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, timeout=1800)
    return pytest_server.run(root, options, variables)
