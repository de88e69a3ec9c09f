"""What the CUDA kernels compile to, for GPUs that need not be here.

nvcc compiles csrc/cross_attention/cuda*.cu as setup.py does: registers and instructions are the kernel's.
Threads and shared memory are the launch's: the launchers are compiled for this machine, on a CUDA runtime
that hands every launch over instead of launching (tests/ptx/host_library.py).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from crossvit_kernels.cross_attention import packing
from tests.ptx import host_library
from tests.ptx.host_library import HostLibrary, Launched, compile_library

from .compiled import ARCHITECTURES, Case, Patches, Resources, dump, parse_sass, tasks, triton_tool

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
OPTIONS = ("-O3", "-std=c++17")  # and -lineinfo, as setup.py builds
PROCESSES = 2  # of nvcc at a time
# Architectures of the table that the CUDA kernels are for, as nvcc has them.
CODES = {
    name: f"{name}a" if name in ("sm_90", "sm_100") else name
    for name, architecture in ARCHITECTURES.items()
    if not architecture.is_amd
}
PRODUCTS = ("bfloat16", "float16", "float32", "tf32")  # of csrc/common/cuda_elements.cuh


def missing() -> str | None:
    """Why this machine cannot compile and read the kernels; None when it can."""
    for program, what in (("nvcc", "of the CUDA toolkit"), ("c++filt", "of binutils")):
        if shutil.which(program) is None:
            return f"{program} {what} was not found on PATH"
    for program in ("cuobjdump", "nvdisasm"):
        if triton_tool(program) is None:
            return f"there is no Triton with a {program}"
    return None


# ---- from source to cubins ----


def sources() -> list[Path]:
    return sorted((CSRC / "cross_attention").glob("cuda*.cu"))


def cubins(architecture: str) -> list[Path]:
    """One for each source. They are kept until something that they were made from changes."""
    headers = sorted(x for x in CSRC.rglob("*") if x.suffix in (".h", ".cuh"))
    common = b"".join([nvcc_version().encode(), *(x.read_bytes() for x in headers)])
    with ThreadPoolExecutor(PROCESSES) as pool:
        return list(pool.map(lambda source: _cubin(source, architecture, common), sources()))


@cache
def nvcc_version() -> str:
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout


def _cubin(source: Path, architecture: str, common: bytes) -> Path:
    code = CODES[architecture]
    target = f"-gencode=arch={code.replace('sm', 'compute')},code={code}"
    command = ["nvcc", *OPTIONS, "-lineinfo", target, "-cubin", str(source)]
    name = hashlib.sha256(common + " ".join(command).encode() + source.read_bytes()).hexdigest()[:32]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "crossvit-kernels-cubins" / architecture
    path = folder / f"{source.stem}-{name}.cubin"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        part = Path(scratch, path.name)
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        for old in folder.glob(f"{source.stem}-{'?' * len(name)}.cubin"):
            old.unlink(missing_ok=True)
        os.replace(part, path)
    return path


# ---- what is in them ----


@dataclass
class Kernel:
    """A kernel of a cubin.

    Attributes:
        name: as its source has it, with what its template was given: "attend_kernel<bfloat16, as is>".
        shared: bytes that are static; a launch adds to them.
    """

    name: str
    symbol: str
    cubin: Path
    registers: int
    stack: int
    shared: int
    opcodes: Counter[str]


def parse_resource_usages(text: str) -> dict[str, tuple[int, int, int]]:
    """(registers, stack bytes, static bytes of shared memory) of each kernel by its symbol."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    return {name: (int(r), int(s), int(m)) for name, r, s, m in re.findall(pattern, text)}


def parse_functions(text: str) -> dict[str, str]:
    """The instructions of each kernel in the output of cuobjdump -sass, by its symbol."""
    parts = re.split(r"(?m)^\s*Function : (\S+)$", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def named(signature: str) -> str:
    """A kernel's name from its C++ signature: without namespaces and arguments, products by their names."""
    text = signature[: signature.rindex("(")].removeprefix("void ")
    text = re.sub(r"\(crossvit::Product\)(\d)", lambda found: PRODUCTS[int(found[1])], text)
    text = re.sub(r"\(anonymous namespace\)::|\w+::", "", text)
    return text.replace(", true", ", as is").replace(", false", "")


@cache
def demangled(symbol: str) -> str:
    run = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True)
    return named(run.stdout.strip())


@cache
def kernels(architecture: str) -> dict[str, Kernel]:
    """All kernels by their names."""
    found = {}
    for cubin in cubins(architecture):
        functions = parse_functions(dump(cubin, "-sass"))
        for symbol, (registers, stack, shared) in parse_resource_usages(
            dump(cubin, "--dump-resource-usage")
        ).items():
            # Of what the toolkit reports, the first kilobyte is the system's, from compute capability 9.0 on.
            own = shared - (ARCHITECTURES[architecture].reserved if int(architecture[3:]) >= 90 else 0)
            opcodes = parse_sass(functions[symbol])
            kernel = Kernel(demangled(symbol), symbol, cubin, registers, stack, max(own, 0), opcodes)
            found[kernel.name] = kernel
    return found


# ---- launches ----


class Launcher(HostLibrary):
    """Calls the launchers and records what they launch. With `ptx`, kernels run too, on the interpreter."""

    def __init__(self, library: Path, ptx: Sequence[str] = ()) -> None:
        super().__init__(library, ptx or [_NO_KERNELS])
        self.only = ".*" if ptx else "(?!)"  # kernels that run; the others are recorded alone
        found = ctypes.CDLL(str(library))
        self.direction_bytes, self.plan = found.direction_bytes(), found.crossvit_cuda_plan
        self.plan.restype = _Plan

    def __call__(
        self, case: Case, architecture: str, batch: int, patches: Patches, multiprocessors: int
    ) -> list[Launched]:
        """Of one call on a GPU that is made up; no launch is refused for its shared memory."""
        forward, backward = tasks(case, batch, patches)
        packed = packing.pack_backward(backward) if case.backward else packing.pack_forward(forward)
        packed = [x.ljust(self.direction_bytes, b"\0") for x in packed]
        directions = ctypes.create_string_buffer(b"".join(packed))
        flags = [ctypes.c_int64(x) for x in (len(packed), case.backward, case.tf32)]
        self.capability = self.code_version = int(architecture.removeprefix("sm_"))
        shared = ARCHITECTURES[architecture].shared_of_block
        plan = self.plan(directions, *flags, self._gpu(multiprocessors, shared))
        gpu = self._gpu(multiprocessors, max(shared, plan.shared_of_block))
        memory = np.zeros(max(1, plan.floats), np.float32)
        self.launches = []
        with mock.patch.dict(host_library.DEVICES, {self.capability: (1 << 20, multiprocessors)}):
            self.call(
                "crossvit_cuda_run",
                *(directions, *flags, gpu, 1e-6, ctypes.c_double(0), memory, ctypes.c_void_p(0)),
                memory=[*tensors_in([forward, backward])],
            )
        return self.launches

    def _gpu(self, multiprocessors: int, shared: int) -> Any:
        """crossvit::Gpu."""
        return (ctypes.c_int64 * 3)(self.capability, multiprocessors, shared)

    def _launch(
        self, name: bytes, grid: Any, block: Any, cluster: Any, dependent: int, args: Any, shared: int
    ) -> int:
        if re.fullmatch(self.only, demangled(name.decode()).split("_kernel")[0]):
            return super()._launch(name, grid, block, cluster, dependent, args, shared)
        shape = tuple(cluster[:3]) if cluster else None
        self.launches.append(
            Launched(name.decode(), tuple(grid[:3]), tuple(block[:3]), shared, shape, bool(dependent))
        )
        return 0


_NO_KERNELS = ".version 8.0\n.target sm_80\n.address_size 64\n"


class _Plan(ctypes.Structure):
    """crossvit::CudaPlan."""

    _fields_ = (("floats", ctypes.c_int64), ("shared_of_block", ctypes.c_int64))


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors in lists, tuples and dataclasses, in any depth."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
        elif is_dataclass(value):
            yield from tensors_in(vars(value).values())


def library(architecture: str) -> Path:
    """The launchers, with kernels in the PTX of an architecture."""
    size = ROOT / "tests/direction_bytes.cu"
    return compile_library([*sources(), size], virtual(architecture), OPTIONS, headers=CSRC)


def virtual(architecture: str) -> str:
    return CODES[architecture].replace("sm", "compute")


@cache
def launcher() -> Launcher:
    """Launches do not depend on what the kernels were compiled for."""
    return Launcher(library("sm_80"))


def compile_case(
    case: Case, architecture: str, only: str | None = None, batch: int = 2, patches: Patches = None
) -> list[Resources]:
    """All kernels of a case for an architecture, or those whose names `only` matches."""
    found: dict[str, Resources] = {}
    for launched in launcher()(case, architecture, batch, patches, multiprocessors=132):
        kernel = kernels(architecture)[demangled(launched.kernel)]
        name = kernel.name.split("_kernel")[0]
        if only is None or re.fullmatch(only, name):
            found[kernel.name] = Resources(
                kernel=name,
                architecture=architecture,
                case=case,
                registers=kernel.registers,
                stack=kernel.stack,
                shared=kernel.shared + launched.shared,
                warps=-(-launched.block[0] // ARCHITECTURES[architecture].warp),
                opcodes=kernel.opcodes,
                instance=kernel.name.replace("_kernel", ""),
            )
    return list(found.values())
