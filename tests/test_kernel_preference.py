"""Where "auto" takes Triton's kernels for the layers of a block."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed")

from crossvit_kernels import (
    kernel_preference,
    linear,
    patch_embed,
    self_attention,
    use_backend,
    validate,
    validation,
)
from crossvit_kernels.kernel_preference import ahead, predicted
from crossvit_kernels.linear import triton_launch
from tests.by_definition import linear_inputs, normal, patch_inputs
from tests.contract import without_a_gpu

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def nothing_was_tried() -> Iterator[None]:
    validation.forget()
    yield
    validation.forget()


@pytest.mark.parametrize(
    ("operation", "shape", "number", "found"),
    [
        ("linear", (448, 1344, "norm, gelu"), 50_432, True),
        ("linear", (448, 1344, "norm, gelu"), 197, False),
        ("linear", (448, 1344, "norm"), 50_432, False),
        ("linear", (1344, 448, "residual"), 50_432, False),
        ("self_attention", (197, 64), 1792, True),
        ("self_attention", (401, 32), 1792, True),
        ("self_attention", (577, 64), 1792, False),
        ("self_attention", (197, 64), 7, False),
        ("patch_embed", (16, 448, True), 256, True),
        ("patch_embed", (12, 224, False), 256, False),
    ],
)
def test_predictions(operation, shape, number, found):
    """Of an H100 alone, in bfloat16, forward."""
    assert predicted("sm_90", operation, shape, number, False) is found
    assert ahead("sm_90", operation, shape, number, False, BF16) is found
    assert not predicted("sm_90", operation, shape, number, True)
    assert not predicted("sm_80", operation, shape, number, False)
    assert not ahead("sm_90", operation, shape, number, False, torch.float16)


def test_what_only_moves_bytes_is_ahead_everywhere():
    for architecture, training in (("sm_80", True), ("sm_90", False), ("sm_120", True)):
        assert predicted(architecture, "add_position", (196, 448), 256, training)
        assert not predicted(architecture, "add_position", (196, 448), 1, training)


def test_measurements_go_before_predictions():
    key = ("sm_90", "linear", (448, 1344, "norm, gelu"), False, BF16)
    with mock.patch.dict(kernel_preference._MEASURED, {key: ((1000, True), (60_000, False))}):
        assert [ahead(*key[:3], number, False, BF16) for number in (1, 1000, 1001, 10**6)] == [
            *(True, True, False, False)
        ]


def _linear(x: list[Tensor], backend: str = "auto", **options: object) -> Tensor:
    return linear(*x[:3], norm_weight=x[3], norm_bias=x[4], activation="gelu", backend=backend, **options)


def test_auto_takes_what_is_ahead_once_it_was_tried(caplog):
    """The GPU kernels are known by their bits, which are not those of PyTorch's operators."""
    x = [t.to(BF16) for t in linear_inputs((3, 5), 40, 24)]
    qkv = normal(2, 5, 96).to(BF16)
    pixels = [t.to(BF16) for t in patch_inputs((2, 3, 9, 9), 4, 8, (2, 2))]
    calls = {
        ("linear", (40, 24, "norm, gelu")): lambda backend: _linear(x, backend),
        ("self_attention", (5, 16)): lambda backend: self_attention(qkv, 2, backend=backend),
        ("patch_embed", (4, 8, True)): lambda backend: patch_embed(*pixels, size=(8, 8), backend=backend),
    }
    for (operation, shape), call in calls.items():
        key = ("sm_90", operation, shape, False, BF16)
        with without_a_gpu("sm_90") as recorder:
            call("auto")
            assert not recorder.launches
            with mock.patch.dict(kernel_preference._MEASURED, {key: ((10**9, True),)}):
                got = call("auto")
                tried = len(recorder.launches)
                assert torch.equal(call("auto"), got)
                assert 0 < len(recorder.launches) - tried < tried
                assert torch.equal(got, call("triton"))
                launches = len(recorder.launches)
                with use_backend("torch"):
                    call("auto")
                call("reference")
                assert len(recorder.launches) == launches
    assert not caplog.records


def test_auto_leaves_what_is_wrong_and_says_so_once(caplog):
    x = [t.to(BF16) for t in linear_inputs((3, 5), 40, 24)]
    key = ("sm_90", "linear", (40, 24, "norm, gelu"), False, BF16)
    right = triton_launch.fold

    def without_the_offset(*args: object) -> tuple[Tensor, Tensor]:
        folded, vectors = right(*args)
        return folded, torch.stack((vectors[0], vectors[1] + 1))

    want = _linear(x, "torch")
    with (
        without_a_gpu("sm_90"),
        mock.patch.dict(kernel_preference._MEASURED, {key: ((10**9, True),)}),
        mock.patch.object(triton_launch, "fold", without_the_offset),
    ):
        assert torch.equal(_linear(x), want)
        assert torch.equal(_linear(x), want)
    assert len(caplog.records) == 1
    assert "linear of widths (40, 24)" in caplog.text
    assert "does not use the backend triton" in caplog.text


def test_nothing_is_tried_where_it_cannot_be(caplog):
    """Under torch.func and modes that see operators, whose errors would count as the kernels'."""
    x = [t.to(BF16) for t in linear_inputs((3, 5), 40, 24)]
    key = ("sm_90", "linear", (40, 24, "norm, gelu"), False, BF16)
    with (
        without_a_gpu("sm_90") as recorder,
        mock.patch.dict(kernel_preference._MEASURED, {key: ((10**9, True),)}),
    ):
        torch.vmap(lambda t: _linear([t, *x[1:]]))(x[0])
        torch.func.grad(lambda t: _linear([t, *x[1:]]).float().sum())(x[0])
        with FakeTensorMode(allow_non_fake_inputs=True):
            _linear(x)
        assert not recorder.launches
        _linear(x)
        assert recorder.launches
    assert not caplog.records


def test_a_trial_without_memory_is_repeated():
    kind = validation.Kind("linear", torch.device("cpu"), (40, 24), (), BF16, BF16)
    with mock.patch("crossvit_kernels.check.what_is_wrong", side_effect=torch.OutOfMemoryError):
        assert not validation.trusted("triton", kind, False)
    with mock.patch("crossvit_kernels.check.what_is_wrong", return_value=(0.0, None)):
        assert validation.trusted("triton", kind, False)


def test_validating_ahead_of_time():
    """Of the one backend that has kernels for it."""
    with without_a_gpu("sm_90"):
        for operation, widths, heads in (
            *(("linear", (40, 72), ()), ("self_attention", (96,), (3,)), ("patch_embed", (24, 4), ())),
            ("add_position", (24,), ()),
        ):
            kind = {"widths": widths, "num_heads": heads, "dtype": BF16, "device": "cpu"}
            assert validate(operation, **kind) is None
            assert f"it does not implement {operation}" in validate(operation, **kind, backend="cuda")


def test_auto_leaves_what_the_kernels_do_not_take_and_what_is_compiled():
    x = [t.to(BF16) for t in linear_inputs((3, 5), 40, 24)]
    keys = {
        ("sm_90", "linear", (40, 24, "norm, gelu"), training, BF16): ((10**9, True),)
        for training in (False, True)
    }
    scale = torch.ones(3, requires_grad=True)
    with without_a_gpu("sm_90") as recorder, mock.patch.dict(kernel_preference._MEASURED, keys):
        _linear(x, residual_scale=scale)
        torch.compile(lambda t: _linear([t, *x[1:]]), fullgraph=True, backend="eager")(x[0])
        assert not recorder.launches
