"""Loads, stores and atomic operations."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .formats import SINT, UINT, WIDTH, PtxError, decode, encode, numpy_type
from .memory import as_bytes
from .opcodes import Execute, Mask, opcode
from .parser import Instruction, vector
from .scalar import simple

if TYPE_CHECKING:
    from .machine import Machine

# Generic addresses of shared and local memory and of parameters lie in these windows, far from all real
# addresses. Those of shared memory may be of any block of the cluster.
WINDOWS = {"shared": 1 << 56, "cluster": 1 << 56, "local": 1 << 57, "param": 1 << 58}

CACHE_HINTS = (
    "ca cg cs lu wb wt nc volatile relaxed weak cta gpu sys L1::no_allocate L1::evict_last L1::evict_first "
    "L1::evict_normal L1::evict_unchanged L2::evict_first L2::evict_last L2::evict_normal L2::cache_hint "
    "L2::64B L2::128B L2::256B"
)
STRONG = ("relaxed", "volatile")  # accesses that may meet those of other threads without a race
VALUES = "b8 b16 b32 b64 u8 u16 u32 u64 s8 s16 s32 s64 f32 f64"


def _space(ins: Instruction) -> str:
    """The address space an instruction names, or "generic"."""
    if "shared::cluster" in ins.mods:
        return "cluster"
    return "shared" if ins.has("shared", "shared::cta") else ins.has("global", "local", "param") or "generic"


def _by_space(space: str, addresses: np.ndarray) -> list[tuple[str, np.ndarray | slice, np.ndarray]]:
    """(space, which lanes, addresses in that space) of generic addresses."""
    if space != "generic":
        return [(space, slice(None), addresses)]
    parts: list[tuple[str, np.ndarray | slice, np.ndarray]] = []
    window = addresses >> 56
    for k, name in ((0, "global"), (1, "cluster"), (2, "local"), (4, "param")):
        chosen = np.flatnonzero(window == k)
        if chosen.size:
            parts.append((name, chosen, addresses[chosen] - WINDOWS.get(name, 0)))
    return parts


@opcode("cvta", "to global local shared const param", "u64")
def cvta(machine: Machine, ins: Instruction) -> Execute | None:
    """Generic addresses to addresses of one space, and back."""
    window = np.uint64(WINDOWS.get(ins.has("shared", "local", "param") or "", 0))
    if "to" in ins.mods:
        return simple(machine, ins, lambda x: x - window)
    return simple(machine, ins, lambda x: x + window)


@opcode(
    "ld",
    "param const global shared shared::cta shared::cluster local v2 v4 v8 acquire " + CACHE_HINTS,
    VALUES,
)
def load(machine: Machine, ins: Instruction) -> Execute | None:
    if "param" in ins.mods and not re.match(r"\[\s*%", ins.args[1]):
        return _load_parameter(machine, ins)
    width = WIDTH[ins.types[0]]
    address, puts = machine.address(ins.args[1]), [machine.write(r) for r in vector(ins.args[0])]
    space, size = _space(ins), width // 8 * len(puts)
    if "const" in ins.mods:
        space = "const"
    if not _well_formed(ins, len(puts), 2):
        return None
    element = SINT[width] if ins.types[0][0] == "s" else UINT[width]
    strong, acquires = bool(ins.has(*STRONG, "acquire")), "acquire" in ins.mods

    def fetch(lanes: np.ndarray) -> np.ndarray:
        addresses = machine.per_lane(address())[lanes]
        if space != "generic" and not strong:
            return machine.memory.load(space, addresses, size, lanes, ins.line, ins.used)
        data = np.empty((len(lanes), size), np.uint8)
        for name, chosen, part in _by_space(space, addresses):
            data[chosen] = machine.memory.load(name, part, size, lanes[chosen], ins.line, ins.used, strong)
            if strong and name == "global" and machine.memory.races:
                for lane, at in zip(lanes[chosen].tolist(), part.tolist(), strict=True):
                    machine.order.strong_read(lane, at, acquires)
        return data

    def run(mask: Mask) -> None:
        lanes = machine.lanes(mask)
        values = np.ascontiguousarray(fetch(lanes)).view(element)
        for i, put in enumerate(puts):
            column = values[:, i]
            if mask is not None:
                column = np.zeros(machine.n, element)
                column[lanes] = values[:, i]
            put(column, mask)

    return run


def _well_formed(ins: Instruction, count: int, operands: int) -> bool:
    """The number of registers fits the instruction, and a cache policy is there where one is announced."""
    width = WIDTH[ins.types[0]] // 8 * count
    hints = "L2::cache_hint" in ins.mods
    return (
        len(ins.args) == operands + hints
        and count == int((ins.has("v2", "v4", "v8") or "v1")[1:])
        and width <= 16
    )


def _load_parameter(machine: Machine, ins: Instruction) -> Execute | None:
    match = re.fullmatch(r"\[\s*([\w$]+)\s*(?:\+\s*(\d+))?\s*\]", ins.args[1])
    if not match or match.group(1) not in machine.params:
        raise PtxError(f"unknown parameter {ins.args[1]}")
    data, offset = machine.params[match.group(1)], int(match.group(2) or 0)
    puts, width = [machine.write(r) for r in vector(ins.args[0])], WIDTH[ins.types[0]] // 8
    part = data[offset : offset + width * len(puts)]
    if part.size != width * len(puts) or offset % width or not _well_formed(ins, len(puts), 2):
        raise PtxError(f"parameter {match.group(1)} has {data.size} bytes")
    values = part.copy().view(numpy_type(ins.types[0]))

    def run(mask: Mask) -> None:
        for i, put in enumerate(puts):
            put(values[i : i + 1], mask)

    return run


@opcode("st", "global shared shared::cta shared::cluster local v2 v4 v8 release " + CACHE_HINTS, VALUES)
def store(machine: Machine, ins: Instruction) -> Execute | None:
    width = WIDTH[ins.types[0]]
    address, sources = (
        machine.address(ins.args[0]),
        [machine.read(r, f"b{width}") for r in vector(ins.args[1])],
    )
    space = _space(ins)
    if not _well_formed(ins, len(sources), 2):
        return None
    strong, releases = bool(ins.has(*STRONG, "release")), "release" in ins.mods

    def run(mask: Mask) -> None:
        lanes = machine.lanes(mask)
        columns = [machine.per_lane(s())[lanes] for s in sources]
        data = as_bytes(columns, len(lanes), width)
        for name, chosen, part in _by_space(space, machine.per_lane(address())[lanes]):
            machine.memory.store(name, part, data[chosen], lanes[chosen], ins.line, strong)
            if strong and name == "global" and machine.memory.races:
                for lane, at in zip(lanes[chosen].tolist(), part.tolist(), strict=True):
                    machine.order.strong_write(lane, at, releases)

    return run


@opcode(
    "prefetch prefetchu discard applypriority",
    "global L1 L2 L2::evict_last L2::evict_normal",
)
def prefetch(machine: Machine, ins: Instruction) -> Execute | None:
    if ins.op == "discard":
        return None
    machine.address(ins.args[0])
    return lambda mask: None


@opcode(
    "createpolicy",
    "fractional range cvt L2::evict_first L2::evict_last L2::evict_normal L2::evict_unchanged",
    "b64",
)
def create_policy(machine: Machine, ins: Instruction) -> Execute:
    """Cache policies change nothing here."""
    put = machine.write(ins.args[0])
    return lambda mask: put(np.zeros(1, np.uint64), mask)


# ---- atomic operations, lane by lane in a random order ----

UPDATE: dict[str, Callable[[Any, Any, Any], Any]] = {
    "add": lambda old, value, new: old + value,
    "min": lambda old, value, new: min(old, value),
    "max": lambda old, value, new: max(old, value),
    "exch": lambda old, value, new: value,
    "cas": lambda old, value, new: new if old == value else old,
    "and": lambda old, value, new: old & value,
    "or": lambda old, value, new: old | value,
    "xor": lambda old, value, new: old ^ value,
    "inc": lambda old, value, new: 0 if old >= value else old + 1,
    "dec": lambda old, value, new: value if old == 0 or old > value else old - 1,
}
BITWISE = ("exch", "cas", "and", "or", "xor")


def _allowed(kind: str, type_name: str, count: int, has_result: bool, ins: Instruction) -> bool:
    base = type_name.removesuffix("x2")
    small = base in ("f16", "bf16")
    if len(ins.args) != has_result + 2 + (kind == "cas") + ("L2::cache_hint" in ins.mods):
        return False
    if small or count > 1:
        return kind == "add" and (small or type_name == "f32")
    if type_name in ("f32", "f64"):
        return kind in ("add", "exch")
    if kind in ("inc", "dec"):
        return type_name == "u32"
    return kind in BITWISE or type_name[0] != "b"


@opcode(
    "atom red",
    "global shared shared::cta shared::cluster relaxed acquire release acq_rel cta gpu sys noftz v2 v4 v8 "
    "L2::cache_hint " + " ".join(UPDATE),
    "b16 b32 b64 u32 s32 u64 s64 f32 f64 f16 bf16 f16x2 bf16x2",
)
def atomic(machine: Machine, ins: Instruction) -> Execute | None:
    type_name, has_result = ins.types[0], ins.op == "atom"
    kind, base, space = ins.has(*UPDATE), type_name.removesuffix("x2"), _space(ins)
    count = int((ins.has("v2", "v4", "v8") or "v1")[1:])
    if kind is None or not _allowed(kind, type_name, count, has_result, ins):
        return None
    small = base in ("f16", "bf16")
    raw = f"b{WIDTH[type_name]}" if small else type_name
    address, operands = machine.address(ins.args[has_result]), ins.args[has_result + 1 :]
    values = [machine.read(x, raw) for x in vector(operands[0])]
    replacements = [machine.read(x, raw) for x in vector(operands[1])] if kind == "cas" else values
    puts = [machine.write(x) for x in vector(ins.args[0])] if has_result else []
    if len(values) != count or (has_result and len(puts) != count):
        return None
    one = _one_atomic(machine, ins, UPDATE[kind], raw, base if small else None)

    def run(mask: Mask) -> None:
        lanes, size = machine.lanes(mask), WIDTH[type_name] // 8
        addresses = machine.per_lane(address())
        if (addresses[lanes] % (size * count)).any():
            raise PtxError(f"misaligned atomic operation: {ins.line}")
        given, new = (
            [np.ascontiguousarray(machine.per_lane(x())) for x in part] for part in (values, replacements)
        )
        old = np.zeros((count, machine.n), numpy_type(raw))
        for lane in machine.random.permutation(lanes):
            name, _, part = _by_space(space, addresses[lane : lane + 1])[0]
            for e in range(count):
                at, this = int(part[0]) + e * size, slice(lane, lane + 1)
                old[e, lane] = one(name, int(lane), at, given[e][this], new[e][this])
        for put, values_seen in zip(puts, old, strict=False):
            put(values_seen, mask)

    return run


def _one_atomic(
    machine: Machine, ins: Instruction, update: Callable[[Any, Any, Any], Any], raw: str, small: str | None
) -> Callable[[str, int, int, np.ndarray, np.ndarray], Any]:
    """The operation of one lane; returns the old value."""
    acquires, releases = bool(ins.has("acquire", "acq_rel")), bool(ins.has("release", "acq_rel"))
    ordered = machine.memory.races
    size = WIDTH[raw] // 8

    def one(space: str, lane: int, address: int, value: np.ndarray, new: np.ndarray) -> Any:
        cell = machine.memory.atomic_cell(space, address, size, lane, ins.line).view(numpy_type(raw))
        if ordered and space == "global":
            machine.order.strong_read(lane, address, acquires)
        old = cell[0].copy()
        if small:
            numbers = (decode(x.view(np.uint16), small).astype(np.float64) for x in (cell.copy(), value))
            cell.view(np.uint16)[:] = encode(sum(numbers), small)  # type: ignore[arg-type]
        else:
            cell[0] = update(old, value[0], new[0])
        if ordered and space == "global":
            machine.order.strong_write(lane, address, releases)
        return old

    return one
