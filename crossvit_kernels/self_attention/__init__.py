"""Multi-head self-attention from packed queries, keys and values.

Shapes: B images, N tokens, C channels, H heads, d = C / H.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernel_preference
from ..backends import Call, choose
from ..cross_attention.checks import check_heads, check_probability, got, matrix_dtype
from ..library import any_requires_grad
from ..modes import autocast_enabled, forward_mode, plain_operators_only, without_autocast
from . import gpu_op, op, reference

__all__ = ["self_attention"]

# Best first: the order in which "auto" tries them.
IMPLEMENTATIONS: dict[str, Callable] = {
    "cpu": op.self_attention,
    "torch": reference.fused,
    "triton": gpu_op.self_attention,
    "reference": reference.output,
}
# PyTorch's fused operator has a backward of its own; that of `cpu` computes the definition once more.
WITH_GRADIENTS = {name: IMPLEMENTATIONS[name] for name in ("torch", "cpu", "triton", "reference")}
# The CPU's kernel keeps the scores of some queries over all tokens, which then leave its caches.
_LONGEST_ON_CPU = 3072
_WIDEST_HEAD = 128  # whose rows Triton's kernels still keep in registers


@overload
def self_attention(
    qkv: Tensor,
    num_heads: int,
    *,
    scale: float | None = ...,
    dropout_p: float = ...,
    return_attention: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def self_attention(
    qkv: Tensor,
    num_heads: int,
    *,
    scale: float | None = ...,
    dropout_p: float = ...,
    return_attention: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


def self_attention(
    qkv: Tensor,
    num_heads: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_attention: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y = softmax(scale q k^T) v of each head, the heads side by side.

    MSA of Eq. 1 of CrossViT (Chen, Fan, Panda, ICCV 2021) between its two linear layers.

    Args:
        qkv: [B, N, 3 C], any strides: queries, keys and values side by side, within each of them the heads,
            as timm's layer `qkv` gives them.
        num_heads: H, a divisor of C.
        scale: what multiplies the scores; None for 1 / sqrt(d).
        dropout_p: dropout probability on the attention. Applied whenever it is above 0: pass 0 to evaluate.
        return_attention: also return the attention [B, H, N, N] before its dropout, float32 at least;
            differentiable.
        backend: "auto" or a name from `crossvit_kernels.backends()`; a named one never falls back.

    Returns:
        y [B, N, C] in the dtype of qkv, or (y, attention).

    The backends `cpu` and `triton` take positive scales; they have neither dropout nor the attention to
    return, and `torch` (F.scaled_dot_product_attention) has neither of these two: "auto" then takes
    `reference`. `triton` takes heads of 16, 32, … 128 channels, on GPUs; "auto" takes it where it is ahead of
    PyTorch's (kernel_preference.py).

    Differentiable any number of times. `cpu` computes forward natively and gradients through the definition
    in PyTorch's operators, from qkv, which is all that is saved: "auto" takes `torch` where a gradient is
    wanted, and for more than 3,072 tokens, where it is faster. `triton` has kernels for the gradient, and
    saves y and a number for each query beside qkv; results are the same bits in every run.

    Dtypes: any floating-point one. Under autocast products are in autocast's dtype and y keeps that of qkv.
    Sums are float32 at least.

    Raises:
        ValueError: a shape, the scale or the probability is wrong, or no backend has that name.
        TypeError: qkv is not floating-point.
        RuntimeError: the backend cannot take this call; all reasons are listed.
    """
    if not torch.jit.is_tracing():  # a trace would record every comparison of sizes
        _check_shape(qkv, num_heads)
    if not qkv.is_floating_point():
        raise TypeError(f"qkv must be a floating-point tensor, got {qkv.dtype}")
    check_probability("dropout_p", dropout_p)
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, or None for 1 / sqrt(d), got {scale}")
    channels = qkv.shape[2] // 3
    device = qkv.device.type
    dtype = matrix_dtype(qkv, qkv, autocast_enabled(device))
    against = []
    if scale is None:
        scale = (channels // num_heads) ** -0.5
    elif scale <= 0:
        against.append(("cpu", _positive(scale)))
    head_channels = channels // num_heads
    against += [("triton", reason) for reason in reasons_of_triton(head_channels, scale)]
    if forward_mode():
        against.append(("torch", "F.scaled_dot_product_attention has no forward-mode derivative"))
    for name in ("cpu", "torch", "triton"):
        if dropout_p > 0:
            against.append((name, f"it has no dropout, got dropout_p = {dropout_p}"))
        if return_attention:
            against.append((name, "it does not return the attention"))
    call = Call(
        *(device, qkv.dtype, dtype, (channels,), (num_heads,)),
        plain=plain_operators_only(),
        against=tuple(against),
    )
    wants_gradients = torch.is_grad_enabled() and any_requires_grad((qkv,))
    if kernel_preference.has_a_say(backend, call):
        backend = kernel_preference.chosen(
            *("self_attention", call, qkv),
            shape=(qkv.shape[1], head_channels),
            number=qkv.shape[0] * num_heads,
            training=wants_gradients,
            widths=(channels,),
            heads=(num_heads,),
        )
    torch_first = wants_gradients or (device == "cpu" and qkv.shape[1] > _LONGEST_ON_CPU)
    implementations = WITH_GRADIENTS if torch_first else IMPLEMENTATIONS
    compute = choose("self_attention", backend, call, implementations)
    with without_autocast(device):  # the operands have the right dtypes
        if not (return_attention or dropout_p > 0):
            return compute(qkv, num_heads, scale, dtype)
        mask = None
        if dropout_p > 0:
            batch, tokens, _ = qkv.shape
            ones = qkv.new_ones(
                (batch, num_heads, tokens, tokens), dtype=torch.promote_types(dtype, torch.float32)
            )
            mask = F.dropout(ones, dropout_p)
        y, attention = reference.self_attention(qkv, num_heads, scale, dtype, mask)
    return (y, attention) if return_attention else y


def reasons_of_triton(head_channels: int, scale: float) -> list[str]:
    """Why Triton's kernels cannot take heads of so many channels with this scale; empty when they can."""
    reasons = [] if scale > 0 else [_positive(scale)]
    if head_channels % 16 or head_channels > _WIDEST_HEAD:
        reasons.append(f"it takes heads of 16, 32, … {_WIDEST_HEAD} channels, got {head_channels}")
    return reasons


def _positive(scale: float) -> str:
    return f"it takes positive scales, got {scale}"


def _check_shape(qkv: Tensor, num_heads: int) -> None:
    if qkv.ndim != 3 or qkv.shape[2] % 3:
        raise ValueError(
            f"qkv must have shape [B, N, 3 C], {got(qkv)}: put queries, keys and values side by side"
        )
    check_heads("num_heads", num_heads, "C", qkv.shape[2] // 3)
