"""Small pieces of PTX for tests: an instruction on columns of numbers, or a kernel written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .machine import run_kernel
from .parser import Module


def execute(
    text: str, inputs: Sequence[Sequence[int]], widths: int | Sequence[int] = 32, result_width: int = 32
) -> list[int]:
    """Run instructions in one thread per row: operands %a0, %a1, ... and result %d, all as bit patterns.

    Predicates %p and %q and a 32-bit register %t (the number of the thread) may be used as well.
    """
    threads = len(inputs[0])
    padded = -(-threads // 32) * 32
    sizes = [widths] * len(inputs) if isinstance(widths, int) else list(widths)
    loads = "".join(
        f"mad.wide.u32 %x, %t, {w // 8}, %i{k}; ld.global.b{w} %a{k}, [%x];\n" for k, w in enumerate(sizes)
    )
    registers = "".join(f".reg .b{w} %a{k}; .reg .b64 %i{k};\n" for k, w in enumerate(sizes))
    pointers = "".join(f"ld.param.b64 %i{k}, [p{k}];\n" for k in range(len(sizes)))
    params = ", ".join(f".param .u64 p{k}" for k in range(len(sizes) + 1))
    ptx = f""".visible .entry f({params}) {{
    .reg .b32 %t; .reg .b64 %x, %o; .reg .b{result_width} %d; .reg .pred %p, %q;
    {registers}{pointers} ld.param.b64 %o, [p{len(sizes)}];
    mov.u32 %t, %tid.x;
    {loads}{text}
    mad.wide.u32 %x, %t, {result_width // 8}, %o; st.global.b{result_width} [%x], %d; ret; }}"""
    arrays = []
    for column, width in zip(inputs, sizes, strict=True):
        array = np.zeros(padded, f"u{width // 8}")
        array[:threads] = [int(v) % 2**width for v in column]
        arrays.append(array)
    result = np.zeros(padded, f"u{result_width // 8}")
    run_kernel(Module(ptx), "f", (1, 1, 1), (padded, 1, 1), 0, [*arrays, result])
    return [int(v) for v in result[:threads]]


def entry(body: str, params: str = ".param .u64 p", registers: str = "", head: str = "") -> Module:
    """A kernel "f" with registers %p, %r and %q, float registers %f, and dynamic shared memory "sm"."""
    return Module(
        f"""{head}
.extern .shared .align 16 .b8 sm[];
.visible .entry f({params}) {{
.reg .pred %p<8>; .reg .b32 %r<32>; .reg .b64 %q<16>; .reg .f32 %f<16>;
{registers}
{body}
ret;
}}"""
    )


def run(
    module: Module, args: Sequence[Any], threads: int = 64, blocks: int = 1, shared: int = 0, **options: Any
) -> int:
    """Launch the kernel "f"."""
    options.setdefault("max_steps", 100_000)
    return run_kernel(module, "f", (blocks, 1, 1), (threads, 1, 1), shared, args, **options)
