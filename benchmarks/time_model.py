"""`python -m benchmarks.time_model`: predictions of the kernels' times from what they compile to.

Nothing here is measured on the kernels: bytes, products and exponentials are counted from the shapes,
instructions and shared memory traffic from the compiled code, and each is held against what a GPU can do. The
longest is the prediction, and what binds. Good for finding what to improve; a measurement decides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from .compiled import Case, Resources, compile_case, count


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

    @property
    def binds(self) -> str:
        return max(self.limits, key=lambda name: self.limits[name])

    @property
    def microseconds(self) -> float:
        return START + self.limits[self.binds]


def _programs(
    found: Resources, directions: tuple[Direction, ...], batch: int, gpu: Gpu, tokens: int
) -> Iterator:
    """(direction, programs, trips of the token loop) of a kernel of the attention."""
    from crossvit_kernels.cross_attention.triton_launch import splits

    for d in directions:
        parts = splits(batch * len(directions), d.P, tokens, gpu.multiprocessors)
        yield d, batch * parts, -(-d.P // (parts * tokens))


def predict(
    found: Resources, directions: tuple[Direction, ...], batch: int, gpu: Gpu, tokens: int
) -> Prediction:
    """`tokens` are those of a step of the attention. Directions run at once, in one launch."""
    total = [work(found.kernel, d, batch) for d in directions]
    cycle = 1e-3 / gpu.clock  # microseconds
    limits = {
        "memory": sum(w.bytes for w in total) / gpu.memory * 1e-6,
        "tensor cores": sum(w.flops for w in total) / gpu.tensor * 1e-6,
        "exponentials": sum(w.exponentials for w in total) / (EXPONENTIALS * gpu.multiprocessors) * cycle,
    }
    loops = sorted((x for x in found.loops if count(x.opcodes, "[HIQ]G?MMA")), key=_matrix_products)
    if found.kernel.startswith("attend") and len(loops) == len(directions):
        once = (found.instructions - sum(sum(x.opcodes.values()) for x in loops)) / len(directions)
        issued = moved = programs = 0.0
        longest = 0.0
        narrow_first = sorted(_programs(found, directions, batch, gpu, tokens), key=lambda x: x[0].C)
        for loop, (_, number, trips) in zip(loops, narrow_first, strict=True):
            of_warp = once + trips * sum(loop.opcodes.values())
            issued += number * found.warps * of_warp
            moved += number * found.warps * trips * shared_bytes(loop.opcodes)
            longest = max(longest, of_warp)
            programs += number
        busy = min(gpu.multiprocessors, programs)
        resident = min(found.blocks, -(-programs // gpu.multiprocessors)) * found.warps / ISSUES
        rate = ISSUES * min(1.0, resident / CYCLES_BETWEEN)
        limits["instructions"] = max(issued / (rate * busy), longest * CYCLES_BETWEEN) * cycle
        limits["shared memory"] = moved / (SHARED_BYTES * busy) * cycle
    return Prediction(found.kernel, limits)


def _matrix_products(loop: object) -> int:
    return count(loop.opcodes, "[HIQ]G?MMA")  # type: ignore[attr-defined]


def tokens_of(case: Case, architecture: str) -> int:
    """Tokens of a step of the attention, by the package's table."""
    from crossvit_kernels.cross_attention.triton_table import configuration

    from .compiled import calls

    return configuration(calls(case)[0], case.backward, architecture).tokens


def predictions(gpu: Gpu, batch: int, backward: bool) -> list[Prediction]:
    """Of the kernels of a fusion of crossvit_18 in bf16, both directions."""
    case = Case((224, 448), 7, backward=backward, split=batch < 64)
    tokens = tokens_of(case, gpu.architecture)
    return [predict(r, crossvit_18(), batch, gpu, tokens) for r in compile_case(case, gpu.architecture)]


def page() -> str:
    """Markdown of all predictions."""
    lines = [
        "## Predictions",
        "",
        "No kernel was timed for this: these are limits computed by `python -m benchmarks.time_model`.",
        "crossvit_18, bf16, both directions of one fusion; microseconds by what binds: bytes from and to",
        "memory, FLOPs on tensor cores, exponentials, and, for the kernels over the tokens, instructions and",
        "shared memory traffic of the compiled code. Assumed: a launch and its first trips to memory take",
        f"{START:g} us, a warp issues every {CYCLES_BETWEEN:g} cycles. Aims on an H200, a direction:",
        "attention within 1.5 times 45 MB forward and 135 MB backward, 16 and 47 us; all of forward, 18 us.",
        "",
        "| GPU | GHz | TB/s | TFLOP/s | source |",
        "|---|---|---|---|---|",
        *(f"| {g.name} | {g.clock} | {g.memory} | {g.tensor} | {g.source} |" for g in GPUS),
        "",
        "| GPU | batch | kernel | predicted us | binds | limits us |",
        "|---|---|---|---|---|---|",
    ]
    for gpu in GPUS:
        for batch in (256, 1):
            for backward in (False, True):
                found = predictions(gpu, batch, backward)
                for p in found:
                    limits = ", ".join(f"{k} {v:.1f}" for k, v in p.limits.items() if v >= 0.05)
                    of_interest = p.kernel.startswith("attend") or gpu.name == "H200"
                    if of_interest:
                        row = (gpu.name, batch, p.kernel, f"{p.microseconds:.1f}", p.binds, limits)
                        lines.append(f"| {' | '.join(map(str, row))} |")
                name = "all of backward" if backward else "all of forward"
                total = sum(p.microseconds for p in found)
                lines.append(f"| {gpu.name} | {batch} | {name} | {total:.1f} | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page())
