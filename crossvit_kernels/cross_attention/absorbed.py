"""The same function in one pass over the tokens, in PyTorch operators: no K, no V, no concatenation.

With x^ the normalised token (LayerNorm without its affine part), per head h:

    qt_h = gamma * (Wk_h^T q_h) / sqrt(d)       the query, absorbed into token space     [C]
    p_hn = softmax_n(qt_h . x^_n)               b_k and beta cancel in the softmax
    z_h  = sum_n p_hn x^_n                                                               [C]
    o_h  = Wv_h (gamma * z_h + t_h beta) + t_h b_v      t_h = sum_n p_hn, 1 without dropout

so K and V cost 4 N C H FLOPs instead of 4 N C^2, and every gradient of a weight is a product over the batch,
not over the tokens. The attention of absorbed queries over normalised tokens is `AbsorbedAttention`;
everything around it is B or B H rows and left to autograd.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modes import forward_mode, without_autocast
from .operands import Operands


def cross_attention(operands: Operands) -> tuple[Tensor, Tensor]:
    """y and the attention, as `reference.cross_attention` defines them."""
    cls, patches = operands.cls, operands.patches
    norm_weight, norm_bias, wq, bq, wk, bk, wv, bv, wo, bo = operands.weights
    num_heads, eps = operands.num_heads, operands.eps
    attention_mask, residual_scale = operands.attention_mask(), operands.residual_scale
    dtype = wq.dtype
    width = cls.shape[-1]
    head_width = width // num_heads
    gamma = norm_weight.to(cls.dtype)
    beta = None if norm_bias is None else norm_bias.to(cls.dtype)

    q = F.linear(F.layer_norm(cls, (width,), gamma, beta, eps).to(dtype), wq, bq)  # [B, 1, C]
    q = q.view(cls.shape[0], num_heads, head_width).transpose(0, 1)  # [H, B, d]
    query = torch.bmm(q, wk.view(num_heads, head_width, width)).transpose(0, 1)  # [B, H, C]
    query = (query * (gamma * head_width**-0.5)).to(dtype)

    z, attention = _attend(cls, patches, query, attention_mask, eps)

    total = None if attention_mask is None else (attention * attention_mask).sum(-1, keepdim=True).to(dtype)
    u = z * gamma.to(dtype)  # [B, H, C]
    if beta is not None:
        u = u + (beta.to(dtype) if total is None else total * beta.to(dtype))
    o = torch.bmm(u.transpose(0, 1), wv.view(num_heads, head_width, width).mT).transpose(0, 1)  # [B, H, d]
    if bv is not None:
        bv = bv.view(num_heads, head_width)
        o = o + (bv if total is None else total * bv)
    output = F.linear(o.reshape(cls.shape[0], 1, width), wo, bo)
    if _differentiated(bk):
        output = ZeroGradient.apply(output, bk)
    if residual_scale is not None:
        output = output * residual_scale
    return (cls + output).to(cls.dtype), attention


def _attend(
    cls: Tensor, patches: Tensor, query: Tensor, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`AbsorbedAttention`, or its forward alone where there is nothing to differentiate."""
    if _differentiated(cls, patches, query):
        return AbsorbedAttention.apply(cls, patches, query, mask, eps)
    return AbsorbedAttention.forward(cls, patches, query, mask, eps)


def _differentiated(*inputs: Tensor | None) -> bool:
    """Whether to go through an autograd.Function: where there is something to differentiate, and not under
    torch.jit.trace, whose graphs cannot hold one, nor in forward mode, which it has no rule for."""
    if not torch.is_grad_enabled() or torch.jit.is_tracing() or forward_mode():
        return False
    return any(x is not None and x.requires_grad for x in inputs)


class ZeroGradient(torch.autograd.Function):
    """x unchanged; `constant`, on which it does not depend, gets a gradient of zeros instead of None.

    The key's bias cancels in the softmax: its gradient is exactly zero, and optimisers, DDP and people who
    loop over parameters expect a tensor.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, constant: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (constant,) = ctx.saved_tensors
        return grad, torch.zeros_like(constant)


class AbsorbedAttention(torch.autograd.Function):
    """z [B, H, C] and the attention [B, H, 1 + P] of absorbed queries over normalised tokens.

    Saves its inputs and the attention, nothing of size B N C; the tokens are normalised again in backward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        cls: Tensor, patches: Tensor, query: Tensor, mask: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        cls_hat, patches_hat = (_normalise(x, query.dtype, eps)[0] for x in (cls, patches))
        attention = _softmax_scores(query, cls_hat, patches_hat)
        weights = (attention if mask is None else attention * mask).to(query.dtype)
        z = torch.baddbmm(weights[..., :1] * cls_hat, weights[..., 1:], patches_hat)
        return z, attention

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        cls, patches, query, mask, eps = inputs
        _, attention = output
        ctx.save_for_backward(cls, patches, query, mask, attention)
        ctx.set_materialize_grads(False)
        ctx.eps = eps

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, dattention: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: checkpointing recomputes at each reading
        with without_autocast(saved[0].device.type):
            return _backward(ctx, saved, dz, dattention)


def _backward(
    ctx: Any, saved: tuple[Tensor, ...], dz: Tensor | None, dattention: Tensor | None
) -> tuple[Tensor | None, ...]:
    # The saved attention is an output, so a gradient of this gradient passes through it to the inputs.
    cls, patches, query, mask, attention = saved
    needs_cls, needs_patches, needs_query, *_ = ctx.needs_input_grad
    dtype = query.dtype
    cls_hat, cls_mean, cls_rstd = _normalise(cls, dtype, ctx.eps)
    patches_hat, patches_mean, patches_rstd = _normalise(patches, dtype, ctx.eps)

    dz = torch.zeros_like(query) if dz is None else dz
    dp = _scores(dz, cls_hat, patches_hat).to(attention.dtype)
    if mask is not None:
        dp = dp * mask
    if dattention is not None:
        dp = dp + dattention
    ds = (attention * (dp - (attention * dp).sum(-1, keepdim=True))).to(dtype)
    dquery = torch.baddbmm(ds[..., :1] * cls_hat, ds[..., 1:], patches_hat) if needs_query else None

    # d x^_n = sum_h p_hn dz_h + ds_hn qt_h: one product with the two sums side by side.
    weights = attention if mask is None else attention * mask
    left = torch.cat((weights.to(dtype), ds), dim=1).mT  # [B, N, 2H]
    right = torch.cat((dz, query), dim=1)  # [B, 2H, C]
    dcls = dpatches = None
    if needs_cls:
        dcls = _normalise_backward(left[:, :1] @ right, cls, cls_mean, cls_rstd)
    if needs_patches:
        dpatches = _normalise_backward(left[:, 1:] @ right, patches, patches_mean, patches_rstd)
    return dcls, dpatches, dquery, None, None


def _normalise(x: Tensor, dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(variance + eps) over the channels, rounded to `dtype`; the mean; 1 / sqrt(...)."""
    hat, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
    return hat.to(dtype), mean, rstd


def _normalise_backward(dhat: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    outputs = [True, False, False]
    return torch.ops.aten.native_layer_norm_backward(
        dhat.to(x.dtype), x, x.shape[-1:], mean, rstd, None, None, outputs
    )[0]


def _scores(query: Tensor, cls_hat: Tensor, patches_hat: Tensor) -> Tensor:
    """query . token for the CLS row and the patches, side by side: [B, H, 1 + P]."""
    return torch.cat((query @ cls_hat.mT, query @ patches_hat.mT), dim=-1)


def _softmax_scores(query: Tensor, cls_hat: Tensor, patches_hat: Tensor) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return _scores(query, cls_hat, patches_hat).softmax(-1, dtype=dtype)
