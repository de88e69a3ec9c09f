"""`python -m benchmarks.time_model`: predictions of the kernels' times from what they compile to.

Nothing here is measured on the kernels: bytes, products and exponentials are counted from the shapes,
instructions and shared memory traffic from the compiled code, and each is held against what a GPU can do. The
longest is the prediction, and what binds. Good for finding what to improve; a measurement decides.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from . import compiled_cuda, executed
from .compiled import Case, Resources, compile_case, count
from .executed import Executed


@dataclass(frozen=True)
class Gpu:
    """What a GPU can do at most.

    Attributes:
        clock: GHz, boost.
        memory: TB/s. tensor: TFLOP/s of bf16 with float32 sums.
        source: of memory and tensor.
    """

    name: str
    architecture: str
    multiprocessors: int
    clock: float
    memory: float
    tensor: float
    source: str


GPUS = (
    Gpu("A100 80 GB", "sm_80", 108, 1.41, 2.04, 312, "NVIDIA's data sheet, SXM"),
    Gpu("RTX 4090", "sm_89", 128, 2.52, 1.01, 165, "NVIDIA's Ada whitepaper"),
    Gpu("H100", "sm_90", 132, 1.83, 3.35, 989, "NVIDIA's data sheet, SXM"),
    Gpu("H200", "sm_90", 132, 1.83, 4.3, 790, "a copy and a GEMM of others, measured; data sheet 4.8, 989"),
    Gpu("B200", "sm_100", 148, 1.85, 8.0, 2250, "NVIDIA's data sheet of DGX B200, an eighth"),
)

# Of one multiprocessor and cycle: CUDA C++ programming guide, throughput of native instructions.
ISSUES = 4
EXPONENTIALS = 16
SHARED_BYTES = 128
# Assumptions: cycles between two instructions of one warp, and what a launch in a CUDA graph and a kernel's
# first trips to memory take, in microseconds.
CYCLES_BETWEEN = 2.5
START = 3.0
# The same where a kernel may begin before the one before it has ended, which hides its launch and what it
# prepares.
OVERLAPPED_START = 2.0
OVERLAPPING = ("sm_90", "sm_100", "sm_120")


@dataclass(frozen=True)
class Direction:
    """A CLS token of `own` channels reads P patches of C channels with H heads."""

    own: int
    C: int
    H: int
    P: int


def crossvit_18() -> tuple[Direction, Direction]:
    """At 240 px: S's CLS token reads L's 196 patches, L's reads S's 400."""
    return Direction(224, 448, 7, 196), Direction(448, 224, 7, 400)


@dataclass(frozen=True)
class Work:
    """Bytes from and to memory, FLOPs of products, exponentials."""

    bytes: float
    flops: float
    exponentials: float = 0.0


def work(kernel: str, d: Direction, batch: int, size: int = 2) -> Work:
    """Of one direction; `size` is that of an element of tokens and matrices in bytes.

    Rows between kernels are float32. Heads are padded to 16 in the attention's products.
    """
    B, C, H, P, own = batch, d.C, d.H, d.P, d.own
    tokens, row, heads, own_row = B * P * C * size, 4 * B * C, 4 * B * H * C, 4 * B * own
    square, oblong = size * C * C, size * C * own
    product, small = 2 * B * C * C, 2 * B * C * own
    return {
        "project": Work(B * own * size + oblong + row, small),
        "absorb": Work(row + 2 * square + row + heads, 2 * product),
        "attend": Work(2 * tokens + row + 2 * heads, 2 * 2 * B * P * C * 16, B * P * H),
        "values": Work(heads + square + row, product),
        "output": Work(2 * row + square + 2 * row, product),
        "back": Work(row + oblong + B * own * size, small),
        "back_backward": Work(B * own * size + own_row + oblong + 4 * row, small),
        "output_backward": Work(2 * row + square + 3 * row, product),
        "values_backward": Work(row + square + heads + 4 * heads, product),
        "attend_backward": Work(3 * tokens + 2 * row + 3 * heads, 3 * 2 * B * P * C * 16, B * P * H),
        "absorb_backward": Work(3 * heads + square + 2 * heads + row, product),
        "query_backward": Work(2 * row + square + 3 * row, product),
        "project_backward": Work(4 * row + oblong + 3 * own_row, small),
        "cls_backward": Work(own_row + 2 * B * own * size, 0),
        "parameters_backward": Work(
            4 * heads + 8 * row + 4 * own_row + 4 * square + 2 * oblong, 4 * product + 2 * small
        ),
    }[kernel]


def shared_bytes(opcodes: Counter[str]) -> int:
    """That a warp reads and writes in shared memory."""
    total = 0
    for opcode, number in opcodes.items():
        name = opcode.split(".")[0]
        if name in ("LDSM", "STSM"):
            total += number * 128 * int((re.findall(r"\.(\d)$", opcode) or ["1"])[0])
        elif name in ("LDS", "STS", "LDGSTS"):
            bits = [int(x) for x in re.findall(r"\.(\d+)", opcode) if int(x) in (64, 128)]
            total += number * (max(bits, default=32) // 8) * 32
    return total


@dataclass(frozen=True)
class Prediction:
    """Microseconds of each limit; the longest binds."""

    kernel: str
    limits: dict[str, float]
    start: float = START

    @property
    def binds(self) -> str:
        return max(self.limits, key=lambda name: self.limits[name])

    @property
    def words(self) -> str:
        """Every limit that is more than nothing, the longest first."""
        longest_first = sorted(self.limits.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {value:.1f}" for name, value in longest_first if value >= 0.05)

    @property
    def microseconds(self) -> float:
        return self.start + self.limits[self.binds]


@dataclass(frozen=True)
class Issued:
    """What the warps of a launch have to get through the schedulers.

    Attributes:
        instructions, moved: of all warps, and the bytes of shared memory that they read and write.
        longest: instructions of one warp.
    """

    instructions: float
    longest: float
    moved: float
    blocks: float

    def limits(self, found: Resources, gpu: Gpu) -> dict[str, float]:
        """Microseconds; `found` says how many warps take turns on a scheduler."""
        cycle = 1e-3 / gpu.clock
        busy = min(gpu.multiprocessors, self.blocks)
        resident = min(found.blocks, -(-self.blocks // gpu.multiprocessors)) * found.warps / ISSUES
        rate = ISSUES * min(1.0, resident / CYCLES_BETWEEN)
        return {
            "instructions": max(self.instructions / (rate * busy), self.longest * CYCLES_BETWEEN) * cycle,
            "shared memory": self.moved / (SHARED_BYTES * busy) * cycle,
        }


def limits_of_work(total: Sequence[Work], gpu: Gpu) -> dict[str, float]:
    """Microseconds of what all directions together have to do."""
    cycle = 1e-3 / gpu.clock
    return {
        "memory": sum(w.bytes for w in total) / gpu.memory * 1e-6,
        "tensor cores": sum(w.flops for w in total) / gpu.tensor * 1e-6,
        "exponentials": sum(w.exponentials for w in total) / (EXPONENTIALS * gpu.multiprocessors) * cycle,
    }


def predict(
    found: Resources,
    run: Executed | None,
    directions: Sequence[Direction],
    batch: int,
    gpu: Gpu,
    start: float = START,
) -> Prediction:
    """Of a kernel, with all directions in one launch.

    run: what one image executes, where that is known. Products on tensor cores are then those that were
    executed, 16 x 8 x 16 each: padded to whole tiles, and without what the code has for wider slices.
    """
    total = [work(found.kernel, d, batch) for d in directions]
    if run is None:
        return Prediction(found.kernel, limits_of_work(total, gpu), start)
    flops = batch * count(run.opcodes, r"HMMA\.16816") * 2 * 16 * 8 * 16
    total = [replace(w, flops=flops / len(total)) for w in total]
    issued = Issued(
        instructions=batch * float(run.of_warps.sum()),
        longest=float(run.of_warps.max()),
        moved=batch * shared_bytes(run.opcodes),
        blocks=batch * run.blocks,
    )
    return Prediction(found.kernel, limits_of_work(total, gpu) | issued.limits(found, gpu), start)


BACKENDS = ("cuda", "triton")


def predictions(backend: str, gpu: Gpu, batch: int, backward: bool) -> list[Prediction]:
    """Of the kernels of a fusion of crossvit_18 in bf16, both directions.

    What is executed is counted for one image (executed.py): in all kernels for a batch of one, and in those
    of the attention for a larger one, where no image is split and every image costs the same.
    """
    case, patches = Case((224, 448), 7, backward=backward), (400, 196)
    multiprocessors, only = (gpu.multiprocessors, "") if batch == 1 else (0, "attend")
    counted = executed.counted(backend, case, gpu.architecture, multiprocessors, patches, only)
    start = OVERLAPPED_START if backend == "cuda" and gpu.architecture in OVERLAPPING else START
    compiled = compiled_cuda.compile_case if backend == "cuda" else compile_case
    found = compiled(case, gpu.architecture, batch=batch, patches=patches)
    return [predict(r, counted.get(r.kernel), crossvit_18(), batch, gpu, start) for r in found]


INTRODUCTION = f"""\
No kernel was timed for this: these are limits computed by `python -m benchmarks.time_model`.
crossvit_18, bf16, both directions of one fusion. The longest of these binds: bytes from and to memory, FLOPs
on tensor cores, exponentials, and, for the kernels over the tokens and for a batch of one, the instructions
that are executed, counted without a GPU (benchmarks/executed.py), and their shared memory traffic. Assumed: a
launch and its first trips to memory take {START:g} us, {OVERLAPPED_START:g} us where launches overlap (cuda
from compute capability 9.0 on); a warp issues every {CYCLES_BETWEEN:g} cycles. What a B200 executes was
counted in the code for an H100. Left out: conflicts of banks, and weights that are read again and again from
the L2 cache.

Aims on an H200 at a batch of 256: attention within 1.5 times the time of 45 MB forward and 135 MB backward a
direction, 31 and 94 us for both; all of forward, and all of backward, 36 us for both. At a batch of 1: a
fusion in 30 us. At every batch: CUDA no slower than Triton."""


def page() -> str:
    """Markdown of all predictions, both backends side by side."""
    lines = [
        INTRODUCTION,
        "",
        "| GPU | GHz | TB/s | TFLOP/s | source |",
        "|---|---|---|---|---|",
        *(f"| {g.name} | {g.clock} | {g.memory} | {g.tensor} | {g.source} |" for g in GPUS),
        "",
        "| GPU | batch | kernel | cuda us | triton us | limits of cuda us | limits of triton us |",
        "|---|---|---|---|---|---|---|",
    ]
    for gpu, batch, backward in itertools.product(GPUS, (256, 1), (False, True)):
        lines += table(gpu, batch, *(predictions(backend, gpu, batch, backward) for backend in BACKENDS))
    return "\n".join(lines)


def table(gpu: Gpu, batch: int, ours: Sequence[Prediction], theirs: Sequence[Prediction]) -> list[str]:
    """Rows: the kernels of the attention, on an H200 all of them, and the sum."""
    rivals, rows = {p.kernel: p for p in theirs}, []
    for p in ours:
        if p.kernel.startswith("attend") or gpu.name == "H200":
            rival = rivals[p.kernel]
            times = f"{p.microseconds:.1f} | {rival.microseconds:.1f}"
            rows.append(f"| {gpu.name} | {batch} | {p.kernel} | {times} | {p.words} | {rival.words} |")
    name = "all of backward" if any("backward" in p.kernel for p in ours) else "all of forward"
    sums = " | ".join(f"{sum(p.microseconds for p in found):.1f}" for found in (ours, theirs))
    return [*rows, f"| {gpu.name} | {batch} | {name} | {sums} | | |"]


if __name__ == "__main__":
    print(page())
