"""`python -m benchmarks.layer_model`: predictions of the times of a block's layers from what they compile to.

As time_model.py, for the Triton kernels of linear layers, self-attention and patch embedding of crossvit_18
on an H200 at a batch of 256. What is executed is counted for a few rows and scaled; bytes between registers,
L2 cache and memory, and products, are counted from the shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch

from crossvit_kernels.cross_attention.gpu import Gpu
from crossvit_kernels.linear import gpu_op as linear_op
from crossvit_kernels.linear import triton_launch as linear_launch
from crossvit_kernels.patch_embed import triton_launch as patch_launch
from crossvit_kernels.self_attention import triton_launch as attention_launch

from . import compiled_layers, executed
from .compiled import ARCHITECTURES, Layer, compiling, resources
from .time_model import GPUS, SHARED_BYTES, START, Issued, Prediction

H200 = next(gpu for gpu in GPUS if gpu.name == "H200")
BATCH = 256
# TB/s of the L2 cache: inferred from the best published rate of a product whose tiles are 128 x 256.
L2 = 7.9
TILE = 128


@dataclass(frozen=True)
class Task:
    """A kernel of a layer at a batch of 256.

    Attributes:
        run: what launches it on a few rows, and how many times more rows the batch has.
        bytes: from and to memory. l2: likewise, of all programs.
        flops: of whole tiles.
        shared: bytes that products read and copies write in shared memory.
    """

    layer: str
    kernel: str
    run: Callable[[], object]
    times: float
    bytes: float
    flops: float = 0.0
    l2: float = 0.0
    shared: float = 0.0


def _product(
    layer: str, rows: int, depth: int, columns: int, extra: float, run: Callable, times: float
) -> Task:
    """extra: matrices of the result's size that the epilogue reads or writes."""
    across, down = -(-columns // 64) * 64, -(-rows // TILE) * TILE
    tiles = down // TILE * (across / TILE)
    operands = tiles * 2 * TILE * depth * 2
    result = 2.0 * rows * columns * extra
    # Both groups of four warps read all columns of W, and 64 rows of x each; the copies write what they read.
    read = tiles * depth * 2 * (TILE + 2 * TILE)
    return Task(
        *(layer, "product", run, times, 2.0 * rows * depth + 2.0 * depth * columns + result),
        flops=2.0 * down * across * depth,
        l2=operands + result,
        shared=read + operands + result,
    )


def tasks() -> Iterator[Task]:
    """Of a block of each branch, and of its patches."""
    bf16 = torch.bfloat16
    few = 2 * TILE
    for branch, tokens, channels, heads in (("L", 197, 448, 7), ("S", 401, 224, 7)):
        rows, hidden = BATCH * tokens, 3 * channels
        times = rows / few
        for name, (k, n, norm, activation, residual) in compiled_layers.linear_layers(channels, hidden):
            x, weight, y = (
                torch.zeros(few, k, dtype=bf16),
                torch.zeros(n, k, dtype=bf16),
                torch.zeros(few, n, dtype=bf16),
            )
            gamma = torch.zeros(k, dtype=bf16) if norm else None
            args = (
                x,
                weight,
                torch.zeros(n, dtype=bf16),
                gamma,
                gamma,
                y if residual else None,
                None,
                1e-6,
                activation,
            )
            forward = partial(linear_op._forward, *args, False)
            layer = f"{branch} {name}"
            if norm:
                yield Task(layer, "statistics", forward, times, 2.0 * rows * k)
            yield _product(layer, rows, k, n, 2.0 if residual else 1.0, forward, times)
        channels_of_head = channels // heads
        qkv = torch.zeros(1, tokens, 3 * channels, dtype=bf16)
        attend = partial(attention_launch.forward, qkv, heads, channels_of_head**-0.5, bf16, False)
        read = 2.0 * BATCH * tokens * 4 * channels
        padded = -(-tokens // 64) * 64
        yield Task(
            *(f"{branch} attention", "attend", attend, BATCH, read),
            flops=4.0 * BATCH * heads * padded * padded * channels_of_head,
            l2=read + BATCH * heads * (padded // 64) * 2.0 * tokens * 2 * channels_of_head,
        )
    for branch, side, channels, size in (("S", 12, 224, None), ("L", 16, 448, (224, 224))):
        image, weight = (
            torch.zeros(1, 3, 240, 240, dtype=bf16),
            torch.zeros(channels, 3, side, side, dtype=bf16),
        )
        grid = (size or (240, 240))[0] // side
        tokens, depth = 1 + grid * grid, 3 * side * side
        position = torch.zeros(tokens, channels, dtype=bf16)
        run = partial(patch_launch.forward, image, weight, None, position, position[0], size, None, None)
        pixels = 2.0 * BATCH * 3 * 240 * 240
        cut = 2.0 * BATCH * tokens * depth
        if size:
            yield Task(f"{branch} patches", "cut", run, BATCH, pixels + cut)
        found = _product(f"{branch} patches", BATCH * tokens, depth, channels, 1.0, run, BATCH)
        yield Task(
            *(found.layer, "embed", run, BATCH, (cut if size else pixels) + 2.0 * BATCH * tokens * channels),
            flops=found.flops,
            l2=found.l2,
            shared=found.shared,
        )


def predictions() -> list[tuple[str, Prediction]]:
    """Of each task, by layer; kernels that one layer has twice are counted each for itself."""
    counted: dict[int, dict[str, Any]] = {}
    found = []
    for task in tasks():
        key = id(task.run)
        if key not in counted:
            counted[key] = _counted(task.run)
        one, run = counted[key][task.kernel]
        issued = Issued(
            instructions=float(run.of_warps.sum()) * task.times,
            longest=float(run.of_warps.max()),
            moved=0.0,
            blocks=run.blocks * task.times,
        )
        cycle = 1e-3 / H200.clock
        limits = {
            **issued.limits(one, H200),
            "memory": task.bytes / H200.memory * 1e-6,
            "L2": task.l2 / L2 * 1e-6,
            "tensor cores": task.flops / H200.tensor * 1e-6,
            "shared memory": task.shared / (SHARED_BYTES * H200.multiprocessors) * cycle,
        }
        found.append((task.layer, Prediction(task.kernel, limits, START)))
    return found


def _counted(call: Callable[[], object]) -> dict[str, Any]:
    """Resources and what is executed of each kernel of a call, on a GPU of one multiprocessor."""
    gpu = Gpu(90, 1, ARCHITECTURES["sm_90"].shared_of_block)
    with (
        mock.patch.object(patch_launch, "gpu_of", return_value=gpu),
        mock.patch.object(linear_launch, "gpu_of", return_value=gpu),
    ):
        with compiling("sm_90") as kernels:
            call()
        of_kernel = {kernel.hash: resources(kernel, "sm_90", Layer("")) for kernel in kernels}
        runs = executed.launched_by(call, "sm_90", 1, linear_launch)
    return {launch.name: (of_kernel[launch.hash], run) for launch, run in runs}


INTRODUCTION = f"""\
No kernel was timed for this: these are limits computed by `python -m benchmarks.layer_model`, for crossvit_18
at 240 px on an H200, bfloat16, a batch of {BATCH}, forward. As above; instructions are those of a few rows,
scaled, and L2 is what all programs read and write at {L2} TB/s, which was inferred from a published rate of
products. A launch and its first trips to memory are taken for {START:g} us. Where copies, products and
epilogues do not overlap, times are longer."""


def page() -> str:
    """Markdown: a row a kernel."""
    lines = [INTRODUCTION, "", "| layer | kernel | us | limits |", "|---|---|---|---|"]
    lines += [f"| {layer} | {p.kernel} | {p.microseconds:.0f} | {p.words} |" for layer, p in predictions()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page())
