"""Single-query cross-attention: the CLS token of one branch reads the patch tokens of the other.

Shapes throughout: B images, P patches, N = 1 + P tokens, C channels, H heads, d = C / H.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import autocast_enabled
from ..backends import Call, choose
from . import absorbed, reference
from .operands import Operands

__all__ = ["cross_attention"]

# Best first: the order in which "auto" tries them.
IMPLEMENTATIONS = {"torch": absorbed.cross_attention, "reference": reference.cross_attention}


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

    Differentiable twice. Forward-mode differentiation (torch.func.jvp) works with backend="reference" only.

    Dtypes: outside autocast all tensors share one floating-point dtype. Under autocast cls takes the dtype of
    the patches, the projections take autocast's dtype, sums are float32 at least.

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
    _check_devices_and_dtypes({"cls": cls, **vectors, **matrices}, residual_scale, patches, autocast)
    _check_probability("dropout_p", dropout_p)
    _check_probability("proj_dropout_p", proj_dropout_p)

    if autocast:
        cls = cls.to(patches.dtype)
        dtype = patches.dtype if patches.dtype == torch.float64 else torch.get_autocast_dtype(device)
        wq, wk, wv, wo = (w.to(dtype) for w in (wq, wk, wv, wo))
        bq, bk, bv, bo = (None if b is None else b.to(dtype) for b in (bq, bk, bv, bo))
    compute = choose("cross_attention", backend, Call(device, patches.dtype, wq.dtype), IMPLEMENTATIONS)

    # Everything random is drawn here, in this order, so that a backend is a function of its arguments.
    attention_mask = None
    if dropout_p > 0:
        ones = torch.ones(
            (cls.shape[0], num_heads, 1 + patches.shape[1]),
            dtype=torch.promote_types(wq.dtype, torch.float32),
            device=cls.device,
        )
        attention_mask = F.dropout(ones, dropout_p)
    if residual_scale is not None:
        if residual_scale.ndim == 1:
            residual_scale = residual_scale[:, None, None]
        residual_scale = residual_scale.to(cls.dtype)
    if proj_dropout_p > 0:
        kept = F.dropout(torch.ones_like(cls), proj_dropout_p)
        residual_scale = kept if residual_scale is None else kept * residual_scale

    operands = Operands(
        cls, patches, norm_weight, norm_bias, wq, bq, wk, bk, wv, bv, wo, bo,
        num_heads, eps, attention_mask, residual_scale,
    )  # fmt: skip
    if autocast:  # the backend has its operands in the right dtypes; autocast would round its float32 sums
        with torch.autocast(device, enabled=False):
            y, attention = compute(operands)
    else:
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
    def got(tensor: Tensor) -> str:
        return f"got {list(tensor.shape)}"

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
        if matrix.ndim != 2 or matrix.shape[0] != width or matrix.shape[1] != width:
            raise ValueError(f"{name} must have shape [C, C] = [{width}, {width}], {got(matrix)}")
    for name, vector in vectors.items():
        if vector is not None and (vector.ndim != 1 or vector.shape[0] != width):
            raise ValueError(f"{name} must have shape [C] = [{width}], {got(vector)}")
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads must divide C = {width}, got {num_heads}")
    if residual_scale is not None and residual_scale.shape not in ((batch,), (batch, 1, width)):
        raise ValueError(
            f"residual_scale must have shape [B] = [{batch}] or [B, 1, C] = [{batch}, 1, {width}], "
            f"{got(residual_scale)}"
        )


def _check_devices_and_dtypes(
    tensors: dict[str, Tensor | None], residual_scale: Tensor | None, patches: Tensor, autocast: bool
) -> None:
    for name, tensor in {"patches": patches, "residual_scale": residual_scale, **tensors}.items():
        if tensor is None:
            continue
        if tensor.device != patches.device:
            raise RuntimeError(
                f"{name} is on {tensor.device}, patches on {patches.device}: move them together"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if not autocast and name != "residual_scale" and tensor.dtype != patches.dtype:
            raise TypeError(
                f"{name} must have the dtype of patches, {patches.dtype}, got {tensor.dtype}: "
                "cast it, or run under torch.autocast to mix them"
            )


def _check_probability(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie between 0 and 1, got {value}")
