"""The steps of the compiled module that cut an image into windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..program import Place


@dataclass(frozen=True)
class Pixels:
    """An image in memory: its place, size, and the bytes from one channel, line and pixel to the next.

    channels_last: the channels of a pixel lie together, as those of tokens do.
    """

    place: Place
    channels: int
    height: int
    width: int
    of_channel: int
    of_line: int
    of_pixel: int
    channels_last: bool = False


@dataclass(frozen=True)
class Windows:
    """A convolution's windows: kernel, stride and padding in pixels, and their rows and columns."""

    kernel: int
    stride: int
    padding: int
    rows: int
    columns: int


class Resizing:
    """Which lines and columns each one of the resized image is the sum of; as torch's bicubic interpolation.

    F.interpolate(mode="bicubic", align_corners=False): four taps of the cubic kernel with a = -0.75 about the
    centre, those outside of the image moved to its edge.
    """

    def __init__(self, old: tuple[int, int], new: tuple[int, int]) -> None:
        axes = [_taps(before, after) for before, after in zip(old, new, strict=True)]
        self.taps = torch.cat([taps.flatten() for taps, _ in axes]).to(torch.int32)
        self.weights = torch.cat([weights.flatten() for _, weights in axes]).float()


def _taps(old: int, new: int) -> tuple[Tensor, Tensor]:
    """Indices and weights [4, new]."""
    # In float32, as torch computes positions.
    scale = torch.tensor(old / new, dtype=torch.float32)
    at = (torch.arange(new, dtype=torch.float32) + 0.5) * scale - 0.5
    first = at.floor()
    t = (at - first).double()
    a = -0.75

    def near(x: Tensor) -> Tensor:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Tensor) -> Tensor:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    weights = torch.stack([far(t + 1), near(t), near(1 - t), far(2 - t)])
    taps = first.long() + torch.arange(-1, 3)[:, None]
    return taps.clamp(0, old - 1), weights


def patch_step(
    pixels: Pixels, out: Place, windows: Windows, seen: tuple[int, int], resizing: Resizing | None
) -> list[int]:
    """The words of struct PatchStep. `seen`: (height, width) that the windows lie in, after the resizing."""
    return [
        *(*pixels.place.words(), *out.words(), pixels.channels, pixels.height, pixels.width),
        *(pixels.of_channel, pixels.of_line, pixels.of_pixel, int(pixels.channels_last)),
        *(windows.rows, windows.columns, windows.kernel, windows.stride, windows.padding, *seen),
        *((0, 0) if resizing is None else (resizing.taps.data_ptr(), resizing.weights.data_ptr())),
    ]


def copy_step(source: Place, out: Place, rows: int, channels: int) -> list[int]:
    """The words of struct CopyStep."""
    return [*source.words(), *out.words(), rows, channels]
