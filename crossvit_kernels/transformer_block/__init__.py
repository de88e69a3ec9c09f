"""A transformer block: self-attention and MLP, each behind a LayerNorm and beside a residual.

Shapes: B images, N tokens, C channels, H heads, d = C / H.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import kernel_preference
from ..backends import BACKENDS, Call, choose, selected
from ..cross_attention.checks import (
    check_devices_and_dtypes,
    check_heads,
    check_matrix,
    check_vector,
    got,
    matrix_dtype,
)
from ..library import any_requires_grad
from ..modes import autocast_enabled, forward_mode, plain_operators_only, without_autocast
from ..self_attention import reasons_of_triton
from . import gpu_op, reference

__all__ = ["BlockWeights", "transformer_block"]

# Best first: the order in which "auto" tries them.
IMPLEMENTATIONS: dict[str, Callable] = {
    "torch": reference.fused,
    "triton": gpu_op.transformer_block,
    "reference": reference.transformer_block,
}


@dataclass(frozen=True)
class BlockWeights:
    """The parameters of a block with MLPs of `hidden` channels. Biases may be None.

    Attributes:
        norm1_weight, norm1_bias: [C], LayerNorm before the attention.
        qkv_weight, qkv_bias: [3 C, C] and [3 C].
        proj_weight, proj_bias: [C, C] and [C].
        norm2_weight, norm2_bias: [C], LayerNorm before the MLP.
        fc1_weight, fc1_bias: [hidden, C] and [hidden].
        fc2_weight, fc2_bias: [C, hidden] and [C].
    """

    norm1_weight: Tensor
    norm1_bias: Tensor | None
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor | None
    norm2_weight: Tensor
    norm2_bias: Tensor | None
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, in this order."""
        return tuple(getattr(self, name) for name in _NAMES)


_NAMES = tuple(BlockWeights.__dataclass_fields__)
_NORMS = tuple(name for name in _NAMES if name.startswith("norm"))


def transformer_block(
    x: Tensor,
    weights: BlockWeights,
    *,
    num_heads: int,
    attention_scale: float | None = None,
    eps: float | tuple[float, float] = 1e-6,
    residual_scales: tuple[Tensor | None, Tensor | None] = (None, None),
    backend: str = "auto",
) -> Tensor:
    """y = u + s2 FFN(LN(u)) with u = x + s1 MSA(LN(x)): Eq. 1 of CrossViT (Chen, Fan, Panda, ICCV 2021).

    MSA is a linear layer to queries, keys and values, softmax attention of each head and a linear layer; FFN
    is a linear layer, exact GELU and a linear layer.

    Args:
        x: [B, N, C], any strides.
        weights: the parameters.
        num_heads: H, a divisor of C.
        attention_scale: what multiplies the scores; None for 1 / sqrt(d).
        eps: added to the variance in both LayerNorms, or in the first and in the second.
        residual_scales: s1 and s2, each [B], one number an image as drop-path draws them, or None for 1.
        backend: "auto" or a name from `crossvit_kernels.backends()`; a named one never falls back.

    Returns:
        y [B, N, C] in the dtype of x.

    `triton` keeps for backward x, the queries, keys and values, what the attention gives and a number for
    each query, u, and what GELU is taken of; it computes no product twice, and gives the same bits in every
    run. It has no gradients of the residual scales. "auto" takes it where it is ahead
    (kernel_preference.py), for now in training on large batches. (The CPU's program of a block is a part of
    the models, which pack its weights: crossvit/native_block.py.)

    Differentiable any number of times, but by `triton` where the matrices have another dtype than x: it then
    keeps x and u normalised and in that dtype, and refuses to be differentiated twice.

    Dtypes: outside autocast all tensors share one floating-point dtype; the LayerNorm's may stay in float32.
    Under autocast matrices are multiplied in autocast's dtype, x, the residuals and y keep theirs, and
    gradients of weights have the dtype of the weights: `triton` rounds its sums to no other. Sums are float32
    at least.

    Raises:
        ValueError: a shape or the scale is wrong, or no backend has that name.
        TypeError: dtypes differ, or are not floating-point.
        RuntimeError: devices differ, or the backend cannot take this call; all reasons are listed.
    """
    named: dict[str, Any] = dict(zip(_NAMES, weights.tensors(), strict=True))
    if not torch.jit.is_tracing():  # a trace would record every comparison of sizes
        _check_shapes(x, named, num_heads, residual_scales)
    if attention_scale is not None and not math.isfinite(attention_scale):
        raise ValueError(
            f"attention_scale must be a finite number, or None for 1 / sqrt(d), got {attention_scale}"
        )
    device = x.device.type
    autocast = autocast_enabled(device)
    scales = {f"residual_scales[{i}]": scale for i, scale in enumerate(residual_scales)}
    others = {**{f"weights.{name}": w for name, w in named.items()}, **scales}
    norms = tuple(f"weights.{name}" for name in _NORMS)
    check_devices_and_dtypes("x", x, others, tuple(scales), norms, autocast)
    dtype = matrix_dtype(x, weights.qkv_weight, autocast)

    scale = (x.shape[2] // num_heads) ** -0.5 if attention_scale is None else attention_scale
    call = _call(x, dtype, num_heads, scale, residual_scales)
    if kernel_preference.has_a_say(backend, call):
        backend = _chosen(x, weights, call)
    compute = choose("transformer_block", backend, call, IMPLEMENTATIONS)
    tensors = weights.tensors()
    both = (eps[0], eps[1]) if isinstance(eps, tuple) else (eps, eps)
    with without_autocast(device):  # the operands have the right dtypes
        return compute(x, tensors, residual_scales, num_heads, scale, both, dtype)


def preferred(x: Tensor, weights: BlockWeights, *, num_heads: int, attention_scale: float) -> str:
    """What "auto" stands for in a call whose arguments fit together: "triton", or "auto" for others."""
    dtype = matrix_dtype(x, weights.qkv_weight, autocast_enabled(x.device.type))
    call = _call(x, dtype, num_heads, attention_scale, ())
    if kernel_preference.has_a_say("auto", call):
        return _chosen(x, weights, call)
    named = selected() == "triton" and not BACKENDS["triton"].reasons_against(call)
    return "triton" if named else "auto"


def _call(
    x: Tensor, dtype: torch.dtype, num_heads: int, scale: float, residual_scales: tuple[Tensor | None, ...]
) -> Call:
    channels = x.shape[2]
    against = [("triton", reason) for reason in reasons_of_triton(channels // num_heads, scale)]
    if torch.is_grad_enabled() and any_requires_grad(residual_scales):
        against.append(("triton", "it has no gradients of the residual scales"))
    if forward_mode():
        against.append(("torch", "F.scaled_dot_product_attention has no forward-mode derivative"))
    sizes = (channels,), (num_heads,)
    return Call(
        *(x.device.type, x.dtype, dtype, *sizes), plain=plain_operators_only(), against=tuple(against)
    )


def _chosen(x: Tensor, weights: BlockWeights, call: Call) -> str:
    channels, hidden = x.shape[2], weights.fc1_weight.shape[0]
    return kernel_preference.chosen(
        *("transformer_block", call, x),
        shape=(x.shape[1], channels, hidden),
        number=x.shape[0],
        training=torch.is_grad_enabled() and any_requires_grad((x, *weights.tensors())),
        widths=(channels, hidden),
        heads=call.heads,
    )


def _check_shapes(
    x: Tensor,
    named: dict[str, Any],
    num_heads: int,
    residual_scales: tuple[Tensor | None, Tensor | None],
) -> None:
    if x.ndim != 3 or x.shape[2] < 1:
        raise ValueError(f"x must have shape [B, N, C] with C at least 1, {got(x)}")
    channels = x.shape[2]
    check_heads("num_heads", num_heads, "C", channels)
    fc1 = named["fc1_weight"]
    if fc1.ndim != 2 or fc1.shape[0] < 1:
        raise ValueError(f"weights.fc1_weight must have shape [hidden, C] with C = {channels}, {got(fc1)}")
    hidden = fc1.shape[0]
    shapes = {
        "qkv": ("3 C", "C", 3 * channels, channels),
        "proj": ("C", "C", channels, channels),
        "fc1": ("hidden", "C", hidden, channels),
        "fc2": ("C", "hidden", channels, hidden),
    }
    for name, (rows, columns, outputs, inputs) in shapes.items():
        weight = named[f"{name}_weight"]
        check_matrix(f"weights.{name}_weight", weight, f"{rows}, {columns}", outputs, inputs)
        check_vector(f"weights.{name}_bias", named[f"{name}_bias"], rows, outputs)
    for name in _NORMS:
        check_vector(f"weights.{name}", named[name], "C", channels)
    for i, scale in enumerate(residual_scales):
        if scale is not None and scale.shape != x.shape[:1]:
            raise ValueError(
                f"residual_scales[{i}] must have shape [B] = [{x.shape[0]}] (of x), {got(scale)}: "
                "pass one number for each image"
            )
