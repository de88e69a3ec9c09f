"""T2T tokens (Yuan et al., ICCV 2021), which the paper puts into both branches of CrossViT-18 for 83.0 %."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Mlp, NormLayer, attend

_CHANNELS = 64  # of the tokens between two splits, as in T2T-ViT


class SoftSplit(NamedTuple):
    """Windows of an image, which overlap; each makes a token."""

    kernel: int
    stride: int
    padding: int


# The product of the strides is the patch. T2T-ViT has patches of 16 only. S reaches 12 by the strides of the
# dagger models' stem, 4, 3, 1, for 4 x 4 pixels leave 3,600 tokens to the first transformer; 3, 2, 2 would
# leave 6,400 and cost three times as much. The second window is 5 wide there, for one of 3 would not overlap.
SOFT_SPLITS = {
    12: (SoftSplit(7, 4, 2), SoftSplit(5, 3, 1), SoftSplit(3, 1, 1)),
    16: (SoftSplit(7, 4, 2), SoftSplit(3, 2, 1), SoftSplit(3, 2, 1)),
}


class TokenTransformer(nn.Module):
    """[B, N, C] -> [B, N, 64]: v + proj(attention), then x + MLP(LN(x)); one head.

    The values stand in for the input in the first sum, as its width is another one. Scores are divided by the
    square root of the input's width C, not of the 64 channels of queries: so T2T-ViT has it.
    """

    def __init__(self, dim: int, norm_layer: NormLayer, **factory: Any) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim, **factory)
        self.qkv = nn.Linear(dim, 3 * _CHANNELS, bias=False, **factory)
        self.proj = nn.Linear(_CHANNELS, _CHANNELS, **factory)
        self.norm2 = norm_layer(_CHANNELS, **factory)
        self.mlp = Mlp(_CHANNELS, _CHANNELS, **factory)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x))
        scale = x.shape[-1] ** -0.5
        x = qkv[..., 2 * _CHANNELS :] + self.proj(attend(qkv, 1, scale))
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """Image [B, in_chans, height, width] -> patch tokens [B, P, C], row by row, in place of `PatchEmbed`.

    Three soft splits; transformers make 64 channels of the tokens of the first two, a linear layer C of those
    of the last. A remainder below one patch at the right and at the bottom is not seen.

    Raises:
        ValueError: the patches are neither of 12 nor of 16 pixels.
    """

    img_size: tuple[int, int]
    num_patches: int

    def __init__(
        self, patch_size: int, in_chans: int, embed_dim: int, norm_layer: NormLayer, **factory: Any
    ) -> None:
        super().__init__()
        if patch_size not in SOFT_SPLITS:
            raise ValueError(f"t2t knows patch sizes 12 and 16, got {patch_size}")
        self.patch_size = (patch_size, patch_size)
        self.splits = SOFT_SPLITS[patch_size]
        widths = [
            channels * split.kernel**2
            for channels, split in zip((in_chans, _CHANNELS, _CHANNELS), self.splits, strict=True)
        ]
        self.transformers = nn.ModuleList(
            TokenTransformer(width, norm_layer, **factory) for width in widths[:2]
        )
        self.proj = nn.Linear(widths[2], embed_dim, **factory)

    def forward(self, image: Tensor) -> Tensor:
        height, width = (size // p * p for size, p in zip(image.shape[-2:], self.patch_size, strict=True))
        image = image[..., :height, :width]
        for split, transformer in zip(self.splits, self.transformers, strict=False):
            height, width = height // split.stride, width // split.stride
            image = transformer(_windows(image, split)).transpose(1, 2).unflatten(2, (height, width))
        return self.proj(_windows(image, self.splits[-1]))


def _windows(image: Tensor, split: SoftSplit) -> Tensor:
    """[B, C, height, width] -> [B, N, C * kernel * kernel]."""
    return F.unfold(image, split.kernel, padding=split.padding, stride=split.stride).transpose(1, 2)
