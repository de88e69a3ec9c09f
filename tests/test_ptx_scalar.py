"""Single instructions against plain Python integers, exact fractions and numpy, column by column."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from tests.ptx import PtxError
from tests.ptx.snippets import execute

ROWS = 256


def numbers(bits: int, seed: int) -> list[int]:
    """Random patterns with many at the ends of the range."""
    generator = random.Random(seed)
    ends = [0, 1, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1]
    return [
        generator.choice(ends) if generator.random() < 0.2 else generator.getrandbits(bits)
        for _ in range(ROWS)
    ]


def small_numbers(seed: int, below: int = 70) -> list[int]:
    generator = random.Random(seed)
    return [
        generator.choice([0, 31, 32, 33, 255, 256, 2**31]) if i % 5 == 0 else generator.randrange(below)
        for i in range(ROWS)
    ]


def signed(value: int, bits: int = 32) -> int:
    return value - 2**bits if value >> (bits - 1) else value


def permute(a: int, b: int, selector: int) -> int:
    both, out = b << 32 | a, 0
    for i in range(4):
        choice = selector >> 4 * i & 15
        byte = both >> 8 * (choice & 7) & 255
        out |= (255 * (byte >> 7) if choice & 8 else byte) << 8 * i
    return out


def extract(a: int, position: int, length: int, is_signed: bool, width: int = 32) -> int:
    position, length = position & 255, length & 255
    if length == 0:
        return 0
    sign = is_signed and a >> min(position + length - 1, width - 1) & 1
    bits = [a >> (position + i) & 1 if position + i < width and i < length else sign for i in range(width)]
    return sum(bit << i for i, bit in enumerate(bits))


def insert(a: int, b: int, position: int, length: int, width: int = 32) -> int:
    position, length = position & 255, length & 255
    for i in range(length):
        if position + i < width:
            b = b & ~(1 << (position + i)) | (a >> i & 1) << (position + i)
    return b


def table(code: int):
    def look_up(a: int, b: int, c: int) -> int:
        return sum((code >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32))

    return look_up


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


# Instruction: what it computes from three columns of 32-bit patterns
THREE_COLUMNS = {
    "add.s32 %d, %a0, %a1;": lambda a, b, c: a + b,
    "sub.u32 %d, %a0, %a1;": lambda a, b, c: a - b,
    "mul.lo.s32 %d, %a0, %a1;": lambda a, b, c: a * b,
    "mul.hi.u32 %d, %a0, %a1;": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 %d, %a0, %a1;": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mad.lo.s32 %d, %a0, %a1, %a2;": lambda a, b, c: a * b + c,
    "mad.hi.s32 %d, %a0, %a1, %a2;": lambda a, b, c: (signed(a) * signed(b) >> 32) + c,
    "mad.hi.u32 %d, %a0, %a1, %a2;": lambda a, b, c: (a * b >> 32) + c,
    "min.s32 %d, %a0, %a1;": lambda a, b, c: min(signed(a), signed(b)),
    "max.u32 %d, %a0, %a1;": lambda a, b, c: max(a, b),
    "abs.s32 %d, %a0;": lambda a, b, c: abs(signed(a)),
    "neg.s32 %d, %a0;": lambda a, b, c: -a,
    "sad.s32 %d, %a0, %a1, %a2;": lambda a, b, c: abs(signed(a) - signed(b)) + c,
    "and.b32 %d, %a0, %a1;": lambda a, b, c: a & b,
    "xor.b32 %d, %a0, %a1;": lambda a, b, c: a ^ b,
    "not.b32 %d, %a0;": lambda a, b, c: ~a,
    "lop3.b32 %d, %a0, %a1, %a2, 0xe8;": table(0xE8),
    "lop3.b32 %d, %a0, %a1, %a2, 0x2d;": table(0x2D),
    "lop3.b32 %d, %a0, %a1, %a2, 0x96;": table(0x96),
    "prmt.b32 %d, %a0, %a1, %a2;": permute,
    "prmt.b32 %d, %a0, %a1, 0x5410;": lambda a, b, c: permute(a, b, 0x5410),
    "clz.b32 %d, %a0;": lambda a, b, c: 32 - a.bit_length(),
    "popc.b32 %d, %a0;": lambda a, b, c: a.bit_count(),
    "brev.b32 %d, %a0;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "bfind.u32 %d, %a0;": lambda a, b, c: a.bit_length() - 1,
    "add.cc.u32 %d, %a0, %a1; addc.u32 %d, %a2, 0;": lambda a, b, c: c + (a + b >> 32),
    "sub.cc.u32 %d, %a0, %a1; subc.u32 %d, %a2, 0;": lambda a, b, c: c - (a < b),
    "mad.lo.cc.u32 %d, %a0, %a1, %a2; madc.hi.u32 %d, %a0, %a1, %a2;": lambda a, b, c: (
        ((a * b % 2**32 + c) >> 32) + (a * b >> 32) + c
    ),
    "setp.lt.s32 %p, %a0, %a1; selp.b32 %d, %a2, %a0, %p;": lambda a, b, c: c if signed(a) < signed(b) else a,
    "setp.hs.u32 %p, %a0, %a1; selp.b32 %d, 1, 0, %p;": lambda a, b, c: int(a >= b),
    "setp.eq.b32 %p|%q, %a0, %a1; selp.b32 %d, 1, 0, %q;": lambda a, b, c: int(a != b),
    "setp.ne.s32 %q, %a2, 0; setp.gt.and.s32 %p, %a0, %a1, %q; selp.b32 %d, 1, 0, %p;": lambda a, b, c: int(
        signed(a) > signed(b) and c != 0
    ),
}


@pytest.mark.parametrize("text", THREE_COLUMNS)
def test_integers(text):
    columns = [numbers(32, seed) for seed in (1, 2, 3)]
    columns[1][::7] = columns[0][::7]
    assert execute(text, columns) == [THREE_COLUMNS[text](*row) % 2**32 for row in zip(*columns, strict=True)]


SHIFTS = {
    "shl.b32 %d, %a0, %a1;": lambda a, n, m: a << n if n < 32 else 0,
    "shr.u32 %d, %a0, %a1;": lambda a, n, m: a >> n if n < 32 else 0,
    "shr.s32 %d, %a0, %a1;": lambda a, n, m: signed(a) >> min(n, 31),
    "shf.l.wrap.b32 %d, %a0, %a2, %a1;": lambda a, n, m: ((m << 32 | a) << (n & 31)) >> 32,
    "shf.r.wrap.b32 %d, %a0, %a2, %a1;": lambda a, n, m: (m << 32 | a) >> (n & 31),
    "shf.l.clamp.b32 %d, %a0, %a2, %a1;": lambda a, n, m: ((m << 32 | a) << min(n, 32)) >> 32,
    "shf.r.clamp.b32 %d, %a0, %a2, %a1;": lambda a, n, m: (m << 32 | a) >> min(n, 32),
    "bfe.u32 %d, %a0, %a1, %a2;": lambda a, n, m: extract(a, n, m, False),
    "bfe.s32 %d, %a0, %a1, %a2;": lambda a, n, m: extract(a, n, m, True),
    "bfi.b32 %d, %a0, 0x12345678, %a1, %a2;": lambda a, n, m: insert(a, 0x12345678, n, m),
}


@pytest.mark.parametrize("text", SHIFTS)
def test_shifts_and_bit_fields_with_any_count(text):
    columns = [numbers(32, 4), small_numbers(5), small_numbers(6)]
    assert execute(text, columns) == [SHIFTS[text](*row) % 2**32 for row in zip(*columns, strict=True)]


WIDE = {
    "mul.wide.s32 %d, %a0, %a1;": lambda a, b: signed(a) * signed(b),
    "mul.wide.u32 %d, %a0, %a1;": lambda a, b: a * b,
    "mad.wide.s32 %d, %a0, %a1, -1;": lambda a, b: signed(a) * signed(b) - 1,
    "mov.b64 %d, {%a0, %a1};": lambda a, b: b << 32 | a,
}


@pytest.mark.parametrize("text", WIDE)
def test_thirty_two_bits_to_sixty_four(text):
    columns = [numbers(32, 1), numbers(32, 2)]
    assert execute(text, columns, 32, 64) == [WIDE[text](*row) % 2**64 for row in zip(*columns, strict=True)]


SIXTY_FOUR = {
    "add.s64 %d, %a0, %a1;": lambda a, b: a + b,
    "mul.lo.s64 %d, %a0, %a1;": lambda a, b: a * b,
    "mul.hi.u64 %d, %a0, %a1;": lambda a, b: a * b >> 64,
    "mul.hi.s64 %d, %a0, %a1;": lambda a, b: signed(a, 64) * signed(b, 64) >> 64,
    "mad.lo.s64 %d, %a0, %a1, 5;": lambda a, b: a * b + 5,
    "min.s64 %d, %a0, %a1;": lambda a, b: min(signed(a, 64), signed(b, 64)),
    "max.u64 %d, %a0, %a1;": max,
    "div.u64 %d, %a0, %a1;": lambda a, b: a // b if b else 2**64 - 1,
    "rem.u64 %d, %a0, %a1;": lambda a, b: a % b if b else a,
    "div.s64 %d, %a0, %a1;": lambda a, b: truncated(signed(a, 64), signed(b, 64)) if b else -1,
    "rem.s64 %d, %a0, %a1;": lambda a, b: (
        math.fmod(0, 1) if not b else signed(a, 64) - truncated(signed(a, 64), signed(b, 64)) * signed(b, 64)
    ),
    "shl.b64 %d, %a0, 40;": lambda a, b: a << 40,
    "bfe.u64 %d, %a0, 7, 50;": lambda a, b: extract(a, 7, 50, False, 64),
    "bfi.b64 %d, %a0, %a1, 9, 33;": lambda a, b: insert(a, b, 9, 33, 64),
    "brev.b64 %d, %a0;": lambda a, b: int(f"{a:064b}"[::-1], 2),
}


@pytest.mark.parametrize("text", SIXTY_FOUR)
def test_sixty_four_bits(text):
    columns = [numbers(64, 7), [v or 1 for v in numbers(64, 8)] if "rem" in text else numbers(64, 8)]
    assert execute(text, columns, 64, 64) == [
        int(SIXTY_FOUR[text](*row)) % 2**64 for row in zip(*columns, strict=True)
    ]


def test_sixteen_bits():
    a, b = numbers(16, 9), numbers(16, 10)
    assert execute("add.s16 %d, %a0, %a1;", [a, b], 16, 16) == [
        (x + y) % 2**16 for x, y in zip(a, b, strict=True)
    ]
    assert execute("mul.wide.u16 %d, %a0, %a1;", [a, b], 16, 32) == [x * y for x, y in zip(a, b, strict=True)]
    want = [max(signed(x, 16), signed(y, 16)) % 2**16 for x, y in zip(a, b, strict=True)]
    assert execute("max.s16 %d, %a0, %a1;", [a, b], 16, 16) == want


# ---- floating point ----


def to_float(pattern: int) -> float:
    return float(np.uint32(pattern).view(np.float32))


def from_floats(values: list[float] | np.ndarray) -> list[int]:
    return [int(v) for v in np.asarray(values, np.float32).view(np.uint32)]


def random_floats(seed: int, spread: int = 30) -> list[int]:
    generator = np.random.default_rng(seed)
    return from_floats(generator.standard_normal(ROWS) * 2.0 ** generator.integers(-spread, spread, ROWS))


def rounded(exact: Fraction, rounding: str) -> float:
    """An exact number as float32."""
    near = np.float32(float(exact))
    candidates = {
        float(near),
        float(np.nextafter(near, np.float32(np.inf))),
        float(np.nextafter(near, -np.float32(np.inf))),
    }
    if rounding == "rn":
        key = lambda v: (abs(Fraction(v) - exact), int(np.float32(v).view(np.uint32)) & 1)  # noqa: E731
        return min(candidates, key=key)
    inside = {
        "rm": lambda v: Fraction(v) <= exact,
        "rp": lambda v: Fraction(v) >= exact,
        "rz": lambda v: abs(Fraction(v)) <= abs(exact) and (v == 0 or (v < 0) == (exact < 0)),
    }[rounding]
    return min((v for v in candidates if inside(v)), key=lambda v: abs(Fraction(v) - exact))


@pytest.mark.parametrize("rounding", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
def test_float32_rounds_once(op, rounding):
    a, b, c = (random_floats(seed) for seed in (1, 2, 3))
    # half of the sums almost cancel, which shows a product that was rounded first
    c[::2] = from_floats([-to_float(x) * to_float(y) for x, y in zip(a[::2], b[::2], strict=True)])
    if op in ("add", "sub"):
        b[::2] = from_floats([to_float(x) * (1 + 2**-12) for x in a[::2]])
    exact = {
        "add": lambda x, y, z: x + y,
        "sub": lambda x, y, z: x - y,
        "mul": lambda x, y, z: x * y,
        "fma": lambda x, y, z: x * y + z,
    }[op]
    operands = "%a0, %a1, %a2" if op == "fma" else "%a0, %a1"
    got = execute(f"{op}.{rounding}.f32 %d, {operands};", [a, b, c])
    for *row, pattern in zip(a, b, c, got, strict=True):
        value = exact(*(Fraction(to_float(v)) for v in row))
        assert to_float(pattern) == rounded(value, rounding), [to_float(v) for v in row]


def test_float64_fma_rounds_once():
    generator = np.random.default_rng(4)
    a, b = generator.standard_normal(ROWS), generator.standard_normal(ROWS)
    c = -a * b
    columns = [[int(v) for v in x.view(np.uint64)] for x in (a, b, c)]
    got = execute("fma.rn.f64 %d, %a0, %a1, %a2;", columns, 64, 64)
    want = [float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert np.array(got, np.uint64).view(np.float64).tolist() == want


SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 3.0]
PAIRS = [(x, y) for x in SPECIAL for y in SPECIAL]


def pick(x: float, y: float, largest: bool, propagate: bool) -> float:
    if math.isnan(x) or math.isnan(y):
        return math.nan if propagate or (math.isnan(x) and math.isnan(y)) else y if math.isnan(x) else x
    key = lambda v: (v, math.copysign(1, v))  # noqa: E731
    return max(x, y, key=key) if largest else min(x, y, key=key)


def same(got: float, want: float) -> bool:
    if math.isnan(want):
        return math.isnan(got)
    return got == want and math.copysign(1, got) == math.copysign(1, want)


@pytest.mark.parametrize("op", ["min", "max"])
@pytest.mark.parametrize("mods", ["", ".NaN"])
def test_minimum_and_maximum_with_nan_and_zeros(op, mods):
    columns = [from_floats([p[k] for p in PAIRS]) for k in (0, 1)]
    got = execute(f"{op}{mods}.f32 %d, %a0, %a1;", columns)
    for (x, y), pattern in zip(PAIRS, got, strict=True):
        x, y = float(np.float32(x)), float(np.float32(y))
        assert same(to_float(pattern), pick(x, y, op == "max", bool(mods))), (x, y)


@pytest.mark.parametrize("op", ["min", "max"])
def test_xorsign_takes_the_sign_of_the_product(op):
    pairs = [p for p in PAIRS if not any(map(math.isnan, p))]
    columns = [from_floats([p[k] for p in pairs]) for k in (0, 1)]
    got = execute(f"{op}.xorsign.abs.f32 %d, %a0, %a1;", columns)
    for (x, y), pattern in zip(pairs, got, strict=True):
        want = math.copysign(
            pick(abs(x), abs(y), op == "max", False), math.copysign(1, x) * math.copysign(1, y)
        )
        assert same(to_float(pattern), float(np.float32(want)))


COMPARISONS = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y and not (math.isnan(x) or math.isnan(y)),
    "lt": lambda x, y: x < y,
    "ge": lambda x, y: x >= y,
    "equ": lambda x, y: x == y or math.isnan(x) or math.isnan(y),
    "neu": lambda x, y: x != y,
    "ltu": lambda x, y: not x >= y,
    "geu": lambda x, y: not x < y,
    "gtu": lambda x, y: not x <= y,
    "leu": lambda x, y: not x > y,
    "nan": lambda x, y: math.isnan(x) or math.isnan(y),
    "num": lambda x, y: not (math.isnan(x) or math.isnan(y)),
}


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_comparisons_of_floats(comparison):
    columns = [from_floats([p[k] for p in PAIRS]) for k in (0, 1)]
    got = execute(f"setp.{comparison}.f32 %p, %a0, %a1; selp.b32 %d, 1, 0, %p;", columns)
    want = [COMPARISONS[comparison](float(np.float32(x)), float(np.float32(y))) for x, y in PAIRS]
    assert got == [int(v) for v in want]


@pytest.mark.parametrize(("kind", "dtype"), [("f16x2", np.float16), ("bf16x2", ml_dtypes.bfloat16)])
@pytest.mark.parametrize("comparison", COMPARISONS)
def test_comparisons_of_pairs(comparison, kind, dtype):
    """The first predicate is of the lower halves, the second of the upper ones."""
    numbers = [1.5, -0.0, 0.0, -2.25, math.nan, math.inf]
    pairs = list(itertools.product(numbers, numbers))
    lower = [np.array([p[k] for p in pairs], dtype).view(np.uint16).astype(int) for k in (0, 1)]
    upper = [x[::-1] for x in lower]
    columns = [
        [int(a | b << 16) for a, b in zip(*both, strict=True)] for both in zip(lower, upper, strict=True)
    ]
    text = f"setp.{comparison}.{kind} %p|%q, %a0, %a1; selp.b32 %d, 1, 0, %p; @%q add.u32 %d, %d, 2;"
    want = [int(COMPARISONS[comparison](*p)) for p in pairs]
    assert execute(text, columns) == [a + 2 * b for a, b in zip(want, want[::-1], strict=True)]


def test_flushing_and_saturation():
    x = from_floats([1e-40, -1e-40, 0.25, 7.0, -3.0, math.nan])
    got = [to_float(v) for v in execute("add.ftz.f32 %d, %a0, 0f00000000;", [x])]
    assert got[:5] == [0.0, 0.0, 0.25, 7.0, -3.0]
    got = [to_float(v) for v in execute("add.sat.f32 %d, %a0, %a0;", [x])]
    assert got == [2 * to_float(x[0]), 0, 0.5, 1, 0, 0]


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("ex2.approx.ftz.f32", np.exp2),
        ("lg2.approx.f32", lambda x: np.log2(np.abs(x))),
        ("rsqrt.approx.ftz.f32", lambda x: 1 / np.sqrt(np.abs(x))),
        ("rcp.rn.f32", lambda x: 1 / x),
        ("sqrt.rn.f32", lambda x: np.sqrt(np.abs(x))),
        ("tanh.approx.f32", np.tanh),
        ("sin.approx.f32", np.sin),
        ("cos.approx.ftz.f32", np.cos),
    ],
)
def test_functions(text, function):
    x = random_floats(11, 5)
    prepare = "abs.f32 %a0, %a0;" if text[:4] in ("lg2.", "rsqr", "sqrt") else ""
    got = np.array(execute(f"{prepare}{text} %d, %a0;", [x]), np.uint32).view(np.float32)
    want = function(np.array(x, np.uint32).view(np.float32).astype(np.float64))
    np.testing.assert_allclose(got, want, rtol=2e-7, atol=1e-38)


def test_tf32_rounds_halves_away_from_zero():
    x = [*random_floats(13), *from_floats([0.0, -0.0, math.inf, -math.inf, 1e-40, 3e38])]
    x[::3] = [v & 0xFFFFE000 | 0x1000 for v in x[::3]]  # halfway
    x[1::3] = [v & 0xFFFFE000 | 0xFFF for v in x[1::3]]
    x = [v for v in x if not math.isnan(to_float(v))]
    got = execute("cvt.rna.tf32.f32 %d, %a0;", [x])
    assert got == [(v + 0x1000) & 0xFFFFE000 for v in x]
    (nan,) = execute("cvt.rna.tf32.f32 %d, %a0;", [from_floats([math.nan])])
    assert math.isnan(to_float(nan))


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma.rn", "min", "max", "neg", "abs"])
def test_pairs_of_sixteen_bits(kind, op):
    dtype = ml_dtypes.bfloat16 if kind == "bf16" else np.float16
    generator = np.random.default_rng(12)
    a, b, c = (
        (generator.standard_normal(2 * ROWS) * 2.0 ** generator.integers(-4, 4, 2 * ROWS)).astype(dtype)
        for _ in "abc"
    )
    x, y, z = (v.astype(np.float64) for v in (a, b, c))
    want = {
        "add": x + y,
        "sub": x - y,
        "mul": x * y,
        "fma.rn": x * y + z,
        "min": np.minimum(x, y),
        "max": np.maximum(x, y),
        "neg": -x,
        "abs": np.abs(x),
    }[op].astype(dtype)
    count = 1 if op in ("neg", "abs") else 3 if op == "fma.rn" else 2
    operands = ", ".join(["%d", "%a0", "%a1", "%a2"][: count + 1])
    columns = [[int(w) for w in v.view(np.uint16).view(np.uint32)] for v in (a, b, c)]
    got = execute(f"{op}.{kind}x2 {operands};", columns)
    np.testing.assert_array_equal(np.array(got, np.uint32).view(np.uint16).view(dtype), want)


# ---- warps ----


def reference_shuffle(kind: str, values: list[int], distance: int, clamp: int) -> list[tuple[int, bool]]:
    """Written from the pseudo code of the manual."""
    segment, limit, out = clamp >> 8 & 31, clamp & 31, []
    for lane in range(32):
        top, low = (lane & segment) | (limit & ~segment), lane & segment
        source, fine = {
            "up": (lane - distance, lane - distance >= top),
            "down": (lane + distance, lane + distance <= top),
            "bfly": (lane ^ distance, lane ^ distance <= top),
            "idx": (low | (distance & ~segment), (low | (distance & ~segment)) <= top),
        }[kind]
        fine = bool(fine) and 0 <= source < 32
        out.append((values[source] if fine else values[lane], fine))
    return out


@pytest.mark.parametrize("kind", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("distance", [0, 1, 5, 16, 31])
@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(kind, distance, width):
    clamp = (32 - width) << 8 | (0 if kind == "up" else 31)
    values = numbers(32, 20)[:32]
    text = f"shfl.sync.{kind}.b32 {{}}, %a0, {distance}, {clamp}, 0xffffffff;"
    want = reference_shuffle(kind, values, distance, clamp)
    assert execute(text.format("%d"), [values]) == [v for v, _ in want]
    assert execute(text.format("%d|%p") + " selp.b32 %d, 1, 0, %p;", [values]) == [int(p) for _, p in want]


def test_votes_and_reductions():
    values = numbers(32, 21)[:64]
    odd = [v & 1 for v in values]
    ballots = [sum(bit << i for i, bit in enumerate(odd[w : w + 32])) for w in (0, 32) for _ in range(32)]
    predicate = "and.b32 %d, %a0, 1; setp.ne.u32 %p, %d, 0;"
    assert execute(f"{predicate} vote.sync.ballot.b32 %d, %p, -1;", [values]) == ballots
    for kind, function in (("any", any), ("all", all)):
        text = f"{predicate} vote.sync.{kind}.pred %q, %p, -1; selp.b32 %d, 1, 0, %q;"
        assert execute(text, [values]) == [int(function(odd[w : w + 32])) for w in (0, 32) for _ in range(32)]
    warps = [[signed(v) for v in values[w : w + 32]] for w in (0, 32)]
    for kind, function in (("add", sum), ("min", min), ("max", max)):
        got = execute(f"redux.sync.{kind}.s32 %d, %a0, -1;", [values])
        assert got == [function(w) % 2**32 for w in warps for _ in range(32)]


def test_vote_of_some_lanes():
    text = (
        "setp.lt.u32 %p, %t, 4; mov.u32 %d, 0; setp.ne.u32 %q, %a0, 0; @%p vote.sync.ballot.b32 %d, %q, 0xf;"
    )
    assert execute(text, [[1, 0, 1, 1] + [1] * 28])[:6] == [0b1101] * 4 + [0, 0]


# ---- what is not known ----


@pytest.mark.parametrize(
    "text",
    [
        "add.sat.s32 %d, %a0, %a0;",
        "cvt.rn.f32.f32 %d, %a0;",
        "min.ftz.s32 %d, %a0, %a0;",
        "dp4a.u32.u32 %d, %a0, %a0, %a0;",
        "prmt.b32.f4e %d, %a0, %a0, %a0;",
        "mul.s32 %d, %a0, %a0;",
        "cvt.rn.bf16.f16 %d, %a0;",
        "setp.lo.s32 %p, %a0, %a0;",
        "setp.lt.b32 %p, %a0, %a0;",
        "setp.ltu.s32 %p, %a0, %a0;",
        "mov.b32 %d, %clock;",
        "add.s32 %d, %a0, 1.5;",
        "add.f32 %d, %a0, 1;",
        "add.s32 %d, %a0;",
        "add.s64 %d, %a0, %a0;",
        "ex2.rn.f32 %d, %a0;",
        "shl.s32 %d, %a0, 1;",
        "ld.acquire.cluster.global.b32 %d, [%i0];",
        "bar.sync 1, 32, 7;",
        "brx.idx %a0, t;",
        "mov.b32 %d, undefined_name;",
        "nonsense %d;",
    ],
)
def test_what_is_unknown_is_an_error_that_names_the_instruction(text):
    with pytest.raises(PtxError) as error:
        execute(text, [[0] * 32])
    assert text.split(";")[0] in str(error.value)
