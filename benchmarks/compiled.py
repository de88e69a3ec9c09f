"""What the Triton kernels compile to, for GPUs that need not be here.

The package's own launcher runs on CPU tensors under a driver that names the target and launches nothing: what
is compiled is what users get, the divisibility of addresses and strides included. Triton keeps the results in
its cache on disk.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from crossvit_kernels.cross_attention import op, triton_launch
from crossvit_kernels.cross_attention.directions import Direction, ForwardOutputs, Gradients
from crossvit_kernels.cross_attention.triton_table import Configuration, configuration

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Architecture:
    """What one multiprocessor (on AMD: compute unit) has to give to the blocks that run on it.

    From the CUDA C++ programming guide's table of compute capabilities, and AMD's CDNA 3 and 4 white papers.

    Attributes:
        shared, shared_of_block: bytes of shared memory, and how much of it one block may have.
        reserved: bytes of shared memory that each block takes besides its own.
        warps, blocks: that fit at most.
    """

    name: str
    shared: int
    shared_of_block: int
    warps: int
    blocks: int
    reserved: int = 1024
    warp: int = 32

    @property
    def is_amd(self) -> bool:
        return self.name.startswith("gfx")

    def fitting_blocks(self, registers: int, shared: int, warps: int) -> int:
        """How many blocks run at once; registers are a thread's."""
        if self.is_amd:
            # Four SIMDs of 512 registers a lane, given out by 8, and 8 waves each.
            by_registers = 4 * min(8, 512 // (-(-max(registers, 1) // 8) * 8)) // warps
        else:
            # 65536 registers, given out by 256 to a warp; each of the four schedulers has its own quarter.
            of_warp = -(-max(registers, 1) * 32 // 256) * 256
            by_registers = 4 * (65536 // 4 // of_warp) // warps
        by_shared = self.shared // (shared + self.reserved) if shared + self.reserved else self.blocks
        return min(by_registers, by_shared, self.warps // warps, self.blocks)


_KB = 1024
ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("sm_80", 164 * _KB, 163 * _KB, 64, 32),
        Architecture("sm_86", 100 * _KB, 99 * _KB, 48, 16),
        Architecture("sm_89", 100 * _KB, 99 * _KB, 48, 24),
        Architecture("sm_90", 228 * _KB, 227 * _KB, 64, 32),
        Architecture("sm_100", 228 * _KB, 227 * _KB, 64, 32),
        Architecture("sm_120", 100 * _KB, 99 * _KB, 48, 24),
        Architecture("gfx942", 64 * _KB, 64 * _KB, 32, 32, reserved=0, warp=64),
        Architecture("gfx950", 160 * _KB, 160 * _KB, 32, 32, reserved=0, warp=64),
    )
}


@dataclass(frozen=True)
class Case:
    """A call to compile for.

    Attributes:
        widths: of the tokens, (S, L) for the fusion of two branches, (C,) for one cross-attention.
        tokens, weights: names of dtypes.
        tf32: whether float32 products may use it.
        split: the tokens of an image are read by several programs, as at small batches.
    """

    widths: tuple[int, ...]
    heads: int
    tokens: str = "bf16"
    weights: str = "bf16"
    tf32: bool = False
    backward: bool = False
    split: bool = False

    @property
    def dtypes(self) -> str:
        return f"{self.tokens}/{self.weights}" + (" tf32" if self.tf32 else "")

    @property
    def label(self) -> str:
        return "/".join(map(str, self.widths))


@dataclass(frozen=True)
class Layer:
    """A layer of a block to compile for, in one dtype; `label` names it with its widths."""

    label: str
    dtype: str = "bf16"

    @property
    def dtypes(self) -> str:
        return f"{self.dtype}/{self.dtype}"

    @property
    def weights(self) -> str:
        return self.dtype


@dataclass
class Resources:
    """What a compiled kernel takes: registers and stack bytes of a thread, shared bytes of a block.

    Attributes:
        kernel: its name, the same in all backends.
        instance: that of the C++ template's instance; empty for Triton's.
    """

    kernel: str
    architecture: str
    case: Case | Layer
    registers: int
    stack: int
    shared: int
    warps: int
    opcodes: Counter[str]
    instance: str = ""

    @property
    def local(self) -> int:
        """Instructions that read or write a thread's local memory, which is where spilled registers go."""
        return self._count(r"(LDL|STL)\b|scratch_(load|store)")

    @property
    def tensor(self) -> int:
        return self._count(TENSOR)

    @property
    def wide(self) -> int:
        """Accesses to global memory of 16 bytes a thread."""
        return self._count(WIDE)

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())

    @property
    def blocks(self) -> int:
        """Blocks that run at once on a multiprocessor."""
        return ARCHITECTURES[self.architecture].fitting_blocks(self.registers, self.shared, self.warps)

    def _count(self, pattern: str) -> int:
        return count(self.opcodes, pattern)


TENSOR = r"[HIQ]G?MMA|UTC\w*MMA|v_mfma|v_smfmac"
WIDE = r"(LDG|STG|LDGSTS)\b.*\.128|UTMALDG|UBLKCP|(global|buffer)_(load|store)_(lds_)?dwordx4"


def count(opcodes: Counter[str], pattern: str) -> int:
    """Instructions whose opcode begins as the pattern says."""
    return sum(n for opcode, n in opcodes.items() if re.match(pattern, opcode))


def cuobjdump() -> Path | None:
    """Triton's own, which reads what Triton's ptxas writes."""
    return triton_tool("cuobjdump")


def triton_tool(name: str) -> Path | None:
    """A program of the CUDA toolkit that comes with Triton; None where it, or Triton, is missing."""
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return path if path.is_file() else None


def dump(cubin: Path, option: str, program: str = "cuobjdump") -> str:
    """What cuobjdump, or nvdisasm, prints."""
    tool = triton_tool(program)
    if tool is None:
        raise RuntimeError(f"this Triton has no {program}")
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def parse_resource_usage(text: str) -> tuple[int, int]:
    """(registers, stack bytes) of the one kernel in the output of cuobjdump --dump-resource-usage."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"no resource usage in {text!r}")
    return int(found[1]), int(found[2])


_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)[^;]*;", re.M)


def parse_sass(text: str) -> Counter[str]:
    """Opcodes with their modifiers."""
    return Counter(opcode for opcode in _SASS.findall(text) if opcode != "NOP")


_AMD_INSTRUCTION = re.compile(r"^\s+([a-z]\w+_\w+)", re.M)


def parse_amdgcn(text: str) -> tuple[int, int, Counter[str]]:
    """(registers, stack bytes, opcodes) of the one kernel in an AMD assembly file."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise ValueError(f"no {name} in the assembly")
        return int(found[1])

    code = text.split("s_endpgm")[0] if "s_endpgm" in text else text
    code = text[: text.find(".section\t.rodata")] if ".section\t.rodata" in text else code
    # vgpr_count is that of the whole unified file, accumulation registers included.
    return number("vgpr_count"), number("private_segment_fixed_size"), Counter(_AMD_INSTRUCTION.findall(code))


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        name = self.architecture.name
        if self.architecture.is_amd:
            return GPUTarget("hip", name, self.architecture.warp)
        return GPUTarget("cuda", int(name.removeprefix("sm_")), self.architecture.warp)

    def get_current_device(self) -> str:
        return self.architecture.name  # Triton keeps its kernels by device

    def get_current_stream(self, device: Any = None) -> int:
        return 0


@contextmanager
def compiling(
    architecture: str, only: str | None = None, config: Configuration | None = None
) -> Iterator[list[Any]]:
    """Within it, launches compile for the architecture and end there; the list receives the kernels.

    only: a regular expression; a kernel whose name it does not match whole is passed over.
    config: takes the place of the table's.
    """
    from triton.runtime import JITFunction, driver

    kernels: list[Any] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if only is not None and not re.fullmatch(only, self.fn.__name__):
            return None
        kernel = original(self, *args, grid=grid, warmup=True, **options)
        kernels.append(kernel)
        return kernel

    def configure(directions: list[Direction], backward: bool, *_: Any, **__: Any) -> Configuration:
        return config or configuration(directions, backward, architecture)

    previous = driver._active
    driver.set_active(_Driver(ARCHITECTURES[architecture]))
    try:
        with (
            mock.patch.object(JITFunction, "run", run),
            mock.patch.object(triton_launch, "configuration", configure),
        ):
            yield kernels
    finally:
        driver._active = previous


def _weights(width: int, own: int | None, dtype: torch.dtype, norm_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """In the order of the public functions; `own` None leaves out f and g."""

    def norm(n: int) -> list[Tensor]:
        return [torch.empty(n, dtype=norm_dtype), torch.empty(n, dtype=norm_dtype)]

    def linear(rows: int, columns: int) -> list[Tensor]:
        return [torch.empty(rows, columns, dtype=dtype), torch.empty(rows, dtype=dtype)]

    attention = [*norm(width), *(x for _ in range(4) for x in linear(width, width))]
    if own is None:
        return tuple(attention)
    return (*norm(own), *linear(width, own), *attention, *norm(width), *linear(own, width))


Patches = tuple[int, ...] | int | None


def calls(case: Case, batch: int = 2, patches: Patches = None) -> tuple[list[Direction], list[Tensor]]:
    """The directions of a case and the tokens that they read, as the operators pass them.

    patches: of each width, or of all.
    """
    tokens = DTYPES[case.tokens]
    weights = DTYPES[case.weights]
    if patches is None:
        patches = 256 if case.split else 16  # few tokens of few images are read by one program each
    if isinstance(patches, int):
        patches = (patches,) * len(case.widths)
    of_widths = zip(patches, case.widths, strict=True)
    buffers = [torch.zeros(batch, 1 + number, width, dtype=tokens) for number, width in of_widths]
    if len(case.widths) == 1:
        width = case.widths[0]
        given = _weights(width, None, weights, tokens)
        cls = torch.zeros(batch, 1, width, dtype=tokens)
        return [Direction(cls, buffers[0][:, 1:], given, case.heads)], buffers
    directions = []
    for stream, (own, other) in enumerate((buffers, buffers[::-1])):
        given = _weights(other.shape[2], own.shape[2], weights, tokens)
        directions.append(Direction(own[:, :1], other[:, 1:], given, case.heads, stream=stream))
    return directions, buffers


Forward = list[tuple[Direction, ForwardOutputs]]
Backward = list[tuple[Direction, Gradients]]


def tasks(case: Case, batch: int = 2, patches: Patches = None) -> tuple[Forward, Backward]:
    """What launchers get of a case, forward and backward, on the default device."""
    directions, buffers = calls(case, batch, patches)
    fuses = len(directions) == 2
    new, incoming = ([torch.zeros_like(x) for x in buffers] for _ in range(2))
    cls = [x[:, :1] for x in new]
    copies = [x[:, 1:] for x in reversed(new)]
    saved = [
        torch.zeros(batch, triton_launch.saved_floats(d.patches.shape[2], d.num_heads)) for d in directions
    ]
    outputs = [
        (d, ForwardOutputs(c, p if fuses else None, None, s))
        for d, c, p, s in zip(directions, cls, copies, saved, strict=True)
    ]
    gradients = [
        (
            d,
            Gradients(
                cls=g[:, :1],
                patches=h[:, 1:] if fuses else None,
                attention=None,
                saved=s,
                to_cls=c,
                to_patches=p,
                to_scale=None,
                to_weights=op.weight_gradients(d.weights, batch),
            ),
        )
        for d, g, h, c, p, s in zip(directions, incoming, reversed(incoming), cls, copies, saved, strict=True)
    ]
    return outputs, gradients


def prepared(case: Case, batch: int = 2, patches: Patches = None) -> Callable[[], None]:
    """Forward or backward of a case on the default device, through the launcher; nobody reads its results."""
    outputs, gradients = tasks(case, batch, patches)

    def call() -> None:
        float32 = torch.backends.cuda.matmul
        previous, float32.fp32_precision = float32.fp32_precision, "tf32" if case.tf32 else "ieee"
        try:
            if case.backward:
                triton_launch.backward(gradients, 1e-6, 0.0)
            else:
                triton_launch.forward(outputs, 1e-6, 0.0)
        finally:
            float32.fp32_precision = previous

    return call


def resources(kernel: Any, architecture: str, case: Case | Layer) -> Resources:
    """Of one compiled kernel."""
    if ARCHITECTURES[architecture].is_amd:
        registers, stack, opcodes = parse_amdgcn(kernel.asm["amdgcn"])
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            registers, stack = parse_resource_usage(dump(Path(file.name), "--dump-resource-usage"))
            opcodes = parse_sass(dump(Path(file.name), "-sass"))
    return Resources(
        kernel=kernel.metadata.name,
        architecture=architecture,
        case=case,
        registers=registers,
        stack=stack,
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        opcodes=opcodes,
    )


def compile_case(
    case: Case,
    architecture: str,
    only: str | None = None,
    config: Configuration | None = None,
    batch: int = 2,
    patches: Patches = None,
) -> list[Resources]:
    """All kernels of a case for an architecture, or those whose names `only` matches."""
    with compiling(architecture, only, config) as kernels:
        prepared(case, batch, patches)()
    return [resources(kernel, architecture, case) for kernel in kernels]
