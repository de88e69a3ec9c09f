"""`python -m benchmarks.compile_table`: what every GPU kernel compiles to, held against a budget.

No GPU is needed. `--write` puts the tables and the predictions of time_model.py into docs/compile_table.md;
what is there of a backend that was not asked for stays as it is.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from crossvit.variants import VARIANTS

from . import compiled_cuda, compiled_layers, layer_model, time_model
from .compiled import ARCHITECTURES, Case, Layer, Resources, compile_case, cuobjdump, triton_tool

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

NUMBERS = ("registers", "stack", "local", "shared", "instructions", "tensor", "wide", "blocks")
COLUMNS = ("kernel", "target", "widths", "dtypes", *NUMBERS, "verdict")
TITLES = {
    "triton": "The Triton kernels",
    "cuda": "The CUDA kernels",
    "layers": "The Triton kernels of a block's layers",
}
PREDICTIONS = "Predictions"
PREDICTIONS_OF_LAYERS = "Predictions for a block's layers"
INTRODUCTION = """\
# What the kernels for GPUs compile to

Written by `python -m benchmarks.compile_table --write`; no GPU is involved.

- dtypes: of tokens and matrices; tf32 where float32 products may use it.
- registers: of a thread. stack: bytes of a thread, for registers that were spilled and arrays; local:
  instructions that access them. shared: bytes of a block.
- instructions: of the whole kernel, both directions of a fusion. tensor: those of the tensor cores; wide:
  accesses of 16 bytes a thread to global memory, and copies of whole rows.
- blocks: that run at once on a multiprocessor, by registers, shared memory and warps.
- verdict: `ok`, or what is over the budget: nothing in local memory, no more shared memory than a block of
  the target can have, and, for 16-bit matrices, products on the tensor cores and accesses of 16 bytes. Of the
  CUDA kernels, tf32 too is for the tensor cores, each kernel over the tokens has accesses of 16 bytes, and
  two of its blocks run at once where they have four warps and shared memory allows. The CUDA kernels beside
  them are listed once for each product: they are the same at all widths. The kernels of a block's layers are
  those of crossvit_18, each listed with the first layer that needs it."""


def widths_of_variants() -> dict[tuple[int, int], int]:
    """Widths of S and L of every variant with its heads, narrow ones first."""
    return {v.widths: v.heads for v in sorted(VARIANTS.values(), key=lambda v: v.widths)}


def verdict(found: Resources) -> str:
    """Whether a kernel keeps within its budget; "ok", or what does not."""
    architecture = ARCHITECTURES[found.architecture]
    faults = []
    layer = isinstance(found.case, Layer)
    if found.stack or found.local:
        faults.append("local memory")
    if found.shared > architecture.shared_of_block:
        faults.append("shared memory")
    if found.blocks < 1:
        faults.append("does not fit")
    elif found.blocks < (designed := designed_blocks(found)):
        faults.append(f"{found.blocks} of {designed} blocks")
    is_cuda, sixteen_bits = bool(found.instance), found.case.weights != "fp32"
    if isinstance(found.case, Layer):
        has_products, tf32 = found.kernel.split()[0] in compiled_layers.WITH_PRODUCTS, False
    else:
        has_products, tf32 = found.kernel not in ("cls_backward", "add_attention_sums"), found.case.tf32
    if has_products and not found.tensor and (sixteen_bits or (is_cuda and tf32)):
        faults.append("no tensor cores")
    if not found.wide and (_reads_tokens(found) if is_cuda else sixteen_bits and (has_products or not layer)):
        faults.append("no 16-byte access")
    return ", ".join(faults) or "ok"


def _reads_tokens(found: Resources) -> bool:
    return re.fullmatch(ATTENTION, found.kernel) is not None


def designed_blocks(found: Resources) -> int:
    """Of a multiprocessor, for the CUDA kernels over the tokens: two of four warps where memory allows."""
    if not found.instance or not _reads_tokens(found):
        return 1
    by_shared = ARCHITECTURES[found.architecture].fitting_blocks(1, found.shared, found.warps)
    return min(2 if found.warps == 4 else 1, by_shared)


def cells(found: Resources) -> tuple[str, ...]:
    """A row, in the order of COLUMNS."""
    return (
        found.instance or found.kernel,
        found.architecture,
        found.case.label,
        found.case.dtypes,
        *(str(getattr(found, name)) for name in NUMBERS),
        verdict(found),
    )


def cases(
    widths: Sequence[tuple[int, ...]], dtypes: Sequence[str], backend: str = "triton"
) -> Iterator[Case]:
    """Forward and backward; one width is a cross-attention, two are a fusion."""
    heads = widths_of_variants()
    alone = {w: h for pair, h in heads.items() for w in pair}
    for pair in widths:
        for tokens, weights, tf32 in (*DTYPES, *FLOAT32):
            for backward in (False, True):
                count = heads.get(pair, 0) if len(pair) == 2 else alone.get(pair[0], 0)
                case = Case(pair, count or max(1, max(pair) // 64), tokens, weights, tf32, backward)
                if case.dtypes in dtypes if dtypes else weights != "fp32" or backend == "cuda":
                    yield case


def rows(
    backend: str, architectures: Sequence[str], chosen: Sequence[Case], only: str | None, progress: Progress
) -> Iterator[Resources]:
    """Compiles; for one case after another, so that a run that ends early has whole cases."""
    task = progress.add_task("compiling", total=len(architectures) * (len(chosen) or 1))
    if backend == "layers":
        for architecture in architectures:
            progress.update(task, description=f"layers {architecture}")
            yield from compiled_layers.compile_layers(compiled_layers.layers_of_crossvit_18(), architecture)
            progress.advance(task)
        return
    listed: set[tuple] = set()
    for case in chosen:
        for architecture in architectures:
            progress.update(task, description=f"{backend} {case.label} {case.dtypes} {architecture}")
            if backend == "cuda":
                for found in compiled_cuda.compile_case(case, architecture, only):
                    key = (found.instance, architecture, found.shared, found.warps)
                    if key not in listed or _reads_tokens(found):
                        yield found
                    listed.add(key)
            else:
                # The chain's kernels are the same at all widths but for the lengths of their loops.
                whole = case.widths in WHOLE and case.dtypes == "bf16/bf16"
                yield from compile_case(case, architecture, only or (None if whole else ATTENTION))
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


def versions(backend: str) -> str:
    """Of what compiled."""
    if backend == "cuda":
        return f"nvcc {compiled_cuda.nvcc_version().split('release ')[1].split(',')[0]}"
    import triton

    found = [f"Triton {triton.__version__}"]
    for name in ("ptxas", "ptxas-blackwell"):
        tool = triton_tool(name)
        assert tool is not None
        run = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True)
        found.append(f"{name} {run.stdout.split('release ')[1].split(',')[0]}")
    return ", ".join(found)


def section(backend: str, found: Sequence[Resources]) -> str:
    """The page's part of a backend."""
    return f"{versions(backend)}.\n\n{summary(found)}\n\n{markdown(found)}"


def rewritten(page: str, new: dict[str, str]) -> str:
    """The page with these sections, by their titles, in place of its own, and all others as they are."""
    parts = re.split(r"(?m)^## (.*)\n", page)
    old = dict(zip(parts[1::2], (text.strip("\n") for text in parts[2::2]), strict=True))
    titles = [
        title for title in (*TITLES.values(), PREDICTIONS, PREDICTIONS_OF_LAYERS) if title in {**old, **new}
    ]
    return "\n\n".join([INTRODUCTION, *(f"## {t}\n\n{new.get(t, old.get(t))}" for t in titles)]) + "\n"


def write(new: dict[str, str]) -> None:
    """Rewrites the page: a temporary file beside it first, so that an interrupted run leaves the old page."""
    part = PAGE.with_suffix(".md.part")
    part.write_text(rewritten(PAGE.read_text() if PAGE.exists() else "", new))
    os.replace(part, PAGE)


def missing(backend: str) -> str | None:
    """Why this machine cannot compile and read the kernels of a backend; None when it can."""
    if backend == "cuda":
        return compiled_cuda.missing()
    return None if cuobjdump() else "there is no Triton with a cuobjdump"


def _list(text: str) -> list[str]:
    return text.split(",")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a kernel is over its budget."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_table", description=__doc__)
    parser.add_argument("--backend", choices=[*TITLES, "all"], default="all")
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
    backends = list(TITLES) if options.backend == "all" else [options.backend]
    for backend in backends:
        if reason := missing(backend):
            print(f"{backend} kernels cannot be compiled here: {reason}", file=sys.stderr)
            return 2
    architectures = [a if a in ARCHITECTURES else f"sm_{a}" for a in options.arch]
    unknown = [a for a in architectures if a not in ARCHITECTURES]
    if unknown:
        parser.error(f"--arch: {unknown[0]} is not one of {', '.join(ARCHITECTURES)}")
    widths = [tuple(map(int, text.split("/"))) for text in options.widths] or list(widths_of_variants())
    found = {backend: compiled(backend, architectures, widths, options) for backend in backends}
    if options.write:
        write({TITLES[backend]: section(backend, of_backend) for backend, of_backend in found.items()})
        if "layers" in found:
            write({PREDICTIONS_OF_LAYERS: layer_model.page()})
        if found.keys() - {"layers"} and not any(map(missing, TITLES)):
            write({PREDICTIONS: time_model.page()})
    return int(any(verdict(r) != "ok" for of_backend in found.values() for r in of_backend))


def compiled(
    backend: str, architectures: Sequence[str], widths: Sequence[tuple[int, ...]], options: argparse.Namespace
) -> list[Resources]:
    """Compiles the kernels of a backend, and prints them as a table."""
    console = Console(stderr=True)
    if backend == "cuda":
        architectures = [a for a in architectures if a in compiled_cuda.CODES]
    found = []
    table = Table(*COLUMNS, title=None)
    chosen = [] if backend == "layers" else list(cases(widths, options.dtypes, backend))
    with Progress(console=console, transient=True) as progress:
        for row in rows(backend, architectures, chosen, options.kernels, progress):
            found.append(row)
            if verdict(row) != "ok":
                console.print(" ".join(cells(row)))
            table.add_row(*cells(row))
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    print(summary(found))
    return found


if __name__ == "__main__":
    sys.exit(main())
