"""How often each instruction of a kernel is executed, counted without a GPU.

The interpreter (tests/ptx) runs the kernel's PTX on real sizes and counts; ptxas tells from which line of the
PTX it made each machine instruction (nvdisasm -gp). So what a width, a dtype or an absent argument skips is
not counted: of the eight unrolled products of a warp's slice, for instance, only those that it has.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.ptx.host_library import compile_ptx
from tests.ptx.machine import Machine

from . import compiled_cuda
from .compiled import ARCHITECTURES, Case, Patches, dump, prepared
from .compiled_cuda import OPTIONS, Launcher


@dataclass
class Executed:
    """Machine instructions of one launch.

    Attributes:
        opcodes: how often, by all warps.
        of_warps: how many, by each warp.
        overlaps: whether the launch may begin before the one before it has ended.
    """

    opcodes: Counter[str]
    of_warps: np.ndarray
    blocks: int
    overlaps: bool


def instruction_lines(text: str, symbol: str) -> list[int]:
    """The line of each instruction of a kernel, counted from 1, in PTX as nvcc writes it."""
    lines = text.split("\n")
    at = next(i for i, line in enumerate(lines) if re.search(rf"\.entry {re.escape(symbol)}\(", line))
    at += lines[at:].index("{")
    found, depth, statement, start = [], 0, "", 0
    for number, line in enumerate(lines[at:], at + 1):
        # Without vectors: other braces are those of scopes.
        code = re.sub(r"//.*|^\s*\.loc\s.*|\{[^;{}]*\}", "", line)
        depth += code.count("{") - code.count("}")
        code = re.sub(r"^\s*[$%\w]+:", "", re.sub(r"[{}]", "", code))
        for i, part in enumerate(code.split(";")):
            if i:  # a statement ended
                found += [start] if statement[:1] not in ("", ".") else []
                statement = ""
            start = start if statement else number
            statement += part.strip()
        if depth == 0:
            return found
    raise ValueError(f"{symbol} has no end")


@dataclass
class Instruction:
    """Of the machine: its opcode, and the line of the PTX that it was made from."""

    opcode: str
    line: int


_LINE = re.compile(
    r"""nv_debug_ptx_txt", line (\d+)|^(\.L_x_\d+):"""
    r"""|^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)""",
    re.M,
)


def parse_lines(text: str) -> list[Instruction]:
    """The instructions of a kernel in the output of nvdisasm -gp, but those for diverged warps alone.

    ptxas keeps a copy of each shuffle for warps whose lanes are apart, behind everything else, where BRA.DIV
    goes.
    """
    found, line = [], 0
    apart = set(re.findall(r"BRA\.DIV.*?(\.L_x_\d+)", text))
    for number, label, opcode in _LINE.findall(text):
        if label in apart:
            break
        if number:
            line = int(number)
        elif opcode and opcode != "NOP":
            found.append(Instruction(opcode, line))
    return found


@contextmanager
def counting() -> Iterator[dict[str, list[np.ndarray]]]:
    """Within it, the interpreter counts how often each warp came to each instruction of a kernel.

    What is found of a kernel is an array for each part of a grid: a row an instruction, a column a warp.
    """
    found: dict[str, list[np.ndarray]] = {}
    make, original = Machine._step, Machine._active

    def step_of(self: Any, instruction: Any) -> Any:
        if not hasattr(self, "places"):
            self.places = {id(x): place for place, x in enumerate(self.kernel.code)}
            self.counts = np.zeros((len(self.kernel.code), self.n // 32), np.int64)
            found.setdefault(self.kernel.name, []).append(self.counts)
        step: Any = make(self, instruction)
        step.counts = self.counts[self.places[id(instruction)]]
        return step

    def active(self: Any, step: Any, mask: Any) -> Any:
        step.counts += 1 if mask is None else mask.reshape(-1, 32).any(1)
        return original(self, step, mask)

    with mock.patch.object(Machine, "_step", step_of), mock.patch.object(Machine, "_active", active):
        yield found


def _executed(
    counts: list[np.ndarray], text: str, symbol: str, instructions: list[Instruction]
) -> tuple[Counter[str], np.ndarray]:
    """How often each opcode was executed by all warps, and how many instructions by each warp.

    counts: of the instructions of the kernel's PTX, a column a warp, for each part of the grid.
    """
    of_ptx = np.concatenate(counts, axis=1)
    by_line: dict[int, np.ndarray] = {}
    for line, n in zip(instruction_lines(text, symbol), of_ptx, strict=True):
        by_line[line] = np.maximum(by_line.get(line, 0), n)
    opcodes: Counter[str] = Counter()
    of_warps = np.zeros(of_ptx.shape[1], np.int64)
    for instruction in instructions:
        n = by_line.get(instruction.line, of_ptx[0])  # else of the kernel's beginning
        of_warps += n
        opcodes[instruction.opcode] += int(n.sum())
    return opcodes, of_warps


@cache
def counted(
    backend: str, case: Case, architecture: str, multiprocessors: int, patches: Patches = None, only: str = ""
) -> dict[str, Executed]:
    """Of the kernels of one image whose names begin with `only`, all directions together.

    The tokens of the image are split as on a GPU of so many multiprocessors: not at all for none.
    """
    # The interpreter does not know some of what compilers use from 10.0 on: the code for 9.0 stands for it.
    architecture = "sm_90" if architecture in ("sm_100", "sm_120") else architecture
    count = {"cuda": _by_cuda, "triton": _by_triton}[backend]
    return count(case, architecture, multiprocessors, patches, f"{only}.*")


def _by_cuda(
    case: Case, architecture: str, multiprocessors: int, patches: Patches, only: str
) -> dict[str, Executed]:
    launcher, texts = _launcher(architecture)
    launcher.only = only
    with counting() as counts:
        launches = launcher(case, architecture, 1, patches, multiprocessors)
    found = {}
    for launched in launches:
        if launched.kernel in counts:
            name = compiled_cuda.demangled(launched.kernel)
            (text,) = (x for x in texts if f".entry {launched.kernel}(" in x)
            code = _instructions(architecture, name)
            opcodes, of_warps = _executed(counts[launched.kernel], text, launched.kernel, code)
            blocks = int(np.prod(launched.grid))
            found[name.split("_kernel")[0]] = Executed(opcodes, of_warps, blocks, launched.dependent)
    return found


@cache
def _launcher(architecture: str) -> tuple[Launcher, list[str]]:
    """Launches that run, and all PTX."""
    virtual = compiled_cuda.virtual(architecture)
    texts = compile_ptx(compiled_cuda.sources(), virtual, OPTIONS, headers=compiled_cuda.CSRC)
    return Launcher(compiled_cuda.library(architecture), texts), texts


@cache
def _instructions(architecture: str, name: str) -> list[Instruction]:
    kernel = compiled_cuda.kernels(architecture)[name]
    return parse_lines(_sections(kernel.cubin)[kernel.symbol])


@cache
def _sections(cubin: Path) -> dict[str, str]:
    """The code of each kernel of a cubin with the lines of its PTX, by its symbol."""
    parts = re.split(r"(?m)^\s*\.section\s+\.text\.([^,]+),.*$", dump(cubin, "-gp", "nvdisasm"))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _by_triton(
    case: Case, architecture: str, multiprocessors: int, patches: Patches, only: str
) -> dict[str, Executed]:
    from crossvit_kernels.cross_attention import triton_launch
    from crossvit_kernels.cross_attention.triton_table import configuration

    with mock.patch.object(
        triton_launch,
        "configuration",
        lambda directions, backward, *_: configuration(directions, backward, architecture),
    ):
        run = launched_by(prepared(case, 1, patches), architecture, multiprocessors, triton_launch, only)
    return {launch.name: executed for launch, executed in run}


def launched_by(
    call: Callable[[], object], architecture: str, multiprocessors: int, launcher: Any, only: str = ".*"
) -> list[tuple[Any, Executed]]:
    """Each Triton launch of a call whose kernel's name `only` matches whole, as the interpreter records it.

    launcher: the module that asks `gpu_of` for the GPU, which has so many multiprocessors.
    """
    from crossvit_kernels.cross_attention.gpu import Gpu
    from tests.ptx import triton_driver

    binaries: dict[str, bytes] = {}
    load, run = triton_driver._Utilities.load_binary, triton_driver.Launcher._run
    found: list[tuple[Any, Executed]] = []

    def keep(self: Any, name: str, binary: bytes, *rest: Any) -> Any:
        binaries[self._loading.kernel.hash] = binary
        return load(self, name, binary, *rest)

    def run_some(self: Any, grid: Any, kernel: Any, arguments: Any) -> None:
        if not re.fullmatch(only, kernel.name):
            return
        with counting() as counts:
            run(self, grid, kernel, arguments)
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "cubin")
            cubin.write_bytes(binaries[kernel.hash])
            code = parse_lines(_sections.__wrapped__(cubin)[kernel.name])
        opcodes, of_warps = _executed(counts[kernel.name], kernel.ptx, kernel.name, code)
        found.append((recorder.launches[-1], Executed(opcodes, of_warps, int(np.prod(grid)), overlaps=False)))

    capability, shared = int(architecture.removeprefix("sm_")), ARCHITECTURES[architecture].shared_of_block
    gpu = Gpu(capability, multiprocessors, shared)
    with (
        mock.patch.dict(triton_driver.PROPERTIES, {capability: (shared, multiprocessors)}),
        mock.patch.object(triton_driver._Utilities, "load_binary", keep),
        mock.patch.object(triton_driver.Launcher, "_run", run_some),
        mock.patch.object(launcher, "gpu_of", return_value=gpu),
        triton_driver.interpreted(capability, races=False, machine_code=True) as recorder,
    ):
        call()
    return found
