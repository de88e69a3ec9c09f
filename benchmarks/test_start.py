"""What comes before the first result: installing, importing, the first call; in processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks.race import comparison

ROUNDS = 3
ROOT = Path(__file__).parent.parent

# torch is imported before the clock starts: both need it.
IMPORT = """
import time, torch
start = time.perf_counter()
{}
print(time.perf_counter() - start)
"""
FIRST_CALL = """
import time, torch
from crossvit import create_model
from crossvit._timm import import_timm
device = "cuda" if torch.cuda.is_available() else "cpu"
model = ({})("crossvit_18_240").eval().to(device)
image = torch.randn(1, 3, 240, 240, device=device)
model = ({})(model)
with torch.inference_mode():
    start = time.perf_counter()
    model(image).cpu()
    print(time.perf_counter() - start)
"""
OURS, THEIRS, AS_IT_IS = "create_model", "import_timm().create_model", "lambda model: model"


def seconds_of(code: str, folder: Path) -> float:
    """What a program prints last; caches of compilers begin empty."""
    empty = {name: str(folder / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    for path in empty.values():
        shutil.rmtree(path, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **empty}
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


def in_turn(programs: Mapping[str, str], folder: Path) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(ROUNDS):
        for name, code in programs.items():
            samples[name].append(seconds_of(code, folder))
    return samples


@pytest.mark.benchmark(group="before the first result")
def test_import(benchmark, tmp_path):
    """Beyond torch; timm's models need torchvision."""
    programs = {
        "ours": IMPORT.format("import crossvit"),
        "timm": IMPORT.format("from crossvit._timm import import_timm; import_timm()"),
    }
    samples = in_turn(programs, tmp_path)
    benchmark.extra_info["against timm"] = comparison(samples["ours"], samples["timm"])
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.benchmark(group="before the first result")
def test_first_call_of_crossvit_18(benchmark, tmp_path, request):
    """Ours packs the weights, on a GPU it compiles kernels and tries them; eager timm does neither."""
    programs = {
        "ours": FIRST_CALL.format(OURS, AS_IT_IS),
        "timm": FIRST_CALL.format(THEIRS, AS_IT_IS),
    }
    if request.config.getoption("--full"):
        programs["torch.compile"] = FIRST_CALL.format(THEIRS, "torch.compile")
    samples = in_turn(programs, tmp_path)
    for name in programs:
        if name != "ours":
            benchmark.extra_info[f"against {name}"] = comparison(samples["ours"], samples[name])
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.full
@pytest.mark.benchmark(group="before the first result")
def test_install(benchmark, tmp_path):
    """`pip install` of the sources, torch and what they are built with being there."""
    source = tmp_path / "source"
    listed = subprocess.run(("git", "ls-files"), capture_output=True, text=True, cwd=ROOT, check=True).stdout
    for name in listed.splitlines():
        if not name.startswith(("docs/", "tests/", "benchmarks/")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    command = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-cache-dir")
    times = []
    for environment in ({"CROSSVIT_CUDA": "0"}, {"CXX": "none"}):
        start = time.perf_counter()
        done = subprocess.run(
            (*command, "--target", str(tmp_path / "installed"), "--upgrade", str(source)),
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )
        assert done.returncode == 0, done.stderr
        times.append(time.perf_counter() - start)
    benchmark.extra_info["measured"] = {
        f"pip install, building the native module on {os.cpu_count()} cores": times[0],
        "pip install, without a C++ compiler": times[1],
    }
    benchmark.pedantic(lambda: None, rounds=1)
