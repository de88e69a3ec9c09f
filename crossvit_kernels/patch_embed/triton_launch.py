"""The launches of the Triton kernels of the patch embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .. import dependent_launch
from ..cross_attention.gpu import gpu_of, on_device_of, within_reach
from ..cross_attention.triton_launch import architecture_of_device
from ..cross_attention.triton_table import allows_tf32
from ..linear import triton_launch as linear_launch
from ..linear.triton_table import tiles_of_product
from ..validation import precision_of_float32
from . import bicubic
from . import triton_kernels as kernels
from .gpu_op import cuts_first
from .native import levels


def forward(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    cls_token: Tensor,
    size: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    into: Tensor | None = None,
    patches: Tensor | None = None,
) -> Tensor:
    """y [B, 1 + P, C], as the definition; `patches` is room for those that are cut first."""
    batch, side = image.shape[0], weight.shape[-1]
    width = image.shape[-1] if size is None else size[1]
    tokens, channels = position.shape
    y = position.new_empty((batch, tokens, channels)) if into is None else into
    if y.numel() == 0:
        return y
    matrix, position = linear_launch.rows_of(weight.flatten(1)), linear_launch.rows_of(position)
    is_cut = cuts_first(image, weight, size) or matrix.shape[1] == 1
    pixels = cut(image, side, weight.dtype, size, mean, std, patches) if is_cut else within_reach(image)
    if matrix.shape[1] == 1:  # as in linear's launch
        pixels, matrix = F.pad(pixels, (0, 1)), F.pad(matrix, (0, 1))
    strides = (pixels.stride(0), 0, 0, 0) if is_cut else tuple(pixels.stride())
    rows, depth = batch * tokens, matrix.shape[1]
    bias, cls_token = None if bias is None else bias.contiguous(), cls_token.contiguous()
    small = -(-rows // 128) * -(-channels // 128) < gpu_of(image.device).multiprocessors
    with on_device_of(image):
        architecture = architecture_of_device()
        tiles = tiles_of_product(architecture, weight.dtype, depth, channels, False, False, small)
        precise = precision_of_float32() if allows_tf32(architecture) else "ieee"
        limit = {} if tiles.registers is None else {"maxnreg": tiles.registers}
        kernels.embed[-(-rows // tiles.rows) * -(-channels // tiles.columns),](
            *(pixels, matrix, bias, position, cls_token, y, rows, channels, depth, tokens, width // side),
            *(*strides, matrix.stride(0), position.stride(0)),
            **{"SIDE": side, "RUN": 1 if is_cut else _run(pixels, side), "IS_CUT": is_cut},
            **{"ROWS": tiles.rows, "COLUMNS": tiles.columns, "SLICE": tiles.slice, "STEP": tiles.step},
            **{"WHOLE": depth % tiles.step == 0, "PRECISION": precise},
            **{"num_warps": tiles.warps, "num_stages": tiles.stages, **limit},
            **dependent_launch.options(architecture),
        )
    return y


def add_position(patches: Tensor, position: Tensor, cls_token: Tensor, into: Tensor | None = None) -> Tensor:
    """y [B, 1 + P, C] in the widest of their dtypes."""
    batch, count, channels = patches.shape
    dtype = torch.promote_types(torch.promote_types(patches.dtype, position.dtype), cls_token.dtype)
    y = patches.new_empty((batch, 1 + count, channels), dtype=dtype) if into is None else into
    if y.numel() == 0:
        return y
    patches, position = within_reach(patches), linear_launch.rows_of(position)
    side = 64  # 128 bytes of a line of either layout
    with on_device_of(patches):
        kernels.place[batch * -(-(1 + count) // side) * -(-channels // side),](
            *(patches, position, cls_token.contiguous(), y, 1 + count, channels),
            *(*patches.stride(), position.stride(0)),
            **{"TOKENS": side, "CHANNELS": side, "num_warps": 4},
            **dependent_launch.options(architecture_of_device()),
        )
    return y


def cut(
    image: Tensor,
    side: int,
    dtype: torch.dtype,
    size: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    room: Tensor | None = None,
) -> Tensor:
    """The patches [B * (1 + P), in * p * p] in `dtype`, resized and standardised, CLS tokens' rows zero."""
    image = within_reach(image)
    batch, planes, *old = image.shape
    new = tuple(old) if size is None else (size[0], size[1])
    lines, columns = (extent // side for extent in new)
    tokens, seen = 1 + lines * columns, (lines * side, columns * side)
    shape = (batch, tokens, planes * side * side)
    patches = image.new_empty(shape, dtype=dtype) if room is None else room[: math.prod(shape)].view(shape)
    patches[:, 0] = 0
    resized = new != tuple(old)
    tables: Sequence[Tensor | None] = (None,) * 4
    width, window = min(256, triton.next_power_of_2(seen[1])), 1
    if resized:
        tables = [t for axis in range(2) for t in _taps(old[axis], new[axis], seen[axis], image.device)]
        width, window = _window(old[1], new[1], seen[1])
    height = max(1, min(32, 1024 // max(width, window)))
    of_bytes = (
        table_of_bytes(planes, _key(mean), _key(std), image.device) if image.dtype == torch.uint8 else None
    )
    with on_device_of(image):
        kernels.cut[batch * planes * -(-seen[0] // height) * -(-seen[1] // width),](
            *(image, *tables, of_bytes, patches, planes, *seen, old[1], tokens, columns, *image.stride()),
            **{"SIDE": side, "RESIZED": resized, "LINES": height, "PIXELS": width, "WINDOW": window},
            **{"num_warps": 2, **dependent_launch.options(architecture_of_device())},
        )
    return patches.flatten(0, 1)


def backward(
    grad: Tensor,
    image: Tensor,
    weight: Tensor,
    size: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of image, weight, bias, position and CLS token, where they are wanted.

    Position and CLS token are sums over the images, which PyTorch has; so is what a patch has to be taken
    apart into, and the transposed interpolation, two products with its few numbers a line.
    """
    batch, tokens, _ = grad.shape
    side = weight.shape[-1]
    results: list[Tensor | None] = [None] * 5
    if wanted[3] or wanted[4]:
        of_position = grad.sum(0, dtype=torch.float32).to(grad.dtype)
        results[3], results[4] = of_position, of_position[0]
    dz = linear_launch.rows_of(grad.to(weight.dtype))
    if wanted[1] or wanted[2]:
        patches = cut(image, side, weight.dtype, size, mean, std)
        beside = linear_launch.ones_beside(dz)
        beside.view(batch, tokens, 16)[:, 0] = 0  # the CLS tokens have no bias
        flat = weight.flatten(1)
        dw, results[2], _, _ = linear_launch.weight_gradient(
            dz, patches, beside, means=False, weight=flat, gamma=None, beta=None, bias=True
        )
        results[1] = dw.view(weight.shape)
    if wanted[0]:
        matrix = linear_launch.rows_of(weight.flatten(1))
        of_patches = image.new_empty((batch * tokens, matrix.shape[1]))
        linear_launch.product(dz, matrix, of_patches, transposed=False)
        results[0] = _to_image(of_patches.view(batch, tokens, -1)[:, 1:], image, side, size)
    return results


def _to_image(patches: Tensor, image: Tensor, side: int, size: Sequence[int] | None) -> Tensor:
    batch, planes, *old = image.shape
    new = tuple(old) if size is None else (size[0], size[1])
    lines, columns = (extent // side for extent in new)
    pixels = patches.view(batch, lines, columns, planes, side, side).permute(0, 3, 1, 4, 2, 5)
    pixels = pixels.reshape(batch, planes, lines * side, columns * side)
    if new == tuple(old):
        whole = image.new_zeros(image.shape)
        whole[..., : lines * side, : columns * side] = pixels
        return whole
    down, across = (
        _interpolation(old[axis], new[axis], pixels.shape[2 + axis], image.device) for axis in range(2)
    )
    return (down.T @ pixels.float() @ across).to(image.dtype)


def _interpolation(old: int, new: int, seen: int, device: torch.device) -> Tensor:
    """The matrix [seen, old] that interpolates along an axis."""
    places, weights = _taps(old, new, seen, device)
    matrix = torch.zeros((seen, old), dtype=torch.float32, device=device)
    for place, weight in zip(places, weights, strict=True):  # several taps may lie on one line of the edge
        matrix.scatter_add_(1, place.long()[:, None], weight[:, None])
    return matrix


# Tables are copied to a device once, and stay: a copy makes the CPU wait and cannot be recorded into a CUDA
# graph, whose replays read the table that was there.


def _key(numbers: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if numbers is None else tuple(numbers)


@cache
def table_of_bytes(
    planes: int, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, device: torch.device
) -> Tensor:
    """What every byte of each channel stands for."""
    with torch.inference_mode(False):
        return levels(planes, mean, std).to(device)


@cache
def _taps(old: int, new: int, seen: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`bicubic.taps` of the first `seen` of the new lines, as the kernel reads them."""
    places, weights = bicubic.taps(old, new)
    with torch.inference_mode(False):
        return (
            places[:, :seen].to(device, torch.int32).contiguous(),
            weights[:, :seen].to(device, torch.float32).contiguous(),
        )


@cache
def _window(old: int, new: int, seen: int) -> tuple[int, int]:
    """How many pixels are interpolated at once, and from how many side by side they come.

    These are in the registers of the lanes of a warp, one a lane if they are 32, and change lanes.
    """
    places, _ = bicubic.taps(old, new)
    first, last = places[0, :seen], places[3, :seen]
    count = 32
    while True:
        count //= 2
        begin = first[::count] // 8 * 8
        end = torch.stack([last[i : i + count].max() for i in range(0, seen, count)])
        window = max(32, triton.next_power_of_2(int((end - begin).max()) + 1))
        if window <= 32 or count == 8:
            return count, window


def _run(image: Tensor, side: int) -> int:
    """Pixels side by side that begin at a multiple of their number, in elements: 8 at most."""
    if image.stride(3) != 1:
        return 1
    return math.gcd(8, side, *(image.stride(i) for i in range(3) if image.shape[i] > 1))
