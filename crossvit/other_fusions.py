"""The fusions that the paper compares cross-attention with (Sec. 3.2, Table 6).

A fusion takes and gives the tokens of both branches, [B, 1 + P, C] of S and of L, and keeps the shapes. f and
g are LayerNorm, GELU, Linear, as in the released models; what else the paper leaves open is decided so that
Table 6's parameters and FLOPs come out, and said below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Attention, DropPath, NormLayer, attend, is_plain, projection

Grids = Sequence[tuple[int, int]]  # (rows, columns) of patches of S and of L


class AllAttentionFusion(nn.Module):
    """Eq. 2: both branches' tokens side by side through one self-attention, the rival of cross-attention.

    y = [f_L(x_L) || f_S(x_S)];  o = y + MSA(LN(y));  z = g(o). The common width is that of L; f and g are
    LayerNorm, GELU, Linear for both branches, which is the reading that gives Table 6's 7.6 GFLOPs. The
    paper's 27.7 M parameters do not come out together with them under any reading.
    """

    def __init__(
        self,
        dims: tuple[int, int],
        num_heads: tuple[int, int],
        qkv_bias: bool,
        proj_drop: float,
        attn_drop: float,
        drop_path: float,
        norm_layer: NormLayer,
        **factory: Any,
    ) -> None:
        super().__init__()
        width = dims[1]
        self.projs = nn.ModuleList(projection(dim, width, norm_layer, **factory) for dim in dims)
        self.norm1 = norm_layer(width, **factory)
        self.attn = Attention(width, num_heads[1], qkv_bias, attn_drop, proj_drop, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.revert_projs = nn.ModuleList(projection(width, dim, norm_layer, **factory) for dim in dims)

    def forward(self, tokens: Sequence[Tensor], grids: Grids | None = None) -> list[Tensor]:
        lengths = [x.shape[1] for x in reversed(tokens)]
        y = torch.cat([f(x) for f, x in zip(reversed(self.projs), reversed(tokens), strict=True)], dim=1)
        y = y + self.drop_path(self._attend(self.norm1(y)))
        large, small = y.split(lengths, dim=1)
        return [g(x) for g, x in zip(self.revert_projs, (small, large), strict=True)]

    def _attend(self, x: Tensor) -> Tensor:
        """What `attn` computes, by the package's operation where it is as built and drops nothing."""
        attn = self.attn
        plain = is_plain(attn, Attention) and is_plain(attn.attn_drop, nn.Dropout)
        if not plain or nn.modules.module._has_any_global_hook():
            return attn(x)
        if attn.attn_drop.training and attn.attn_drop.p > 0:
            return attn(x)
        heads = attend(attn.qkv(x), attn.num_heads, attn.scale)
        return attn.proj_drop(attn.proj(heads))


class ClassTokenFusion(nn.Module):
    """Eq. 3: z_i = [g_i(f_S(cls_S) + f_L(cls_L)) || patches_i].

    The common width is that of L, where f and g of L are the identity. With maps for L as well, Table 6's
    24.2 M parameters do not come out.
    """

    def __init__(self, dims: tuple[int, int], norm_layer: NormLayer, **factory: Any) -> None:
        super().__init__()
        small, large = dims
        self.projs = nn.ModuleList([projection(small, large, norm_layer, **factory), nn.Identity()])
        self.revert_projs = nn.ModuleList([projection(large, small, norm_layer, **factory), nn.Identity()])

    def forward(self, tokens: Sequence[Tensor], grids: Grids | None = None) -> list[Tensor]:
        rows = [_split(x) for x in tokens]
        small, large = (f(cls) for f, (cls, _) in zip(self.projs, rows, strict=True))
        return [
            torch.cat((g(small + large), patches), dim=1)
            for g, (_, patches) in zip(self.revert_projs, rows, strict=True)
        ]


class PairwiseFusion(ClassTokenFusion):
    """Eq. 4: z_i = [g_i(f_S(cls_S) + f_L(cls_L)) || g_i(f_S(patches_S) + f_L(patches_L))].

    The maps are those of `ClassTokenFusion`. Patches of the other branch are resized to the branch's own
    grid, bilinearly, at the common width: S's after f, L's before g, so that both maps see all tokens of S,
    as Table 6's 5.5 GFLOPs want it.
    """

    def forward(self, tokens: Sequence[Tensor], grids: Grids | None = None) -> list[Tensor]:
        """`grids`: None for square ones.

        Raises:
            ValueError: grids are not given, and the patches do not make a square.
        """
        of_small, of_large = _square_grids(tokens) if grids is None else grids
        (cls_s, small), (cls_l, large) = (_split(f(x)) for f, x in zip(self.projs, tokens, strict=True))
        cls = cls_s + cls_l
        sums = (
            small + _on_grid(large, of_large, of_small),
            large + _on_grid(small, of_small, of_large),
        )
        # g takes each token alone, so that rows are put together once, behind it.
        return [torch.cat((g(cls), g(x)), dim=1) for g, x in zip(self.revert_projs, sums, strict=True)]


def _split(tokens: Tensor) -> tuple[Tensor, ...]:
    """CLS row and patches, of which autograd writes one gradient; two slices would be padded and added."""
    return tokens.split((1, tokens.shape[1] - 1), dim=1)


def _on_grid(patches: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """[B, P, C] resized to another grid; the channels lie side by side in memory before and after."""
    if old == new:
        return patches
    image = patches.unflatten(1, old).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new, mode="bilinear", align_corners=False)
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def _square_grids(tokens: Sequence[Tensor]) -> Grids:
    sides = [math.isqrt(x.shape[1] - 1) for x in tokens]
    if any(side * side != x.shape[1] - 1 for side, x in zip(sides, tokens, strict=True)):
        counts = [x.shape[1] - 1 for x in tokens]
        raise ValueError(f"grids must be given for patches that make no square, got {counts} of them")
    return [(side, side) for side in sides]
