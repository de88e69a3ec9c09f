"""The multi-scale encoder: transformer blocks of each branch, then the fusion of the branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .fusion import AllAttentionFusion, CrossAttentionBlock
from .layers import Block, NormLayer, projection

FUSIONS = ("cross", "all")


class MultiScaleBlock(nn.Module):
    """One of the K encoders of Fig. 2. Branch 0 is S (small patches), branch 1 is L.

    Args:
        dim: C of each branch.
        depth: blocks of S, blocks of L, cross-attentions in a row (0 and 1 both mean one; they differ in
            the names of its parameters, as in the released checkpoints).
        drop_path: one rate per block; branches share them, the fusion takes the last.
        fusion: "cross" (Eq. 5-7) or "all" (Eq. 2).
        backend: of the cross-attention.
    """

    def __init__(
        self,
        dim: Sequence[int],
        depth: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: Sequence[float],
        qkv_bias: bool,
        proj_drop: float,
        attn_drop: float,
        drop_path: Sequence[float],
        norm_layer: NormLayer,
        fusion: str = "cross",
        backend: str = "auto",
        **factory: Any,
    ) -> None:
        super().__init__()
        shared: dict[str, Any] = {"norm_layer": norm_layer, **factory}
        rates: dict[str, Any] = {"qkv_bias": qkv_bias, "proj_drop": proj_drop, "attn_drop": attn_drop}
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(
                    Block(dim[b], num_heads[b], mlp_ratio[b], drop_path=drop_path[i], **rates, **shared)
                    for i in range(depth[b])
                )
            )
            for b in range(2)
        )
        if fusion == "all":
            self.fusion: nn.ModuleList | AllAttentionFusion = AllAttentionFusion(
                (dim[0], dim[1]),
                (num_heads[0], num_heads[1]),
                drop_path=drop_path[-1],
                **rates,
                **shared,
            )
            return

        def cross(other: int) -> CrossAttentionBlock:
            return CrossAttentionBlock(
                dim[other], num_heads[other], drop_path=drop_path[-1], backend=backend, **rates, **shared
            )

        self.projs = nn.ModuleList(projection(dim[b], dim[1 - b], norm_layer, **factory) for b in range(2))
        self.fusion = nn.ModuleList(
            cross(1 - b) if depth[2] == 0 else nn.ModuleList(cross(1 - b) for _ in range(depth[2]))
            for b in range(2)
        )
        self.revert_projs = nn.ModuleList(
            projection(dim[1 - b], dim[b], norm_layer, **factory) for b in range(2)
        )

    def forward(
        self, tokens: Sequence[Tensor], attention_maps: list[list[Tensor]] | None = None
    ) -> list[Tensor]:
        """Tokens [B, 1 + P, C] of S and L -> the same shapes.

        `attention_maps`, where given, gains a list of the attention [B, H, 1 + P of the other branch] of
        S's and of L's CLS token.
        """
        tokens = [blocks(x) for blocks, x in zip(self.blocks, tokens, strict=True)]
        return self.fuse(tokens, attention_maps)

    def fuse(
        self, tokens: Sequence[Tensor], attention_maps: list[list[Tensor]] | None = None
    ) -> list[Tensor]:
        """The fusion alone; see forward."""
        if isinstance(self.fusion, AllAttentionFusion):
            return self.fusion(list(tokens))
        # Both directions read the tokens from before the fusion.
        maps: list[Tensor] | None = None if attention_maps is None else []
        fused = []
        for b, (project, fusion, back) in enumerate(
            zip(self.projs, self.fusion, self.revert_projs, strict=True)
        ):
            cls, patches = project(tokens[b][:, :1]), tokens[1 - b][:, 1:]
            first, *others = fusion if isinstance(fusion, nn.ModuleList) else (fusion,)
            cls = first(cls, patches, maps)
            for block in others:  # as the released code does, these see the CLS token only
                cls = block(cls, patches[:, :0])
            # A copy on purpose: writing row 0 in place would change what hooks and callers hold, and on a CPU
            # no difference in time was measurable.
            fused.append(torch.cat((back(cls), tokens[b][:, 1:]), dim=1))
        if attention_maps is not None and maps is not None:
            attention_maps.append(maps)
        return fused
