"""The Triton kernel of `gpu_fingerprint.py`: a program for each tensor, a few bytes of every page."""

from __future__ import annotations

import triton
import triton.language as tl

STEP = 2048  # pairs of bytes: 4 KiB
_AT_ONCE = tl.constexpr(256)


def samples_of(pairs: int, step: int) -> int:
    """How many pairs of so many are kept: one of every step, and the last."""
    return -(-pairs // step) + 1


@triton.jit
def sample(regions, kept, changed, COMPARES: tl.constexpr, EVERY: tl.constexpr = 2048):
    """Keeps the samples of each region (address, pairs of bytes, first sample), two pairs each, or looks
    whether they are what was kept: then 1 is written where any differs."""
    region = regions + 3 * tl.program_id(0)
    base = tl.load(region).to(tl.pointer_type(tl.int16))
    pairs, first = tl.load(region + 1), tl.load(region + 2)
    count = (pairs + EVERY - 1) // EVERY + 1
    for start in range(0, count, _AT_ONCE):
        i = start + tl.arange(0, _AT_ONCE)
        at = tl.where(i == count - 1, tl.maximum(pairs - 2, 0), i * EVERY)
        low = tl.load(base + at, mask=i < count, other=0).to(tl.int32)
        high = tl.load(base + tl.minimum(at + 1, pairs - 1), mask=i < count, other=0).to(tl.int32)
        now = (low & 0xFFFF) | (high << 16)
        if COMPARES:
            before = tl.load(kept + first + i, mask=i < count, other=0)
            tl.store(changed + i * 0, 1, mask=(i < count) & (now != before))
        else:
            tl.store(kept + first + i, now, mask=i < count)
