"""Matrix instructions: ldmatrix, stmatrix, mma.sync and wgmma.

Products are exact, summed in float64 and rounded once per instruction; the hardware's own order of summation
differs, so results must be compared with tolerances.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .formats import WIDTH, PtxError, decode, elements, encode
from .opcodes import Execute, Mask, Operand, opcode
from .parser import Instruction, vector
from .warp import collective

if TYPE_CHECKING:
    from .machine import Machine

LANE = np.arange(32)
GROUP, QUAD = LANE // 4, LANE % 4  # the row that a group of four lanes holds, and the place in the group


@opcode("ldmatrix stmatrix", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta", "b16")
def matrix_move(machine: Machine, ins: Instruction) -> Execute | None:
    loads, count = ins.op == "ldmatrix", int((ins.has("x1", "x2", "x4") or "x0")[1:])
    registers, address = vector(ins.args[0 if loads else 1]), machine.address(ins.args[1 if loads else 0])
    if len(registers) != count or not ins.has("shared", "shared::cta"):
        return None
    transposed = "trans" in ins.mods
    if loads:
        return collective(machine, _load_matrices(machine, ins, registers, address, transposed))
    return collective(machine, _store_matrices(machine, ins, registers, address, transposed))


def _address_lanes(lanes: np.ndarray, count: int) -> np.ndarray:
    """The lanes whose addresses name rows: eight per matrix."""
    return lanes[lanes % 32 < 8 * count]


def _load_matrices(
    machine: Machine, ins: Instruction, registers: list[str], address: Operand, transposed: bool
) -> Callable[[Mask], None]:
    puts = [machine.write(r) for r in registers]

    def run(mask: Mask) -> None:
        lanes = machine.lanes(mask)
        use = _address_lanes(lanes, len(puts))
        data = machine.memory.load("shared", machine.per_lane(address())[use], 16, use, ins.line)
        rows = data.view(np.uint16).reshape(-1, len(puts), 8, 8)
        rows = rows.swapaxes(2, 3) if transposed else rows
        for j, put in enumerate(puts):
            out = np.zeros(machine.n, np.uint32)
            out[lanes] = np.ascontiguousarray(rows[:, j]).reshape(-1, 64).view(np.uint32).reshape(-1)
            put(out, mask)

    return run


def _store_matrices(
    machine: Machine, ins: Instruction, registers: list[str], address: Operand, transposed: bool
) -> Callable[[Mask], None]:
    sources = [machine.read(r, "b32") for r in registers]

    def run(mask: Mask) -> None:
        lanes = machine.lanes(mask)
        use = _address_lanes(lanes, len(sources))
        values = np.stack([machine.per_lane(s())[lanes].reshape(-1, 32) for s in sources], 1)
        rows = np.ascontiguousarray(values).view(np.uint16).reshape(-1, len(sources), 8, 8)
        rows = np.ascontiguousarray(rows.swapaxes(2, 3) if transposed else rows)
        data = rows.view(np.uint8).reshape(-1, 16)
        machine.memory.store("shared", machine.per_lane(address())[use], data, use, ins.line)

    return run


@opcode("movmatrix", "sync aligned m8n8 trans", "b16")
def transpose_matrix(machine: Machine, ins: Instruction) -> Execute | None:
    """An 8 x 8 matrix of 16-bit elements, a row for every four lanes, transposed."""
    put, source = machine.write(ins.args[0]), machine.read(ins.args[1], "b32")
    if set(ins.mods) != {"sync", "aligned", "m8n8", "trans"}:
        return None

    def run(mask: Mask) -> None:
        matrices = np.ascontiguousarray(machine.per_lane(source())).view(np.uint16).reshape(-1, 8, 8)
        put(np.ascontiguousarray(matrices.swapaxes(1, 2)).reshape(-1).view(np.uint32), mask)

    return collective(machine, run)


# ---- fragments: which element of a matrix a register of a lane holds ----


Places = tuple[np.ndarray, np.ndarray]  # rows and columns: [registers, elements of a register, lanes]
Lanes = np.ndarray | slice


@lru_cache
def operand_places(type_name: str, registers: int, left: bool) -> Places:
    """The places of a left or right operand."""
    per_register = 32 // WIDTH[type_name]
    r, e = np.arange(registers)[:, None, None], np.arange(per_register)[:, None]
    row = GROUP + (8 * (r & 1) if left else 0 * r) + 0 * e
    return row, QUAD * per_register + e + 4 * per_register * (r >> 1 if left else r)


@lru_cache
def result_places(type_name: str, registers: int) -> Places:
    """The places of an accumulator: 16 rows, eight columns for every four values."""
    per_register = 2 if type_name == "f16" else 1
    i = np.arange(registers * per_register).reshape(registers, per_register, 1)
    return GROUP + 8 * (i >> 1 & 1), 2 * QUAD + (i & 1) + 8 * (i >> 2)


def _stacked(machine: Machine, registers: Sequence[Operand], lanes: Lanes) -> np.ndarray:
    """The patterns of some registers: [registers, lanes]."""
    return np.stack([machine.per_lane(r())[lanes] for r in registers])


def gather_operand(
    machine: Machine,
    registers: Sequence[Operand],
    type_name: str,
    lanes: Lanes,
    shape: tuple[int, int],
    left: bool,
) -> np.ndarray:
    """The operand of every warp: [warps, *shape] float64."""
    bits = _stacked(machine, registers, lanes)
    values = elements(bits, type_name).reshape(len(registers), -1, 32, 32 // WIDTH[type_name])
    out = np.zeros((values.shape[1], *shape))
    out[(slice(None), *operand_places(type_name, len(registers), left))] = values.transpose(1, 0, 3, 2)
    return out


def gather_result(
    machine: Machine, registers: Sequence[Operand], type_name: str, lanes: Lanes, columns: int
) -> np.ndarray:
    bits = _stacked(machine, registers, lanes)
    if type_name == "f16":
        values = elements(bits, "f16")
    else:
        values = bits.view(np.int32 if type_name == "s32" else np.float32)
    values = values.reshape(len(registers), -1, 32, 2 if type_name == "f16" else 1)
    out = np.zeros((values.shape[1], 16, columns))
    out[(slice(None), *result_places(type_name, len(registers)))] = values.transpose(1, 0, 3, 2)
    return out


def scatter_result(
    puts: Sequence[Callable[[Any, Mask], None]],
    type_name: str,
    lanes: Lanes,
    values: np.ndarray,
    mask: Mask,
    threads: int,
) -> None:
    """values [warps, 16, columns] to the result registers."""
    numbers = values[(slice(None), *result_places(type_name, len(puts)))].transpose(1, 0, 3, 2)
    if type_name == "f16":
        bits = np.ascontiguousarray(encode(numbers, "f16")).view(np.uint32)
    elif type_name == "s32":
        bits = numbers.astype(np.int64).astype(np.int32).view(np.uint32)
    else:
        bits = numbers.astype(np.float32).view(np.uint32)
    bits = bits.reshape(len(puts), -1)
    if mask is not None:
        bits, part = np.zeros((len(puts), threads), np.uint32), bits
        bits[:, lanes] = part
    for put, column in zip(puts, bits, strict=True):
        put(column, mask)


# ---- mma.sync ----

SHAPES = {
    "m16n8k16": ("f16", "bf16"),
    "m16n8k8": ("f16", "bf16", "tf32"),
    "m16n8k4": ("tf32",),
    "m16n8k32": ("e4m3", "e5m2", "s8", "u8"),
}


def _types_fit(result: str, left: str, right: str, added: str, shape: str) -> bool:
    if left not in SHAPES[shape] or right not in SHAPES[shape] or result != added:
        return False
    if left in ("s8", "u8"):
        return right in ("s8", "u8") and result == "s32"
    if left in ("e4m3", "e5m2"):
        return right in ("e4m3", "e5m2") and result == "f32"
    return left == right and (result == "f32" or (result == "f16" and left == "f16"))


@opcode("mma", "sync aligned row col satfinite " + " ".join(SHAPES), "f16 f32 bf16 tf32 e4m3 e5m2 s8 u8 s32")
def mma(machine: Machine, ins: Instruction) -> Execute | None:
    result, left_type, right_type, added = ins.types
    shape, saturates = ins.has(*SHAPES), "satfinite" in ins.mods
    if shape is None or not _types_fit(result, left_type, right_type, added, shape):
        return None
    if [x for x in ins.mods if x in ("row", "col")] != ["row", "col"] or (saturates and result != "s32"):
        return None
    depth, per_register = int(shape.split("k")[1]), 32 // WIDTH[left_type]
    names = [vector(x) for x in ins.args]
    sizes = [2 if result == "f16" else 4, depth // 2 // per_register, depth // 4 // per_register]
    if [len(x) for x in names] != [*sizes, sizes[0]]:
        return None
    puts = [machine.write(x) for x in names[0]]
    a, b, c = ([machine.read(x, "b32") for x in part] for part in names[1:])

    def run(mask: Mask) -> None:
        lanes = machine.lanes(mask)
        left = gather_operand(machine, a, left_type, lanes, (16, depth), True)
        right = gather_operand(machine, b, right_type, lanes, (8, depth), False)  # transposed
        total = left @ right.swapaxes(1, 2) + gather_result(machine, c, added, lanes, 8)
        if saturates:
            total = np.clip(total, -(2.0**31), 2.0**31 - 1)
        scatter_result(puts, result, lanes, total, mask, machine.n)

    return collective(machine, run)


# ---- wgmma: operands are read and results appear at wait_group; until then the accumulators hold NaN ----


@dataclass(eq=False)
class Product:
    """One wgmma.mma_async of one warpgroup, not yet waited for."""

    start: int  # first lane of the warpgroup
    registers: list[str]
    left: Callable[[], np.ndarray]
    right: Callable[[], np.ndarray]
    sign: int
    accumulates: bool  # otherwise the accumulator starts from zero
    age: int = 0  # groups committed since


@dataclass
class Accumulator:
    """The value that accumulator registers will have when all their products are complete."""

    value: np.ndarray
    registers: list[str]
    type: str
    pending: int = 0


@opcode(
    "wgmma",
    "fence commit_group wait_group mma_async sync aligned "
    + " ".join(f"m64n{n}k{k}" for n in range(8, 257, 8) for k in (8, 16, 32)),
    "f32 f16 bf16 tf32 e4m3 e5m2 s8 u8 s32",
)
def wgmma(machine: Machine, ins: Instruction) -> Execute | None:
    kind = ins.mods[0]
    if kind == "fence":
        return _wgmma_fence(machine)
    if kind == "commit_group":
        return lambda mask: _commit_products(machine, mask)
    if kind == "wait_group":
        return lambda mask: _wait_for_products(machine, mask, int(ins.args[0]))
    return _start_products(machine, ins) if kind == "mma_async" else None


def _wgmma_fence(machine: Machine) -> Execute:
    """Registers must not change between here and the product, so their values are remembered."""
    products = [i for i in machine.kernel.code if i.op == "wgmma" and i.mods[0] == "mma_async"]
    names = {r for i in products for x in i.args[:2] if x[0] == "{" for r in vector(x)}

    def run(mask: Mask) -> None:
        lanes = machine.lanes(mask)
        for name in names:
            seen = machine.fenced.setdefault(name, np.zeros(machine.n, np.uint32))
            seen[lanes] = machine.registers[name][lanes]
        machine.fenced_lanes[lanes] = True

    return run


def _commit_products(machine: Machine, mask: Mask) -> None:
    warpgroups = set((machine.lanes(mask) // 128 * 128).tolist())
    for product in machine.products:
        product.age += product.start in warpgroups
    if machine.serial_wgmma:
        _finish(machine, warpgroups, 0)


def _wait_for_products(machine: Machine, mask: Mask, keep: int) -> None:
    warpgroups = set((machine.lanes(mask) // 128 * 128).tolist())
    machine.fenced_lanes[np.isin(np.arange(machine.n) // 128 * 128, list(warpgroups))] = False
    _finish(machine, warpgroups, keep)


@lru_cache(maxsize=256)
def _matrix_addresses(
    descriptor: int, rows: int, depth: int, size: int, transposed: bool, line: str
) -> np.ndarray:
    """Shared addresses of the [rows, depth] elements that a matrix descriptor names."""
    reserved = descriptor >> 49 & 7 or descriptor >> 14 & 3 or descriptor >> 30 & 3 or descriptor >> 46 & 7
    if reserved or descriptor >> 52 & 0x3FF:
        raise PtxError(f"unsupported matrix descriptor {descriptor:#x}: {line}")
    start, lead, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    swizzle = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62]
    r, k = np.arange(rows)[:, None], np.arange(depth)[None]
    if not transposed and swizzle == 16:
        at = start + r // 8 * stride + k * size // 16 * lead + r % 8 * 16 + k * size % 16
    elif not transposed:
        at = start + r // 8 * stride + r % 8 * swizzle + k * size
    elif swizzle == 16:
        at = start + r // 8 * stride + k // 8 * lead + k % 8 * 16 + r % 8 * 2
    else:
        per_row = swizzle // 2  # elements of one swizzled row; only 16-bit types transpose
        at = start + r // per_row * lead + r % per_row * 2 + k % 8 * swizzle + k // 8 * stride
    return at ^ (at >> 7 & (swizzle // 16 - 1)) << 4


def _shared_matrix(
    machine: Machine, addresses: np.ndarray, type_name: str, lane: int, line: str, left: bool
) -> Callable[[], np.ndarray]:
    """A function that reads an operand in shared memory when the product completes."""
    size, (rows, depth) = WIDTH[type_name] // 8, addresses.shape
    memory = machine.memory
    # `addresses` are made once for each descriptor, and remain in memory as long as the machine knows them.
    key = id(addresses), lane, left
    if key not in machine.operands:
        positions = memory.shared_positions(addresses.reshape(-1), size, lane, line).reshape(rows, -1)
        units = memory.shared_units(positions)
        # each of the four warps reads sixteen rows of the left operand, and all of the right one
        parts = [memory.shared_units(x) for x in positions.reshape(4, 16, -1)] if left else [units] * 4
        readers = [(lane + 32 * w, part) for w, part in enumerate(parts)]
        machine.operands[key] = addresses, positions, units, readers
    _, positions, units, readers = machine.operands[key]
    started = memory.async_read_starts(positions, units, line, readers)

    def get() -> np.ndarray:
        data = np.ascontiguousarray(machine.memory.async_read_ends(started)).reshape(-1)
        if type_name in ("s8", "u8"):
            values = data.view(np.int8 if type_name == "s8" else np.uint8)
        else:
            values = decode(data.view(f"u{size}"), type_name)
        return values.reshape(rows, depth).astype(np.float64)

    return get


@dataclass
class ProductForm:
    """The fixed parts of a wgmma.mma_async instruction."""

    columns: int
    depth: int
    result: str
    left_type: str
    right_type: str
    registers: list[str]
    left_registers: list[str] | None  # None: the left operand is in shared memory
    sign: int
    left_transposed: bool
    right_transposed: bool


def _product_form(ins: Instruction) -> ProductForm | None:
    match = re.fullmatch(r"m64n(\d+)k(\d+)", ins.mods[-1])
    if not match:
        return None
    columns, depth = int(match.group(1)), int(match.group(2))
    result, left, right = ins.types
    registers, rest = vector(ins.args[0]), ins.args[4:]
    left_registers = vector(ins.args[1]) if ins.args[1][0] == "{" else None
    integer, transposable = left in ("s8", "u8"), left in ("f16", "bf16")
    results = ("s32",) if integer else ("f32", "f16")
    if WIDTH[left] * depth != 256 or WIDTH[right] != WIDTH[left] or result not in results:
        return None
    if left != right and left not in ("e4m3", "e5m2", "s8", "u8"):
        return None
    expected = 0 if integer else 2 + transposable * (1 if left_registers else 2)
    if len(registers) != columns // 2 // (2 if result == "f16" else 1) or len(rest) != expected:
        return None
    if any(x not in ("1", "-1") for x in rest[:2]) or any(x not in ("0", "1") for x in rest[2:]):
        return None
    return ProductForm(
        columns,
        depth,
        result,
        left,
        right,
        registers,
        left_registers,
        int(rest[0]) * int(rest[1]) if rest else 1,
        transposable and left_registers is None and rest[2] == "1",
        transposable and rest[-1] == "1",
    )


def _start_products(machine: Machine, ins: Instruction) -> Execute | None:
    form = _product_form(ins)
    if form is None:
        return None
    left = None if form.left_registers else machine.read(ins.args[1], "b64")
    right, scale = machine.read(ins.args[2], "b64"), machine.read(ins.args[3], "pred")

    def run(mask: Mask) -> None:
        for start in np.unique(machine.lanes(mask) // 128 * 128).tolist():
            lanes = slice(start, start + 128)
            if mask is not None and not mask[lanes].all():
                raise PtxError(f"wgmma needs a converged warpgroup: {ins.line}")
            _claim_accumulator(machine, form, lanes, ins.line)
            descriptor = int(machine.per_lane(right())[start])
            size = WIDTH[form.right_type] // 8
            at = _matrix_addresses(
                descriptor, form.columns, form.depth, size, form.right_transposed, ins.line
            )
            get_right = _shared_matrix(machine, at, form.right_type, start, ins.line, False)
            if left is None:
                get_left = _left_in_registers(machine, form, lanes, ins.line)
            else:
                descriptor = int(machine.per_lane(left())[start])
                at = _matrix_addresses(descriptor, 64, form.depth, size, form.left_transposed, ins.line)
                get_left = _shared_matrix(machine, at, form.left_type, start, ins.line, True)
            on = bool(machine.per_lane(scale())[start])
            machine.products.append(Product(start, form.registers, get_left, get_right, form.sign, on))

    return run


def _claim_accumulator(machine: Machine, form: ProductForm, lanes: slice, line: str) -> None:
    """Check the registers of a product and make its accumulators unreadable until it is waited for."""
    if not machine.fenced_lanes[lanes].all():
        raise PtxError(f"wgmma without wgmma.fence: {line}")
    key = lanes.start, form.registers[0]
    accumulator = machine.accumulators.get(key)
    for name in ([] if accumulator else form.registers) + (form.left_registers or []):
        if (machine.fenced[name][lanes] != machine.registers[name][lanes]).any():
            raise PtxError(f"register {name} changed between wgmma.fence and its use: {line}")
    if accumulator is None:
        own = [machine.read(r, "b32") for r in form.registers]
        value = gather_result(machine, own, form.result, lanes, form.columns).reshape(64, form.columns)
        accumulator = machine.accumulators[key] = Accumulator(value, form.registers, form.result)
    elif accumulator.registers != form.registers or accumulator.type != form.result:
        raise PtxError(f"overlapping accumulators: {line}")
    accumulator.pending += 1
    for name in form.registers:
        machine.registers[name][lanes] = 0xFFFFFFFF


def _left_in_registers(
    machine: Machine, form: ProductForm, lanes: slice, line: str
) -> Callable[[], np.ndarray]:
    names = form.left_registers or []
    sources = [machine.read(r, "b32") for r in names]
    value = gather_operand(machine, sources, form.left_type, lanes, (16, form.depth), True)
    seen = [machine.registers[r][lanes].copy() for r in names]

    def get() -> np.ndarray:
        if any((machine.registers[r][lanes] != s).any() for r, s in zip(names, seen, strict=True)):
            raise PtxError(f"operand register changed before wait_group: {line}")
        return value.reshape(64, form.depth)

    return get


def _finish(machine: Machine, warpgroups: set[int], keep: int) -> None:
    """Complete the products of all but the last `keep` groups."""
    done = [q for q in machine.products if q.start in warpgroups and q.age > keep]
    machine.products = [q for q in machine.products if q not in done]
    for product in done:
        key = product.start, product.registers[0]
        accumulator: Accumulator = machine.accumulators[key]
        value = product.sign * product.left() @ product.right().T
        value += accumulator.value if product.accumulates else 0
        if accumulator.type == "f32":
            value = value.astype(np.float32).astype(np.float64)
        elif accumulator.type == "f16":
            value = value.astype(np.float16).astype(np.float64)
        accumulator.value = value
        accumulator.pending -= 1
        if accumulator.pending == 0:
            _publish(machine, key)


def _publish(machine: Machine, key: tuple[int, str]) -> None:
    """Give accumulator registers their value."""
    accumulator, start = machine.accumulators.pop(key), key[0]
    lanes = slice(start, start + 128)
    mask = np.zeros(machine.n, bool)
    mask[lanes] = True
    puts = [machine.write(r) for r in accumulator.registers]
    value = accumulator.value.reshape(4, 16, -1)
    scatter_result(puts, accumulator.type, lanes, value, mask, machine.n)
