"""The decisions of setup.py, without building: targets, compilers, systems, messages."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools

SETUP = Path(__file__).parent.parent / "setup.py"


@pytest.fixture
def build(monkeypatch):
    """The functions of setup.py; changes to `build.names` are seen by all of them."""
    for variable in ("CXX", "CUDA_HOME", "CUDA_PATH", "CROSSVIT_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
    namespace = runpy.run_path(str(SETUP))
    return SimpleNamespace(names=namespace["build"].__globals__, **namespace)


@pytest.mark.parametrize(
    ("wanted", "targets"),
    [
        ("8.0", ["sm_80"]),
        ("8.0;9.0a+PTX", ["sm_80", "sm_90a", "compute_90a"]),
        ("8.6 8.9 12.0", ["sm_86", "sm_89", "sm_120"]),
        ("9.0 10.0+PTX", ["sm_90a", "sm_100a", "compute_100"]),
    ],
)
def test_targets_from_the_environment(build, monkeypatch, wanted, targets):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    assert build.cuda_targets() == targets


def test_targets_of_the_visible_gpus_or_the_defaults(build):
    build.names["run"] = lambda *args, **kwargs: "9.0\n8.6\n9.0\n"
    assert build.cuda_targets() == ["sm_86", "sm_90a"]
    build.names["run"] = lambda *args, **kwargs: "No devices were found\n"
    assert build.cuda_targets() == ["sm_80", "sm_90a", "compute_90"]


def test_code_generation_flags(build):
    assert build.gencode_flags(["sm_90a", "compute_80"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("a.cpp: In function f:\na.cpp:3:1: error: no x\na.cpp:4:1: error: no y\n", "a.cpp:3:1: error: no x"),
        (
            "ninja: entering\n/usr/bin/ld: cannot find -lcudart_static\n",
            "/usr/bin/ld: cannot find -lcudart_static",
        ),
        ("something odd\n\n", "something odd"),
        ("", "no output"),
    ],
)
def test_the_first_error_line(build, output, line):
    assert build.first_error_line(output) == line


def test_a_named_compiler_is_not_replaced(build, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert build.find_cxx() is None
    report = build.build(Path("nowhere"))
    assert report["cpu"] is None
    assert report["cpu_left_out"] == "no C++ compiler was found (CXX=no-such-compiler -m64)"


@pytest.mark.parametrize("value", [" ", "-m64"])
def test_a_compiler_variable_that_names_nothing(build, monkeypatch, value):
    monkeypatch.setenv("CXX", value)
    assert build.find_cxx() is None


def test_targets_do_not_matter_without_cuda(build, monkeypatch, tmp_path):
    monkeypatch.setenv("CROSSVIT_CUDA", "0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere")
    build.names.update(
        compile_module=lambda *args: None, find_cxx=lambda: ["c++"], run=lambda command, **kwargs: "c++ 1.0\n"
    )
    assert build.build(tmp_path / "module.so")["cpu"]["compiler"] == "c++ 1.0"


def test_a_missing_build_requirement_is_a_reason(build, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pybind11", None)
    build.names.update(find_cxx=lambda: ["c++"], openmp_flags=lambda cxx: [], find_nvcc=lambda: None)
    report = build.build(tmp_path / "module.so")
    assert "pybind11" in report["cpu_left_out"]


def test_windows_goes_without_the_module(build, monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Windows")
    report = build.build(Path("nowhere"))
    assert (report["cpu"], report["cuda"]) == (None, None)
    assert report["cpu_left_out"] == "the native module is not built on Windows"


def test_a_compiler_without_openmp_is_used_without_it(build):
    build.names["run"] = lambda command, **kwargs: (_ for _ in ()).throw(
        build.BuildError("unsupported option")
    )
    assert build.openmp_flags(["c++"]) == []


def test_cuda_that_does_not_compile_is_left_out_with_the_reason(build, monkeypatch, tmp_path):
    compiled = []

    def compile_module(output, cxx, openmp, nvcc, targets):
        if nvcc:
            raise build.BuildError("x\nkernel.cu(3): error: unsupported architecture\n")
        compiled.append(output)

    build.names.update(
        compile_module=compile_module,
        find_nvcc=lambda: Path("nvcc"),
        find_cxx=lambda: ["c++"],
        openmp_flags=lambda cxx: [],
        nvcc_release=lambda nvcc: "13.0",
        run=lambda command, **kwargs: "c++ 1.0\n",
    )
    report = build.build(tmp_path / "module.so")
    assert report["cuda_left_out"] == "it did not compile: kernel.cu(3): error: unsupported architecture"
    assert report["cpu"] == {"compiler": "c++ 1.0", "openmp": False}
    assert compiled == [tmp_path / "module.so"]
    monkeypatch.setenv("CROSSVIT_CUDA", "1")
    with pytest.raises(SystemExit, match="demands the CUDA kernels, but it did not compile"):
        build.build(tmp_path / "module.so")
