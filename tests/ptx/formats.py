"""PTX types: their widths, their numpy equivalents, and exact conversion of the small floating-point formats.

Registers hold bit patterns (unsigned integers). `decode` turns patterns into numbers, `encode` rounds numbers
to patterns; both work on whole arrays.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np


class PtxError(Exception):
    """An instruction that is not supported, or a defect of the kernel found while it ran."""


UINT: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SINT: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT: dict[int, Any] = {16: np.float16, 32: np.float32, 64: np.float64}

WIDTH = {f"{kind}{width}": width for kind in "bus" for width in (8, 16, 32, 64)}
WIDTH.update(f16=16, f32=32, f64=64, bf16=16, tf32=32, f16x2=32, bf16x2=32, pred=1)
WIDTH.update(e4m3=8, e5m2=8, e4m3x2=16, e5m2x2=16)

# format: exponent bits, fraction bits; e4m3 has no infinities and one NaN per sign
SMALL = {"f16": (5, 10), "bf16": (8, 7), "e4m3": (4, 3), "e5m2": (5, 2), "tf32": (8, 10)}


@cache
def numpy_type(type_name: str) -> Any:
    """The numpy type that holds a PTX type: bit patterns for b, packed and small types."""
    width = WIDTH[type_name]
    if type_name[0] == "s":
        return SINT[width]
    return FLOAT[width] if type_name in ("f16", "f32", "f64") else UINT[width]


def _all_values(type_name: str) -> np.ndarray:
    """The values of all patterns of an 8-bit format."""
    exponent_bits, fraction_bits = SMALL[type_name]
    code = np.arange(1 << (1 + exponent_bits + fraction_bits))
    exponent = code >> fraction_bits & ((1 << exponent_bits) - 1)
    fraction = code & ((1 << fraction_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    normal = (fraction + (1 << fraction_bits)) * 2.0 ** (exponent.astype(float) - bias - fraction_bits)
    value = np.where(exponent == 0, fraction * 2.0 ** (1 - bias - fraction_bits), normal)
    top = exponent == (1 << exponent_bits) - 1
    if type_name == "e4m3":
        value = np.where(top & (fraction == 7), np.nan, value)
    else:
        value = np.where(top, np.where(fraction > 0, np.nan, np.inf), value)
    return np.where(code >> (exponent_bits + fraction_bits), -value, value)


_VALUES = {name: _all_values(name).astype(np.float32) for name in ("e4m3", "e5m2")}


def decode(bits: np.ndarray, type_name: str) -> np.ndarray:
    """Bit patterns to float32 (float64 for f64)."""
    if type_name == "f16":
        return bits.view(np.float16).astype(np.float32)
    if type_name == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if type_name == "tf32":  # the tensor cores ignore the low 13 bits of the pattern
        return (bits.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    if type_name in _VALUES:
        return _VALUES[type_name][bits.view(np.uint8)]
    return bits.view(numpy_type(type_name))


def _round_integral(x: np.ndarray, negative: np.ndarray, rounding: str, type_name: str) -> np.ndarray:
    """Magnitudes in units of the last place to whole numbers."""
    if rounding == "rn":
        return np.rint(x)
    if rounding == "rna":
        return np.floor(x + 0.5)
    if rounding not in ("rz", "rm", "rp"):
        raise PtxError(f"unsupported rounding {rounding} to {type_name}")
    return np.where(_away_from_zero(negative, rounding), np.ceil(x), np.floor(x))


def _away_from_zero(negative: np.ndarray, rounding: str) -> np.ndarray:
    return {"rm": negative, "rp": ~negative}.get(rounding, np.zeros_like(negative))


def encode(x: np.ndarray, type_name: str, rounding: str = "rn", saturate: bool = False) -> np.ndarray:
    """Floats to bit patterns of a small format, rounded once ("rn" to even, "rz", "rm", "rp", "rna")."""
    x = np.asarray(x)
    if type_name == "f16" and rounding == "rn" and not saturate:
        with np.errstate(over="ignore"):
            return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))
    if type_name == "bf16" and rounding == "rn" and not saturate and x.dtype == np.float32:
        bits = np.ascontiguousarray(x).view(np.uint32)
        up = np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
        return np.where(np.isnan(x), np.uint16(0x7FFF), ((bits + up) >> np.uint32(16)).astype(np.uint16))
    return _encode_any(x.astype(np.float64), type_name, rounding, saturate)


def _encode_any(x: np.ndarray, type_name: str, rounding: str, saturate: bool) -> np.ndarray:
    exponent_bits, fraction_bits = SMALL[type_name]
    lowest = 2 - (1 << (exponent_bits - 1))  # exponent of the smallest normal number
    magnitude, negative = np.abs(x), np.signbit(x)
    finite = np.where(np.isfinite(magnitude), magnitude, 0.0)
    exponent = np.maximum(np.frexp(np.where(finite > 0, finite, 1.0))[1] - 1, lowest)
    places = _round_integral(np.ldexp(finite, fraction_bits - exponent), negative, rounding, type_name)
    carry = places >= 2.0 ** (fraction_bits + 1)
    places, exponent = np.where(carry, places / 2, places), exponent + carry
    field = np.where(places >= 2.0**fraction_bits, exponent - lowest + 1, 0)
    code = (field.astype(np.int64) << fraction_bits) + (places.astype(np.int64) & ((1 << fraction_bits) - 1))

    top = ((1 << exponent_bits) - 1) << fraction_bits
    largest = top + 6 if type_name == "e4m3" else top - 1
    infinite = largest + 1  # infinity, or the NaN of e4m3
    over = (code > largest) | np.isinf(magnitude)
    if saturate:
        code = np.where(over, largest, code)
    elif rounding in ("rn", "rna") or type_name == "e4m3":
        code = np.where(over, infinite, code)
    else:
        away = _away_from_zero(negative, rounding) | np.isinf(magnitude)
        code = np.where(over, np.where(away, infinite, largest), code)

    width = 1 + exponent_bits + fraction_bits
    code = np.where(np.isnan(x), (1 << (width - 1)) - 1, code | negative.astype(np.int64) << (width - 1))
    if type_name == "tf32":
        return np.where(np.isnan(x), 0x7FFFFFFF, code << 13).astype(np.uint32)
    return code.astype(UINT[width])


def round_to_f32(x: np.ndarray, rounding: str | None = "rn") -> np.ndarray:
    """float64 (or wider) to float32 in the direction asked for."""
    nearest = x.astype(np.float32)
    if rounding == "rm":
        return np.where(nearest > x, np.nextafter(nearest, np.float32(-np.inf)), nearest)
    if rounding == "rp":
        return np.where(nearest < x, np.nextafter(nearest, np.float32(np.inf)), nearest)
    if rounding == "rz":
        return np.where(np.abs(nearest) > np.abs(x), np.nextafter(nearest, np.float32(0)), nearest)
    return nearest


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 numbers to zero of the same sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def elements(bits: np.ndarray, type_name: str) -> np.ndarray:
    """Packed 32-bit patterns as [..., 32 // width] numbers, lowest first."""
    packed = np.ascontiguousarray(bits, np.uint32).reshape(-1, 1)
    if type_name in ("s8", "u8"):
        return packed.view(np.int8 if type_name == "s8" else np.uint8)
    return decode(packed.view(UINT[WIDTH[type_name]]), type_name)
