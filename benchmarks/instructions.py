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
from pathlib import Path

import torch

from crossvit import create_model, find_variant
from crossvit_kernels import native, self_attention
from crossvit_kernels.linear.native import with_packed
from crossvit_kernels.linear.packed import PackedLinear
from tests.operations import OPERATIONS, Size

ISA, LANES = "avx2", 8
MODEL = "crossvit_18_240"
S, L, HEADS = (401, 224), (197, 448), 7  # tokens and width of its branches
FUSION = OPERATIONS[1]
BOTH = Size(1, 400, 224, HEADS, 196, 448, HEADS)
# What is counted, from the call to the return. Every call of one of them is a row, in the order of `ROWS`.
FUNCTIONS = (
    "run_program(crossvit::Program const&, int*)",
    "cross_attention_forward(crossvit::Direction const*, long, crossvit::Options const&, float*)",
    "cross_attention_backward(crossvit::Direction const*, long, crossvit::Options const&, float*)",
)


def _linear(tokens: int, width: int, out: int, normed: bool, activation: str | None) -> Callable[[], object]:
    norm = (torch.ones(width), torch.zeros(width)) if normed else (None, None)
    packed = PackedLinear(torch.randn(out, width), torch.zeros(out), *norm)
    x = torch.randn(1, tokens, width)
    return lambda: with_packed(x, packed, None, 1e-6 if normed else None, activation)


def _attention(tokens: int, width: int) -> Callable[[], object]:
    qkv = torch.randn(1, tokens, 3 * width)
    return lambda: self_attention(qkv, HEADS, backend="cpu")


def _fusion(backward: bool) -> Callable[[], object]:
    tensors = [x.requires_grad_(backward) for x in FUSION.inputs(BOTH, torch.float32)]
    if not backward:
        return lambda: FUSION.run(tensors, BOTH, backend="cpu")
    return lambda: sum(y.sum() for y in FUSION.run(tensors, BOTH, backend="cpu")).backward()


def _model() -> Callable[[], object]:
    model = create_model(MODEL).eval().freeze()
    return lambda: model(torch.zeros(1, 3, *model.img_size))


# What is called, its multiply-adds as the operation is defined, and how many rows it makes.
ROWS: tuple[tuple[Sequence[str], float, Callable[[], Callable[[], object]]], ...] = (
    (["linear 448 -> 1344 of L, after LayerNorm"], 197 * 448 * 1344, lambda: _linear(*L, 1344, True, None)),
    (["linear 448 -> 1344 of L, with GELU"], 197 * 448 * 1344, lambda: _linear(*L, 1344, True, "gelu")),
    (["linear 1344 -> 448 of L"], 197 * 448 * 1344, lambda: _linear(197, 1344, 448, False, None)),
    (["linear 224 -> 672 of S, after LayerNorm"], 401 * 224 * 672, lambda: _linear(*S, 672, True, None)),
    (["self-attention of L"], 2 * 197**2 * 448, lambda: _attention(*L)),
    (["self-attention of S"], 2 * 401**2 * 224, lambda: _attention(*S)),
    (["fusion of both branches"], 0, lambda: _fusion(False)),
    (["fusion, forward for a backward", "fusion, backward"], 0, lambda: _fusion(True)),
    (["the whole model, frozen"], find_variant(MODEL).gmacs * 1e9, _model),
)


def _run() -> None:
    """All that is counted, in order; packing and what else goes before is not."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with native.use_isa(ISA):
        for _, _, prepare in ROWS:
            prepare()()


def totals(folder: Path) -> list[int]:
    """Instructions of each call, in order, from callgrind's files `out.<number>`."""
    files = sorted((int(file.suffix[1:]), file) for file in folder.glob("out.*") if file.suffix[1:].isdigit())
    found = [re.search(r"^totals: (\d+)", file.read_text(), re.MULTILINE) for _, file in files]
    return [int(match[1]) for match in found if match is not None and int(match[1]) > 0]


def table(counts: Sequence[int]) -> str:
    """Markdown, a row for each call."""
    rows = [(name, operations) for names, operations, _ in ROWS for name in names]
    if len(rows) != len(counts):
        raise RuntimeError(f"callgrind gave {len(counts)} counts for {len(rows)} calls")
    lines = ["| | million instructions | for each vector of multiply-adds |", "|---|---|---|"]
    for (name, operations), count in zip(rows, counts, strict=True):
        each = f"{count / (operations / LANES):.2f}" if operations else ""
        lines.append(f"| {name} | {count / 1e6:.2f} | {each} |")
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
    functions = [f"crossvit::{ISA}::{name}" for name in FUNCTIONS]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *("valgrind", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={folder}/out"),
            *(f"--toggle-collect={name}" for name in functions),
            *(f"--dump-after={name}" for name in functions),
            *(sys.executable, "-c", "from benchmarks.instructions import _run; _run()"),
        ]
        print("counting; some minutes ...", file=sys.stderr)
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
        if done.returncode != 0:
            print(f"valgrind failed: {done.stderr[-2000:]}", file=sys.stderr)
            return 1
        print(table(totals(Path(folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
