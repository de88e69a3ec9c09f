"""Cross-attention, the fusion of the released models (Eq. 5-7). other_fusions.py has its rivals."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossvit_kernels import cross_attention

from .layers import DropPath, NormLayer, check_heads, is_plain


class CrossAttention(nn.Module):
    """Attention of row 0 over all rows, [B, N, C] -> [B, 1, C], as timm's module of this name computes it.

    The models compute it together with the LayerNorm in `CrossAttentionBlock`, which reads these parameters
    and calls this forward only where someone has changed or hooked a submodule.
    """

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool, attn_drop: float, proj_drop: float, **factory: Any
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5  # timm's attribute, which may be set
        self.wq = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.wk = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.wv = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, N, d]

        q, k, v = heads(self.wq(x[:, :1])), heads(self.wk(x)), heads(self.wv(x))
        attention = self.attn_drop((q @ k.mT * self.scale).softmax(-1))
        return self.proj_drop(self.proj((attention @ v).transpose(1, 2).flatten(2)))


class CrossAttentionBlock(nn.Module):
    """Eq. 7, first line: cls + MCA(LN([cls || patches])), the query from the CLS token alone.

    Computed by `crossvit_kernels.cross_attention` from the parameters of its submodules. A submodule that is
    no longer plain (adapters, pruning, quantisation, hooks, another norm) is called as a module instead.
    """

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
        self.attn = CrossAttention(dim, num_heads, qkv_bias, attn_drop, proj_drop, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.backend = backend
        self._scale = self.attn.scale

    def changed(self) -> list[str]:
        """Names of the submodules whose own forward has to run."""
        names = []
        if not is_plain(self.attn, CrossAttention):
            names.append("attn")
        elif self.attn.scale != self._scale:
            names.append("attn.scale")
        if not is_plain(self.norm1, nn.LayerNorm) or self.norm1.weight is None:
            names.append("norm1")
        if not is_plain(self.drop_path, nn.Identity) and not is_plain(self.drop_path, DropPath):
            names.append("drop_path")
        for part in ("wq", "wk", "wv", "proj"):
            if not is_plain(getattr(self.attn, part, None), nn.Linear):
                names.append(f"attn.{part}")
        for part in ("attn_drop", "proj_drop"):
            if not is_plain(getattr(self.attn, part, None), nn.Dropout):
                names.append(f"attn.{part}")
        return names

    def attention_dropout(self) -> float:
        """The probability in force."""
        dropout = self.attn.attn_drop
        return dropout.p if dropout.training else 0.0

    def residual_scale(self, cls: Tensor) -> Tensor | None:
        """The masks of the projection's dropout and of drop-path, in the shape [B, 1, C] of cls; None for 1.

        Drawn as timm draws them, the projection's first: one seed gives the same masks.
        """
        dropout, path = self.attn.proj_drop, self.drop_path
        if (dropout.training and dropout.p > 0) or (path.training and not isinstance(path, nn.Identity)):
            return path(dropout(torch.ones_like(cls)))
        return None

    def forward(self, cls: Tensor, patches: Tensor, attention_maps: list[Tensor] | None = None) -> Tensor:
        """cls [B, 1, C] and the other branch's patches [B, P, C] -> the new cls.

        `attention_maps`, where given, gains the attention [B, H, 1 + P].

        Raises:
            RuntimeError: a submodule was changed, and a backend is named or the attention is asked for.
        """
        changed = self.changed()
        free = self.backend == "auto" and attention_maps is None
        if changed or (free and nn.modules.module._has_any_global_hook()):
            if not free:
                wanted = "give the attention" if attention_maps is not None else f"run on {self.backend!r}"
                raise RuntimeError(
                    f"the cross-attention cannot {wanted}: {', '.join(changed)} was replaced or has hooks, "
                    'so it runs through its modules; use backend="auto" without attention maps'
                )
            return cls + self.drop_path(self.attn(self.norm1(torch.cat((cls, patches), dim=1))))
        attn, norm = self.attn, cast(nn.LayerNorm, self.norm1)
        compute = partial(
            cross_attention,
            cls,
            patches,
            *(norm.weight, norm.bias),
            *(attn.wq.weight, attn.wq.bias),
            *(attn.wk.weight, attn.wk.bias),
            *(attn.wv.weight, attn.wv.bias),
            *(attn.proj.weight, attn.proj.bias),
            num_heads=attn.num_heads,
            eps=norm.eps,
            dropout_p=self.attention_dropout(),
            residual_scale=self.residual_scale(cls),
            backend=self.backend,
        )
        if attention_maps is None:
            return compute()
        cls, attention = compute(return_attention=True)
        attention_maps.append(attention)
        return cls


def is_projection(module: Any) -> bool:
    """Whether the module is `layers.projection` as it was made: LayerNorm, GELU, Linear."""
    if not is_plain(module, nn.Sequential) or len(module) != 3:
        return False
    norm, gelu, linear = module
    return (
        is_plain(norm, nn.LayerNorm)
        and norm.weight is not None
        and is_plain(gelu, nn.GELU)
        and gelu.approximate == "none"
        and is_plain(linear, nn.Linear)
    )


def attention_grid(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attention over [cls || patches], [B, H, 1 + P] -> over the patches as an image, [B, H, *grid]."""
    return attention[..., 1:].unflatten(-1, grid)


def upsample_attention(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [B, H, h, w] -> [B, H, *size] pixels (bilinear), to lay over the image."""
    return F.interpolate(grid, size=size, mode="bilinear", align_corners=False)
