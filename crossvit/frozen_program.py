"""The program of a frozen model for images of one size, and the memory that it runs in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossvit_kernels import native
from crossvit_kernels.cross_attention.directions import Direction, ForwardOutputs
from crossvit_kernels.cross_attention.native import fusion_step
from crossvit_kernels.linear.packed import PackedLinear
from crossvit_kernels.patch_embed.native import (
    Pixels,
    Resizing,
    Windows,
    copy_step,
    patch_step,
    place_of,
)
from crossvit_kernels.program import Activation, Base, Kind, Place, Program, rows_of

from .layers import resize_position_embedding
from .native_block import Layers, Settings, add_steps

if TYPE_CHECKING:
    from .frozen import PackedModel
    from .model import CrossViT


class Instance:
    """Memory for some images of one size, and the program that runs in it. For one caller at a time."""

    def __init__(
        self, weights: PackedModel, model: CrossViT, x: Tensor, capacity: int, threads: int, key: tuple
    ) -> None:
        self.weights, self.capacity, self.threads, self.key = weights, capacity, threads, key
        self.program = Program()
        size = (x.shape[2], x.shape[3])
        grids = model.grid_sizes(size)
        self.tokens_of = [1 + rows * columns for rows, columns in grids]
        self._arena(model, size, grids)
        for b in range(2):
            self._embed(model, b, x, size, grids[b])
        for k in range(len(weights.blocks)):
            for b in range(2):
                for layers, settings in weights.blocks[k][b]:
                    self._block(b, layers, settings)
            self._fuse(*weights.fusions[k])
        if weights.classes:
            self._classify(model)
        self.words = self.program.packed()
        # Kept, as taking it for each call would leave holes between what callers keep.
        self.isa, _, scratch = native.load().program_plan(self.words, self.capacity, self.threads)
        self.scratch = torch.empty(scratch + 16, dtype=torch.int32, device="cpu")
        del self.weights  # which hold this: without a cycle, all of it goes with its last user

    def _arena(self, model: CrossViT, size: tuple[int, int], grids: list[tuple[int, int]]) -> None:
        """Tokens of every image, and for each worker what a block passes from step to step."""
        weights = self.weights
        wide = 0
        of_tokens = [n * c for n, c in zip(self.tokens_of, weights.widths, strict=True)]
        for b in range(2):
            hidden = max((x.fc1.outputs for blocks in weights.blocks for x, _ in blocks[b]), default=0)
            wide = max(wide, self.tokens_of[b] * (max(3 * weights.widths[b], hidden) + weights.widths[b]))
            wide = max(wide, *(_stem_elements(weights.stems[b], model.branch_sizes(size)[b])))
        of_worker = -(-2 * wide // 16) * 16  # the input of a step and its output, at most float32
        total = self.capacity * sum(of_tokens) + self.threads * of_worker
        self.arena = torch.empty(total + 16, dtype=torch.float32, device="cpu")
        at = -self.arena.data_ptr() % 64 // 4
        self.tokens: list[Tensor] = []
        for n, c in zip(self.tokens_of, weights.widths, strict=True):
            self.tokens.append(self.arena[at : at + self.capacity * n * c].view(self.capacity, n, c))
            at += self.capacity * n * c
        self._workers = self.arena.data_ptr() + 4 * at
        self._of_worker = 4 * of_worker

    def _scratch(self, offset: int, columns: int, dtype: torch.dtype) -> Place:
        """Rows of a worker, `offset` bytes into its memory."""
        size = dtype.itemsize
        return Place(Base.FIXED, self._workers + offset, dtype, columns * size, 0, self._of_worker)

    def _embed(
        self, model: CrossViT, b: int, x: Tensor, size: tuple[int, int], grid: tuple[int, int]
    ) -> None:
        weights, program = self.weights, self.program
        tokens = rows_of(self.tokens[b])
        position = resize_position_embedding(weights.positions[b], weights.grids[b], grid)
        position = position[0].expand(self.tokens_of[b], weights.widths[b]).contiguous()
        first = (position[0] + weights.cls[b][0, 0])[None].contiguous()
        program.keep += [position, first]
        program.images()
        program.add(Kind.COPY, copy_step(rows_of(first), tokens, 1, weights.widths[b]))
        place = place_of(x, Base.INPUT)
        strides = cast(tuple[int, int, int], tuple(s * x.element_size() for s in x.stride()[1:]))
        levels = weights.levels if x.dtype == torch.uint8 else None
        pixels = Pixels(place, x.shape[1], *size, *strides, levels=levels)
        seen = model.branch_sizes(size)[b]
        resizing = None
        if seen != size and model.crop_scale and seen[0] <= size[0] and seen[1] <= size[1]:
            top, left = round((size[0] - seen[0]) / 2.0), round((size[1] - seen[1]) / 2.0)
            place = replace(place, data=top * strides[1] + left * strides[2])
            pixels = replace(pixels, place=place, height=seen[0], width=seen[1])
        elif seen != size:
            resizing = Resizing(size, seen)
            program.keep.append(resizing)
        patch = model.patch_size[b]
        seen = (seen[0] // patch * patch, seen[1] // patch * patch)
        if resizing is None:
            pixels = replace(pixels, height=seen[0], width=seen[1])
        half = self._of_worker // 2
        stem = weights.stems[b]
        for i, (packed, convolution) in enumerate(stem):
            last = i == len(stem) - 1
            windows = _windows(convolution, seen)
            count = windows.rows * windows.columns
            if last and count != self.tokens_of[b] - 1:
                raise RuntimeError(f"patch_embed.{b} gives {count} patches, not {self.tokens_of[b] - 1}")
            columns = self._scratch(0, packed.channels, weights.dtype)
            program.add(Kind.PATCHES, patch_step(pixels, columns, windows, seen, resizing))
            out = tokens.row(1) if last else self._scratch(half, packed.outputs, weights.dtype)
            step = packed.step(
                columns, out, count,
                activation=Activation.NONE if last else Activation.RELU,
                residual=rows_of(position).row(1) if last else None,
            )  # fmt: skip
            program.add(Kind.LINEAR, step)
            bytes_of = weights.dtype.itemsize
            of_pixel = packed.outputs * bytes_of
            seen, resizing = (windows.rows, windows.columns), None
            pixels = Pixels(
                out, packed.outputs, *seen, 0, of_pixel * windows.columns, of_pixel, channels_last=True
            )

    def _block(self, b: int, layers: Layers, settings: Settings) -> None:
        x = rows_of(self.tokens[b])
        dtype, half = self.weights.dtype, self._of_worker // 2
        qkv = self._scratch(0, layers.qkv.outputs, dtype)
        attended = self._scratch(half, layers.proj.channels, dtype)
        hidden = self._scratch(0, layers.fc1.outputs, dtype)
        add_steps(self.program, layers, settings, self.tokens_of[b], x, x, qkv, attended, hidden)

    def _fuse(self, weights: list[tuple[Any, ...]], heads: list[int], eps: float) -> None:
        nothing = torch.empty(0, dtype=torch.float32, device="cpu")
        directions = []
        for b in range(2):
            own, other = self.tokens[b], self.tokens[1 - b]
            direction = Direction(own[:, :1], other[:, 1:], weights[b], heads[b], stream=b)
            # The CLS rows are read before they are written, and no direction reads the other's.
            directions.append((direction, ForwardOutputs(own[:, :1], None, None, nothing)))
        self.program.keep.append(directions)
        self.program.batch()
        self.program.add(Kind.FUSION, fusion_step(directions, eps))

    def _classify(self, model: CrossViT) -> None:
        classes = self.weights.classes
        logits = Place(Base.OUTPUT, 0, torch.float32, 4 * classes, of_image=4 * classes)
        self.program.batch()
        for b, (head, (_, _, eps)) in enumerate(zip(self.weights.heads, self.weights.norms, strict=True)):
            residual = logits if b else None
            step = head.step(rows_of(self.tokens[b]), logits, 1, eps=eps, residual=residual)
            self.program.add(Kind.LINEAR, step)

    def run(self, weights: PackedModel, x: Tensor, out: Tensor) -> None:
        module, images = native.load(), x.shape[0]
        _, threads, _ = module.program_plan(self.words, images, self.threads)  # one after a fork
        scratch = self.scratch.data_ptr() + -self.scratch.data_ptr() % 64
        module.run_program(self.words, images, x.data_ptr(), out.data_ptr(), scratch, self.isa, threads)
        if not weights.classes:
            rows = (y[:images, 0] for y in self.tokens)
            normalised = (
                F.layer_norm(row, row.shape[1:], weight.float(), bias.float(), eps)
                for row, (weight, bias, eps) in zip(rows, weights.norms, strict=True)
            )
            torch.cat(tuple(normalised), dim=1, out=out)


def _windows(convolution: nn.Conv2d, seen: tuple[int, int]) -> Windows:
    (kernel, _), (stride, _) = convolution.kernel_size, convolution.stride
    padding = cast(tuple[int, int], convolution.padding)[0]
    rows, columns = ((size + 2 * padding - kernel) // stride + 1 for size in seen)
    return Windows(kernel, stride, padding, rows, columns)


def _stem_elements(stem: list[tuple[PackedLinear, nn.Conv2d]], seen: tuple[int, int]) -> Iterator[int]:
    """The most that a convolution of the stem has as windows, and as results."""
    for packed, convolution in stem:
        windows = _windows(convolution, seen)
        seen = (windows.rows, windows.columns)
        yield windows.rows * windows.columns * max(packed.channels, packed.outputs)
