"""`python -m benchmarks.compile_table`: what every Triton kernel compiles to, held against a budget.

No GPU is needed. `--write` puts the table and the predictions of time_model.py into docs/compile_table.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from crossvit.variants import VARIANTS

from .compiled import ARCHITECTURES, Case, Resources, compile_case, cuobjdump

PAGE = Path(__file__).parents[1] / "docs/compile_table.md"
ATTENTION = "attend|attend_backward"
WHOLE = ((224, 448), (448,))  # widths whose kernels are all compiled, crossvit_18's
# Tokens, matrices, tf32. The first is compiled whole; the chain's kernels hardly differ in the others.
DTYPES = (("bf16", "bf16", False), ("fp16", "fp16", False), ("fp32", "bf16", False))
# These spill, and do not fit everywhere: docs/triton.md.
FLOAT32 = (
    ("fp32", "fp32", False),
    ("fp32", "fp32", True),
)

COLUMNS = ("kernel", "target", "widths", "dtypes", "registers", "stack", "local", "shared", "instructions")
COLUMNS = (*COLUMNS, "tensor", "wide", "blocks", "verdict")
EXPLANATION = """\
- dtypes: of tokens and matrices; tf32 where float32 products may use it.
- registers: of a thread. stack: bytes of a thread, for registers that were spilled and arrays; local:
  instructions that access them. shared: bytes of a block.
- instructions: of the whole kernel, both directions of a fusion. tensor: those of the tensor cores; wide:
  accesses of 16 bytes a thread to global memory.
- blocks: that run at once on a multiprocessor, by registers, shared memory and warps.
- verdict: `ok`, or what is over the budget: nothing in local memory, no more shared memory than a block of
  the target can have, and, for 16-bit matrices, products on the tensor cores and accesses of 16 bytes."""


def widths_of_variants() -> dict[tuple[int, int], int]:
    """Widths of S and L of every variant with its heads, narrow ones first."""
    return {v.widths: v.heads for v in sorted(VARIANTS.values(), key=lambda v: v.widths)}


def verdict(found: Resources) -> str:
    """Whether a kernel keeps within its budget; "ok", or what does not."""
    architecture = ARCHITECTURES[found.architecture]
    faults = []
    if found.stack or found.local:
        faults.append("local memory")
    if found.shared > architecture.shared_of_block:
        faults.append("shared memory")
    if found.blocks < 1:
        faults.append("does not fit")
    if found.case.weights != "fp32":
        if not found.tensor and found.kernel != "cls_backward":  # it has no products
            faults.append("no tensor cores")
        if not found.wide:
            faults.append("no 16-byte access")
    return ", ".join(faults) or "ok"


def cells(found: Resources) -> tuple[str, ...]:
    """A row, in the order of COLUMNS."""
    numbers = (found.registers, found.stack, found.local, found.shared, found.instructions, found.tensor)
    return (
        found.kernel,
        found.architecture,
        found.case.label,
        found.case.dtypes,
        *map(str, (*numbers, found.wide, found.blocks)),
        verdict(found),
    )


def cases(widths: Sequence[tuple[int, ...]], dtypes: Sequence[str]) -> Iterator[Case]:
    """Forward and backward; one width is a cross-attention, two are a fusion."""
    heads = widths_of_variants()
    alone = {w: h for pair, h in heads.items() for w in pair}
    for pair in widths:
        for tokens, weights, tf32 in (*DTYPES, *FLOAT32):
            for backward in (False, True):
                count = heads.get(pair, 0) if len(pair) == 2 else alone.get(pair[0], 0)  # type: ignore[call-overload]
                case = Case(pair, count or max(1, max(pair) // 64), tokens, weights, tf32, backward)
                if case.dtypes in dtypes if dtypes else weights != "fp32":
                    yield case


def rows(
    architectures: Sequence[str], chosen: Sequence[Case], only: str | None, progress: Progress
) -> Iterator[Resources]:
    """Compiles; for one case after another, so that a run that ends early has whole cases."""
    task = progress.add_task("compiling", total=len(architectures) * len(chosen))
    for case in chosen:
        for architecture in architectures:
            progress.update(task, description=f"{case.label} {case.dtypes} {architecture}")
            # The chain's kernels are the same at all widths but for the lengths of their loops.
            whole = case.widths in WHOLE and case.dtypes == "bf16/bf16"
            kernels = only or (None if whole else ATTENTION)
            yield from compile_case(case, architecture, kernels)
            progress.advance(task)


def markdown(found: Sequence[Resources]) -> str:
    """The table, a row for each kernel, target, widths and dtypes."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([*lines, *(f"| {' | '.join(cells(r))} |" for r in found)])


def summary(found: Sequence[Resources]) -> str:
    """How many keep the budget, and which do not."""
    failed = [r for r in found if verdict(r) != "ok"]
    text = f"{len(found) - len(failed)} of {len(found)} kernels keep within their budget."
    return text + "".join(
        f"\n- {r.kernel} {r.architecture} {r.case.label} {r.case.dtypes}: {verdict(r)}" for r in failed
    )


def versions() -> str:
    """Of what compiled."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    found = [f"Triton {triton.__version__}"]
    for name in ("ptxas", "ptxas-blackwell"):
        run = subprocess.run([tools / name, "--version"], capture_output=True, text=True, check=True)
        found.append(f"{name} {run.stdout.split('release ')[1].split(',')[0]}")
    return ", ".join(found)


def write(found: Sequence[Resources]) -> None:
    """Rewrites the page: a temporary file beside it first, so that an interrupted run leaves the old page."""
    from . import time_model

    text = "\n".join(
        (
            "# What the Triton kernels compile to",
            "",
            f"Written by `python -m benchmarks.compile_table --write`; {versions()}. No GPU is involved.",
            "",
            EXPLANATION,
            "",
            summary(found),
            "",
            markdown(found),
            "",
            time_model.page(),
        )
    )
    part = PAGE.with_suffix(".md.part")
    part.write_text(text + "\n")
    os.replace(part, PAGE)


def _list(text: str) -> list[str]:
    return text.split(",")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a kernel is over its budget."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_table", description=__doc__)
    parser.add_argument("--arch", type=_list, default=list(ARCHITECTURES), help="80,90,gfx942")
    parser.add_argument("--widths", type=_list, default=[], help="96/192 is a fusion, 448 a cross-attention")
    parser.add_argument(
        "--dtypes",
        type=_list,
        default=[],
        help="bf16/bf16,'fp32/fp32 tf32'; without, 16-bit matrices",
    )
    parser.add_argument(
        "--kernels",
        help="a regular expression; without, all in bf16 at crossvit_18's widths, else the attention's",
    )
    parser.add_argument("--write", action="store_true", help="write docs/compile_table.md")
    options = parser.parse_args(arguments)
    if cuobjdump() is None:
        print("this Triton has no cuobjdump", file=sys.stderr)
        return 2
    architectures = [a if a in ARCHITECTURES else f"sm_{a}" for a in options.arch]
    unknown = [a for a in architectures if a not in ARCHITECTURES]
    if unknown:
        parser.error(f"--arch: {unknown[0]} is not one of {', '.join(ARCHITECTURES)}")
    widths = [tuple(map(int, text.split("/"))) for text in options.widths] or list(widths_of_variants())
    console = Console(stderr=True)
    found = []
    table = Table(*COLUMNS, title=None)
    with Progress(console=console, transient=True) as progress:
        for row in rows(architectures, list(cases(widths, options.dtypes)), options.kernels, progress):
            found.append(row)
            if verdict(row) != "ok":
                console.print(" ".join(cells(row)))
            table.add_row(*cells(row))
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    print(summary(found))
    if options.write:
        write(found)
    return int(any(verdict(r) != "ok" for r in found))


if __name__ == "__main__":
    sys.exit(main())
