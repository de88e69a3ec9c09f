"""The steps of the compiled module that cut an image into windows, and the call into csrc/patch_embed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linear.packed import PackedLinear
from ..program import Base, Kind, Place, Precision, Program, plain, precision_of, rows_of, run, threads_for
from . import bicubic


@dataclass(frozen=True)
class Pixels:
    """An image in memory: its place, size, and the bytes from one channel, line and pixel to the next.

    channels_last: the channels of a pixel lie together, as those of tokens do.
    levels: what a byte stands for, where pixels are bytes; see `levels`.
    """

    place: Place
    channels: int
    height: int
    width: int
    of_channel: int
    of_line: int
    of_pixel: int
    channels_last: bool = False
    levels: Tensor | None = None


def levels(channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """[2, channels]: (pixel / 255 - mean) / std is the pixel times the first plus the second.

    Raises:
        ValueError: mean or std do not have a number for each channel, or std has a zero.
    """
    middle, spread = (
        torch.tensor([default] * channels if x is None else list(x), dtype=torch.float64, device="cpu")
        for x, default in ((mean, 0.0), (std, 1.0))
    )
    if not len(middle) == len(spread) == channels:
        found = f"{len(middle)} and {len(spread)}"
        raise ValueError(f"mean and std must have a number for each of {channels} channels, got " + found)
    if (spread == 0).any():
        raise ValueError(f"std must not be zero, got {tuple(spread.tolist())}")
    return torch.stack([1 / (255 * spread), -middle / spread]).float()


def place_of(image: Tensor, base: Base = Base.FIXED) -> Place:
    """Of the pixels of [B, channels, height, width]. Bytes are told by `levels`, not by a dtype."""
    dtype = torch.float32 if image.dtype == torch.uint8 else image.dtype
    data = image.data_ptr() if base == Base.FIXED else 0
    return Place(base, data, dtype, 0, image.stride(0) * image.element_size())


@dataclass(frozen=True)
class Windows:
    """A convolution's windows: kernel, stride and padding in pixels, and their rows and columns."""

    kernel: int
    stride: int
    padding: int
    rows: int
    columns: int


class Resizing:
    """Which lines and columns each one of the resized image is the sum of, by `bicubic.taps`."""

    def __init__(
        self, old: tuple[int, int], new: tuple[int, int], seen: tuple[int, int] | None = None
    ) -> None:
        """`seen`: how many lines and columns of the resized image are wanted, from the first on."""
        axes = [
            tuple(x[:, :count] for x in bicubic.taps(before, after))
            for before, after, count in zip(old, new, seen or new, strict=True)
        ]
        self.taps = torch.cat([places.flatten() for places, _ in axes]).to(torch.int32)
        self.weights = torch.cat([weights.flatten() for _, weights in axes]).float()


def patch_step(
    pixels: Pixels, out: Place, windows: Windows, seen: tuple[int, int], resizing: Resizing | None
) -> list[int]:
    """The words of struct PatchStep. `seen`: (height, width) that the windows lie in, after the resizing."""
    return [
        *(*pixels.place.words(), *out.words(), pixels.channels, pixels.height, pixels.width),
        *(pixels.of_channel, pixels.of_line, pixels.of_pixel, int(pixels.channels_last)),
        *(windows.rows, windows.columns, windows.kernel, windows.stride, windows.padding, *seen),
        *((0, 0) if resizing is None else (resizing.taps.data_ptr(), resizing.weights.data_ptr())),
        0 if pixels.levels is None else pixels.levels.data_ptr(),
    ]


def copy_step(source: Place, out: Place, rows: int, channels: int) -> list[int]:
    """The words of struct CopyStep."""
    return [*source.words(), *out.words(), rows, channels]


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
    """As the definition."""
    image, position = image.detach().resolve_neg(), plain(position)
    patch, precision = weight.shape[-1], precision_of(weight.dtype)
    old = (image.shape[-2], image.shape[-1])
    new = old if size is None else (size[0], size[1])
    rows, columns = (side // patch for side in new)
    out = torch.empty(
        (image.shape[0], 1 + rows * columns, weight.shape[0]), dtype=position.dtype, device="cpu"
    )
    if image.shape[1] != weight.shape[1] or position.shape != out.shape[1:] or min(old) < 1:
        raise ValueError(
            f"image, weight and position do not fit: got {list(image.shape)}, {list(weight.shape)} and "
            f"{list(position.shape)} for {rows} x {columns} patches"
        )
    of_bytes = levels(image.shape[1], mean, std) if image.dtype == torch.uint8 else None
    if out.numel() == 0:
        return out
    seen = (rows * patch, columns * patch)
    resizing = None if new == old else Resizing(old, new, seen)
    packed = PackedLinear(weight.flatten(1), bias, precision=precision)
    first = (position[:1] + cls_token.detach()).contiguous()

    threads = threads_for(2 * image.shape[0] * rows * columns * weight.numel())
    dtype = torch.bfloat16 if precision == Precision.BFLOAT16 else torch.float32
    windows = torch.empty((threads, rows * columns, packed.channels), dtype=dtype, device="cpu")
    of_row, of_worker = (windows.stride(i) * windows.element_size() for i in (1, 0))
    cut = Place(Base.FIXED, windows.data_ptr(), dtype, of_row, of_worker=of_worker)
    of_channel, of_line, of_pixel = (x * image.element_size() for x in image.stride()[1:])
    height, width = seen if resizing is None else old
    pixels = Pixels(
        *(place_of(image), image.shape[1], height, width, of_channel, of_line, of_pixel), levels=of_bytes
    )
    tokens = rows_of(out)
    program = Program()
    program.images()
    program.add(Kind.COPY, copy_step(rows_of(first), tokens, 1, packed.outputs))
    program.add(
        Kind.PATCHES, patch_step(pixels, cut, Windows(patch, patch, 0, rows, columns), seen, resizing)
    )
    residual = rows_of(position).row(1)
    program.add(Kind.LINEAR, packed.step(cut, tokens.row(1), rows * columns, residual=residual))
    run(program.packed(), image.shape[0], threads=threads)
    return out
