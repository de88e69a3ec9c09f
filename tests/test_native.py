"""The compiled module: every instruction set of this machine, and what is said when it is missing."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crossvit_kernels import native
from tests.contract import needs_module
from tests.operations import relative_error


def isas() -> list[str]:
    return native.load().isas() if native.load_error() is None else ["baseline"]


@needs_module
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("columns", [1, 2, 7, 16, 31, 224, 449])
def test_layer_norm_statistics(isa, columns):
    wide = torch.full((300, columns + 5), float("nan"))
    x = wide[:, 2 : 2 + columns]
    x.copy_(torch.randn(300, columns) * 3 + 100)
    with native.use_isa(isa):
        mean, rstd = native.layer_norm_statistics(x)
    exact = x.double()
    assert relative_error(mean, exact.mean(1)) < 1e-6
    assert relative_error(rstd, (exact.var(1, correction=0) + 1e-6).rsqrt()) < 1e-5


@needs_module
def test_enough_rows_for_every_thread_and_none_at_all():
    x = torch.randn(5000, 64)
    mean, _ = native.layer_norm_statistics(x)
    assert relative_error(mean, x.double().mean(1)) < 1e-5
    assert native.layer_norm_statistics(torch.empty(0, 64))[0].shape == (0,)


@needs_module
@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(3), r"\[rows, columns\] on a CPU or a CUDA GPU, got torch.float32 \[3\]"),
        (torch.zeros(3, 4).double(), "got torch.float64"),
        (torch.zeros(3, 0), "at least one column"),
        (torch.zeros(3, 4).T, r"stride 4: call x.contiguous\(\)"),
    ],
)
def test_bad_rows_are_refused(x, words):
    with pytest.raises(ValueError, match=words):
        native.layer_norm_statistics(x)


@needs_module
def test_instruction_sets_are_chosen_by_name():
    best = native.load().isa()
    assert best == isas()[0]
    with native.use_isa("baseline"):
        assert native.load().isa() == "baseline"
    assert native.load().isa() == best
    with (
        pytest.raises(ValueError, match=r"isa must be auto or one that this machine runs .* got sse9"),
        native.use_isa("sse9"),
    ):
        pass


@needs_module
def test_an_instruction_set_in_the_environment():
    code = "from crossvit_kernels import native; print(native.load().isa())"
    assert run_code(code, CROSSVIT_ISA="baseline").strip() == "baseline"
    code = "from crossvit_kernels import native; print(native.load_error())"
    assert "isa must be auto or one that this machine runs" in run_code(code, CROSSVIT_ISA="sse9")


@needs_module
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which is Linux's")
def test_shares_the_thread_pool_of_torch():
    """One OpenMP runtime in the process, and no thread more than torch had."""
    code = """
import os, torch
torch.set_num_threads(2)
torch.randn(600, 600) @ torch.randn(600, 600)
(torch.randn(1 << 20) + 1).sum()
before = len(os.listdir("/proc/self/task"))
from crossvit_kernels import native
native.layer_norm_statistics(torch.randn(5000, 64))
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
print(len(runtimes), len(os.listdir("/proc/self/task")) - before)
"""
    if not native.build_report()["cpu"]["openmp"]:
        pytest.skip("built without OpenMP")
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["1", "0"]


@pytest.fixture
def fresh_native(monkeypatch):
    """The module native with its caches empty, before and after."""
    native._import.cache_clear()
    native.build_report.cache_clear()
    yield monkeypatch
    native._import.cache_clear()
    native.build_report.cache_clear()


def break_import(monkeypatch, error: Exception) -> None:
    def import_module(name):
        raise error

    monkeypatch.setattr(native, "import_module", import_module)


def test_a_broken_module_is_explained(fresh_native, tmp_path):
    report = {"python": "cpython-39", "platform": "linux-armv7l", "cpu": {"compiler": "g++ 99"}, "cuda": None}
    (tmp_path / "_build_report.json").write_text(json.dumps(report))
    fresh_native.setattr(native, "_REPORT", tmp_path / "_build_report.json")
    break_import(fresh_native, ImportError("wrong ELF class"))
    words = "built for cpython-39 on linux-armv7l by g\\+\\+ 99; import met ImportError: wrong ELF class"
    with pytest.raises(RuntimeError, match=words):
        native.load()


def test_a_module_that_was_left_out_is_explained(fresh_native, tmp_path):
    report = {"python": "cpython-311", "platform": "linux", "cpu": None, "cpu_left_out": "no C++ compiler"}
    (tmp_path / "_build_report.json").write_text(json.dumps(report))
    fresh_native.setattr(native, "_REPORT", tmp_path / "_build_report.json")
    break_import(fresh_native, ModuleNotFoundError("no _native"))
    assert "without the native module: no C++ compiler" in native.load_error()


def test_a_package_that_was_never_built_is_explained(fresh_native, tmp_path):
    fresh_native.setattr(native, "_REPORT", tmp_path / "_build_report.json")
    break_import(fresh_native, ModuleNotFoundError("no _native"))
    assert "was not built" in native.load_error()


def run_code(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_light():
    """No CUDA context, no Triton, none of the extras."""
    heavy = ["triton", "timm", "torchvision", "matplotlib", "PIL", "rich", "huggingface_hub", "safetensors"]
    code = f"""
import sys, torch
import crossvit_kernels, crossvit
print([name for name in {heavy} if name in sys.modules], torch.cuda.is_initialized())
"""
    assert run_code(code).strip() == "[] False"


def test_a_backend_in_the_environment():
    code = """
import sys, torch
from crossvit_kernels import cross_attention
print(sys.modules["crossvit_kernels.backends"]._selected)
w = [torch.eye(4), torch.zeros(4)] * 4
try:
    cross_attention(torch.zeros(1, 1, 4), torch.zeros(1, 2, 4), torch.ones(4), None, *w, num_heads=2)
    print("ran")
except ValueError as error:
    print(error)
"""
    assert run_code(code, CROSSVIT_BACKEND="reference").split() == ["reference", "ran"]
    assert (
        "CROSSVIT_BACKEND must be one of auto, cpu, cuda, triton, torch, reference, got 'fast'"
        in run_code(code, CROSSVIT_BACKEND="fast")
    )


def test_the_diagnosis_runs_and_checks_itself():
    done = subprocess.run(
        [sys.executable, "-m", "crossvit_kernels", "--check"], capture_output=True, text=True, check=True
    )
    assert re.search(r"ok +cross_attention, torch on cpu: forward and gradients", done.stdout)
    assert "FAIL" not in done.stdout
    if native.load_error() is None:
        assert f"native {isas()[0]}" in done.stdout
        assert f"cross_fusion, cpu with {isas()[-1]}" in done.stdout


def test_the_package_names_its_version():
    from importlib.metadata import version

    for name in ("crossvit", "crossvit_kernels"):
        package = importlib.import_module(name)
        assert package.__version__ == version("crossvit-kernels")
        assert all(hasattr(package, public) for public in package.__all__)
        assert Path(package.__file__).with_name("py.typed").exists()
