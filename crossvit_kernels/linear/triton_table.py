"""Which tiles the products of linear layers use, by architecture, dtype and size.

Chosen from what the kernels compile to: nothing in a thread's memory, two programs on a multiprocessor, so
that one multiplies while the other is in its epilogue. `_MEASURED` goes before that: `python -m
benchmarks.tune_linear` writes it on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..cross_attention.triton_table import FAMILIES, nearest


@dataclass(frozen=True)
class Tiles:
    """Of `product` and of `weight_gradient`.

    Attributes:
        rows, columns: of a program's tile.
        step: of the dimension that is summed over.
        slice: columns that the epilogue takes at once, all of them, a half or a quarter.
        tma: whether tiles are copied by descriptors.
        registers: the limit of a thread; None for none.
    """

    rows: int
    columns: int
    step: int
    slice: int
    warps: int
    stages: int
    tma: bool = False
    registers: int | None = None

    def tail(self, columns: int) -> int:
        """Columns of the last tile of a row of tiles, if half a tile is enough; 0 where it is not."""
        half = self.columns // 2
        return half if self.tma and half >= self.slice and 0 < columns % self.columns <= half else 0


# (architecture, dtype, depth, columns, narrow, small) -> what was fastest.
# Written by benchmarks/tune_linear.py from here to the end of the braces.
_MEASURED: dict[tuple[str, torch.dtype, int, int, bool, bool], Tiles] = {}


def has_tma(architecture: str) -> bool:
    """Whether tiles are copied by the TMA unit. (sm_120 has one, but no room for what it is good for.)"""
    return nearest(architecture) in ("sm_90", "sm_100")


def tiles_of_product(
    architecture: str, dtype: torch.dtype, depth: int, columns: int, narrow: bool, tma: bool, small: bool
) -> Tiles:
    """For operands of `dtype`, `depth` numbers of which are summed for each of `columns` results of a row.

    narrow: slices of half the width, for epilogues that have twice the numbers in registers.
    small: tiles of 128 x 128 would leave multiprocessors without one.
    """
    architecture = nearest(architecture)
    measured = _MEASURED.get((architecture, dtype, depth, columns, narrow, small))
    if measured is not None and (tma or not measured.tma):
        return measured
    amd = FAMILIES[architecture] == "amd"
    slice_ = 32 if narrow else 64
    # ptxas aims at 80 or 96 registers where four warps take few, and keeps a predicate in memory then.
    of_four_warps = None if amd else 128
    if dtype == torch.float32:
        return Tiles(64, 64, 16, 32, 4, 2, registers=of_four_warps)
    if small:
        step = 64 if depth % 64 == 0 else 32
        return Tiles(64, 64, step, slice_, 4, 3, tma, registers=of_four_warps)
    if tma:
        # Rows of 128 bytes are what the unit copies best; half of them, where 64 do not divide K.
        # Two programs have 128 registers a thread; ptxas takes more for two results of a slice.
        step, stages = (64, 3) if depth % 64 == 0 else (32, 4)
        return Tiles(128, 128, step, slice_, 8, stages, True, registers=128)
    if amd:
        return Tiles(128, 128, 32, slice_, 8, 2)
    # 48 KB of shared memory and 128 registers: two programs also where a multiprocessor has 100 KB. What the
    # gradients' epilogues have in registers is too much for that on sm_120.
    fits = not (architecture == "sm_120" and narrow)
    return Tiles(128, 128, 32, slice_, 8, 4, registers=128 if fits else None)


def tiles_of_weight_gradient(architecture: str, dtype: torch.dtype, tma: bool) -> Tiles:
    """Rows are outputs here, columns channels, and steps go along the rows of x."""
    if dtype == torch.float32:
        return Tiles(64, 64, 16, 64, 4, 2)
    if tma:
        return Tiles(128, 128, 64, 128, 8, 3, True)
    if FAMILIES[nearest(architecture)] == "amd":
        return Tiles(128, 128, 32, 128, 8, 2)
    return Tiles(128, 128, 32, 128, 8, 3)
