"""The account of a training step's memory, counted on the CPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import training_memory
from benchmarks.training_memory import TOTAL
from crossvit_kernels import triton_runtime

needs_triton = pytest.mark.skipif(
    triton_runtime.load_error() is not None, reason=f"Triton cannot be used: {triton_runtime.load_error()}"
)


@needs_triton
def test_less_is_kept_than_timm_keeps(monkeypatch, capsys):
    monkeypatch.setattr(training_memory, "MEASURED", (4, 6))
    found = training_memory.reports("crossvit_tiny_240", 64, torch.device("cpu"))
    ours, theirs = found["this package"], found["timm"]
    assert ours["parameters"] == theirs["parameters"]
    assert ours["kept for backward"] < 0.65 * theirs["kept for backward"]
    for report in found.values():
        assert report[TOTAL] == pytest.approx(sum(v for k, v in report.items() if k != TOTAL))
    lines = training_memory.table(found)
    assert len(lines) == 1 + len(ours) + 1
    assert lines[-1] == f"{ours[TOTAL] / theirs[TOTAL]:.2f} times timm's"


def test_a_large_batch_from_two_small_ones(monkeypatch):
    monkeypatch.setattr(training_memory, "MEASURED", (2, 4))
    reports = [{"kept": 30.0, TOTAL: 130.0}, {"kept": 50.0, TOTAL: 150.0}]
    assert training_memory.at(10, reports) == {"kept": 110.0, TOTAL: 210.0}
