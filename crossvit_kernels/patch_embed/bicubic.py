"""Bicubic interpolation as F.interpolate(mode="bicubic", align_corners=False) does it: the cubic kernel with
a = -0.75 about the centre of each pixel."""

from __future__ import annotations

import torch
from torch import Tensor


def taps(old: int, new: int) -> tuple[Tensor, Tensor]:
    """Of each of `new` lines the four old ones that it is the sum of, and their weights: [4, new] both.

    Weights are float64. Lines outside of the image are moved to its edge.
    """
    # In float32, as torch computes positions.
    scale = torch.tensor(old / new, dtype=torch.float32, device="cpu")
    at = (torch.arange(new, dtype=torch.float32, device="cpu") + 0.5) * scale - 0.5
    first = at.floor()
    t = (at - first).double()
    a = -0.75

    def near(x: Tensor) -> Tensor:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Tensor) -> Tensor:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    weights = torch.stack([far(t + 1), near(t), near(1 - t), far(2 - t)])
    places = first.long() + torch.arange(-1, 3, device="cpu")[:, None]
    return places.clamp(0, old - 1), weights
