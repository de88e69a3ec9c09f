"""Self-attention of the GPU backends as an operator of torch, with kernels of its own for the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..library import any_requires_grad, define, differentiate_by, vjp
from . import reference


def self_attention(qkv: Tensor, num_heads: int, scale: float, dtype: torch.dtype) -> Tensor:
    """y, as `reference.output` defines it, by Triton's kernels."""
    if torch.is_grad_enabled() and any_requires_grad((qkv,)):
        return SelfAttention.apply(qkv, num_heads, scale, dtype, True)[0]
    return FORWARD(qkv, num_heads, scale, dtype, False)[0]


def _forward(
    qkv: Tensor, num_heads: int, scale: float, dtype: torch.dtype, saves: bool
) -> tuple[Tensor, Tensor]:
    from . import triton_launch

    return triton_launch.forward(qkv, num_heads, scale, dtype, saves)


def _forward_fake(
    qkv: Tensor, num_heads: int, scale: float, dtype: torch.dtype, saves: bool
) -> tuple[Tensor, Tensor]:
    batch, tokens, columns = qkv.shape
    shape = (batch, num_heads, tokens) if saves else (0,)
    return qkv.new_empty((batch, tokens, columns // 3)), qkv.new_empty(shape, dtype=torch.float32)


def _backward(
    grad: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, num_heads: int, scale: float, dtype: torch.dtype
) -> Tensor:
    from . import triton_launch

    return triton_launch.backward(grad, qkv, y.contiguous(), lse.contiguous(), num_heads, scale, dtype)


def _backward_fake(
    grad: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, num_heads: int, scale: float, dtype: torch.dtype
) -> Tensor:
    return qkv.new_empty(qkv.shape)


_OPTIONS = "int num_heads, float scale, ScalarType dtype"
FORWARD = define(
    f"self_attention_triton(Tensor qkv, {_OPTIONS}, bool saves) -> (Tensor, Tensor)", _forward, _forward_fake
)
BACKWARD = define(
    f"self_attention_triton_backward(Tensor grad, Tensor qkv, Tensor y, Tensor lse, {_OPTIONS}) -> Tensor",
    _backward,
    _backward_fake,
)


class SelfAttention(torch.autograd.Function):
    """y and the log-sum-exp, which is for backward alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return FORWARD(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        qkv, *ctx.options, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(qkv, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
        qkv, y, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            (found,) = vjp(lambda x: (reference.output(x, *ctx.options),), (qkv,), (grad,))
        else:
            found = BACKWARD(grad, qkv, y, lse, *ctx.options)
        return found, None, None, None, None


differentiate_by(FORWARD, lambda *args: SelfAttention.apply(*args[:-1], True))
