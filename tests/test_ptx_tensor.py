"""Matrix instructions, asynchronous copies and mbarriers: PTX written by hand and CUDA, against numpy."""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.ptx import PtxError
from tests.ptx.host_library import HostLibrary, compile_library, compile_ptx
from tests.ptx.snippets import entry, run

PARAMETERS = ".param .u64 p, .param .u64 o"
THREAD = "ld.param.b64 %q0, [p]; ld.param.b64 %q1, [o]; mov.u32 %r0, %tid.x; mov.b32 %r31, sm;"
TO_SHARED = "mad.lo.s32 %r30, %r0, 16, %r31; mad.wide.u32 %q2, %r0, 16, %q0;"
COPY = f"{TO_SHARED} cp.async.cg.shared.global [%r30], [%q2], 16; cp.async.wait_all; bar.sync 0;"


def fragments(dtype: str, count: int) -> tuple[str, list[str]]:
    """Registers %r0.. of one operand: loads of `count` words per thread from %q."""
    names = [f"{dtype}{i}" for i in range(count)]
    return f".reg .b32 {', '.join(names)};", names


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count, transposed):
    """Each thread holds two neighbours of a row (of a column, transposed); stmatrix is the inverse."""
    trans = ".trans" if transposed else ""
    registers = "{" + ", ".join(f"%r{k}" for k in range(4, 4 + count)) + "}"
    stores = "".join(f"st.global.b32 [%q3+{4 * k}], %r{4 + k};" for k in range(count))
    body = f"""{THREAD} {COPY}
ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers}, [%r30];
mad.wide.u32 %q3, %r0, {4 * count}, %q1; {stores}
bar.sync 0; stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r30+512], {registers};
bar.sync 0; ld.shared.v4.b32 {{%r8, %r9, %r10, %r11}}, [%r30+512]; mad.wide.u32 %q4, %r0, 16, %q1;
st.global.v4.b32 [%q4+1024], {{%r8, %r9, %r10, %r11}};"""
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    # what stmatrix does not write is filled beforehand
    body = body.replace(
        "bar.sync 0; stmatrix", "st.shared.v4.b32 [%r30+512], {0, 0, 0, 0}; bar.sync 0; stmatrix"
    )
    out = np.zeros(2048, np.uint8)
    run(entry(body, PARAMETERS), [matrices, out], threads=32, shared=1024)
    got = out[: 128 * count].view(np.uint16).reshape(32, count, 2)
    source = matrices.swapaxes(1, 2) if transposed else matrices
    for lane in range(32):
        for k in range(count):
            want = source[k, lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
            assert got[lane, k].tolist() == want.tolist()
    back = out[1024:1536].view(np.uint16).reshape(4, 8, 8)
    np.testing.assert_array_equal(back[:count], matrices[:count])
    assert not back[count:].any()


def test_movmatrix():
    """Lane 4 i + j gives elements 2 j, 2 j + 1 of row i, and gets those of column i."""
    body = """ld.param.b64 %q0, [p]; ld.param.b64 %q1, [o]; mov.u32 %r0, %tid.x;
mad.wide.u32 %q2, %r0, 4, %q0; mad.wide.u32 %q3, %r0, 4, %q1; ld.global.b32 %r1, [%q2];
GUARD movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1; st.global.b32 [%q3], %r2;"""
    matrices = np.random.default_rng(0).integers(0, 2**16, (3, 8, 8), dtype=np.uint16)
    out = np.zeros_like(matrices)
    run(entry(body.replace("GUARD", ""), PARAMETERS), [matrices, out], threads=96)
    for lane in range(96):
        matrix, row, column = lane // 32, lane % 32 // 4, 2 * (lane % 4)
        want = [matrices[matrix, column, row], matrices[matrix, column + 1, row]]
        assert out[matrix, row, column : column + 2].tolist() == want
    some = body.replace("GUARD", "mov.u32 %r2, 0; setp.ge.u32 %p0, %r0, 32; @%p0")
    run(entry(some, PARAMETERS), [matrices, out], threads=96)
    assert not out[0].any()
    np.testing.assert_array_equal(out[1:], matrices[1:].swapaxes(1, 2))
    half = body.replace("GUARD", "mov.u32 %r2, 0; and.b32 %r3, %r0, 16; setp.eq.u32 %p0, %r3, 0; @%p0")
    with pytest.raises(PtxError, match="deadlock"):
        run(entry(half, PARAMETERS), [matrices, out], threads=96)


DTYPES = {
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "tf32": np.float32,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "s8": np.int8,
    "u8": np.uint8,
}
PRODUCTS = [
    ("bf16", 16, "f32"),
    ("bf16", 8, "f32"),
    ("f16", 16, "f32"),
    ("f16", 16, "f16"),
    ("f16", 8, "f32"),
    ("tf32", 8, "f32"),
    ("tf32", 4, "f32"),
    ("e4m3", 32, "f32"),
    ("e5m2", 32, "f32"),
    ("s8", 32, "s32"),
    ("u8", 32, "s32"),
]


def left_operand(a: np.ndarray) -> np.ndarray:
    """The registers of each lane for a 16 x K left operand, from the tables of the manual."""
    per, depth = 4 // a.dtype.itemsize, a.shape[1]
    words = np.zeros((32, 16 * depth // 32 // per, per), a.dtype)
    for lane in range(32):
        group, quad = lane // 4, lane % 4
        for r in range(words.shape[1]):
            row = group + 8 * (r % 2)
            column = quad * per + 4 * per * (r // 2)
            words[lane, r] = a[row, column : column + per]
    return words


def right_operand(b: np.ndarray) -> np.ndarray:
    """The same for a K x 8 right operand."""
    per, depth = 4 // b.dtype.itemsize, b.shape[0]
    words = np.zeros((32, 8 * depth // 32 // per, per), b.dtype)
    for lane in range(32):
        group, quad = lane // 4, lane % 4
        for r in range(words.shape[1]):
            row = quad * per + 4 * per * r
            words[lane, r] = b[row : row + per, group]
    return words


def load_words(count: int, first: int, pointer: str) -> str:
    moves = "".join(f"ld.global.b32 %r{first + k}, [%q8+{4 * k}];" for k in range(count))
    return f"mad.wide.u32 %q8, %r0, {4 * count}, {pointer}; {moves}"


def names(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{k}" for k in range(first, first + count)) + "}"


@pytest.mark.parametrize(("kind", "depth", "result"), PRODUCTS)
def test_mma(kind, depth, result):
    generator = np.random.default_rng(depth)
    a, b = generator.standard_normal((16, depth)) * 3, generator.standard_normal((depth, 8)) * 3
    if kind in ("s8", "u8"):
        a, b = np.abs(a) * 20 if kind == "u8" else a * 20, np.abs(b) * 20 if kind == "u8" else b * 20
    a, b = a.astype(DTYPES[kind]), b.astype(DTYPES[kind])
    if kind == "tf32":
        a, b = ((x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for x in (a, b))
    dtype = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[result]
    c = (generator.standard_normal((16, 8)) * 10).astype(dtype)
    left, right = (
        np.ascontiguousarray(x).view(np.uint32)[..., 0] for x in (left_operand(a), right_operand(b))
    )
    na, nb, nc = left.shape[1], right.shape[1], 2 if result == "f16" else 4
    added = np.zeros((32, nc, 4 // c.dtype.itemsize), dtype)
    for lane in range(32):
        flat = [c[lane // 4 + 8 * half, 2 * (lane % 4) + i] for half in (0, 1) for i in (0, 1)]
        added[lane] = np.array(flat, dtype).reshape(nc, -1)
    stores = "".join(f"st.global.b32 [%q9+{4 * k}], %r{20 + k};" for k in range(nc))
    body = f"""ld.param.b64 %q0, [p]; ld.param.b64 %q1, [b]; ld.param.b64 %q2, [c]; ld.param.b64 %q3, [o];
mov.u32 %r0, %tid.x; {load_words(na, 4, "%q0")} {load_words(nb, 10, "%q1")} {load_words(nc, 14, "%q2")}
mma.sync.aligned.m16n8k{depth}.row.col.{result}.{kind}.{kind}.{result}
{names(20, nc)}, {names(4, na)}, {names(10, nb)}, {names(14, nc)};
mad.wide.u32 %q9, %r0, {4 * nc}, %q3; {stores}"""
    out = np.zeros((32, nc), np.uint32)
    params = ", ".join(f".param .u64 {x}" for x in "pbco")
    run(entry(body, params), [left, right, added.view(np.uint32), out], threads=32)
    want = a.astype(np.float64) @ b.astype(np.float64) + c.astype(np.float64)
    got = np.zeros((16, 8), dtype)
    values = out.view(dtype).reshape(32, 4)
    for lane in range(32):
        for k in range(4):
            got[lane // 4 + 8 * (k // 2), 2 * (lane % 4) + k % 2] = values[lane, k]
    np.testing.assert_allclose(
        got.astype(np.float64), want, rtol=1e-3 if result == "f16" else 1e-6, atol=1e-3
    )


@pytest.mark.parametrize("size", [0, 3, 8, 16])
def test_cp_async_fills_with_zeros(size):
    body = f"""{THREAD} {TO_SHARED} cp.async.cg.shared.global [%r30], [%q2], 16, {size}; cp.async.wait_all;
ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r30]; mad.wide.u32 %q3, %r0, 16, %q1;
st.global.v4.b32 [%q3], {{%r4, %r5, %r6, %r7}};"""
    data, out = np.arange(1, 513, dtype=np.uint8), np.full(512, 9, np.uint8)
    run(entry(body, PARAMETERS), [data, out], threads=32, shared=512)
    want = data.reshape(32, 16).copy()
    want[:, size:] = 0
    np.testing.assert_array_equal(out.reshape(32, 16), want)


def test_cp_async_groups_land_in_order():
    load = "ld.shared.b32 %r{}, [%r30+{}]; st.global.b32 [%q3+{}], %r{};"
    body = f"""{THREAD} {TO_SHARED} mad.wide.u32 %q3, %r0, 8, %q1;
cp.async.ca.shared.global [%r30], [%q2], 4; cp.async.commit_group;
cp.async.ca.shared.global [%r30+4], [%q2+4], 4; cp.async.commit_group;
cp.async.wait_group 1; {load.format(4, 0, 0, 4)} cp.async.wait_group 0; {load.format(5, 4, 4, 5)}"""
    data, out = np.arange(128, dtype=np.uint32), np.zeros((32, 2), np.uint32)
    run(entry(body, PARAMETERS), [data, out], threads=32, shared=512)
    np.testing.assert_array_equal(out, data.reshape(32, 4)[:, :2])
    early = body.replace("wait_group 1", "wait_group 2")
    with pytest.raises(PtxError, match="read of uninitialised shared memory"):
        run(entry(early, PARAMETERS), [data, out], threads=32, shared=512)


BULK = """ld.param.b64 %q0, [p]; ld.param.b64 %q1, [o]; mov.u32 %r0, %tid.x; setp.eq.u32 %p0, %r0, 0;
mov.b32 %r1, sm; @%p0 mbarrier.init.shared.b64 [%r1], 1; @%p0 fence.mbarrier_init.release.cluster; bar.sync 0;
@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 256;
@%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1+128], [%q0], 256, [%r1];
WAIT: mbarrier.try_wait.parity.shared.b64 %p1, [%r1], 0;
@!%p1 bra WAIT;
mad.lo.s32 %r2, %r0, 4, %r1; ld.shared.b32 %r3, [%r2+128]; add.s32 %r3, %r3, 1; bar.sync 0;
st.shared.b32 [%r2+128], %r3; fence.proxy.async.shared::cta; bar.sync 0;
@%p0 cp.async.bulk.global.shared::cta.bulk_group [%q1], [%r1+128], 256; @%p0 cp.async.bulk.commit_group;
@%p0 cp.async.bulk.wait_group 0;"""


@pytest.mark.parametrize("space", [".shared", ".shared::cta"])
@pytest.mark.parametrize("destination", ["shared::cluster", "shared::cta"])
def test_bulk_copies_and_mbarriers(destination, space):
    data, out = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    text = BULK.replace(".shared.b64", f"{space}.b64").replace("bulk.shared::cluster", f"bulk.{destination}")
    run(entry(text, PARAMETERS), [data, out], shared=512)
    np.testing.assert_array_equal(out, data + 1)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("@%p0 fence.mbarrier_init.release.cluster;", "", "mbarrier initialised without a fence"),
        ("fence.proxy.async.shared::cta;", "", "operand written without fence.proxy.async"),
        ("_, [%r1], 256", "_, [%r1], 272", "deadlock"),
        ("@!%p1 bra WAIT;", "", None),
        (
            "WAIT: mbarrier.try_wait.parity.shared.b64 %p1, [%r1], 0;\n@!%p1 bra WAIT;",
            "",
            "uninitialised shared",
        ),
        ("@%p0 cp.async.bulk.wait_group 0;", "", "bulk stores of f were never waited for"),
        ("%p1, [%r1], 0", "%p1, [%r1], 1", "uninitialised shared memory"),
    ],
)
def test_defects_of_bulk_copies(old, new, words):
    assert old in BULK
    module = entry(BULK.replace(old, new), PARAMETERS)
    data, out = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    if words is None:  # try_wait waits here until the phase is complete, so the loop round it is not needed
        run(module, [data, out], shared=512)
        return
    with pytest.raises(PtxError, match=words):
        run(module, [data, out], shared=512)


# ---- wgmma: an m64n8k16 product whose operands lie in shared memory ----


def descriptor(lead: int, stride: int, swizzle: int) -> int:
    return lead >> 4 << 16 | stride >> 4 << 32 | {16: 0, 128: 1, 64: 2, 32: 3}[swizzle] << 62


def swizzled(flat: np.ndarray, swizzle: int) -> np.ndarray:
    """Bytes of a matrix stored in rows of `swizzle` bytes, with their 16-byte pieces exchanged."""
    out = np.zeros_like(flat)
    at = np.arange(flat.size)
    out[at ^ (at >> 7 & (swizzle // 16 - 1)) << 4] = flat
    return out


WGMMA = """ld.param.b64 %q0, [p]; ld.param.b64 %q1, [o]; ld.param.b64 %q2, [d];
mov.u32 %r0, %tid.x; mov.b32 %r1, sm; mov.u32 %r2, %r0;
COPY: setp.ge.u32 %p0, %r2, {chunks}; @%p0 bra COPIED; mad.wide.u32 %q3, %r2, 16, %q0;
ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%q3]; mad.lo.s32 %r3, %r2, 16, %r1;
st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}}; add.s32 %r2, %r2, 128; bra COPY;
COPIED: fence.proxy.async.shared::cta; bar.sync 0;
ld.global.b64 %q4, [%q2]; ld.global.b64 %q5, [%q2+8]; shr.u32 %r8, %r1, 4; cvt.u64.u32 %q6, %r8;
add.s64 %q4, %q4, %q6; add.s64 %q5, %q5, %q6; setp.ne.u32 %p1, %r1, %r1;
mov.f32 %f0, 0f7FC00000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f0, %f1, %f2, %f3}}, %q4, %q5, %p1, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
mad.wide.u32 %q7, %r0, 16, %q1; st.global.v4.f32 [%q7], {{%f0, %f1, %f2, %f3}};"""


def wgmma_inputs(swizzle: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(swizzle)
    a, b = (generator.standard_normal((n, 16)).astype(ml_dtypes.bfloat16) for n in (64, 8))
    if swizzle == 16:  # core matrices of 8 x 16 bytes, one after the other
        left = np.concatenate([a.reshape(8, 8, 2, 8)[i, :, j] for i in range(8) for j in range(2)])
        right = np.concatenate([b.reshape(1, 8, 2, 8)[0, :, j] for j in range(2)])
        fields = descriptor(128, 256, 16)
    else:  # rows of `swizzle` bytes, of which the product reads the first 32
        width = swizzle // 2
        left, right = (np.zeros((len(x), width), ml_dtypes.bfloat16) for x in (a, b))
        left[:, :16], right[:, :16] = a, b
        fields = descriptor(16, 8 * swizzle, swizzle)
    images = [swizzled(np.ascontiguousarray(x).view(np.uint8).reshape(-1), swizzle) for x in (left, right)]
    image = np.concatenate(images)
    descriptors = np.array([fields, fields + (images[0].size >> 4)], np.uint64)
    return a, b, image, descriptors


@pytest.mark.parametrize("swizzle", [16, 32, 64, 128])
def test_wgmma(swizzle):
    a, b, image, descriptors = wgmma_inputs(swizzle)
    module = entry(WGMMA.format(chunks=image.size // 16), f"{PARAMETERS}, .param .u64 d")
    out = np.zeros((128, 4), np.float32)
    run(module, [image, out, descriptors], threads=128, shared=image.size)
    want = a.astype(np.float64) @ b.astype(np.float64).T
    got = np.zeros((64, 8), np.float32)
    for thread in range(128):
        for k in range(4):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (k // 2)
            got[row, 2 * (thread % 4) + k % 2] = out[thread, k]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("wgmma.fence.sync.aligned;", "", "wgmma without wgmma.fence: wgmma.mma_async"),
        ("fence.proxy.async.shared::cta;", "", "operand written without fence.proxy.async: wgmma.mma_async"),
        (
            "wgmma.fence.sync.aligned;",
            "wgmma.fence.sync.aligned; mov.f32 %f1, 0f3F800000;",
            "changed between",
        ),
        (
            "wait_group.sync.aligned 0;",
            "wait_group.sync.aligned 1;",
            "wgmma products of f were never waited for",
        ),
        ("bar.sync 0;", "", "race on shared memory|uninitialised"),
    ],
)
def test_defects_of_wgmma(old, new, words):
    _, _, image, descriptors = wgmma_inputs(128)
    text = WGMMA.format(chunks=image.size // 16)
    assert old in text
    module = entry(text.replace(old, new), f"{PARAMETERS}, .param .u64 d")
    with pytest.raises(PtxError, match=words):
        run(module, [image, np.zeros((128, 4), np.float32), descriptors], threads=128, shared=image.size)


# ---- CUDA, compiled by nvcc ----

SOURCE = r"""
#include <cuda_bf16.h>
#include <cstdint>

struct Sizes { int rows, columns; float scale; };

// One warp per row: scaled softmax, with vector loads of pairs and warp shuffles.
template <int kWarps>
__global__ void softmax(const __nv_bfloat162* __restrict__ x, __nv_bfloat162* out, Sizes sizes) {
  extern __shared__ float sums[];
  int row = blockIdx.x * kWarps + threadIdx.y, pairs = sizes.columns / 2;
  if (row >= sizes.rows) return;
  float largest = -INFINITY;
  for (int i = threadIdx.x; i < pairs; i += 32) {
    float2 v = __bfloat1622float2(x[row * pairs + i]);
    largest = fmaxf(largest, fmaxf(v.x, v.y) * sizes.scale);
  }
  for (int d = 16; d; d /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, d));
  float sum = 0;
  for (int i = threadIdx.x; i < pairs; i += 32) {
    float2 v = __bfloat1622float2(x[row * pairs + i]);
    sum += __expf(v.x * sizes.scale - largest) + __expf(v.y * sizes.scale - largest);
  }
  for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(0xffffffff, sum, d);
  if (threadIdx.x == 0) sums[threadIdx.y] = sum;
  __syncwarp();
  for (int i = threadIdx.x; i < pairs; i += 32) {
    float2 v = __bfloat1622float2(x[row * pairs + i]);
    v.x = __expf(v.x * sizes.scale - largest) / sums[threadIdx.y];
    v.y = __expf(v.y * sizes.scale - largest) / sums[threadIdx.y];
    out[row * pairs + i] = __float22bfloat162_rn(v);
  }
}

extern "C" int launch_softmax(const void* x, void* out, int rows, int columns, float scale, void* stream) {
  constexpr int kWarps = 4;
  dim3 grid((rows + kWarps - 1) / kWarps), block(32, kWarps);
  softmax<kWarps><<<grid, block, kWarps * sizeof(float), (cudaStream_t)stream>>>(
      (const __nv_bfloat162*)x, (__nv_bfloat162*)out, Sizes{rows, columns, scale});
  return cudaGetLastError();
}
"""


@pytest.mark.parametrize("architecture", ["compute_80", "compute_90a"])
def test_a_launcher_compiled_by_nvcc(tmp_path: Path, architecture):
    for tool in ("nvcc", "gcc", "g++"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    source = tmp_path / "softmax.cu"
    source.write_text(SOURCE)
    library = HostLibrary(compile_library([source], architecture), compile_ptx([source], architecture))
    x = torch.randn(10, 70).bfloat16()
    out = torch.full_like(x, float("nan"))
    library.call("launch_softmax", x, out, 10, 70, 0.5, None)
    error = (out.double() - (x.double() * 0.5).softmax(1)).abs().max()
    assert error < 1e-3
    (launch,) = library.launches
    assert (launch.grid, launch.block, launch.shared) == ((3, 1, 1), (32, 4, 1), 16)
    with pytest.raises(PtxError, match=r"global access out of bounds.*softmax.cu:\d+\]"):
        library.call("launch_softmax", x[:9], out, 10, 70, 0.5, None)
    with pytest.raises(PtxError, match="returned CUDA error 1"):
        library.call("launch_softmax", x, out, 0, 70, 0.5, None)
