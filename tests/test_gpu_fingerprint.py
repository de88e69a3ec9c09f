"""Writes to parameters on a GPU that torch does not count; the kernel compiled and executed without one."""

from __future__ import annotations

import pytest
import torch

from crossvit_kernels import triton_runtime
from crossvit_kernels.gpu_fingerprint import GpuFingerprint
from tests.contract import without_a_gpu

pytestmark = pytest.mark.skipif(
    triton_runtime.load_error() is not None, reason=f"Triton cannot be used: {triton_runtime.load_error()}"
)

# Of 4 bytes an element: first of a page, of a later page, the last.
PLACES = ((0, 0), (0, 2048), (0, 4999), (1, 0), (1, 2), (2, 0), (2, 1024))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_what_is_noticed_and_when(target):
    """One call after the write, and again until somebody looks anew."""
    tensors = [torch.randn(5000), torch.ones(3), torch.randn(1025)[None], torch.empty(0)]
    with without_a_gpu(target) as recorder:
        recorder.register(*(t for t in tensors if t.numel()))
        for which, place in PLACES:
            found = GpuFingerprint(tensors)
            assert [found.differs() for _ in range(3)] == [False] * 3
            tensors[which].data.view(-1)[place] *= -1  # of which the low half knows nothing
            assert [found.differs() for _ in range(3)] == [False, True, True]
        found = GpuFingerprint(tensors)
        tensors[0][5] += 1  # is not looked at
        assert [found.differs() for _ in range(3)] == [False] * 3


def test_16_bits_and_strides():
    x = torch.randn(64, 96).bfloat16().mT
    with without_a_gpu("sm_80") as recorder:
        recorder.register(x)
        found = GpuFingerprint([x])
        assert not found.differs()
        x[95, 63] = 7.0
        found.differs()
        assert found.differs()


def test_nothing_to_look_at():
    assert not GpuFingerprint([]).differs()
    assert not GpuFingerprint([torch.empty(0), torch.zeros(4, dtype=torch.uint8)]).differs()
