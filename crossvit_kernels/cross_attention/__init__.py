"""Single-query cross-attention: the CLS token of one branch reads the patch tokens of the other.

Shapes throughout: B images, P patches, N = 1 + P tokens, C channels, H heads, d = C / H.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import Call, choose
from ..dropout import draw_seed
from ..modes import autocast_enabled, plain_operators_only, without_autocast
from . import absorbed, op, reference
from .checks import (
    check_devices_and_dtypes,
    check_heads,
    check_matrix,
    check_probability,
    check_scale,
    check_vector,
    got,
    matrix_dtype,
)
from .operands import Operands

__all__ = ["cross_attention"]

# Best first: the order in which "auto" tries them; that of the first two depends on the size of the call
# (cross_attention/gpu_preference.py).
IMPLEMENTATIONS: dict[str, Callable] = {
    "cuda": partial(op.cross_attention, backend="cuda"),
    "triton": partial(op.cross_attention, backend="triton"),
    "cpu": partial(op.cross_attention, backend="cpu"),
    "torch": absorbed.cross_attention,
    "reference": reference.cross_attention,
}


@overload
def cross_attention(
    cls: Tensor,
    patches: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    bk: Tensor | None,
    wv: Tensor,
    bv: Tensor | None,
    wo: Tensor,
    bo: Tensor | None,
    *,
    num_heads: int,
    eps: float = ...,
    dropout_p: float = ...,
    proj_dropout_p: float = ...,
    residual_scale: Tensor | None = ...,
    return_attention: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def cross_attention(
    cls: Tensor,
    patches: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    bk: Tensor | None,
    wv: Tensor,
    bv: Tensor | None,
    wo: Tensor,
    bo: Tensor | None,
    *,
    num_heads: int,
    eps: float = ...,
    dropout_p: float = ...,
    proj_dropout_p: float = ...,
    residual_scale: Tensor | None = ...,
    return_attention: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


def cross_attention(
    cls: Tensor,
    patches: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    bk: Tensor | None,
    wv: Tensor,
    bv: Tensor | None,
    wo: Tensor,
    bo: Tensor | None,
    *,
    num_heads: int,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    proj_dropout_p: float = 0.0,
    residual_scale: Tensor | None = None,
    return_attention: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y = cls + residual_scale * MCA(LN([cls || patches])), the query taken from the CLS row alone.

    Eq. 6 and the first line of Eq. 7 of CrossViT (Chen, Fan, Panda, ICCV 2021), with the biases and the
    output projection of the released models. Nothing is concatenated, time and memory are linear in P.

    Args:
        cls: [B, 1, C], the CLS token of one branch, already projected to the other branch's width C.
        patches: [B, P, C], the patch tokens of the other branch; any strides, P may be 0.
        norm_weight, norm_bias: [C], affine part of the LayerNorm over [cls || patches].
        wq, wk, wv, wo: [C, C], the projections as torch.nn.Linear holds them.
        bq, bk, bv, bo: [C] or None. The gradient of bk is exactly zero: it cancels in the softmax.
        num_heads: H, a divisor of C.
        eps: added to the variance in the LayerNorm.
        dropout_p: dropout probability on the attention. Applied whenever it is above 0: pass 0 to evaluate.
        proj_dropout_p: the same on the output of the last projection.
        residual_scale: None, [B] (drop-path) or [B, 1, C], floating-point; multiplies MCA's output.
        return_attention: also return the attention [B, H, 1 + P] before its dropout, column 0 for the CLS
            token itself, float32 at least; differentiable.
        backend: "auto" or a name from `crossvit_kernels.backends()`; a named one never falls back.

    Returns:
        y [B, 1, C] in the dtype of the patches, or (y, attention).

    Differentiable any number of times, and in forward mode (torch.func.jvp), for which "auto" takes PyTorch's
    operators.

    Dtypes: outside autocast all tensors share one floating-point dtype; the LayerNorm's may stay in float32.
    Under autocast cls and the LayerNorm take the dtype of the patches, the projections take autocast's dtype.
    Sums are float32 at least.

    Raises:
        ValueError: a shape or a probability is wrong, or no backend has that name.
        TypeError: dtypes differ, or are not floating-point.
        RuntimeError: devices differ, or the backend cannot take this call; all reasons are listed.
    """
    device = patches.device.type
    autocast = autocast_enabled(device)
    vectors = {"norm_weight": norm_weight, "norm_bias": norm_bias, "bq": bq, "bk": bk, "bv": bv, "bo": bo}
    matrices = {"wq": wq, "wk": wk, "wv": wv, "wo": wo}
    if not torch.jit.is_tracing():  # a trace would record every comparison of sizes
        _check_shapes(cls, patches, vectors, matrices, num_heads, residual_scale)
    others = {"cls": cls, **vectors, **matrices, "residual_scale": residual_scale}
    norms = ("norm_weight", "norm_bias")
    check_devices_and_dtypes("patches", patches, others, ("residual_scale",), norms, autocast)
    check_probability("dropout_p", dropout_p)
    check_probability("proj_dropout_p", proj_dropout_p)

    if autocast:
        cls, norm_weight = cls.to(patches.dtype), norm_weight.to(patches.dtype)
        norm_bias = None if norm_bias is None else norm_bias.to(patches.dtype)
        dtype = matrix_dtype(patches, wq, autocast)
        wq, wk, wv, wo = (w.to(dtype) for w in (wq, wk, wv, wo))
        bq, bk, bv, bo = (None if b is None else b.to(dtype) for b in (bq, bk, bv, bo))
    sizes = ((patches.shape[2],), (num_heads,))
    call = Call(device, patches.dtype, wq.dtype, *sizes, plain_operators_only())
    compute = choose("cross_attention", backend, call, IMPLEMENTATIONS)

    # Everything random is drawn here, in this order, so that a backend is a function of its arguments.
    seed = draw_seed(cls.device) if dropout_p > 0 else None
    if residual_scale is not None:
        if residual_scale.ndim == 1:
            residual_scale = residual_scale[:, None, None].expand(cls.shape)
        residual_scale = residual_scale.to(cls.dtype)
    if proj_dropout_p > 0:
        kept = F.dropout(torch.ones_like(cls), proj_dropout_p)
        residual_scale = kept if residual_scale is None else kept * residual_scale

    operands = Operands(
        cls, patches, (norm_weight, norm_bias, wq, bq, wk, bk, wv, bv, wo, bo),
        num_heads, eps, dropout_p, seed, 0, residual_scale, return_attention,
    )  # fmt: skip
    with without_autocast(device):  # the operands have the right dtypes
        y, attention = compute(operands)
    return (y, attention) if return_attention else y


def _check_shapes(
    cls: Tensor,
    patches: Tensor,
    vectors: dict[str, Tensor | None],
    matrices: dict[str, Tensor],
    num_heads: int,
    residual_scale: Tensor | None,
) -> None:
    width = matrices["wq"].shape[-1]
    if patches.ndim != 3 or patches.shape[2] != width:
        raise ValueError(
            f"patches must have shape [B, P, C] with C = {width} (the width of wq), "
            f"{got(patches)}: did you pass your own branch's tokens?"
        )
    batch = patches.shape[0]
    if cls.ndim != 3 or cls.shape[0] != batch or cls.shape[1] != 1 or cls.shape[2] != width:
        raise ValueError(
            f"cls must have shape [B, 1, C] = [{batch}, 1, {width}] (B of patches, C of wq), "
            f"{got(cls)}: project it to the other branch's width first"
        )
    for name, matrix in matrices.items():
        check_matrix(name, matrix, "C, C", width, width)
    for name, vector in vectors.items():
        check_vector(name, vector, "C", width)
    check_heads("num_heads", num_heads, "C", width)
    check_scale("residual_scale", residual_scale, batch, width, "C")
