"""Builds and installs from a clean copy of the sources, in environments of their own.

Torch is lent to those environments by a path file: a build must not need it, and nothing is downloaded that
this environment has. Only the build requirements come from the package index.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).parent.parent
NO_CUDA = {"CROSSVIT_CUDA": "0"}


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def environment(**changes: str) -> dict[str, str]:
    hidden = ("CXX", "CUDA_HOME", "CUDA_PATH", "CROSSVIT_CUDA", "TORCH_CUDA_ARCH_LIST", "PYTHONPATH")
    return {**{key: value for key, value in os.environ.items() if key not in hidden}, **changes}


def pythons() -> list[str]:
    """Every CPython from 3.10 on PATH or beside the one that runs this, one a minor version."""
    folders = [Path(p) for p in os.environ["PATH"].split(os.pathsep)]
    folders += sorted(Path(sys.base_prefix).parent.glob("*/bin"))
    found = {}
    for folder in folders:
        for minor in range(10, 20):
            path = folder / f"python3.{minor}"
            if f"3.{minor}" not in found and path.is_file() and "shims" not in path.parts:
                found[f"3.{minor}"] = str(path)
    return [found[key] for key in sorted(found, key=lambda v: int(v.split(".")[1]))]


@pytest.fixture
def source(tmp_path) -> Path:
    """What git would give: tracked files and new ones, nothing that an earlier build left."""
    copy = tmp_path / "source"
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file() and not name.startswith(("docs/", "benchmarks/results/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


def make_environment(folder: Path, python: str = sys.executable, lend_torch: bool = False) -> Path:
    run(python, "-m", "venv", folder)
    binary = folder / "bin" / "python"
    if lend_torch:
        site = run(binary, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
        Path(site, "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return binary


def build_wheel(python: object, source: Path, out: Path, **changes: str) -> tuple[Path, dict]:
    run(python, "-m", "pip", "wheel", "--no-deps", "-w", out, source, env=environment(**changes))
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel, json.loads(archive.read("crossvit_kernels/_build_report.json"))


def native_files(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if "_native" in name]


LOAD = """
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("crossvit_kernels._native", sys.argv[1])
module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
loader.exec_module(module)
print(module.isas()[-1], "torch" in sys.modules)
"""

DIAGNOSE = "-m", "crossvit_kernels", "--check"
MODEL = "import torch, crossvit; print(crossvit.crossvit_tiny().eval()(torch.zeros(1, 3, 240, 240)).shape)"


@pytest.mark.parametrize("python", pythons(), ids=lambda path: Path(path).name)
def test_isolated_wheel_for_every_python(python, source, tmp_path):
    """Built without torch, and the module loads without torch."""
    binary = make_environment(tmp_path / "env", python)
    wheel, report = build_wheel(binary, source, tmp_path / "out", **NO_CUDA)
    assert report["cpu"]["compiler"]
    assert report["cuda_left_out"] == "CROSSVIT_CUDA=0 was set"
    (name,) = native_files(wheel)
    with zipfile.ZipFile(wheel) as archive:
        module = archive.extract(name, tmp_path)
        assert not [n for n in archive.namelist() if n.startswith(("csrc", "tests", "benchmarks"))]
    assert run(binary, "-c", LOAD, module).stdout.split() == ["baseline", "False"]


needs_nvcc = pytest.mark.skipif(
    not shutil.which("nvcc"), reason="there is no nvcc on PATH to compile CUDA with"
)


@needs_nvcc
def test_cuda_for_the_default_targets(source, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    wheel, report = build_wheel(sys.executable, source, tmp_path / "default")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 2 * 180, "more than three minutes on two cores"
    assert after.ru_maxrss * 1024 < 2 * 2**30, "two compilers at a time do not fit into 4 GiB"
    if not shutil.which("nvidia-smi"):
        assert report["cuda"]["targets"] == ["sm_80", "sm_90a", "compute_90"]
    # The runtime is linked statically: nothing of CUDA is needed to load the module.
    with zipfile.ZipFile(wheel) as archive:
        module = archive.extract(native_files(wheel)[0], tmp_path)
    if shutil.which("ldd"):
        assert "cuda" not in run("ldd", module).stdout
    assert run(sys.executable, "-c", LOAD, module).stdout.split() == ["baseline", "False"]
    code = LOAD + "print({'layer_norm_statistics_cuda', 'cuda_run'} <= set(dir(module)))"
    assert run(sys.executable, "-c", code, module).stdout.split()[-1] == "True"


@needs_nvcc
def test_cuda_for_chosen_targets(source, tmp_path):
    _, report = build_wheel(
        sys.executable, source, tmp_path / "chosen", TORCH_CUDA_ARCH_LIST="8.6;9.0+PTX", MAX_JOBS="1"
    )
    assert report["cuda"]["targets"] == ["sm_86", "sm_90a", "compute_90"]


def test_source_distribution(source, tmp_path):
    run(sys.executable, "-m", "build", "--sdist", "-o", tmp_path / "dist", source, env=environment())
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    wheel, report = build_wheel(sys.executable, archive, tmp_path / "out", **NO_CUDA)
    assert report["cpu"] is not None
    assert native_files(wheel)


def test_editable_install(source, tmp_path):
    binary = make_environment(tmp_path / "env", lend_torch=True)
    run(binary, "-m", "pip", "install", "--no-deps", "-e", source, env=environment(**NO_CUDA))
    assert list((source / "crossvit_kernels").glob("_native*.so"))
    output = run(binary, *DIAGNOSE, cwd=tmp_path).stdout
    assert "native module: built by" in output
    where = run(binary, "-c", "import crossvit; print(crossvit.__file__)", cwd=tmp_path).stdout
    assert where.startswith(str(source))


def test_without_nvcc(source, tmp_path):
    _, report = build_wheel(sys.executable, source, tmp_path / "out", CUDA_HOME=str(tmp_path / "none"))
    assert report["cuda"] is None
    assert report["cuda_left_out"].startswith("nvcc was not found")
    assert report["cpu"] is not None


def test_without_any_compiler(source, tmp_path):
    """PATH holds nothing but the environment's own programs: it installs, runs, and says what is missing."""
    binary = make_environment(tmp_path / "env", lend_torch=True)
    path = str(binary.parent)
    run(binary, "-m", "pip", "install", "--no-deps", source, env=environment(PATH=path))
    output = run(binary, *DIAGNOSE, env=environment(PATH=path), cwd=tmp_path).stdout
    assert "without the native module: no C++ compiler was found (CXX=unset)" in output
    assert "ok   cross_attention, torch on cpu" in output
    assert "torch.Size([1, 1000])" in run(binary, "-c", MODEL, cwd=tmp_path).stdout


def test_a_compiler_that_fails_is_quoted(source, tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'broken.cpp:1:1: fatal error: the disk is full of cats' >&2\nexit 1\n")
    broken.chmod(0o755)
    wheel, report = build_wheel(sys.executable, source, tmp_path / "out", CXX=str(broken), **NO_CUDA)
    assert report["cpu_left_out"].endswith("fatal error: the disk is full of cats")
    assert native_files(wheel) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"CROSSVIT_CUDA": "1", "CUDA_HOME": "none"},
            "CROSSVIT_CUDA=1 demands the CUDA kernels, but nvcc was not",
        ),
        ({"CROSSVIT_CUDA": "yes"}, "CROSSVIT_CUDA must be 0, 1 or unset, got 'yes'"),
        ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, "TORCH_CUDA_ARCH_LIST must list capabilities such as"),
    ],
)
def test_wrong_settings_stop_the_build_in_words(changes, words, source, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path / "out"), str(source)],
        capture_output=True,
        text=True,
        env=environment(**changes),
    )
    assert done.returncode != 0
    assert words in done.stdout + done.stderr


def test_builds_side_by_side_and_a_killed_one(source, tmp_path):
    """Two builds of one tree at once both succeed, and one that is killed leaves nothing to pick up."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", str(source), "-w"]
    settings = {"env": environment(**NO_CUDA), "stdout": subprocess.DEVNULL, "start_new_session": True}
    killed = subprocess.Popen([*command, str(tmp_path / "killed")], **settings)
    time.sleep(2.5)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    left = [p for p in source.rglob("*") if re.search(r"\.(so|o|ninja)$", p.name)]
    assert left == []
    both = [subprocess.Popen([*command, str(tmp_path / name)], **settings) for name in ("a", "b")]
    assert [build.wait() for build in both] == [0, 0]
    for name in ("a", "b"):
        (wheel,) = (tmp_path / name).glob("*.whl")
        assert native_files(wheel)
