"""Whole models on a CPU: this package, frozen and not, against timm, OpenVINO and ONNX Runtime.

Each rival runs in a process of its own, because thread pools of several libraries in one process disturb each
other, and they take turns. `pytest benchmarks --benchmark-only -k cpu`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.conftest import THREADS_OF_MACHINE, large, print_line, progress
from benchmarks.cpu_rival import PEAK_SIZE, RIVALS
from benchmarks.energy import counter
from benchmarks.race import comparison, percentiles
from crossvit import create_model, find_variant
from crossvit_kernels import native
from crossvit_kernels.measure import compare

ROUNDS = 5
SAMPLE_SECONDS = 0.15
LOAD = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # before any rival was started
# Largest error of logits over the largest logit, against this package's model in float64.
BOUNDS = {"fp32": 1e-4, "bf16": 1e-1}
ONE, ALL = "one thread", "all threads"
CASES = [("crossvit_18_240", 1, ONE), ("crossvit_18_240", 1, ALL), ("crossvit_18_240", 8, ALL)]
CASES += [large("crossvit_18_240", 8, ONE)]
CASES += [large("crossvit_18_240", 32, threads) for threads in (ONE, ALL)]
CASES += [
    large(name, batch, threads)
    for name in ("crossvit_9_240", "crossvit_15_240", "crossvit_18_dagger_240")
    for batch in (1, 8)
    for threads in (ONE, ALL)
]


class Rival:
    """A process that runs one rival, and why it does not where it does not."""

    def __init__(self, name: str) -> None:
        self.name, self.precision = name, name.rpartition(" ")[2]
        self.failed = ""
        self.version = ""
        self.resident_bytes = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cpu_rival", name],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, **request: object) -> None:
        assert self._process.stdin is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self.failed = "its process ended"

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found = json.loads(line) if line else {"failed": "its process ended"}
        self.failed = found.get("failed", "")
        return found

    def calls(self) -> list[float]:
        self.ask(seconds=SAMPLE_SECONDS)
        return self.answer().get("calls", [float("nan")])

    def call(self) -> None:
        self.ask(seconds=0)
        self.answer()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="results are filed under the GPU's name: CUDA_VISIBLE_DEVICES='' measures the CPU",
)


@pytest.fixture(scope="module")
def rivals() -> Iterator[list[Rival]]:
    if LOAD > 0.3:
        print_line(f"others kept the machine busy (load {LOAD:.1f}): the times say little")
    processes = [Rival(name) for name in RIVALS]
    yield processes
    for rival in processes:
        rival.end()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """File with weights and images, and the exact logits of the first images, of each model once."""
    found: dict[str, tuple[Path, np.ndarray]] = {}

    def make(name: str) -> tuple[Path, np.ndarray]:
        if name not in found:
            torch.manual_seed(0)
            model = create_model(name).eval()
            with torch.no_grad():
                for p in model.parameters():  # away from the initial values, as trained ones are
                    p.add_(torch.randn_like(p) * 0.02)
            images = torch.randn(32, 3, *model.img_size)
            path = tmp_path_factory.mktemp("cpu") / "data.pt"
            torch.save({"state": model.state_dict(), "images": images}, path)
            with torch.no_grad():
                found[name] = path, model.double()(images[:2].double()).numpy()
        return found[name]

    return make


@pytest.mark.parametrize(("name", "batch", "threads"), CASES, ids=lambda value: str(value))
@pytest.mark.benchmark(group="cpu")
def test_cpu(name, batch, threads, rivals, data, benchmark, tmp_path, request):
    if threads == ONE and not request.config.getoption("--full"):
        # It compiles for half a minute each time; the default run has it on all threads.
        rivals = [rival for rival in rivals if not rival.name.startswith("torch.compile")]
    count = 1 if threads == ONE else THREADS_OF_MACHINE
    path, exact = data(name)
    logits = {rival.name: tmp_path / f"{i}.npy" for i, rival in enumerate(rivals)}
    for rival in rivals:
        rival.ask(model=name, batch=batch, threads=count, data=str(path), logits=str(logits[rival.name]))
    errors = {}
    for done, rival in enumerate(rivals):
        progress(f"{name}, batch {batch}, {threads}: loading {rival.name}", done, len(rivals))
        found = rival.answer()
        rival.version = found.get("version", rival.version)
        rival.resident_bytes = found.get("resident_bytes", 0)
        if rival.failed or rival.name.startswith("peak"):
            continue
        got, want = np.load(logits[rival.name])[: len(exact)], exact[:batch]
        errors[rival.name] = float(np.abs(got - want).max() / np.abs(want).max())
        if not errors[rival.name] < BOUNDS[rival.precision]:
            rival.failed = f"its logits are wrong by {errors[rival.name]:.1e}"
    running = [rival for rival in rivals if not rival.failed]
    by_name = {rival.name: rival for rival in running}
    assert "frozen fp32" in by_name, rivals[0].failed
    assert "frozen bf16" in by_name, rivals[1].failed

    samples: dict[str, list[float]] = {rival.name: [] for rival in running}
    calls: dict[str, list[float]] = {rival.name: [] for rival in running}
    read, energy = counter(torch.device("cpu")), dict.fromkeys(samples, 0.0)
    for index in range(ROUNDS):
        for done, rival in enumerate(running if index % 2 == 0 else running[::-1]):
            step = index * len(running) + done
            progress(f"{name}, batch {batch}, {threads}: {rival.name}", step, ROUNDS * len(running))
            before = read() if read else 0.0
            calls[rival.name] += (found := rival.calls())
            energy[rival.name] += read() - before if read else 0.0
            samples[rival.name].append(statistics.mean(found))
    progress("", 1, 1)

    peak = {
        precision: 2 * PEAK_SIZE**3 / min(samples[f"peak {precision}"]) / 1e9
        for precision in BOUNDS
        if f"peak {precision}" in by_name and not by_name[f"peak {precision}"].failed
    }
    gflop = 2 * find_variant(name).gmacs * batch
    print_line(f"{name}, batch {batch}, {threads}; milliseconds an image; logits against float64")
    benchmark.extra_info |= {
        "model": name,
        "batch": batch,
        "threads": count,
        "peak_gflops": peak,
        "load": LOAD,
    }
    benchmark.extra_info |= {"isa": native.load().isa(), "rivals": {}}
    for rival in rivals:
        if rival.name.startswith("peak") and not rival.failed:
            continue
        if rival.failed:
            print_line(f"  {rival.name:21s} not run: {rival.failed}")
            benchmark.extra_info["rivals"][rival.name] = {"not_run": rival.failed}
            continue
        times, ours = samples[rival.name], f"frozen {rival.precision}"
        rate = gflop / min(times)
        row = {
            "version": rival.version,
            "seconds": times,
            "median": statistics.median(times),
            "least": min(times),
            "gflops": rate,
            "share_of_peak": rate / peak[rival.precision] if rival.precision in peak else None,
            "error": errors[rival.name],
            "latency": percentiles(calls[rival.name]),
            "joules": energy[rival.name] / (batch * len(calls[rival.name])) if read else None,
            "resident_bytes": rival.resident_bytes,
        }
        benchmark.extra_info["rivals"][rival.name] = row
        words = ""
        if rival.name != ours:
            race = comparison(samples[ours], times) | {"ratio_of_least": min(times) / min(samples[ours])}
            benchmark.extra_info[f"against {rival.name}"] = race
            words = f"{ours}: {compare(samples[ours], times).words()}, by minima {race['ratio_of_least']:.2f}"
        share = f"{row['share_of_peak']:4.0%} of peak" if row["share_of_peak"] else ""
        median, least = (f"{row[which] / batch * 1e3:7.2f}" for which in ("median", "least"))
        speed = f"{rate:5.0f} GFLOP/s {share}, error {row['error']:.0e}"
        print_line(f"  {rival.name:21s} median {median}, least {least}, {speed}; {words}")
    print_line("  peak: " + ", ".join(f"{p} {rate:.0f} GFLOP/s" for p, rate in peak.items()))
    benchmark.pedantic(by_name["frozen fp32"].call, rounds=3)
