"""The fusion of both branches: each branch's CLS token reads the other's patches and comes back.

Shapes: B images; branch S has P_S patches of C_S channels, branch L has P_L of C_L.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import Call, choose
from ..cross_attention import absorbed
from ..cross_attention import reference as attention_reference
from ..cross_attention.checks import (
    check_devices_and_dtypes,
    check_heads,
    check_matrix,
    check_probability,
    check_scale,
    check_vector,
    got,
    matrix_dtype,
)
from ..cross_attention.operands import Weights
from ..dropout import draw_seed
from ..modes import autocast_enabled, plain_operators_only, without_autocast
from . import op
from .operands import Operands
from .reference import fusion_with

__all__ = ["FusionWeights", "cross_fusion"]

# Best first: the order in which "auto" tries them; that of the first two depends on the size of the call
# (cross_attention/gpu_preference.py).
IMPLEMENTATIONS: dict[str, Callable] = {
    "cuda": partial(op.cross_fusion, backend="cuda"),
    "triton": partial(op.cross_fusion, backend="triton"),
    "cpu": partial(op.cross_fusion, backend="cpu"),
    "torch": fusion_with(absorbed.cross_attention),
    "reference": fusion_with(attention_reference.cross_attention),
}


@dataclass(frozen=True)
class FusionWeights:
    """The parameters of one direction: a CLS token of width `own`, patches of width C.

    Attributes:
        project_norm_weight, project_norm_bias: [own], LayerNorm of f.
        project_weight, project_bias: [C, own] and [C], linear layer of f.
        norm_weight to bo: [C] and [C, C], as `cross_attention` takes them.
        back_norm_weight, back_norm_bias: [C], LayerNorm of g.
        back_weight, back_bias: [own, C] and [own], linear layer of g.

    Biases may be None.
    """

    project_norm_weight: Tensor
    project_norm_bias: Tensor | None
    project_weight: Tensor
    project_bias: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor | None
    wq: Tensor
    bq: Tensor | None
    wk: Tensor
    bk: Tensor | None
    wv: Tensor
    bv: Tensor | None
    wo: Tensor
    bo: Tensor | None
    back_norm_weight: Tensor
    back_norm_bias: Tensor | None
    back_weight: Tensor
    back_bias: Tensor | None

    def tensors(self) -> Weights:
        """All of them, in this order."""
        return tuple(getattr(self, name) for name in _NAMES)


_NAMES = tuple(FusionWeights.__dataclass_fields__)
_NORMS = frozenset(name for name in _NAMES if "norm" in name)


@overload
def cross_fusion(
    tokens_s: Tensor,
    tokens_l: Tensor,
    weights_s: FusionWeights,
    weights_l: FusionWeights,
    *,
    num_heads: tuple[int, int],
    eps: float = ...,
    dropout_p: float = ...,
    proj_dropout_p: float = ...,
    residual_scales: tuple[Tensor | None, Tensor | None] = ...,
    return_attention: Literal[False] = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def cross_fusion(
    tokens_s: Tensor,
    tokens_l: Tensor,
    weights_s: FusionWeights,
    weights_l: FusionWeights,
    *,
    num_heads: tuple[int, int],
    eps: float = ...,
    dropout_p: float = ...,
    proj_dropout_p: float = ...,
    residual_scales: tuple[Tensor | None, Tensor | None] = ...,
    return_attention: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


def cross_fusion(
    tokens_s: Tensor,
    tokens_l: Tensor,
    weights_s: FusionWeights,
    weights_l: FusionWeights,
    *,
    num_heads: tuple[int, int],
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    proj_dropout_p: float = 0.0,
    residual_scales: tuple[Tensor | None, Tensor | None] = (None, None),
    return_attention: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Eq. 5 to 7 of CrossViT (Chen, Fan, Panda, ICCV 2021): both directions, from the tokens before it.

    Per direction c = f(cls of the own branch), y = c + residual_scale * MCA(LN([c || patches of the other])),
    new cls = g(y); f and g are LayerNorm, GELU, linear. The patches are handed on.

    Args:
        tokens_s: [B, 1 + P_S, C_S], row 0 is the CLS token.
        tokens_l: [B, 1 + P_L, C_L].
        weights_s: of the direction of S's CLS token, which reads L's patches: own = C_S, C = C_L.
        weights_l: of the direction of L's CLS token: own = C_L, C = C_S.
        num_heads: heads of either direction, S's first; they divide C_L and C_S.
        eps: of all LayerNorms.
        dropout_p, proj_dropout_p: as in `cross_attention`, for both directions.
        residual_scales: of either direction, [B] or [B, 1, C] or None.
        return_attention: also return the attention of either direction, [B, H, 1 + P of the other branch].
        backend: "auto" or a name from `crossvit_kernels.backends()`; a named one never falls back.

    Returns:
        tokens_s, tokens_l: new tensors of the shapes and dtypes of the arguments; then the attentions.

    Dtypes, differentiation and what is raised: as in `cross_attention`. Both tokens share one dtype.
    """
    device = tokens_s.device.type
    autocast = autocast_enabled(device)
    named = [dict(zip(_NAMES, w.tensors(), strict=True)) for w in (weights_s, weights_l)]
    if not torch.jit.is_tracing():  # a trace would record every comparison of sizes
        _check_shapes(tokens_s, tokens_l, named, num_heads, residual_scales)
    check_devices_and_dtypes("tokens_s", tokens_s, {"tokens_l": tokens_l}, autocast=False)
    others: dict[str, Tensor | None] = {}
    for letter, weights, scale in zip("sl", named, residual_scales, strict=True):
        others |= {f"weights_{letter}.{name}": x for name, x in weights.items()}
        others[f"residual_scales of {letter.upper()}"] = scale
    any_dtype = ("residual_scales of S", "residual_scales of L")
    norms = tuple(f"weights_{letter}.{name}" for letter in "sl" for name in _NORMS)
    check_devices_and_dtypes("tokens_s", tokens_s, others, any_dtype, norms, autocast)
    check_probability("dropout_p", dropout_p)
    check_probability("proj_dropout_p", proj_dropout_p)

    dtype = matrix_dtype(tokens_s, weights_s.wq, autocast)
    if autocast:
        named = [
            {
                n: x if x is None else x.to(tokens_s.dtype if n in _NORMS else dtype)
                for n, x in weights.items()
            }
            for weights in named
        ]
    sizes = ((tokens_l.shape[2], tokens_s.shape[2]), tuple(num_heads))
    call = Call(device, tokens_s.dtype, dtype, *sizes, plain_operators_only())
    compute = choose("cross_fusion", backend, call, IMPLEMENTATIONS)

    # Everything random is drawn here, in this order, so that a backend is a function of its arguments.
    seed = draw_seed(tokens_s.device) if dropout_p > 0 else None
    scales: list[Tensor | None] = []
    for scale, other in zip(residual_scales, (tokens_l, tokens_s), strict=True):
        row = other[:, :1]
        if scale is not None:
            scale = (scale[:, None, None].expand(row.shape) if scale.ndim == 1 else scale).to(row.dtype)
        if proj_dropout_p > 0:
            kept = F.dropout(torch.ones_like(row), proj_dropout_p)
            scale = kept if scale is None else kept * scale
        scales.append(scale)

    operands = Operands(
        tokens_s,
        tokens_l,
        tuple(named[0].values()),
        tuple(named[1].values()),
        num_heads,
        eps,
        dropout_p,
        seed,
        (scales[0], scales[1]),
        return_attention,
    )
    with without_autocast(device):  # the operands have the right dtypes
        results = compute(operands)
    return results if return_attention else results[:2]


def _check_shapes(
    tokens_s: Tensor,
    tokens_l: Tensor,
    named: list[dict[str, Any]],
    num_heads: tuple[int, int],
    scales: tuple[Tensor | None, Tensor | None],
) -> None:
    for name, tokens in (("tokens_s", tokens_s), ("tokens_l", tokens_l)):
        if tokens.ndim != 3 or tokens.shape[1] == 0:
            raise ValueError(
                f"{name} must have shape [B, 1 + P, C] with the CLS token as row 0, {got(tokens)}"
            )
    if tokens_s.shape[0] != tokens_l.shape[0]:
        raise ValueError(
            f"tokens_l must have the batch size of tokens_s, B = {tokens_s.shape[0]}, {got(tokens_l)}"
        )
    if not isinstance(num_heads, (tuple, list)) or len(num_heads) != 2:
        raise ValueError(f"num_heads must be a pair, heads of S's and of L's direction, got {num_heads!r}")
    widths = {"S": tokens_s.shape[2], "L": tokens_l.shape[2]}
    for own, other, weights, heads, scale in (
        ("S", "L", named[0], num_heads[0], scales[0]),
        ("L", "S", named[1], num_heads[1], scales[1]),
    ):
        columns, rows = widths[own], widths[other]
        for name, x in weights.items():
            of_own = name.startswith("project_norm") or name == "back_bias"
            letter, length = (f"C_{own}", columns) if of_own else (f"C_{other}", rows)
            full = f"weights_{own.lower()}.{name}"
            if name == "project_weight":
                check_matrix(full, x, f"C_{other}, C_{own}", rows, columns)
            elif name == "back_weight":
                check_matrix(full, x, f"C_{own}, C_{other}", columns, rows)
            elif name in ("wq", "wk", "wv", "wo"):
                check_matrix(full, x, f"C_{other}, C_{other}", rows, rows)
            else:
                check_vector(full, x, letter, length)
        check_heads(f"num_heads of {own}'s direction", heads, f"C_{other}", rows)
        check_scale(f"residual_scales of {own}", scale, tokens_s.shape[0], rows, f"C_{other}")
