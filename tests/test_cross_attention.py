"""What cross_attention says to bad input, and its options together. Its contract: test_contract.py."""

from __future__ import annotations

import pytest
import torch

from crossvit_kernels import backends, cross_attention
from tests.contract import GPU_BACKENDS
from tests.operations import NAMES, operands, oracle, relative_error

both = pytest.mark.parametrize("backend", [name for name in backends() if name not in GPU_BACKENDS])
LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@both
@LOW
def test_dropout_in_low_precision(dtype, backend):
    """The masks are drawn in float32, so that rates are exact; a float32 scale keeps the tokens' dtype."""
    tensors = operands(4, 40, 96, dtype)
    options = {"num_heads": 3, "dropout_p": 0.3, "proj_dropout_p": 0.2, "backend": backend}
    scale = torch.tensor([0.0, 1.5, 1.0, 2.0])
    torch.manual_seed(9)
    low = cross_attention(*tensors, **options, residual_scale=scale)
    torch.manual_seed(9)
    exact = cross_attention(*(x.float() for x in tensors), **options, residual_scale=scale)
    assert low.dtype == dtype
    assert relative_error(low, exact) < 0.05


def test_projection_dropout_and_residual_scale_together():
    tensors = operands()
    cls, y = tensors[0], oracle(tensors, 4)[0]
    got = cross_attention(
        *tensors, num_heads=4, proj_dropout_p=0.5, residual_scale=torch.tensor([0.5, 3.0]).double()
    )
    factors = ((got - cls) / (y - cls)).squeeze(1)
    for row, scale in zip(factors, (0.5, 3.0), strict=True):
        kept = row.abs() > 1e-9
        assert 10 < kept.sum() < 38
        assert torch.allclose(row[kept], torch.tensor(2 * scale).double())


# Errors: before anything is computed, in words


def replaced(**changes: object) -> dict[str, object]:
    arguments: dict[str, object] = dict(zip(NAMES, operands(), strict=True))
    return {**arguments, "num_heads": 4, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"patches": torch.zeros(2, 17, 96).double()}, ValueError, r"patches must have shape .* with C = 48"),
        ({"patches": torch.zeros(17, 48).double()}, ValueError, r"\[17, 48\]: did you pass your own branch"),
        ({"cls": torch.zeros(3, 1, 48).double()}, ValueError, r"cls must have shape .* = \[2, 1, 48\]"),
        ({"cls": torch.zeros(2, 2, 48).double()}, ValueError, r"got \[2, 2, 48\]"),
        ({"wk": torch.zeros(48, 24).double()}, ValueError, r"wk must have shape \[C, C\] = \[48, 48\]"),
        ({"bo": torch.zeros(24).double()}, ValueError, r"bo must have shape \[C\] = \[48\], got \[24\]"),
        ({"norm_bias": torch.zeros(1, 48).double()}, ValueError, r"norm_bias must have shape \[C\]"),
        (
            {"wq": torch.zeros(0, 0).double(), "patches": torch.zeros(2, 17, 0).double()},
            ValueError,
            r"cls must have shape \[B, 1, C\] = \[2, 1, 0\]",
        ),
        ({"num_heads": 5}, ValueError, "num_heads must divide C = 48, got 5"),
        ({"num_heads": 0}, ValueError, "num_heads must divide C = 48, got 0"),
        ({"dropout_p": 1.1}, ValueError, "dropout_p must lie between 0 and 1, got 1.1"),
        ({"proj_dropout_p": -0.1}, ValueError, "proj_dropout_p must lie between 0 and 1"),
        ({"residual_scale": torch.ones(2).int()}, TypeError, "residual_scale must be a floating-point"),
        ({"residual_scale": torch.ones(2, device="meta")}, RuntimeError, "residual_scale is on meta"),
        ({"residual_scale": torch.ones(3)}, ValueError, r"residual_scale must have shape \[B\] = \[2\]"),
        ({"wq": torch.zeros(48, 48)}, TypeError, "wq must have the dtype of patches, torch.float64"),
        ({"patches": torch.zeros(2, 17, 48).long()}, TypeError, "patches must be a floating-point tensor"),
        ({"wv": torch.zeros(48, 48, device="meta").double()}, RuntimeError, "wv is on meta, patches on cpu"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_words(changes, error, words):
    with pytest.raises(error, match=words):
        cross_attention(**replaced(**changes))


def test_what_a_named_backend_cannot_take_is_refused_with_its_reason():
    words = "cpu: it does not take torch.float64 tokens with torch.float64 weights"
    with pytest.raises(RuntimeError, match=words):
        cross_attention(**replaced(), backend="cpu")
    on_meta = {name: x.to("meta") for name, x in zip(NAMES, operands(dtype=torch.float32), strict=True)}
    with pytest.raises(RuntimeError, match="cpu: it runs on cpu, the tokens are on meta"):
        cross_attention(**on_meta, num_heads=4, backend="cpu")
