"""Kernels of inference that begin before those before them have ended, executed without a GPU."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from crossvit_kernels import dependent_launch, kernel_preference, triton_runtime, use_backend
from crossvit_kernels.dependent_launch import dependent_launches
from tests.contract import without_a_gpu
from tests.fake_cuda import fake_cuda
from tests.models import small
from tests.test_frozen_gpu import model_of

pytestmark = pytest.mark.skipif(
    triton_runtime.load_error() is not None, reason=f"Triton cannot be used: {triton_runtime.load_error()}"
)


def run(model, x, target, wanted=True):
    """Logits, and of each launch its name and whether it is dependent."""
    always = mock.patch.object(kernel_preference, "ahead", return_value=wanted)
    with use_backend("triton"), without_a_gpu(target) as recorder, fake_cuda(), always:
        model.freeze()
        recorder.launches.clear()
        logits = model(x)
        model.unfreeze()
    return logits, {(launch.name, launch.dependent) for launch in recorder.launches}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kernel_waits_before_it_reads(dtype):
    """The interpreter refuses a dependent launch that touches memory before its wait."""
    model = model_of(depth=((1, 1, 0),), img_scale=(1.0, 2 / 3)).to(dtype)
    x = torch.randn(1, 3, 48, 48).to(dtype)
    ordinary, names = run(model, x, "sm_90", wanted=False)
    assert {dependent for _, dependent in names} == {False}
    logits, names = run(model, x, "sm_90")
    assert {dependent for _, dependent in names} == {True}
    kernels = {"embed", "cut", "product", "attend", "project", "absorb", "values", "output", "back"}
    assert {name for name, _ in names} == kernels | {"statistics" if dtype == torch.bfloat16 else "normalise"}
    assert torch.equal(logits, ordinary)


def test_the_stem_of_three_convolutions():
    model = small(embed_dim=(32, 64), num_heads=(2, 4), depth=((1, 1, 0),), multi_conv=True)
    _, names = run(model, torch.randn(1, 3, 48, 48), "sm_90")
    assert ("place", True) in names


def test_older_gpus_launch_as_ever():
    model, x = model_of(depth=((0, 1, 0),)), torch.randn(1, 3, 48, 48)
    _, names = run(model, x, "sm_80")
    assert {dependent for _, dependent in names} == {False}
    assert [dependent_launch.can(name) for name in ("sm_80", "sm_90", "sm_120", "gfx942")] == [
        *(False, True, True, False)
    ]


def test_the_wish_ends_with_its_block():
    assert dependent_launch.options("sm_90") == {}
    with dependent_launches():
        assert dependent_launch.options("sm_90") == {"DEPENDENT": True, "launch_pdl": True}
        with dependent_launches(False):
            assert dependent_launch.options("sm_90") == {}
        assert dependent_launch.options("sm_80") == {}
    assert dependent_launch.options("sm_90") == {}
