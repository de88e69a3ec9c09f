"""What only the Triton kernels have: when they are compiled, and why they are not taken.

What they compute: test_gpu_kernels.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from crossvit_kernels import backends, validate, validation
from tests.contract import Subject, without_a_gpu
from tests.operations import OPERATIONS, Size, leaves

MODULE = sys.modules["crossvit_kernels.backends"]  # the package's attribute of this name is the function
ATTENTION, _ = OPERATIONS


def test_another_length_or_batch_compiles_nothing():
    with without_a_gpu() as recorder:
        counts = []
        for batch, patches in ((2, 196), (2, 197), (2, 16), (1, 208), (16, 5), (3, 1)):
            tensors = leaves(ATTENTION.inputs(Size(batch, patches, 32, 2), torch.float32))
            (y,) = Subject(ATTENTION, "triton").run(tensors, Size(batch, patches, 32, 2))
            torch.autograd.grad(y.sum(), tensors)
            counts.append(recorder.compilations)
    parts = ["in one part", "in parts"]
    assert len(set(counts[:2])) == 1, f"196 and 197 patches, both {parts[1]}: compiled again"
    assert len(set(counts[2:])) == 1, f"short sequences, all {parts[0]}: compiled again"


def test_why_it_cannot_be_taken(monkeypatch):
    tensors = ATTENTION.inputs(Size(), torch.float32)
    with pytest.raises(RuntimeError, match="triton: it runs on cuda, the tokens are on cpu"):
        ATTENTION.run(tensors, Size(), "triton")
    monkeypatch.setattr(MODULE, "_TRITON_ERROR", "Triton is not installed")
    with pytest.raises(RuntimeError, match="triton: Triton is not installed"):
        ATTENTION.run(tensors, Size(), "triton")
    assert "triton" in backends()


def without_one_addition(kernel: str) -> Callable[[str, str], str]:
    """Makes the compiled text of a kernel wrong."""

    def rewrite(name: str, ptx: str) -> str:
        if name != kernel:
            return ptx
        wrong = ptx.replace("add.f32", "sub.f32", 1)
        assert wrong != ptx
        return wrong

    return rewrite


def test_wrong_kernels_are_found():
    validation.forget()
    what = {"widths": (16,), "num_heads": (2,), "dtype": torch.float32, "device": "cpu"}
    with without_a_gpu() as recorder:
        assert validate("cross_attention", **what, gradients=False) is None
        assert recorder.launches
    for kernel, gradients in (("attend", False), ("attend_backward", True)):
        validation.forget()
        with without_a_gpu(rewrite=without_one_addition(kernel)):
            assert "relative error" in validate("cross_attention", **what, gradients=gradients)
    validation.forget()
