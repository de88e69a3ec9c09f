"""What cross_fusion says to bad input, and what it is made of. Its contract: test_contract.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import zeros

from crossvit_kernels import FusionWeights, cross_attention, cross_fusion
from tests.operations import OPERATIONS, Size, relative_error

FUSION = OPERATIONS[1]


def arguments(**changes: object) -> dict[str, object]:
    """Branch S has 48 channels, branch L 24."""
    tensors = FUSION.inputs(Size(), torch.float32)
    weights = {"weights_s": FusionWeights(*tensors[2:20]), "weights_l": FusionWeights(*tensors[20:])}
    for name in list(changes):
        branch, _, weight = name.partition("__")
        if weight:
            weights[branch] = dataclasses.replace(weights[branch], **{weight: changes.pop(name)})
    tokens = {"tokens_s": tensors[0], "tokens_l": tensors[1]}
    return {**tokens, **weights, "num_heads": (3, 4), **changes}


def test_it_is_f_then_cross_attention_then_g():
    """Spelled out with cross_attention, both directions from the tokens before the fusion."""
    given = arguments()
    tokens = (given["tokens_s"], given["tokens_l"])
    kept = [x.clone() for x in tokens]
    got = cross_fusion(**given)
    for b, (weights, heads) in enumerate(((given["weights_s"], 3), (given["weights_l"], 4))):
        w = weights

        def project(x, norm_weight, norm_bias, weight, bias):
            normed = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, 1e-6)
            return F.linear(F.gelu(normed), weight, bias)

        own, other = tokens[b], tokens[1 - b]
        c = project(own[:, :1], w.project_norm_weight, w.project_norm_bias, w.project_weight, w.project_bias)
        y = cross_attention(c, other[:, 1:], *w.tensors()[4:14], num_heads=heads)
        new = project(y, w.back_norm_weight, w.back_norm_bias, w.back_weight, w.back_bias)
        assert relative_error(got[b][:, :1], new) < 1e-5
        assert torch.equal(got[b][:, 1:], own[:, 1:])
    assert all(torch.equal(x, y) for x, y in zip(tokens, kept, strict=True)), (
        "the arguments stay as they were"
    )
    assert all(x.data_ptr() != y.data_ptr() for x, y in zip(tokens, got, strict=True))


def test_weights_are_frozen():
    weights = arguments()["weights_s"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        weights.wq = None


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"tokens_s": zeros(2, 48)}, ValueError, r"tokens_s must have shape \[B, 1 \+ P, C\]"),
        ({"tokens_l": zeros(2, 0, 24)}, ValueError, r"with the CLS token as row 0, got \[2, 0, 24\]"),
        ({"tokens_l": zeros(3, 9, 24)}, ValueError, "batch size of tokens_s, B = 2, got"),
        (
            {"tokens_l": zeros(2, 9, 20)},
            ValueError,
            r"weights_s.project_weight must have shape \[C_L, C_S\]",
        ),
        ({"tokens_l": zeros(2, 9, 24).double()}, TypeError, "tokens_l must have the dtype of tokens_s"),
        ({"tokens_s": zeros(2, 9, 48).int()}, TypeError, "tokens_s must be a floating-point tensor"),
        (
            {"tokens_l": zeros(2, 9, 24, device="meta")},
            RuntimeError,
            "tokens_l is on meta, tokens_s on cpu",
        ),
        (
            {"weights_s__wq": zeros(24, 20)},
            ValueError,
            r"s.wq must have shape \[C_L, C_L\] = \[24, 24\]",
        ),
        (
            {"weights_l__wo": zeros(24, 24)},
            ValueError,
            r"l.wo must have shape \[C_S, C_S\] = \[48, 48\]",
        ),
        ({"weights_l__back_weight": zeros(48, 24)}, ValueError, r"\[C_L, C_S\] = \[24, 48\]"),
        (
            {"weights_s__back_bias": zeros(24)},
            ValueError,
            r"s.back_bias must have shape \[C_S\] = \[48\]",
        ),
        (
            {"weights_s__bk": zeros(24).double()},
            TypeError,
            "weights_s.bk must have the dtype of tokens_s",
        ),
        (
            {"weights_s__bk": zeros(24).long()},
            TypeError,
            "weights_s.bk must be a floating-point tensor",
        ),
        ({"weights_l__wk": zeros(48, 48, device="meta")}, RuntimeError, "weights_l.wk is on meta"),
        ({"weights_s__norm_weight": zeros(24).double()}, TypeError, "s.norm_weight must have the dtype of"),
        ({"num_heads": 3}, ValueError, "num_heads must be a pair, heads of S's and of L's direction, got 3"),
        ({"num_heads": (5, 4)}, ValueError, "num_heads of S's direction must divide C_L = 24, got 5"),
        ({"num_heads": (3, 0)}, ValueError, "num_heads of L's direction must divide C_S = 48, got 0"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must lie between 0 and 1, got 1.5"),
        ({"proj_dropout_p": -1.0}, ValueError, "proj_dropout_p must lie between 0 and 1"),
        (
            {"residual_scales": (torch.ones(2), torch.ones(3))},
            ValueError,
            r"residual_scales of L must have shape \[B\] = \[2\]",
        ),
        (
            {"residual_scales": (torch.ones(2).int(), None)},
            TypeError,
            "scales of S must be a floating",
        ),
        (
            {"backend": "fast"},
            ValueError,
            "backend must be one of auto, cpu, cuda, triton, torch, reference, got 'fast'",
        ),
    ],
)
def test_bad_input_is_refused_in_words(changes, error, words):
    with pytest.raises(error, match=words):
        cross_fusion(**arguments(**changes))


def test_no_channels_are_refused():
    tensors = FUSION.inputs(Size(width=0, heads=1, other_heads=3), torch.float32)
    weights = FusionWeights(*tensors[2:20]), FusionWeights(*tensors[20:])
    with pytest.raises(ValueError, match="C_S must be at least 1, got 0: a token needs channels"):
        cross_fusion(*tensors[:2], *weights, num_heads=(3, 1))


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_norms_may_stay_in_float32(backend):
    """As in a model that was cast to half precision but for its LayerNorms."""
    given = arguments()
    for branch in ("weights_s", "weights_l"):
        halves = {name: x if "norm" in name else x.bfloat16() for name, x in vars(given[branch]).items()}
        given[branch] = FusionWeights(**halves)
    tokens = {name: given[name].bfloat16() for name in ("tokens_s", "tokens_l")}
    got = cross_fusion(**{**given, **tokens}, backend=backend)
    want = cross_fusion(**arguments_like(given), backend="reference")
    for mine, other in zip(got, want, strict=True):
        assert mine.dtype == torch.bfloat16
        assert relative_error(mine, other) < 0.05


def arguments_like(given: dict[str, object]) -> dict[str, object]:
    """The same values in float64."""
    double = {name: x.double() for name, x in given.items() if isinstance(x, torch.Tensor)}
    for branch in ("weights_s", "weights_l"):
        double[branch] = FusionWeights(**{name: x.double() for name, x in vars(given[branch]).items()})
    return {**given, **double}


def test_two_dtypes_of_tokens_are_refused_under_autocast_too():
    given = arguments()
    given["tokens_l"] = given["tokens_l"].bfloat16()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match="tokens_l must have the dtype of tokens_s"),
    ):
        cross_fusion(**given)
