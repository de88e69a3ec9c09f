"""The multi-scale encoder: transformer blocks of each branch, then the fusion of the branches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from crossvit_kernels import FusionWeights, cross_fusion

from .fusion import CrossAttentionBlock, is_plain, is_projection
from .layers import Block, NormLayer, projection, with_mean
from .other_fusions import AllAttentionFusion, ClassTokenFusion, Grids, PairwiseFusion

FUSIONS = ("cross", "all", "class", "pairwise", "none")


class MultiScaleBlock(nn.Module):
    """One of the K encoders of Fig. 2. Branch 0 is S (small patches), branch 1 is L.

    Args:
        dim: C of each branch.
        depth: blocks of S, blocks of L, cross-attentions in a row (0 and 1 both mean one; they differ in
            the names of its parameters, as in the released checkpoints).
        drop_path: one rate per block; branches share them, the fusion takes the last.
        fusion: "cross" (Eq. 5-7), "all" (Eq. 2), "class" (Eq. 3), "pairwise" (Eq. 4) or "none".
        identity_projections: f and g of the cross-attention are the identity where the widths are equal.
        attends_again: of several cross-attentions in a row, the later ones see the patches as well. In the
            released code they see the CLS token alone.
        class_token: False where row 0 is no token of its own, but the mean of the patches before the fusion.
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
        identity_projections: bool = False,
        attends_again: bool = False,
        class_token: bool = True,
        backend: str = "auto",
        **factory: Any,
    ) -> None:
        super().__init__()
        self.attends_again = attends_again
        self.class_token = class_token
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
        dims, heads = (dim[0], dim[1]), (num_heads[0], num_heads[1])
        self.fusion: nn.Module | None = None
        if fusion == "all":
            self.fusion = AllAttentionFusion(dims, heads, drop_path=drop_path[-1], **rates, **shared)
        elif fusion == "class":
            self.fusion = ClassTokenFusion(dims, **shared)
        elif fusion == "pairwise":
            self.fusion = PairwiseFusion(dims, **shared)
        if fusion != "cross":
            return

        def cross(other: int) -> CrossAttentionBlock:
            return CrossAttentionBlock(
                dim[other], num_heads[other], drop_path=drop_path[-1], backend=backend, **rates, **shared
            )

        def maps(ins: Sequence[int], outs: Sequence[int]) -> nn.ModuleList:
            if identity_projections and dim[0] == dim[1]:
                return nn.ModuleList(nn.Identity() for _ in ins)
            pairs = zip(ins, outs, strict=True)
            return nn.ModuleList(projection(i, o, norm_layer, **factory) for i, o in pairs)

        self.projs = maps(dims, dims[::-1])
        self.fusion = nn.ModuleList(
            cross(1 - b) if depth[2] == 0 else nn.ModuleList(cross(1 - b) for _ in range(depth[2]))
            for b in range(2)
        )
        self.revert_projs = maps(dims[::-1], dims)

    def forward(
        self,
        tokens: Sequence[Tensor],
        attention_maps: list[list[Tensor]] | None = None,
        grids: Grids | None = None,
    ) -> list[Tensor]:
        """Tokens [B, 1 + P, C] of S and L -> the same shapes.

        `attention_maps`, where given, gains a list of the attention [B, H, 1 + P of the other branch] of
        S's and of L's CLS token. `grids` are those of the patches, which the pairwise fusion takes for square
        where they are not given.
        """
        tokens = [blocks(x) for blocks, x in zip(self.blocks, tokens, strict=True)]
        return self.fuse(tokens, attention_maps, grids)

    def fuse(
        self,
        tokens: Sequence[Tensor],
        attention_maps: list[list[Tensor]] | None = None,
        grids: Grids | None = None,
    ) -> list[Tensor]:
        """The fusion alone; see forward."""
        if not self.class_token:
            tokens = [with_mean(x[:, 1:]) for x in tokens]
        if self.fusion is None:
            return list(tokens)
        if not isinstance(self.fusion, nn.ModuleList):
            return self.fusion(tokens, grids)
        weights = self._weights()
        if weights is not None and tokens[0].dtype == tokens[1].dtype:
            return self._fuse_at_once(tokens, weights, attention_maps)
        # Both directions read the tokens from before the fusion.
        maps: list[Tensor] | None = None if attention_maps is None else []
        fused = []
        for b, (project, fusion, back) in enumerate(
            zip(self.projs, self.fusion, self.revert_projs, strict=True)
        ):
            cls, patches = project(tokens[b][:, :1]), tokens[1 - b][:, 1:]
            first, *others = fusion if isinstance(fusion, nn.ModuleList) else (fusion,)
            cls = first(cls, patches, maps)
            for block in others:
                cls = block(cls, patches if self.attends_again else patches[:, :0])
            fused.append(torch.cat((back(cls), tokens[b][:, 1:]), dim=1))
        if attention_maps is not None and maps is not None:
            attention_maps.append(maps)
        return fused

    def _weights(self) -> tuple[FusionWeights, FusionWeights] | None:
        """What `cross_fusion` takes, or None where some module's own forward has to run: it was replaced or
        has hooks, there are several cross-attentions in a row, or the directions differ in what they share.
        """
        if nn.modules.module._has_any_global_hook():
            return None
        found = []
        shared = set()
        branches: Any = zip(self.projs, cast(nn.ModuleList, self.fusion), self.revert_projs, strict=True)
        for project, fusion, back in branches:
            if not (is_plain(fusion, CrossAttentionBlock) and is_projection(project) and is_projection(back)):
                return None
            if fusion.changed():
                return None
            attn, norms = fusion.attn, (project[0], fusion.norm1, back[0])
            shared |= {(fusion.backend, fusion.attention_dropout(), norm.eps) for norm in norms}
            found.append(
                FusionWeights(
                    *(project[0].weight, project[0].bias, project[2].weight, project[2].bias),
                    *(fusion.norm1.weight, fusion.norm1.bias),
                    *(attn.wq.weight, attn.wq.bias),
                    *(attn.wk.weight, attn.wk.bias),
                    *(attn.wv.weight, attn.wv.bias),
                    *(attn.proj.weight, attn.proj.bias),
                    *(back[0].weight, back[0].bias, back[2].weight, back[2].bias),
                )
            )
        return (found[0], found[1]) if len(shared) == 1 else None

    def _fuse_at_once(
        self,
        tokens: Sequence[Tensor],
        weights: tuple[FusionWeights, FusionWeights],
        attention_maps: list[list[Tensor]] | None,
    ) -> list[Tensor]:
        """The fusion as one operation. The new tokens are new tensors: writing the CLS rows in place would
        change what hooks and callers hold, and the operation copies the patches while it reads them.
        """
        small, large = blocks = cast(list[CrossAttentionBlock], list(cast(nn.ModuleList, self.fusion)))
        scales = [
            block.residual_scale(other[:, :1]) for block, other in zip(blocks, reversed(tokens), strict=True)
        ]
        compute = partial(
            cross_fusion,
            tokens[0],
            tokens[1],
            weights[0],
            weights[1],
            num_heads=(small.attn.num_heads, large.attn.num_heads),
            eps=cast(nn.LayerNorm, small.norm1).eps,
            dropout_p=small.attention_dropout(),
            residual_scales=(scales[0], scales[1]),
            backend=small.backend,
        )
        if attention_maps is None:
            return list(compute())
        results = compute(return_attention=True)
        attention_maps.append(list(results[2:]))
        return list(results[:2])
