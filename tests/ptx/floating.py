"""Floating-point arithmetic and conversions. Results are rounded exactly once, in the direction asked for.

Approximate functions (.approx) are computed accurately: tests must compare with tolerances.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from .formats import FLOAT, UINT, WIDTH, decode, encode, flush, numpy_type, round_to_f32
from .opcodes import Execute, Mask, Operand, opcode
from .parser import Instruction
from .scalar import INTEGERS, carrying, integer_arithmetic, integer_division, simple

if TYPE_CHECKING:
    from .machine import Machine

SMALL_TYPES = ("f16", "bf16", "f16x2", "bf16x2")
NAN = np.float32(np.nan)


@opcode(
    "add sub mul fma min max neg abs",
    "rn rz rm rp ftz sat lo hi wide noftz NaN xorsign abs cc",
    INTEGERS + " f16 f32 f64 bf16 f16x2 bf16x2",
)
def arithmetic(machine: Machine, ins: Instruction) -> Execute | None:
    kind, op = ins.types[0], ins.op
    if len(ins.types) != 1 or len(ins.args) != {"fma": 4, "neg": 2, "abs": 2}.get(op, 3):
        return None
    if "cc" in ins.mods:
        return carrying(machine, ins) if op in ("add", "sub") and kind[0] in "us" else None
    if kind in SMALL_TYPES:
        return _small_arithmetic(machine, ins)
    if "noftz" in ins.mods:
        return None
    if {"xorsign", "abs", "NaN"} & set(ins.mods) and (op not in ("min", "max") or kind != "f32"):
        return None
    if kind[0] != "f":
        return integer_arithmetic(machine, ins)
    return _f32_arithmetic(machine, ins) if kind == "f32" else _f64_arithmetic(machine, ins)


def _f32_arithmetic(machine: Machine, ins: Instruction) -> Execute | None:
    op, mods = ins.op, set(ins.mods)
    if mods & {"lo", "hi", "wide"} or (op == "fma" and not ins.has("rn", "rz", "rm", "rp")):
        return None
    rounding = ins.has("rz", "rm", "rp")

    def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return round_to_f32(add_rounded_to_odd(a, b), rounding)

    def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return round_to_f32(a.astype(np.float64) * b, rounding)

    def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return round_to_f32(add_rounded_to_odd(a.astype(np.float64) * b, c), rounding)

    function: dict[str, Callable[..., np.ndarray]] = {
        "add": add if rounding else np.add,
        "sub": (lambda a, b: add(a, -b)) if rounding else np.subtract,
        "mul": multiply if rounding else np.multiply,
        "fma": fma if rounding else _fma_f32,
        "min": lambda a, b: _extreme(a, b, "min", mods),
        "max": lambda a, b: _extreme(a, b, "max", mods),
        "neg": np.negative,
        "abs": np.abs,
    }

    def run(*sources: np.ndarray) -> np.ndarray:
        flushing = "ftz" in mods
        result = function[op](*(map(flush, sources) if flushing else sources))
        result = flush(result) if flushing else result
        return saturated(result) if "sat" in mods else result

    return simple(machine, ins, run if mods & {"ftz", "sat"} else function[op])


def _f64_arithmetic(machine: Machine, ins: Instruction) -> Execute | None:
    if set(ins.mods) - {"rn"}:
        return None
    functions: dict[str, Callable[..., Any]] = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "fma": _fma_f64,
        "min": lambda a, b: _extreme(a, b, "min", set()),
        "max": lambda a, b: _extreme(a, b, "max", set()),
        "neg": np.negative,
        "abs": np.abs,
    }
    return simple(machine, ins, functions[ins.op])


def _extreme(a: np.ndarray, b: np.ndarray, which: str, mods: set[str]) -> np.ndarray:
    """min or max: the other operand if one is NaN (NaN with .NaN), and -0 below +0."""
    x, y = (np.abs(a), np.abs(b)) if "abs" in mods else (a, b)
    result = np.fmin(x, y) if which == "min" else np.fmax(x, y)
    zeros = (result == 0) & (x == y)
    if zeros.any():
        signed, other = (x, y) if which == "min" else (y, x)
        result = np.where(zeros, np.where(np.signbit(x), signed, other), result)
    if "NaN" in mods:
        result = np.where(np.isnan(a) | np.isnan(b), NAN, result)
    if "xorsign" in mods:
        return np.where(np.signbit(a) ^ np.signbit(b), -np.abs(result), np.abs(result))
    return result


def saturated(x: np.ndarray) -> np.ndarray:
    """Clamped to [0, 1]; NaN becomes 0."""
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1)).astype(x.dtype)


def add_rounded_to_odd(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """float64 sum rounded to odd, so that rounding it again to a narrower format rounds only once."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    total = x + y
    back = total - x
    error = (x - (total - back)) + (y - back)
    even = (np.ascontiguousarray(total).view(np.uint64) & np.uint64(1)) == 0
    inexact = (error != 0) & even & np.isfinite(total)
    return np.where(inexact, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


# A float64 between two float32 ends in these bits only where it is halfway between them, or one of them.
_LOW_BITS = np.uint64(0x0FFFFFFF)


def _fma_f32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c rounded once to nearest: the product is exact in float64.

    Rounding the sum to float64 first does harm only where that is halfway between two float32: there the sum
    is rounded to odd.
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    suspect = (total.view(np.uint64) & _LOW_BITS) == 0
    if np.count_nonzero(suspect):
        c = np.broadcast_to(c, total.shape)
        product = np.broadcast_to(product, total.shape)
        total[suspect] = add_rounded_to_odd(product[suspect], c[suspect])
    return total.astype(np.float32)


def _fma_f64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Exact rational arithmetic: slow, but double precision is rare."""

    def one(x: float, y: float, z: float) -> float:
        rough = x * y + z
        if not np.isfinite([x, y, z]).all():
            return rough
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        try:
            return float(exact) if exact else rough
        except OverflowError:
            return float(np.copysign(np.inf, float(exact > 0) - 0.5))

    return np.frompyfunc(one, 3, 1)(*(v.astype(object) for v in (a, b, c))).astype(np.float64)


def _small_arithmetic(machine: Machine, ins: Instruction) -> Execute | None:
    """f16, bf16 and pairs of them: computed in float64, rounded once."""
    kind, op = ins.types[0], ins.op
    if set(ins.mods) - {"rn", "noftz", "NaN"} or ("NaN" in ins.mods and op not in ("min", "max")):
        return None
    base, width = kind.removesuffix("x2"), WIDTH[kind]
    sources, put = [machine.read(a, f"b{width}") for a in ins.args[1:]], machine.write(ins.args[0])
    if op in ("neg", "abs"):
        sign = UINT[width](0x80008000 & ((1 << width) - 1))
        return lambda mask: put(sources[0]() ^ sign if op == "neg" else sources[0]() & ~sign, mask)
    function: dict[str, Callable[..., np.ndarray]] = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "min": lambda a, b: _extreme(a, b, "min", set(ins.mods)),
        "max": lambda a, b: _extreme(a, b, "max", set(ins.mods)),
        "fma": lambda a, b, c: add_rounded_to_odd(a * b, c),
    }

    def run(mask: Mask) -> None:
        values = [np.ascontiguousarray(machine.per_lane(s())).view(np.uint16) for s in sources]
        numbers = [decode(v, base).astype(np.float64) for v in values]
        put(np.ascontiguousarray(encode(function[op](*numbers), base)).view(UINT[width]), mask)

    return run


@opcode("div", "rn full approx ftz", INTEGERS + " f32 f64")
def div(machine: Machine, ins: Instruction) -> Execute | None:
    if ins.types[0][0] != "f":
        return integer_division(machine, ins)
    if not ins.has("rn", "full", "approx") or (ins.types[0] == "f64" and ins.mods != ["rn"]):
        return None
    if "ftz" in ins.mods:
        return simple(machine, ins, lambda a, b: flush(flush(a) / flush(b)))
    return simple(machine, ins, np.divide)


UNARY: dict[str, Callable[[np.ndarray], Any]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: x.dtype.type(1) / x,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "rsqrt": lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(x.dtype),
    "sin": np.sin,
    "cos": np.cos,
}


@opcode(" ".join(UNARY), "approx ftz rn", "f32 f64")
def unary(machine: Machine, ins: Instruction) -> Execute | None:
    kind, function = ins.types[0], UNARY[ins.op]
    exact = ins.op in ("rcp", "sqrt")
    if bool(ins.has("approx")) == bool(ins.has("rn")) or ("rn" in ins.mods and not exact):
        return None
    if kind == "f64" and ins.mods != ["rn"]:
        return None
    if "ftz" in ins.mods:
        return simple(machine, ins, lambda x: flush(function(flush(x))))
    return simple(machine, ins, function)


@opcode("copysign", "", "f32 f64")
def copysign(machine: Machine, ins: Instruction) -> Execute:
    return simple(machine, ins, lambda sign, magnitude: np.copysign(magnitude, sign))


TO_INTEGRAL: dict[str, Callable[[np.ndarray], Any]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


def _is_float(kind: str) -> bool:
    return kind[0] == "f" or kind in ("bf16", "tf32")


@opcode(
    "cvt", "rn rz rm rp rna rni rzi rmi rpi sat ftz satfinite relu", " ".join(t for t in WIDTH if t != "pred")
)
def convert(machine: Machine, ins: Instruction) -> Execute | None:
    if len(ins.types) != 2:
        return None
    to, source = ins.types
    if to.endswith("x2"):
        return _convert_pair(machine, ins)
    if source.endswith("x2") or to in ("e4m3", "e5m2") or source in ("e4m3", "e5m2", "tf32"):
        return None
    if len(ins.args) != 2 or "satfinite" in ins.mods:
        return None
    if _is_float(to):
        return _to_float(machine, ins)
    return _float_to_integer(machine, ins) if _is_float(source) else _integer_to_integer(machine, ins)


def _numbers(machine: Machine, ins: Instruction) -> Operand:
    """The source as numbers: small formats decoded."""
    source, flushing = ins.types[1], "ftz" in ins.mods and ins.types[1] == "f32"
    if source in ("f16", "bf16"):
        get = machine.read(ins.args[1], f"b{WIDTH[source]}")
        return lambda: decode(np.ascontiguousarray(get()), source)
    get = machine.read(ins.args[1], source)
    return (lambda: flush(get())) if flushing else get


def _integer_to_integer(machine: Machine, ins: Instruction) -> Execute | None:
    if set(ins.mods) - {"sat"}:
        return None
    target = numpy_type(ins.types[0])
    get, put = machine.read(ins.args[1], ins.types[1]), machine.write(ins.args[0])
    if "sat" not in ins.mods:
        return lambda mask: put(get().astype(target), mask)
    low, high = np.iinfo(target).min, np.iinfo(target).max
    return lambda mask: put(np.clip(get().astype(object), low, high).astype(target), mask)


def _float_to_integer(machine: Machine, ins: Instruction) -> Execute | None:
    """Out of range: the nearest integer that there is; NaN: 0."""
    integral = ins.has(*TO_INTEGRAL)
    if integral is None or set(ins.mods) - {integral, "ftz"}:
        return None
    target = numpy_type(ins.types[0])
    low, high = np.iinfo(target).min, np.iinfo(target).max
    get, put = _numbers(machine, ins), machine.write(ins.args[0])

    def run(mask: Mask) -> None:
        value = TO_INTEGRAL[integral](get().astype(np.float64))
        result = np.where((value > low) & (value < high), value, 0).astype(target)
        put(np.where(value >= high, target(high), np.where(value <= low, target(low), result)), mask)

    return run


def _to_float(machine: Machine, ins: Instruction) -> Execute | None:
    to, source, mods = *ins.types, set(ins.mods)
    rounding, integral = ins.has("rn", "rz", "rm", "rp", "rna"), ins.has(*TO_INTEGRAL)
    narrows = not _is_float(source) or WIDTH[to] < WIDTH[source] or to == "tf32"
    if narrows != bool(rounding) or (rounding == "rna" and to != "tf32"):
        return None
    if integral and (to != source or to not in ("f32", "f64")):
        return None
    if to == source and not (integral or mods & {"sat", "ftz"}):
        return None
    if {to, source} == {"f16", "bf16"} or (mods & {"sat", "ftz"} and "f32" not in ins.types):
        return None
    if "sat" in mods and to not in ("f32", "f64"):
        return None
    if "relu" in mods and to not in ("f16", "bf16"):
        return None
    if not _is_float(source) and rounding != "rn" and to != "f32":
        return None
    get, put = _numbers(machine, ins), machine.write(ins.args[0])

    def run(mask: Mask) -> None:
        value = get()
        if integral:
            value = TO_INTEGRAL[integral](value)
        if "relu" in mods:
            value = np.where(value <= 0, value.dtype.type(0), value)
        if to in ("f16", "bf16", "tf32"):
            wide = value if source == "f32" else value.astype(np.float64)
            return put(encode(wide, to, rounding or "rn"), mask)
        if rounding == "rn" or not narrows:
            value = value.astype(FLOAT[WIDTH[to]])
        else:
            exact = np.float64 if _is_float(source) or WIDTH[source] < 64 else np.longdouble
            value = round_to_f32(value.astype(exact), rounding)
        value = flush(value) if "ftz" in mods and to == "f32" else value
        put(saturated(value) if "sat" in mods else value, mask)

    return run


def _convert_pair(machine: Machine, ins: Instruction) -> Execute | None:
    """Conversions to packed pairs; the first source is the upper half."""
    to, source, mods = *ins.types, set(ins.mods)
    base, unsigned, half = to[:-2], UINT[WIDTH[to]], WIDTH[to] // 2
    tiny, saturate = base in ("e4m3", "e5m2"), "satfinite" in mods
    rounding = ins.has("rn", "rz")
    if rounding is None or mods - {"rn", "rz", "satfinite", "relu"} or saturate != tiny:
        return None
    if tiny and rounding != "rn":
        return None
    if source == "f32":
        sources = [machine.read(a, "f32") for a in ins.args[1:]]
        if len(sources) != 2:
            return None
    elif base != "bf16" and (source, tiny) in (("f16x2", True), ("e4m3x2", False), ("e5m2x2", False)):
        sources = _halves(machine, ins.args[1], source)
    else:
        return None
    put = machine.write(ins.args[0])

    def run(mask: Mask) -> None:
        values = [machine.per_lane(s()) for s in sources]
        if "relu" in mods:
            values = [np.where(v <= 0, v.dtype.type(0), v) for v in values]
        high, low = (encode(v, base, rounding, saturate).astype(unsigned) for v in values)
        put(high << unsigned(half) | low, mask)

    return run


def _halves(machine: Machine, operand: str, kind: str) -> list[Operand]:
    """Upper and lower half of a packed pair, as numbers."""
    width = WIDTH[kind] // 2
    get = machine.read(operand, f"b{WIDTH[kind]}")

    def part(shift: int) -> Operand:
        return lambda: decode((get() >> get().dtype.type(shift)).astype(UINT[width]), kind[:-2])

    return [part(width), part(0)]
