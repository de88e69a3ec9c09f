"""The definition, on any device and in any dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    cls_token: Tensor,
    size: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Tensor:
    """cat(cls_token, convolution of the resized image) + position, in the dtype of position.

    position [1 + P, C], cls_token [C]; mean and std are those of pixels in uint8.
    """
    if image.dtype == torch.uint8:
        image = standardised(image, mean, std, position.dtype)
    if size is not None and tuple(size) != tuple(image.shape[-2:]):
        image = F.interpolate(image, size=tuple(size), mode="bicubic", align_corners=False)
    patch = weight.shape[-1]
    height, width = (side // patch * patch for side in image.shape[-2:])
    image = image[..., :height, :width].to(weight.dtype)
    patches = F.conv2d(image, weight, bias, stride=patch).flatten(2).transpose(1, 2)  # [B, P, C]
    cls = cls_token.expand(patches.shape[0], 1, -1)
    return torch.cat((cls, patches.to(position.dtype)), dim=1) + position


def add_position(patches: Tensor, position: Tensor, cls_token: Tensor) -> Tensor:
    """cat(cls_token, patches) + position [1 + P, C], in the widest of their dtypes."""
    return torch.cat((cls_token.expand(patches.shape[0], 1, -1), patches), dim=1) + position


def standardised(
    image: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, dtype: torch.dtype
) -> Tensor:
    """Pixels of 0 to 255 as (pixel / 255 - mean) / std of each channel, rounded to `dtype` at the end."""
    exact = torch.promote_types(dtype, torch.float32)
    image = image.to(exact) / 255
    if mean is not None and std is not None:
        of_channels = (torch.tensor(list(x), dtype=exact, device=image.device) for x in (mean, std))
        middle, spread = (x[:, None, None] for x in of_channels)
        image = (image - middle) / spread
    return image.to(dtype)
