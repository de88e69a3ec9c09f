"""The launches of the Triton kernels of linear layers: allocation, descriptors, grids."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import dependent_launch
from ..cross_attention.gpu import gpu_of, on_device_of
from ..cross_attention.triton_launch import architecture_of_device
from ..cross_attention.triton_table import FAMILIES, allows_tf32, nearest
from ..validation import precision_of_float32
from . import triton_kernels as kernels
from . import triton_rows as rows_kernels
from .triton_table import Tiles, has_tma, tiles_of_product, tiles_of_weight_gradient

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_WHOLE_ROW = 1 << 30  # a part of a row's statistics that is as wide as the row


class Statistics(NamedTuple):
    """Of the rows of a LayerNorm's input: [parts, 2, M], sums and squares about their mean, in float32.

    Each part has `part` channels, the last what is left.
    """

    values: Tensor
    part: int = _WHOLE_ROW


class Norm(NamedTuple):
    """A LayerNorm as the product behind it needs it.

    Attributes:
        weight: W gamma, [N, K].
        colsum, offset: sums of its rows; b + W beta. float32.
        statistics: of the rows; None where they are normalised already.
    """

    weight: Tensor
    colsum: Tensor
    offset: Tensor
    statistics: Statistics
    eps: float
    deferred: bool


def defers(x: Tensor, weight: Tensor) -> bool:
    """Whether x is multiplied before it is normalised.

    Products of bfloat16 have no rounding but that of their sums. float32 rows are normalised first, because
    what is left of x W' and mean colsum would be rounding where the mean is large; float16 ones because r dz
    may leave their range; and rows of another dtype than the weight's are written again anyway.
    """
    return x.dtype == weight.dtype == torch.bfloat16


def rows_of(x: Tensor) -> Tensor:
    """[..., C] as a matrix whose rows are contiguous."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def fold(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """W gamma [N, K] in `dtype`, and [2, N]: the sums of its rows, b + W beta. Vectors are contiguous."""
    outputs, channels = weight.shape
    weight = rows_of(weight)
    folded = weight.new_empty((outputs, channels), dtype=dtype)
    vectors = weight.new_empty((2, outputs), dtype=torch.float32)
    height, block = _block(channels)
    with on_device_of(weight):
        rows_kernels.fold[-(-outputs // height),](
            *(weight, bias, gamma, beta, folded, *vectors),
            *(outputs, channels, weight.stride(0)),
            **{"ROWS": height, "BLOCK": block, **_of_rows()},
        )
    return folded, vectors


def statistics(x: Tensor, into: Tensor | None = None) -> Tensor:
    """[1, 2, M] of the rows of x [M, K]."""
    found = x.new_empty((1, 2, x.shape[0]), dtype=torch.float32) if into is None else into
    height, block = _block(x.shape[1])
    with on_device_of(x):
        rows_kernels.statistics[-(-x.shape[0] // height),](
            *(x, found, *x.shape, x.stride(0)),
            **{"ROWS": height, "BLOCK": block, **_of_rows(), **_dependent()},
        )
    return found


def normalise(
    x: Tensor, eps: float, dtype: torch.dtype, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(x - mean) / deviation [M, K] in `dtype`, and the statistics."""
    hat, found = into or (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty((1, 2, x.shape[0]), dtype=torch.float32),
    )
    height, block = _block(x.shape[1])
    with on_device_of(x):
        rows_kernels.normalise[-(-x.shape[0] // height),](
            *(x, found, hat, *x.shape, x.stride(0), eps),
            **{"ROWS": height, "BLOCK": block, **_of_rows(), **_dependent()},
        )
    return hat, found


def merge(statistics: Statistics, channels: int) -> Tensor:
    """[1, 2, M], of statistics of parts of rows of so many channels."""
    values = statistics.values
    to = values.new_empty((1, *values.shape[1:]))
    rows, height = values.shape[2], 256
    with on_device_of(values):
        rows_kernels.merge[-(-rows // height),](
            *(values, to, rows, channels),
            **{"PARTS": values.shape[0], "PART": statistics.part, "ROWS": height, **_of_rows()},
        )
    return to


def beside(statistics: Statistics, channels: int, eps: float) -> Tensor:
    """What goes beside x [M, 16] where it is not normalised, in bfloat16: see `weight_gradient`."""
    values = statistics.values
    rows, height = values.shape[2], 256
    to = values.new_empty((rows, 16), dtype=torch.bfloat16)
    with on_device_of(values):
        rows_kernels.beside[-(-rows // height),](
            *(values, to, rows, channels, eps),
            **{"PARTS": values.shape[0], "PART": statistics.part, "ROWS": height, **_of_rows()},
        )
    return to


def product(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    epilogue: str = "forward",
    activation: str | None = None,
    transposed: bool = True,
    bias: Tensor | None = None,
    colsum: Tensor | None = None,
    statistics: Statistics | None = None,
    eps: float = 0.0,
    scaled: bool = False,
    z: Tensor | None = None,
    residual: Tensor | None = None,
    also: Tensor | None = None,
    scale: Tensor | None = None,
    sums: Tensor | None = None,
    left: Tensor | None = None,
) -> None:
    """Into y [M, N], contiguous: see the kernel. All matrices have contiguous rows, x and weight one dtype.
    `also` [M, N] is contiguous too.

    `sums` [tiles, 2, M] is what `sums_for` allocates, or what is read; `left` [parts, 2, M] what
    `statistics_for` does.
    """
    rows, columns = y.shape
    channels = columns if epilogue == "norm_gradient" else x.shape[1]
    _check(y, residual, scale)
    if x.shape[1] == 1:  # Triton would compile it as a constant, and without the loop its wgmma is wrong
        x, weight = F.pad(x, (0, 1)), F.pad(weight, (0, 1) if transposed else (0, 0, 0, 1))
    depth = x.shape[1]
    matrices = [m for m in (x, weight, y, z, residual, also) if m is not None]
    with on_device_of(x):
        described, mixed = all(map(_has_descriptor, matrices)), y.dtype != x.dtype
        tiles = _tiles_of(x, columns, epilogue, activation, described, mixed)
        _check_room(tiles, columns, sums if epilogue == "activation_gradient" else None, left)
        tail, step = tiles.tail(columns), tiles.step

        def tile(matrix: Tensor | None, height: int, width: int) -> Any:
            return _descriptor(matrix, height, width) if tiles.tma and matrix is not None else matrix

        def of_weight(width: int) -> Any:
            return tile(weight, width, step) if transposed else tile(weight, step, width)

        given, part = (None, 0) if statistics is None else statistics
        limit = {} if tiles.registers is None else {"maxnreg": tiles.registers}
        kernels.product[-(-rows // tiles.rows) * -(-columns // tiles.columns),](
            *(tile(x, tiles.rows, step), of_weight(tiles.columns), of_weight(tail) if tail else None),
            *(tile(m, tiles.rows, tiles.slice) for m in (y, z, residual, also)),
            *(bias, colsum, given, scale, sums, left),
            *(rows, columns, depth, channels, 1 if scale is None else rows // scale.shape[0]),
            *(x.stride(0), weight.stride(0)),
            *(0 if m is None else m.stride(0) for m in (z, residual)),
            eps,
            **{"EPILOGUE": epilogue, "ACTIVATION": activation, "NORM": colsum is not None, "SCALED": scaled},
            **{"TRANSPOSED": transposed, "PARTS": 0 if given is None else given.shape[0], "PART": part},
            **{"SUMS": sums.shape[0] if epilogue == "norm_gradient" and sums is not None else 0},
            **{"OUT": _DTYPES[y.dtype], "ROWS": tiles.rows, "COLUMNS": tiles.columns, "TAIL": tail},
            **{"SLICE": tiles.slice, "STEP": step, "WHOLE": depth % step == 0, "TMA": tiles.tma},
            **{"PRECISION": _precision(), "num_warps": tiles.warps, "num_stages": tiles.stages, **limit},
            **_dependent(),
        )


def _dependent() -> dict[str, Any]:
    return dependent_launch.options(architecture_of_device())


def _check(y: Tensor, residual: Tensor | None, scale: Tensor | None) -> None:
    """Of callers of the operators themselves; the public function has refused it in its own words."""
    if residual is not None and residual.shape != y.shape:
        raise ValueError(f"residual must have {y.shape[0]} rows of {y.shape[1]}, got {list(residual.shape)}")
    if scale is not None and (scale.shape[0] == 0 or y.shape[0] % scale.shape[0]):
        raise ValueError(f"residual_scale must divide {y.shape[0]} rows, got {scale.shape[0]} numbers")


def _check_room(tiles: Tiles, columns: int, sums: Tensor | None, left: Tensor | None) -> None:
    if sums is not None and sums.shape[0] != -(-columns // tiles.columns):
        raise ValueError(f"sums must be what sums_for allocates for tiles of {tiles.columns} columns")
    if left is not None and left.shape[0] != -(-columns // tiles.slice):
        raise ValueError(f"left must be what statistics_for allocates for slices of {tiles.slice} columns")


def _precision() -> str:
    return precision_of_float32() if allows_tf32(architecture_of_device()) else "ieee"


def statistics_for(x: Tensor, columns: int, room: Tensor | None = None) -> Statistics:
    """For what a forward product of x, without activation, leaves of its `columns` results a row.

    room: float32 memory to take it from, `most_statistics` a row.
    """
    with on_device_of(x):
        width = _tiles_of(x, columns, "forward", None, True).slice
    shape = (-(-columns // width), 2, x.shape[0])
    if room is None:
        return Statistics(x.new_empty(shape, dtype=torch.float32), width)
    return Statistics(room[: shape[0] * shape[1] * shape[2]].view(shape), width)


def most_statistics(columns: int) -> int:
    """The most numbers that `statistics_for` takes for a row: its slices are 32 columns at least."""
    return 2 * -(-columns // 32)


def sums_for(x: Tensor, columns: int) -> Tensor:
    """Room for m1 and m2 of the rows of an "activation_gradient"."""
    with on_device_of(x):
        tiles = _tiles_of(x, columns, "activation_gradient", "gelu", True)
    return x.new_empty((-(-columns // tiles.columns), 2, x.shape[0]), dtype=torch.float32)


def gradient_of_rows(
    dy: Tensor,
    dtype: torch.dtype,
    *,
    activation: str | None,
    z: Tensor | None,
    scale: Tensor | None,
    norm: Norm | None,
    channels: int,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """dz [M, N] in `dtype`, m1 and m2 of its rows with a LayerNorm, and what goes beside x [M, 16].

    dz is written to `into`, which may be dy.
    """
    rows, outputs = dy.shape
    dz = dy.new_empty((rows, outputs), dtype=dtype) if into is None else into
    deferred = norm is not None and norm.deferred
    sums = None if norm is None else dy.new_empty((1, 2, rows), dtype=torch.float32)
    beside = dy.new_empty((rows, 16), dtype=dtype) if deferred else ones_beside(dz)
    height, block = _block(outputs, 2048)  # three matrices of a thread's numbers
    given = None if norm is None else norm.statistics
    with on_device_of(dy):
        rows_kernels.gradient_of_rows[-(-rows // height),](
            *(dy, z, scale),
            *(None, None, None) if norm is None else (norm.colsum, norm.offset, norm.statistics.values),
            *(dz, sums, beside, rows, outputs, channels, 1 if scale is None else rows // scale.shape[0]),
            *(dy.stride(0), 0.0 if norm is None else norm.eps),
            **{"ACTIVATION": activation, "NORM": norm is not None, "SCALED": deferred},
            **{
                "PARTS": 0 if given is None else given.values.shape[0],
                "PART": 0 if given is None else given.part,
            },
            **{"ROWS": height, "BLOCK": block, **_of_rows()},
        )
    return dz, sums, beside


def ones_beside(dz: Tensor) -> Tensor:
    """What `weight_gradient` reads beside x where neither mean nor deviation is needed: dz^T 1 is dbias."""
    beside = dz.new_zeros((dz.shape[0], 16))
    beside[:, 3] = 1
    return beside


def weight_gradient(
    dz: Tensor,
    x: Tensor,
    beside: Tensor,
    *,
    means: bool,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of weight, bias, gamma and beta; the same bits in every run on one GPU.

    The rows are summed in parts, so many that all multiprocessors have two programs, and these in order.
    """
    rows, outputs, channels = dz.shape[0], dz.shape[1], x.shape[1]
    with on_device_of(x):
        tma = has_tma(architecture_of_device()) and all(map(_has_descriptor, (dz, x)))
        tiles = tiles_of_weight_gradient(architecture_of_device(), x.dtype, tma)
        programs = -(-outputs // tiles.rows) * -(-channels // tiles.columns)
        wanted = max(1, min(2 * gpu_of(x.device).multiprocessors // programs, rows // (4 * tiles.step)))
        of_part = -(-rows // (wanted * tiles.step)) * tiles.step
        parts = -(-rows // of_part)
        products = x.new_empty((parts, outputs, channels), dtype=torch.float32)
        totals = x.new_empty((parts, outputs, 16), dtype=torch.float32)
        dw, db = torch.empty_like(weight, memory_format=torch.contiguous_format), weight.new_empty(outputs)
        height, width = 16, 128
        of_norm = x.new_empty((-(-outputs // height), 2, channels), dtype=torch.float32)
        operands: list[Any] = [dz, x, beside]
        if tiles.tma:
            sizes = (tiles.rows, tiles.columns, 16)
            operands = [_descriptor(m, tiles.step, size) for m, size in zip(operands, sizes, strict=True)]
        kernels.weight_gradient[programs, parts](
            *(*operands, products, totals, rows, of_part, outputs, channels, dz.stride(0), x.stride(0)),
            **{"OUTPUTS": tiles.rows, "CHANNELS": tiles.columns, "STEP": tiles.step, "TMA": tiles.tma},
            **{"PRECISION": _precision(), "num_warps": tiles.warps, "num_stages": tiles.stages},
        )
        kernels.add_parts[-(-outputs // height) * -(-channels // width),](
            *(products, totals, weight.contiguous(), gamma, beta, dw, db if bias else None),
            *(None if gamma is None else of_norm, parts, outputs, channels),
            **{"MEANS": means, "OUTPUTS": height, "CHANNELS": width, **_of_rows()},
        )
    if gamma is None:
        return dw, db if bias else None, None, None
    sums = of_norm.sum(0)  # copied from, so that no result is a view of another
    of_beta = None if beta is None else sums[1].to(beta.dtype, copy=True)
    return dw, db if bias else None, sums[0].to(gamma.dtype, copy=True), of_beta


def _of_rows() -> dict[str, int]:
    """Warps and registers of the kernels of triton_rows.py and of `add_parts`.

    ptxas aims at fewer registers, and then keeps a predicate in memory on some GPUs; AMD has no such limit.
    """
    nvidia = FAMILIES[nearest(architecture_of_device())] != "amd"
    return {"num_warps": 8, "maxnreg": 128} if nvidia else {"num_warps": 8}


def _tiles_of(
    x: Tensor, columns: int, epilogue: str, activation: str | None, described: bool, mixed: bool = False
) -> Tiles:
    """`mixed`: the result has another dtype than x."""
    architecture = architecture_of_device()
    large = -(-x.shape[0] // 128) * -(-columns // 128)
    small = large < gpu_of(x.device).multiprocessors
    tma = described and has_tma(architecture)
    narrow = epilogue == "activation_gradient" or (
        not tma and (epilogue != "forward" or activation == "gelu" or mixed)
    )
    return tiles_of_product(architecture, x.dtype, x.shape[1], columns, narrow, tma, small)


def _has_descriptor(x: Tensor) -> bool:
    """Whether the TMA unit can address its rows."""
    size = x.element_size()
    return x.data_ptr() % 16 == 0 and x.stride(0) * size % 16 == 0 and x.stride(0) > 0 and x.stride(1) == 1


def _descriptor(x: Tensor, height: int, width: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [height, width])


def _block(columns: int, numbers: int = 4096) -> tuple[int, int]:
    """Rows and columns that a program of triton_rows.py has at once: 4,096 numbers are 16 a thread."""
    width = min(triton.next_power_of_2(columns), 1024)
    return max(1, min(16, numbers // width)), width
