"""Programs of the compiled module: steps on the tokens of a batch of images, run by one call.

This writes what csrc/program/program.h reads. A step takes its tensors by place: addresses and distances in
bytes, so whoever makes a program keeps its tensors alive (`Program.keep`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from . import native

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/common/dtype.h numbers them


class Kind(IntEnum):
    """Of a record; as csrc/program/program.h numbers them."""

    IMAGES, BATCH, LINEAR, SELF_ATTENTION, PATCHES, COPY, FUSION = range(7)


class Base(IntEnum):
    """What the address of a place counts from."""

    ABSENT, FIXED, INPUT, OUTPUT = range(4)


class Activation(IntEnum):
    NONE, GELU, RELU = range(3)


class Precision(IntEnum):
    """What matrices are multiplied in."""

    FLOAT32, BFLOAT16 = range(2)


def precision_of(dtype: torch.dtype) -> Precision:
    """That of products with weights of a dtype; float16 is multiplied in float32."""
    return Precision.BFLOAT16 if dtype == torch.bfloat16 else Precision.FLOAT32


@dataclass(frozen=True)
class Place:
    """Where each image, or each worker, has its rows of contiguous channels; distances are bytes."""

    base: Base
    data: int
    dtype: torch.dtype
    of_row: int
    of_image: int = 0
    of_worker: int = 0

    def words(self) -> list[int]:
        places = (self.base, self.data, self.of_image, self.of_worker, self.of_row)
        return [*map(int, places), DTYPES[self.dtype]]

    def row(self, index: int) -> Place:
        """The same from another row on."""
        return Place(
            self.base, self.data + index * self.of_row, self.dtype, self.of_row, self.of_image, self.of_worker
        )


NOWHERE = [0] * 6


def rows_of(x: Tensor) -> Place:
    """Of a tensor [images, rows, channels] or [rows, channels]; channels are contiguous."""
    size = x.element_size()
    of_image = x.stride(0) * size if x.ndim == 3 else 0
    return Place(Base.FIXED, x.data_ptr(), x.dtype, x.stride(-2) * size, of_image)


def plain(x: Tensor) -> Tensor:
    """The same values with contiguous channels, and no view that stands for -x."""
    x = x.detach().resolve_neg()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def in_images(*tensors: Tensor) -> list[Tensor]:
    """Tensors [..., channels] as [images, rows, channels], all of the same images and rows.

    One image where strides allow it, so that threads share its rows; copied where nothing else goes.
    """
    tensors = tuple(plain(x) for x in tensors)
    try:
        return [x.view(1, -1, x.shape[-1]) for x in tensors]
    except RuntimeError:  # rows are not one distance apart
        if tensors[0].ndim == 3:
            return list(tensors)
        return [x.contiguous().view(1, -1, x.shape[-1]) for x in tensors]


def threads_for(operations: int) -> int:
    """As many of torch's threads as have some 100,000 operations each: waking one takes microseconds."""
    return max(1, min(torch.get_num_threads(), operations // 100_000))


def bits(x: float) -> int:
    """A double, as the word that has its bits."""
    return struct.unpack("q", struct.pack("d", x))[0]


@dataclass
class Program:
    """Records that run in order. `images` and `batch` begin segments: see csrc/program/program.h."""

    records: list[bytes] = field(default_factory=list)
    keep: list[Any] = field(default_factory=list)

    def add(self, kind: Kind, words: Sequence[int] = ()) -> None:
        self.records.append(struct.pack(f"{2 + len(words)}q", kind, len(words), *words))

    def images(self) -> None:
        """The steps that follow run for one image after the other."""
        self.add(Kind.IMAGES)

    def batch(self) -> None:
        """The steps that follow run once for all images of a thread."""
        self.add(Kind.BATCH)

    def packed(self) -> bytes:
        return b"".join(self.records)


def run(words: bytes, images: int, input: int = 0, output: int = 0, threads: int | None = None) -> None:
    """Run the records for `images`, on torch's threads; input and output are addresses."""
    module = native.load()
    most = torch.get_num_threads() if threads is None else threads
    isa, threads, scratch = module.program_plan(words, images, most)
    memory = torch.empty(scratch + 16, dtype=torch.int32, device="cpu")
    aligned = memory.data_ptr() + -memory.data_ptr() % 64
    module.run_program(words, images, input, output, aligned, isa, threads)
