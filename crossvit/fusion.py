"""Ways to fuse the branches of one multi-scale encoder (Sec. 3.2 of the paper).

A fusion takes and gives the tokens of both branches, [B, 1 + P, C] each, and keeps the shapes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossvit_kernels import cross_attention

from .layers import Attention, DropPath, NormLayer, projection


class CrossAttention(nn.Module):
    """The parameters of one single-query cross-attention; `CrossAttentionBlock` computes with them."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool, attn_drop: float, proj_drop: float, **factory: Any
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.wq = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.wk = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.wv = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)


class CrossAttentionBlock(nn.Module):
    """Eq. 7, first line: cls + MCA(LN([cls || patches])), the query from the CLS token alone."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool,
        proj_drop: float,
        attn_drop: float,
        drop_path: float,
        norm_layer: NormLayer,
        backend: str,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim, **factory)
        if not isinstance(self.norm1, nn.LayerNorm) or self.norm1.weight is None:
            raise TypeError(
                "norm_layer must make torch.nn.LayerNorm with a weight: the cross-attention computes it "
                f"inside, got {self.norm1}"
            )
        self.attn = CrossAttention(dim, num_heads, qkv_bias, attn_drop, proj_drop, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.backend = backend

    def forward(self, cls: Tensor, patches: Tensor, attention_maps: list[Tensor] | None = None) -> Tensor:
        """cls [B, 1, C] and the other branch's patches [B, P, C] -> the new cls.

        `attention_maps`, where given, gains the attention [B, H, 1 + P].
        """
        attn, norm = self.attn, self.norm1
        scale = None
        if self.training and (attn.proj_drop.p > 0 or not isinstance(self.drop_path, nn.Identity)):
            # Drawn as timm draws them, the projection's dropout first: one seed gives the same masks.
            scale = self.drop_path(attn.proj_drop(torch.ones_like(cls)))
        arguments: tuple[Any, ...] = (
            *(cls, patches, norm.weight, norm.bias),
            *(attn.wq.weight, attn.wq.bias, attn.wk.weight, attn.wk.bias),
            *(attn.wv.weight, attn.wv.bias, attn.proj.weight, attn.proj.bias),
        )
        options: dict[str, Any] = {
            "num_heads": attn.num_heads,
            "eps": norm.eps,
            "dropout_p": attn.attn_drop.p if self.training else 0.0,
            "residual_scale": scale,
            "backend": self.backend,
        }
        if attention_maps is None:
            return cross_attention(*arguments, **options)
        cls, attention = cross_attention(*arguments, **options, return_attention=True)
        attention_maps.append(attention)
        return cls


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

    def forward(self, tokens: list[Tensor]) -> list[Tensor]:
        lengths = [x.shape[1] for x in reversed(tokens)]
        y = torch.cat([f(x) for f, x in zip(reversed(self.projs), reversed(tokens), strict=True)], dim=1)
        y = y + self.drop_path(self.attn(self.norm1(y)))
        large, small = y.split(lengths, dim=1)
        return [g(x) for g, x in zip(self.revert_projs, (small, large), strict=True)]


def with_cls(tokens: Tensor, cls: Tensor, owned: bool) -> Tensor:
    """The tokens [B, 1 + P, C] with row 0 replaced by cls [B, 1, C].

    In place, without a copy, only where nobody can notice: `owned` says that the caller made the buffer and
    no one else holds it, and nothing is recorded for backward.
    """
    cls = cls.to(tokens.dtype)
    if owned and not torch.is_grad_enabled():
        tokens[:, :1] = cls
        return tokens
    return torch.cat((cls, tokens[:, 1:]), dim=1)


def attention_grid(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attention over [cls || patches], [B, H, 1 + P] -> over the patches as an image, [B, H, *grid]."""
    return attention[..., 1:].unflatten(-1, grid)


def upsample_attention(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [B, H, h, w] -> [B, H, *size] pixels (bilinear), to lay over the image."""
    return F.interpolate(grid, size=size, mode="bilinear", align_corners=False)
