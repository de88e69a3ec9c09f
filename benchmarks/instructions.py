"""`python -m benchmarks.instructions`: instructions that the CPU's kernels execute, counted by callgrind.

A figure that neither other processes nor the clock disturb. The kernels are those for AVX2, as valgrind knows
no later vectors. One image of crossvit_18 at 240 pixels, float32, one thread; docs/cpu.md has the table.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from crossvit_kernels import native, self_attention
from crossvit_kernels.linear.native import with_packed
from crossvit_kernels.linear.packed import PackedLinear
from tests.operations import OPERATIONS, Size

ISA, LANES = "avx2", 8
S, L, HEADS = (401, 224), (197, 448), 7  # tokens and width of the branches
FUSION = OPERATIONS[1]
BOTH = Size(1, 400, 224, HEADS, 196, 448, HEADS)
# What is counted, from the call to the return; callgrind counts nothing right when told of several.
_FUSION = "(crossvit::Direction const*, long, crossvit::Options const&, float*)"
FUNCTIONS = {
    "program": "run_program(crossvit::Program const&, int*)",
    "forward": f"cross_attention_forward{_FUSION}",
    "backward": f"cross_attention_backward{_FUSION}",
}


@dataclass(frozen=True)
class Row:
    """A call of one of `FUNCTIONS`, and its multiply-adds as the operation is defined; None for the fusion,
    which is there to need fewer."""

    what: str
    multiply_adds: int | None
    prepare: Callable[[], Callable[[], object]]
    function: str = "program"


def _linear(tokens: int, width: int, out: int, normed: bool, activation: str | None) -> Callable[[], object]:
    norm = (torch.ones(width), torch.zeros(width)) if normed else (None, None)
    packed = PackedLinear(torch.randn(out, width), torch.zeros(out), *norm)
    x = torch.randn(1, tokens, width)
    return lambda: with_packed(x, packed, None, 1e-6 if normed else None, activation)


def _attention(tokens: int, width: int) -> Callable[[], object]:
    qkv = torch.randn(1, tokens, 3 * width)
    return lambda: self_attention(qkv, HEADS, backend="cpu")


def _fusion(trains: bool) -> Callable[[], object]:
    tensors = [x.requires_grad_(trains) for x in FUSION.inputs(BOTH, torch.float32)]

    def run() -> None:
        found = FUSION.run(tensors, BOTH, backend="cpu")
        if trains:
            torch.cat([y.flatten() for y in found]).sum().backward()

    return run


ROWS = (
    Row("linear of L, 448 to 1344, LayerNorm", 197 * 448 * 1344, partial(_linear, *L, 1344, True, None)),
    Row("... and GELU", 197 * 448 * 1344, partial(_linear, *L, 1344, True, "gelu")),
    Row("linear of L, 1344 to 448", 197 * 448 * 1344, partial(_linear, 197, 1344, 448, False, None)),
    Row("linear of S, 224 to 672, LayerNorm", 401 * 224 * 672, partial(_linear, *S, 672, True, None)),
    Row("self-attention of L", 2 * 197**2 * 448, partial(_attention, *L)),
    Row("self-attention of S", 2 * 401**2 * 224, partial(_attention, *S)),
    Row("fusion of both branches, forward", None, partial(_fusion, False), "forward"),
    Row("fusion of both branches, backward", None, partial(_fusion, True), "backward"),
)


def _rows(function: str) -> list[Row]:
    return [row for row in ROWS if row.function == function]


def call_all(function: str) -> None:
    """What is counted, in order; packing and what else goes before is not."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with native.use_isa(ISA):
        for row in _rows(function):
            row.prepare()()


def totals(folder: Path) -> list[int]:
    """Instructions of each call, in order, from callgrind's files `out.<number>`."""
    files = sorted((int(file.suffix[1:]), file) for file in folder.glob("out.*") if file.suffix[1:].isdigit())
    found = [re.search(r"^totals: (\d+)", file.read_text(), re.MULTILINE) for _, file in files]
    return [int(match[1]) for match in found if match is not None and int(match[1]) > 0]


def count(function: str) -> list[int]:
    """Instructions of the calls of one of `FUNCTIONS`, by running them under callgrind.

    Raises:
        RuntimeError: valgrind failed, or counted another number of calls.
    """
    name = f"crossvit::{ISA}::{FUNCTIONS[function]}"
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *("valgrind", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={folder}/out"),
            *(f"--toggle-collect={name}", f"--dump-after={name}"),
            *(sys.executable, "-c", f"from benchmarks.instructions import *; call_all({function!r})"),
        ]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"valgrind failed: {done.stderr[-2000:]}")
        found = totals(Path(folder))
    if len(found) != len(_rows(function)):
        raise RuntimeError(f"callgrind counted {len(found)} calls of {name}, not {len(_rows(function))}")
    return found


def table(counts: Sequence[int]) -> str:
    """Markdown, a line for each of `ROWS`."""
    lines = ["| | million instructions | for each vector of multiply-adds |", "|---|---|---|"]
    for row, instructions in zip(ROWS, counts, strict=True):
        each = "" if row.multiply_adds is None else f"{instructions / (row.multiply_adds / LANES):.2f}"
        lines.append(f"| {row.what} | {instructions / 1e6:.2f} | {each} |")
    return "\n".join(lines)


def reason_against() -> str | None:
    """Why nothing can be counted here, or None."""
    if shutil.which("valgrind") is None:
        return "valgrind was not found on PATH"
    if native.load_error() is not None:
        return f"the compiled module is not here: {native.load_error()}"
    return None if ISA in native.load().isas() else f"this machine has no {ISA}"


def main() -> int:
    reason = reason_against()
    if reason is not None:
        print(f"instructions cannot be counted here: {reason}", file=sys.stderr)
        return 2
    counts: list[int] = []
    for function in FUNCTIONS:
        print(f"counting {function}; a minute or two ...", file=sys.stderr)
        counts += count(function)
    print(table(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
