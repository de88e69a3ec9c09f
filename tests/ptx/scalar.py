"""Integer, bit and comparison instructions, which work on the registers of one thread.

Results are computed for all lanes and written under the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .formats import SINT, UINT, WIDTH, decode, flush, numpy_type
from .opcodes import Execute, Mask, Operand, opcode
from .parser import Instruction, vector

if TYPE_CHECKING:
    from .machine import Machine

INTEGERS = "u16 s16 u32 s32 u64 s64"
ANY = "b8 b16 b32 b64 u8 u16 u32 u64 s8 s16 s32 s64 f16 f32 f64 bf16"


def simple(
    machine: Machine, ins: Instruction, function: Callable[..., Any], types: Sequence[str] | None = None
) -> Execute:
    """destination = function(sources), all of the instruction's type unless `types` says otherwise."""
    types = types or [ins.types[-1]] * (len(ins.args) - 1)
    sources = [machine.read(arg, t) for arg, t in zip(ins.args[1:], types, strict=True)]
    put = machine.write(ins.args[0])
    if isinstance(function, np.ufunc) and set(types) == {ins.types[-1]}:
        target = machine.place_for(ins.args[0], types[0])
        if target is not None:
            return _in_place(machine, function, sources, ins.args[0], target)
    if len(sources) == 2:
        first, second = sources
        return lambda mask: put(function(first(), second()), mask)
    return lambda mask: put(function(*[s() for s in sources]), mask)


def _in_place(
    machine: Machine, function: np.ufunc, sources: Sequence[Operand], name: str, target: np.ndarray
) -> Execute:
    """Writes what an elementwise function returns straight to the register."""

    def run(mask: Mask) -> None:
        values = [source() for source in sources]
        if mask is None:
            function(*values, out=target)
        else:
            np.copyto(target, function(*values), where=mask)
        machine.written(name, mask)

    return run


@opcode("mov", "", ANY + " pred")
def mov(machine: Machine, ins: Instruction) -> Execute:
    kind, (destination, source) = ins.types[0], ins.args
    if kind == "pred":
        return simple(machine, ins, lambda x: x)
    width = WIDTH[kind]
    if source[0] == "{":
        return _pack(machine, destination, vector(source), width)
    if destination[0] == "{":
        return _unpack(machine, vector(destination), source, width)
    return simple(machine, ins, lambda x: x, [f"b{width}"])


def _pack(machine: Machine, destination: str, parts: list[str], width: int) -> Execute:
    part_width, unsigned = width // len(parts), UINT[width]
    sources, put = [machine.read(p, f"b{part_width}") for p in parts], machine.write(destination)

    def run(mask: Mask) -> None:
        shifted = (s().astype(unsigned) << unsigned(part_width * i) for i, s in enumerate(sources))
        put(sum(shifted), mask)

    return run


def _unpack(machine: Machine, parts: list[str], source: str, width: int) -> Execute:
    part_width = width // len(parts)
    get, puts = machine.read(source, f"b{width}"), [machine.write(p) for p in parts]

    def run(mask: Mask) -> None:
        value = get().copy()
        for i, put in enumerate(puts):
            put((value >> UINT[width](part_width * i)).astype(UINT[part_width]), mask)

    return run


COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
UNORDERED = {
    "equ": "ne",
    "neu": "eq",
    "ltu": "ge",
    "leu": "gt",
    "gtu": "le",
    "geu": "lt",
}  # negations of these
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def _compare(comparison: str, floating: bool, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if comparison in ("nan", "num"):
        return (np.isnan(x) | np.isnan(y)) ^ (comparison == "num")
    if floating and comparison == "ne":  # false when unordered, unlike numpy's
        return (x < y) | (x > y)
    if floating and comparison in UNORDERED:
        return ~_compare(UNORDERED[comparison], True, x, y)
    return COMPARE[comparison](x, y)


@opcode("setp", " ".join([*COMPARE, *UNORDERED, "nan num and or xor ftz"]), ANY + " f16x2 bf16x2")
def setp(machine: Machine, ins: Instruction) -> Execute | None:
    if ins.types[0] in ("f16x2", "bf16x2"):
        return _setp_of_pairs(machine, ins)
    kind, comparison = ins.types[0], ins.mods[0]
    floating = kind[0] == "f" or kind == "bf16"
    only_floating = comparison in UNORDERED or comparison in ("nan", "num")
    if kind in ("b8", "u8", "s8") or (only_floating and not floating):
        return None
    if comparison in ("lo", "ls", "hi", "hs") and kind[0] != "u":
        return None
    if kind[0] == "b" and not floating and comparison not in ("eq", "ne"):
        return None
    small, flushing = kind in ("f16", "bf16"), "ftz" in ins.mods
    join = LOGIC.get(ins.has("and", "or", "xor") or "")
    read_as = f"b{WIDTH[kind]}" if small else kind
    sources = [machine.read(a, read_as) for a in ins.args[1:3]]
    other = machine.read(ins.args[3], "pred") if join else None
    puts = [machine.write(d) for d in ins.args[0].split("|")]
    if len(ins.args) != 3 + bool(join) or (flushing and kind != "f32"):
        return None

    def run(mask: Mask) -> None:
        x, y = (decode(s(), kind) if small else s() for s in sources)
        if flushing:
            x, y = flush(x), flush(y)
        result = _compare(comparison, floating, x, y)
        negation = ~result
        if join and other:
            result, negation = join(result, other()), join(negation, other())
        for put, value in zip(puts, (result, negation), strict=False):
            put(value, mask)

    return run


def _setp_of_pairs(machine: Machine, ins: Instruction) -> Execute | None:
    """The first predicate is that of the lower halves, the second that of the upper ones."""
    kind, (comparison, *others) = ins.types[0].removesuffix("x2"), ins.mods
    targets = ins.args[0].split("|")
    if others or len(ins.args) != 3 or len(targets) != 2:
        return None
    sources = [machine.read(a, "b32") for a in ins.args[1:]]
    puts = [machine.write(target) for target in targets]

    def run(mask: Mask) -> None:
        pairs = [source() for source in sources]
        for shift, put in zip((0, 16), puts, strict=True):
            halves = [decode((pair >> np.uint32(shift)).astype(np.uint16), kind) for pair in pairs]
            put(_compare(comparison, True, *halves), mask)

    return run


@opcode("selp", "", ANY)
def selp(machine: Machine, ins: Instruction) -> Execute:
    bits = f"b{WIDTH[ins.types[0]]}"
    return simple(machine, ins, lambda a, b, p: np.where(p, a, b), [bits, bits, "pred"])


@opcode("and or xor not", "", "b16 b32 b64 pred")
def logic(machine: Machine, ins: Instruction) -> Execute:
    return simple(machine, ins, np.invert if ins.op == "not" else LOGIC[ins.op])


@opcode("shl", "", "b16 b32 b64")
def shl(machine: Machine, ins: Instruction) -> Execute:
    return _shift(machine, ins)


@opcode("shr", "", "b16 b32 b64 " + INTEGERS)
def shr(machine: Machine, ins: Instruction) -> Execute:
    return _shift(machine, ins)


def _shift(machine: Machine, ins: Instruction) -> Execute:
    """Counts beyond the width shift everything out."""
    kind = ins.types[0]
    width, signed, left = WIDTH[kind], kind[0] == "s", ins.op == "shl"

    def shift(a: np.ndarray, count: np.ndarray) -> np.ndarray:
        everything, count = count >= width, np.minimum(count, width - 1).astype(a.dtype)
        result = a << count if left else a >> count
        return result if signed and not left else np.where(everything, result.dtype.type(0), result)

    return simple(machine, ins, shift, [kind, "u32"])


@opcode("shf", "l r wrap clamp", "b32")
def funnel_shift(machine: Machine, ins: Instruction) -> Execute | None:
    left, wrap = "l" in ins.mods, "wrap" in ins.mods
    if len(ins.mods) != 2 or ins.mods[0] not in "lr":
        return None

    def shift(low: np.ndarray, high: np.ndarray, count: np.ndarray) -> np.ndarray:
        value = high.astype(np.uint64) << np.uint64(32) | low
        count = (count & 31 if wrap else np.minimum(count, 32)).astype(np.uint64)
        return ((value << count) >> np.uint64(32) if left else value >> count).astype(np.uint32)

    return simple(machine, ins, shift)


def _ones(count: np.ndarray, width: int) -> np.ndarray:
    """Patterns with the lowest `count` bits set."""
    unsigned = UINT[width]
    some = (unsigned(1) << np.clip(count, 0, width - 1).astype(unsigned)) - unsigned(1)
    return np.where(count >= width, unsigned(2**width - 1), some)


@opcode("bfe", "", "u32 s32 u64 s64")
def bit_field_extract(machine: Machine, ins: Instruction) -> Execute:
    kind = ins.types[0]
    width, unsigned = WIDTH[kind], UINT[WIDTH[kind]]

    def extract(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        position, length = (np.minimum(x.astype(np.int64) & 255, width) for x in (position, length))
        raw = a.view(unsigned)
        field = np.where(
            position >= width, unsigned(0), raw >> np.minimum(position, width - 1).astype(unsigned)
        )
        ones = _ones(length, width)
        if kind[0] == "u":
            return field & ones
        top = np.clip(position + length - 1, 0, width - 1).astype(unsigned)
        sign = (raw >> top & unsigned(1)) == 1
        beyond = ~_ones(width - position, width)  # bits of the field that lie beyond the register
        field = np.where(sign, field | beyond | ~ones, field & ones)
        return np.where(length == 0, unsigned(0), field)

    return simple(machine, ins, extract, [kind, "u32", "u32"])


@opcode("bfi", "", "b32 b64")
def bit_field_insert(machine: Machine, ins: Instruction) -> Execute:
    kind = ins.types[0]
    width, unsigned = WIDTH[kind], UINT[WIDTH[kind]]

    def insert(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        position, length = (np.minimum(x.astype(np.int64) & 255, width) for x in (position, length))
        ones, at = _ones(length, width), np.minimum(position, width - 1).astype(unsigned)
        return np.where(position >= width, b, b & ~(ones << at) | (a & ones) << at)

    return simple(machine, ins, insert, [kind, kind, "u32", "u32"])


@opcode("prmt", "", "b32")
def permute_bytes(machine: Machine, ins: Instruction) -> Execute:
    def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        value, result = b.astype(np.uint64) << np.uint64(32) | a, np.uint32(0)
        for i in range(4):
            choice = selector >> np.uint32(4 * i) & np.uint32(15)
            distance = ((choice & np.uint32(7)) * np.uint32(8)).astype(np.uint64)
            byte = (value >> distance & np.uint64(255)).astype(np.uint32)
            byte = np.where(choice >= 8, (byte >> np.uint32(7)) * np.uint32(255), byte)
            result = result | byte << np.uint32(8 * i)
        return result

    return simple(machine, ins, permute)


@opcode("lop3", "", "b32")
def lop3(machine: Machine, ins: Instruction) -> Execute | None:
    destination, *operands, table_text = ins.args
    table = int(table_text, 0)
    sources, put = [machine.read(a, "b32") for a in operands], machine.write(destination)
    if len(sources) != 3:
        return None

    def run(mask: Mask) -> None:
        a, b, c = (s() for s in sources)
        result = np.zeros(1, np.uint32)
        for k in range(8):
            if table >> k & 1:
                result = result | (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        put(result, mask)

    return run


def _count_leading_zeros(x: np.ndarray) -> np.ndarray:
    value, length = x.astype(np.uint64), np.zeros(x.shape, np.uint32)
    for s in (32, 16, 8, 4, 2, 1):
        big = value >> np.uint64(s) > 0
        length, value = length + np.uint32(s) * big, np.where(big, value >> np.uint64(s), value)
    return (x.dtype.itemsize * 8 - (length + (value > 0))).astype(np.uint32)


def _count_ones(x: np.ndarray) -> np.ndarray:
    return (
        np.unpackbits(x.view(np.uint8).reshape(-1, x.itemsize), axis=1)
        .sum(1, dtype=np.uint32)
        .reshape(x.shape)
    )


def _reverse_bits(x: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(x.view(np.uint8).reshape(-1, x.itemsize), axis=1, bitorder="little")[:, ::-1]
    return np.packbits(bits, axis=1, bitorder="little").view(x.dtype).reshape(x.shape)


@opcode("popc clz brev", "", "b32 b64")
def bit_counts(machine: Machine, ins: Instruction) -> Execute:
    functions: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "popc": _count_ones,
        "clz": _count_leading_zeros,
        "brev": _reverse_bits,
    }
    return simple(machine, ins, lambda x: functions[ins.op](np.ascontiguousarray(x)))


@opcode("bfind", "shiftamt", "u32 s32 u64 s64")
def find_highest_bit(machine: Machine, ins: Instruction) -> Execute:
    """The place of the highest bit that differs from the sign; 0xffffffff if there is none."""
    width = WIDTH[ins.types[0]]

    def find(x: np.ndarray) -> np.ndarray:
        value = np.where(x < 0, ~x, x).astype(UINT[width])
        zeros = _count_leading_zeros(value)
        place = zeros if "shiftamt" in ins.mods else np.uint32(width - 1) - zeros
        return np.where(value == 0, np.uint32(0xFFFFFFFF), place)

    return simple(machine, ins, find)


def integer_arithmetic(machine: Machine, ins: Instruction) -> Execute | None:
    """add, sub, mul, mad, min, max, neg, abs of integers."""
    kind, op = ins.types[0], ins.op
    width, part = WIDTH[kind], ins.has("lo", "hi", "wide")
    if len(ins.mods) != bool(part) or (op in ("mul", "mad")) != bool(part) or op == "fma":
        return None
    double = (SINT if kind[0] == "s" else UINT).get(2 * width)
    if part == "wide" and double is None:
        return None

    def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if part == "lo":
            return a * b
        if double is None:
            return _upper_half(a, b)
        product = a.astype(double) * b.astype(double)
        return product if part == "wide" else (product >> double(width)).astype(numpy_type(kind))

    function: dict[str, Callable[..., Any]] = {
        "add": np.add,
        "sub": np.subtract,
        "mul": multiply,
        "min": np.minimum,
        "max": np.maximum,
        "neg": np.negative,
        "abs": np.abs,
        "mad": lambda a, b, c: multiply(a, b) + c,
    }
    addend = f"{kind[0]}{2 * width}" if part == "wide" else kind
    return simple(machine, ins, function[op], [kind, kind, addend][: len(ins.args) - 1])


def _upper_half(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper 64 bits of 64-bit products, from products of 32-bit halves."""
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    x, y = np.ascontiguousarray(a).view(np.uint64), np.ascontiguousarray(b).view(np.uint64)
    low, cross1 = (x & mask) * (y & mask), (x >> half) * (y & mask)
    cross2 = (x & mask) * (y >> half) + (cross1 & mask) + (low >> half)
    high = (x >> half) * (y >> half) + (cross1 >> half) + (cross2 >> half)
    if a.dtype == np.int64:
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


@opcode("mad", "lo hi wide cc", INTEGERS)
def mad(machine: Machine, ins: Instruction) -> Execute | None:
    return carrying(machine, ins) if "cc" in ins.mods else integer_arithmetic(machine, ins)


@opcode("addc madc subc", "lo hi cc", "u32 s32 u64 s64")
def addc(machine: Machine, ins: Instruction) -> Execute | None:
    return carrying(machine, ins)


def carrying(machine: Machine, ins: Instruction) -> Execute | None:
    """Extended-precision additions: .cc sets the carry flag, addc, subc and madc add it.

    The flag is that of a subtraction too: x - y is x + ~y + 1, and the hardware keeps the borrow as its
    inverse.
    """
    op, width = ins.op, WIDTH[ins.types[0]]
    multiplies, subtracts = op.startswith("mad"), op.startswith("sub")
    if multiplies != bool(ins.has("lo", "hi")) or set(ins.mods) - {"lo", "hi", "cc"}:
        return None
    if multiplies and ins.types[0] != "u32":
        return None
    unsigned = UINT[width]
    sources, put = [machine.read(a, f"b{width}") for a in ins.args[1:]], machine.write(ins.args[0])

    def run(mask: Mask) -> None:
        values = [s().astype(np.uint64) for s in sources]
        if multiplies:
            product = values[0] * values[1]
            values = [
                product >> np.uint64(32) if "hi" in ins.mods else product & np.uint64(0xFFFFFFFF),
                values[2],
            ]
        a, b = (v.astype(unsigned) for v in values)
        if subtracts:
            b = ~b
        one = unsigned(1 if subtracts else 0)
        carry = machine.carry.astype(unsigned) if op.endswith("c") else np.full(machine.n, one)
        total = a + b
        result = total + carry
        put(result, mask)
        if "cc" in ins.mods:
            out = ((total < a) | (result < total)).astype(np.uint64)
            np.copyto(machine.carry, out, where=True if mask is None else mask)

    return run


def integer_division(machine: Machine, ins: Instruction) -> Execute | None:
    return None if ins.mods else simple(machine, ins, lambda a, b: _divide(a, b)[0])


@opcode("rem", "", INTEGERS)
def rem(machine: Machine, ins: Instruction) -> Execute:
    return simple(machine, ins, lambda a, b: _divide(a, b)[1])


def _divide(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quotient towards zero and remainder; all ones and the dividend for division by zero."""
    a, b = np.broadcast_arrays(a, b)
    zero = b == 0
    divisor = np.where(zero, b.dtype.type(1), b)
    remainder = np.fmod(a, divisor)
    quotient = (a - remainder) // divisor
    return np.where(zero, ~b.dtype.type(0), quotient), np.where(zero, a, remainder)


@opcode("sad", "", "u16 s16 u32 s32 u64 s64")
def sum_of_absolute_difference(machine: Machine, ins: Instruction) -> Execute:
    return simple(machine, ins, lambda a, b, c: (np.maximum(a, b) - np.minimum(a, b)) + c)
