"""The small floating-point formats against ml_dtypes, torch and a search over all values."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from tests.ptx.formats import decode, encode, flush, round_to_f32
from tests.ptx.snippets import execute

REFERENCE = {
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
FORMATS = list(REFERENCE)


def patterns(name: str) -> np.ndarray:
    size = np.dtype(REFERENCE[name]).itemsize
    return np.arange(2 ** (8 * size)).astype(f"u{size}")


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.dtype.itemsize}")


def values_of_all_sizes(count: int = 4000) -> np.ndarray:
    generator = np.random.default_rng(0)
    x = np.float32(generator.standard_normal(count) * 2.0 ** generator.integers(-45, 40, count))
    return np.concatenate(
        [x, np.float32([0.0, -0.0, np.inf, -np.inf, 1e-45, 3.4e38, 65504, 65520, 448, 464, 480])]
    )


@pytest.mark.parametrize("name", FORMATS)
def test_every_pattern_decodes(name):
    codes = patterns(name)
    want = codes.view(REFERENCE[name]).astype(np.float32)
    np.testing.assert_array_equal(decode(codes, name), want)
    with np.errstate(invalid="ignore"):
        assert np.array_equal(np.signbit(decode(codes, name)), np.signbit(want))


@pytest.mark.parametrize("name", FORMATS)
def test_round_to_nearest_even(name):
    x = values_of_all_sizes()
    finite = np.sort(decode(patterns(name), name)[np.isfinite(decode(patterns(name), name))])
    middles = finite[1:] / 2 + finite[:-1] / 2
    x = np.concatenate([x, middles, np.nextafter(finite, np.float32(np.inf))])
    with np.errstate(over="ignore"):
        want = x.astype(REFERENCE[name])
    np.testing.assert_array_equal(encode(x, name), bits(want))
    np.testing.assert_array_equal(encode(x.astype(np.float64), name), bits(want))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rounding", ["rz", "rm", "rp"])
def test_directed_rounding_brackets_the_value(name, rounding):
    x = values_of_all_sizes()
    grid = decode(patterns(name), name)
    grid = np.unique(grid[np.isfinite(grid)].astype(np.float64))
    x = x[np.isfinite(x) & (np.abs(x) <= grid[-1])]
    got = decode(encode(x, name, rounding), name).astype(np.float64)
    below, above = grid[np.searchsorted(grid, x, "right") - 1], grid[np.searchsorted(grid, x, "left")]
    want = {"rm": below, "rp": above, "rz": np.where(x < 0, above, below)}[rounding]
    np.testing.assert_array_equal(got, want)


def test_directed_rounding_of_what_is_too_large():
    x = np.float32([1e5, -1e5])
    assert decode(encode(x, "f16", "rz"), "f16").tolist() == [65504, -65504]
    assert decode(encode(x, "f16", "rp"), "f16").tolist() == [np.inf, -65504]
    assert decode(encode(x, "f16", "rm"), "f16").tolist() == [65504, -np.inf]


@pytest.mark.parametrize(("name", "largest"), [("e4m3", 448), ("e5m2", 57344)])
def test_saturation(name, largest):
    x = np.float32([1e9, -1e9, np.inf, largest, np.nan])
    got = decode(encode(x, name, saturate=True), name)
    np.testing.assert_array_equal(got, np.float32([largest, -largest, largest, largest, np.nan]))


@pytest.mark.parametrize("name", FORMATS)
def test_nan_is_canonical(name):
    want = {"f16": 0x7FFF, "bf16": 0x7FFF, "e4m3": 0x7F, "e5m2": 0x7F}[name]
    assert encode(np.float32([np.nan, -np.nan]), name).tolist() == [want, want]


def test_tf32_keeps_ten_bits_of_fraction():
    x = values_of_all_sizes()
    x = x[np.abs(x) > 1e-37]  # of subnormal numbers more bits may be lost
    exact = x.astype(np.float64)
    scale = 2.0 ** (np.frexp(np.where(np.isfinite(exact), exact, 1))[1] - 11)
    for rounding, whole in (
        ("rn", np.rint),
        ("rz", np.trunc),
        ("rna", lambda v: np.trunc(v + np.copysign(0.5, v))),
    ):
        with np.errstate(over="ignore", invalid="ignore"):
            want = np.where(np.isfinite(exact), whole(exact / scale) * scale, exact).astype(np.float32)
        np.testing.assert_array_equal(encode(x, "tf32", rounding).view(np.float32), want)
    assert decode(np.array([0x3F801FFF], np.uint32), "tf32").tolist() == [1.0]


def test_float32_in_every_direction():
    generator = np.random.default_rng(1)
    x = generator.standard_normal(2000) * 2.0 ** generator.integers(-140, 120, 2000)
    down, up = round_to_f32(x, "rm").astype(np.float64), round_to_f32(x, "rp").astype(np.float64)
    assert (down <= x).all()
    assert (up >= x).all()
    assert (np.nextafter(np.float32(down), np.float32(np.inf)) >= np.float32(up)).all()
    np.testing.assert_array_equal(round_to_f32(x, "rz"), np.float32(np.where(x < 0, up, down)))
    np.testing.assert_array_equal(round_to_f32(x), x.astype(np.float32))


def test_flushing_keeps_signs_and_normal_numbers():
    x = np.float32([1e-39, -1e-39, 2.0**-126, -0.0, 1.0])
    got = flush(x)
    assert got.tolist() == [0.0, -0.0, 2.0**-126, -0.0, 1.0]
    assert np.signbit(got).tolist() == [False, True, False, True, False]


def float_bits(x: np.ndarray) -> list[int]:
    return [int(v) for v in np.asarray(x, np.float32).view(np.uint32)]


CONVERSIONS = {
    "cvt.rn.bf16.f32": ml_dtypes.bfloat16,
    "cvt.rn.f16.f32": np.float16,
}


@pytest.mark.parametrize("text", CONVERSIONS)
def test_conversion_to_sixteen_bits(text):
    x = values_of_all_sizes(300)
    got = execute(f"{text} %d, %a0;", [float_bits(x)], 32, 16)
    with np.errstate(over="ignore"):
        assert got == bits(x.astype(CONVERSIONS[text])).tolist()


def test_packed_conversions():
    x, y = values_of_all_sizes(300), values_of_all_sizes(300)[::-1].copy()
    for name, kind in (("bf16x2", ml_dtypes.bfloat16), ("f16x2", np.float16)):
        got = execute(f"cvt.rn.{name}.f32 %d, %a0, %a1;", [float_bits(x), float_bits(y)])
        with np.errstate(over="ignore"):
            high, low = (bits(v.astype(kind)).astype(np.uint32) for v in (x, y))
        assert got == (high << np.uint32(16) | low).tolist()
    for name in ("e4m3", "e5m2"):
        got = execute(f"cvt.rn.satfinite.{name}x2.f32 %d, %a0, %a1;", [float_bits(x), float_bits(y)], 32, 16)
        high, low = (encode(v, name, saturate=True).astype(np.uint16) for v in (x, y))
        assert got == (high << np.uint16(8) | low).tolist()
        back = execute(f"cvt.rn.f16x2.{name}x2 %d, %a0;", [got], 16, 32)
        halves = [decode(v.astype(np.uint8), name).astype(np.float16) for v in (high, low)]
        want = [
            int(h) << 16 | int(v)
            for h, v in zip(*(np.where(np.isnan(x), 0x7FFF, bits(x)) for x in halves), strict=True)
        ]
        assert back == want


@pytest.mark.parametrize("rounding", ["rni", "rzi", "rmi", "rpi"])
def test_float_to_integer(rounding):
    x = np.concatenate([values_of_all_sizes(500), np.float32([0.5, 1.5, -0.5, -2.5, np.nan])])
    whole = {"rni": round, "rzi": int, "rmi": lambda v: v.__floor__(), "rpi": lambda v: v.__ceil__()}[
        rounding
    ]
    for kind, low, high, width in (
        ("s32", -(2**31), 2**31 - 1, 32),
        ("u32", 0, 2**32 - 1, 32),
        ("s64", -(2**63), 2**63 - 1, 64),
    ):
        want = []
        for v in x:
            exact = (
                0
                if np.isnan(v)
                else high
                if v == np.inf
                else low
                if v == -np.inf
                else whole(Fraction(float(v)))
            )
            want.append(min(max(exact, low), high) % 2**width)
        assert execute(f"cvt.{rounding}.{kind}.f32 %d, %a0;", [float_bits(x)], 32, width) == want


@pytest.mark.parametrize("rounding", ["rn", "rz", "rm", "rp"])
def test_integer_to_float(rounding):
    generator = np.random.default_rng(3)
    numbers = [int(v) for v in generator.integers(-(2**62), 2**62, 200)] + [2**24 + 1, -(2**24) - 1, 0, 7]
    got = execute(f"cvt.{rounding}.f32.s64 %d, %a0;", [numbers], 64)
    for number, pattern in zip(numbers, got, strict=True):
        value = Fraction(float(np.uint32(pattern).view(np.float32)))
        ulp = Fraction(2) ** max(-149, abs(number).bit_length() - 24)
        error = value - number
        fine = {
            "rn": abs(error) * 2 <= ulp,
            "rz": abs(value) <= abs(number) and abs(error) < ulp,
            "rm": -ulp < error <= 0,
            "rp": 0 <= error < ulp,
        }
        assert fine[rounding], (number, value)


def test_integer_to_integer():
    numbers = [0, 1, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0xFFFFFF80, 0xFFFFFFFF]
    signed = [v - 2**32 if v >> 31 else v for v in numbers]
    assert execute("cvt.s64.s32 %d, %a0;", [numbers], 32, 64) == [v % 2**64 for v in signed]
    assert execute("cvt.u64.u32 %d, %a0;", [numbers], 32, 64) == numbers
    assert execute("cvt.sat.s8.s32 %d, %a0;", [numbers]) == [min(max(v, -128), 127) % 2**32 for v in signed]
    assert execute("cvt.u8.u32 %d, %a0;", [numbers]) == [v % 256 for v in numbers]
