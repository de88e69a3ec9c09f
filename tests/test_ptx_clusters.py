"""Clusters of blocks, dependent launches, structures of parameters and launchers in CUDA; their defects."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ptx import Module, PtxError, run_kernel
from tests.ptx.host_library import HostLibrary, compile_library, compile_ptx
from tests.ptx.snippets import entry

needs_nvcc = pytest.mark.skipif(
    not all(map(shutil.which, ("nvcc", "gcc", "g++"))), reason="nvcc, gcc or g++ is not installed"
)

SPECIAL = [
    *(f"%{name}.{axis}" for name in ("ctaid", "cluster_ctaid", "clusterid") for axis in "xyz"),
    *(f"%{name}.{axis}" for name in ("nctaid", "cluster_nctaid", "nclusterid") for axis in "xyz"),
    "%cluster_ctarank",
    "%cluster_nctarank",
]


@pytest.mark.parametrize("part", [32, 200, 10**6])
def test_special_registers(part, monkeypatch):
    monkeypatch.setattr("tests.ptx.machine.PART", part)
    grid, cluster = (4, 6, 3), (2, 3, 1)
    words = len(SPECIAL) + 1
    body = "ld.param.b64 %q0, [p]; mov.u32 %r0, %tid.x; setp.ne.u32 %p0, %r0, 0; @%p0 bra END;"
    body += "mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z;"
    body += "mad.lo.u32 %r2, %r3, 6, %r2; mad.lo.u32 %r1, %r2, 4, %r1;"
    body += f"mad.wide.u32 %q1, %r1, {4 * words}, %q0;"
    body += "".join(f"mov.u32 %r4, {s}; st.global.b32 [%q1+{4 * i}], %r4;" for i, s in enumerate(SPECIAL))
    body += "mov.pred %p1, %is_explicit_cluster; selp.b32 %r4, 1, 0, %p1;"
    body += f"st.global.b32 [%q1+{4 * words - 4}], %r4;\nEND:"
    out = np.zeros((3, 6, 4, words), np.uint32)
    run_kernel(entry(body), "f", grid, (64, 1, 1), 0, [out], cluster=cluster)
    for z in range(3):
        for y in range(6):
            for x in range(4):
                row = [x, y, z, x % 2, y % 3, 0, x // 2, y // 3, z, *grid, *cluster, 2, 2, 3]
                assert out[z, y, x].tolist() == [*row, x % 2 + 2 * (y % 3), 6, 1]


# Each block writes its shared memory, reads that of the next block in the cluster, and leaves.
BARRIER = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
EXCHANGE = f"""ld.param.b64 %q0, [p]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x;
mad.lo.u32 %r3, %r1, %r2, %r0; mov.b32 %r4, sm; mad.lo.u32 %r5, %r0, 16, %r4;
st.shared.v4.b32 [%r5], {{%r3, %r3, %r3, %r1}};
{BARRIER}
mov.u32 %r6, %cluster_ctarank; mov.u32 %r7, %cluster_nctarank; add.u32 %r6, %r6, 1; rem.u32 %r6, %r6, %r7;
xor.b32 %r8, %r5, 512; mapa.shared::cluster.u32 %r9, %r8, %r6;
LOAD
mad.wide.u32 %q1, %r3, 16, %q0; st.global.v4.b32 [%q1], {{%r10, %r11, %r12, %r13}};
{BARRIER}"""
LOAD = "ld.shared::cluster.v4.b32 {%r10, %r11, %r12, %r13}, [%r9];"
GENERIC = """cvt.u64.u32 %q2, %r8; cvta.shared.u64 %q2, %q2; mapa.u64 %q3, %q2, %r6;
ld.v4.b32 {%r10, %r11, %r12, %r13}, [%q3];"""


def exchange(
    text: str, cluster: int = 4, blocks: int = 8, threads: int = 64, **options: object
) -> np.ndarray:
    out = np.zeros((blocks, threads, 4), np.uint32)
    run_kernel(
        entry(text), "f", (blocks, 1, 1), (threads, 1, 1), 16 * threads, [out], cluster=(cluster, 1, 1),
        max_steps=10_000, **options,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("load", [LOAD, GENERIC], ids=["shared::cluster", "generic"])
@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
@pytest.mark.parametrize("part", [32, 10**6])
def test_blocks_read_one_anothers_shared_memory(load, cluster, part, monkeypatch):
    monkeypatch.setattr("tests.ptx.machine.PART", part)
    out = exchange(EXCHANGE.replace("LOAD", load), cluster)
    for block in range(8):
        other = block // cluster * cluster + (block + 1) % cluster
        for thread in range(64):
            number = other * 64 + (thread ^ 32)
            assert out[block, thread].tolist() == [number] * 3 + [other]


# Each block writes into the next one, with one of the widths, and reads what was written into its own.
PUSH = f"""ld.param.b64 %q0, [p]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x;
mad.lo.u32 %r3, %r1, %r2, %r0; mov.b32 %r4, sm; mad.lo.u32 %r5, %r0, 16, %r4; add.u32 %r11, %r3, 1;
add.u32 %r12, %r3, 2; add.u32 %r13, %r3, 3;
{BARRIER}
mov.u32 %r6, %cluster_ctarank; xor.b32 %r6, %r6, 1; mapa.shared::cluster.u32 %r9, %r5, %r6;
STORE
{BARRIER}
ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r5]; mad.wide.u32 %q1, %r3, 16, %q0;
st.global.v4.b32 [%q1], {{%r10, %r11, %r12, %r13}};"""
STORES = {
    "v4": "st.shared::cluster.v4.b32 [%r9], {%r3, %r11, %r12, %r13};",
    "v2": "st.shared::cluster.v2.b32 [%r9], {%r3, %r11}; st.shared::cluster.v2.b32 [%r9+8], {%r12, %r13};",
    "one": "st.shared::cluster.b32 [%r9], %r3; st.shared::cluster.b32 [%r9+4], %r11;"
    "st.shared::cluster.b32 [%r9+8], %r12; st.shared::cluster.b32 [%r9+12], %r13;",
}


@pytest.mark.parametrize("store", STORES)
def test_blocks_write_one_anothers_shared_memory(store):
    out = exchange(PUSH.replace("STORE", STORES[store]), 2, 4)
    for block in range(4):
        for thread in range(64):
            first = (block ^ 1) * 64 + thread
            assert out[block, thread].tolist() == [first, first + 1, first + 2, first + 3]


def test_atomic_additions_to_another_block():
    add = "atom.shared::cluster.add.u32 %r10, [%r9], %r3;"
    first = "st.shared.v4.b32 [%r5], {%r1, %r1, %r1, %r1};\nbarrier.cluster.arrive"
    out = exchange(PUSH.replace("STORE", add).replace("barrier.cluster.arrive", first, 1), 2, 4)
    blocks, threads = np.mgrid[:4, :64]
    np.testing.assert_array_equal(out[..., 0], blocks + (blocks ^ 1) * 64 + threads)


RELAXED = "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;"
DEFECTS = {
    "no first barrier": ((BARRIER, "", 1), "no cluster barrier before: the other block may not have started"),
    "no last barrier": ((BARRIER, "", -1), "the block has left: .*rank \\d.*ld.shared::cluster"),
    "relaxed first barrier": (
        (BARRIER, RELAXED, 1),
        "race on shared memory .read after write.*ld.shared::clu",
    ),
    "relaxed last barrier": ((BARRIER, RELAXED, -1), "the block has left"),
    "arrives without waiting": ((BARRIER, "barrier.cluster.arrive.aligned;", -1), "the block has left"),
    "arrives twice": (
        (BARRIER, "barrier.cluster.arrive; barrier.cluster.arrive; barrier.cluster.wait;", 1),
        "threads arrive at a cluster barrier again before they wait: barrier.cluster.arrive",
    ),
    "waits only": (
        (BARRIER, "barrier.cluster.wait;", 1),
        "that they have not arrived at: barrier.cluster.wait",
    ),
    "some threads exit": (
        (BARRIER, f"setp.lt.u32 %p0, %r0, 32; @%p0 ret; {BARRIER}", 1),
        "cluster barrier divergence: threads exited while others wait at barrier.cluster.wait",
    ),
    "a block exits": (
        (BARRIER, f"setp.eq.u32 %p0, %r1, 1; @%p0 ret; {BARRIER}", -1),
        "cluster barrier divergence: threads exited while others wait at barrier.cluster.wait",
    ),
    "half a warp": (
        (BARRIER, f"and.b32 %r20, %r0, 16; setp.eq.u32 %p0, %r20, 0; @%p0 {BARRIER}", 1),
        "deadlock|not arrived",
    ),
    "a block barrier": ((BARRIER, "bar.sync 0;", 1), "the other block may not have started"),
    "beyond the cluster": (("%r9, %r8, %r6;", "%r9, %r8, 4;", 1), "no block 4 in a cluster of 4: mapa"),
    "not the cluster's window": (
        ("ld.shared::cluster.v4", "ld.shared.v4", 1),
        "shared access out of bounds.*ld.shared.v4",
    ),
    "out of bounds": (("[%r9];", "[%r9+1024];", 1), "shared access out of bounds.*ld.shared::cluster"),
    "misaligned": (("[%r9];", "[%r9+4];", 1), "misaligned shared access.*ld.shared::cluster"),
    "uninitialised": (
        ("st.shared.v4.b32 [%r5], {%r3, %r3, %r3, %r1};", "", 1),
        "uninitialised shared memory",
    ),
    "overwritten while others read": (
        ("mad.wide.u32 %q1", "st.shared.b32 [%r5], %r3; mad.wide.u32 %q1", 1),
        "race on shared memory .write after read.*st.shared.b32",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
@pytest.mark.parametrize("part", [32, 10**6])
def test_defect(name, part, monkeypatch):
    monkeypatch.setattr("tests.ptx.machine.PART", part)
    (old, new, which), words = DEFECTS[name]
    text = EXCHANGE.replace("LOAD", LOAD)
    assert old in text
    text = text.replace(old, new, 1) if which == 1 else new.join(text.rsplit(old, 1))
    with pytest.raises(PtxError, match=words):
        exchange(text)


def test_a_fence_before_a_relaxed_arrival_releases():
    text = EXCHANGE.replace("LOAD", LOAD).replace(BARRIER, f"fence.acq_rel.cluster; {RELAXED}")
    np.testing.assert_array_equal(exchange(text), exchange(EXCHANGE.replace("LOAD", LOAD)))


def test_work_between_arrival_and_wait():
    """What comes after the arrival is not yet ordered; what a block barrier passes on is."""
    split = "barrier.cluster.arrive.aligned; st.shared.b32 [%r5+12], %r1; barrier.cluster.wait.aligned;"
    with pytest.raises(PtxError, match="race on shared memory"):
        exchange(EXCHANGE.replace("LOAD", LOAD).replace(BARRIER, split, 1))
    early = "barrier.cluster.arrive.aligned; mov.u32 %r20, 3; barrier.cluster.wait.aligned; bar.sync 0;"
    exchange(EXCHANGE.replace("LOAD", LOAD).replace(BARRIER, early, 1))


def test_shapes_of_clusters():
    def launch(head: str = "", target: str = "sm_90", blocks: int = 4, **options: object) -> int:
        text = f".target {target}\n.visible .entry f() {head} {{ ret; }}"
        return run_kernel(Module(text), "f", (blocks, 1, 1), (32, 1, 1), 0, [], **options)

    launch(".explicitcluster .reqnctapercluster 2, 1, 1")
    launch(".reqnctapercluster 2 .maxclusterrank 8", cluster=(2, 1, 1))
    launch(".explicitcluster", cluster=(4, 1, 1))
    for words, options in {
        "requires clusters of": {"head": ".reqnctapercluster 2, 1, 1", "cluster": (4, 1, 1)},
        "must be launched with a cluster shape": {"head": ".explicitcluster"},
        "compiled for sm_80, which has no clusters": {"target": "sm_80", "cluster": (2, 1, 1)},
        "1 to 8 blocks": {"blocks": 16, "cluster": (16, 1, 1)},
        "is not made of clusters": {"blocks": 5, "cluster": (2, 1, 1)},
    }.items():
        with pytest.raises(PtxError, match=words):
            launch(**options)


# ---- launches that begin early ----

DEPENDENT = """ld.param.b64 %q0, [p]; mov.u32 %r0, %tid.x; mul.wide.u32 %q1, %r0, 4; add.s64 %q1, %q0, %q1;
mov.u32 %r1, sm; mad.lo.u32 %r1, %r0, 4, %r1;
griddepcontrol.wait; ACCESS griddepcontrol.launch_dependents;"""
ACCESSES = {
    "load": "ld.global.b32 %r2, [%q1];",
    "store": "st.global.b32 [%q1], %r0;",
    "generic": "ld.b32 %r2, [%q1];",
    "atomic": "atom.global.add.u32 %r2, [%q1], 1;",
    "copy": "cp.async.ca.shared.global [%r1], [%q1], 4; cp.async.wait_all;",
}


@pytest.mark.parametrize("name", ACCESSES)
def test_a_dependent_launch_waits_before_global_memory(name):
    def launch(text: str, dependent: bool) -> None:
        data = np.zeros(64, np.uint32)
        run_kernel(entry(text), "f", (1, 1, 1), (64, 1, 1), 256, [data], dependent=dependent)

    text = DEPENDENT.replace("ACCESS", ACCESSES[name])
    launch(text, True)
    early = text.replace("griddepcontrol.wait;", "")
    launch(early, False)
    some = text.replace("griddepcontrol.wait;", "setp.lt.u32 %p0, %r0, 32; @%p0 griddepcontrol.wait;")
    for defect in (early, some):
        with pytest.raises(PtxError, match=r"global memory before griddepcontrol.wait: (ld|st|atom|cp)"):
            launch(defect, True)


# ---- CUDA ----

SOURCE = r"""
#include <cuda_runtime.h>

struct Rows {
  const float* from[4];
  float* to[4];
  int counts[4];
  float scales[3];
};

__device__ float table[4] = {1, 2, 3, 4};

// A row of the structure for each y, chosen when it runs.
__global__ void scale(const __grid_constant__ Rows rows) {
  int y = blockIdx.y;
  const float* scales = rows.scales;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < rows.counts[y]; i += gridDim.x * blockDim.x)
    rows.to[y][i] = rows.from[y][i] * scales[(y + i) % 3] * table[y];
}

extern "C" int launch_scale(const void* rows, int blocks) {
  scale<<<dim3(blocks, 4), 64>>>(*static_cast<const Rows*>(rows));
  return cudaGetLastError();
}
"""


class Rows(ctypes.Structure):
    _fields_ = (
        ("source", ctypes.c_void_p * 4),
        ("to", ctypes.c_void_p * 4),
        ("counts", ctypes.c_int * 4),
        ("scales", ctypes.c_float * 3),
    )


@needs_nvcc
@pytest.mark.parametrize("architecture", ["compute_80", "compute_90a"])
def test_a_structure_of_arrays_as_parameter(tmp_path: Path, architecture):
    source = tmp_path / "scale.cu"
    source.write_text(SOURCE)
    library = HostLibrary(compile_library([source], architecture), compile_ptx([source], architecture))
    inputs = [torch.randn(n) for n in (100, 1, 0, 200)]
    outputs = [torch.full_like(x, float("nan")) for x in inputs]
    addresses = [[x.data_ptr() for x in part] for part in (inputs, outputs)]
    scales = [0.5, 2.0, -1.0]
    counts = [len(x) for x in inputs]
    rows = Rows(*((ctypes.c_void_p * 4)(*a) for a in addresses), (ctypes.c_int * 4)(*counts),
                (ctypes.c_float * 3)(*scales))  # fmt: skip
    packed = ctypes.create_string_buffer(bytes(rows), ctypes.sizeof(rows))
    assert library.call("launch_scale", packed, 2, memory=[*inputs, *outputs]) == 0
    for y, (x, out) in enumerate(zip(inputs, outputs, strict=True)):
        factors = torch.tensor([scales[(y + i) % 3] for i in range(len(x))])
        assert torch.equal(out, x * factors * (y + 1))
    with pytest.raises(PtxError, match=r"global access out of bounds.*scale.cu"):
        library.call("launch_scale", packed, 2, memory=[*inputs, *outputs[:3]])


@pytest.mark.parametrize("generic", [False, True])
def test_addresses_of_parameters(generic):
    """A different place of the parameter for each thread; one beyond its end, or before it, is an error."""
    convert, load = ("cvta.param.u64 %q2, %q2;", "ld.b32") if generic else ("", "ld.param.b32")
    body = f"""ld.param.b64 %q0, [p]; mov.u32 %r0, %tid.x; mul.wide.u32 %q1, %r0, 4; mov.b64 %q2, s;
{convert} add.s64 %q2, %q2, %q1; {load} %r1, [%q2+8]; add.s64 %q3, %q0, %q1; st.global.b32 [%q3], %r1;"""
    values = np.arange(40, dtype=np.uint32)
    out = np.zeros(32, np.uint32)

    def launch(text: str) -> None:
        module = entry(text, ".param .u64 p, .param .align 8 .b8 s[160]")
        run_kernel(module, "f", (1, 1, 1), (32, 1, 1), 0, [out, values.tobytes()])

    launch(body)
    np.testing.assert_array_equal(out, values[2:34])
    for offset in ("+36", "+-4"):
        with pytest.raises(PtxError, match=r"access beyond a kernel parameter, 4 bytes: ld"):
            launch(body.replace("+8", offset))
    with pytest.raises(PtxError, match="misaligned param access"):
        launch(body.replace("+8", "+10"))
    if generic:
        with pytest.raises(PtxError, match=r"kernel parameters cannot be written: st.b32"):
            launch(body.replace(f"{load} %r1, [%q2+8];", "mov.u32 %r1, 0; st.b32 [%q2], %r1;"))


LAUNCHES = r"""
#include <cooperative_groups.h>
#include <cuda_runtime.h>
namespace cg = cooperative_groups;

__device__ int kind = KIND;

// The sum of what the blocks of a cluster hold, by distributed shared memory.
__global__ void total_NAME(const float* x, float* out) {
  __shared__ float own;
  asm volatile("griddepcontrol.wait;" ::: "memory");
  auto cluster = cg::this_cluster();
  if (threadIdx.x == 0) own = x[blockIdx.x];
  cluster.sync();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (unsigned i = 0; i < cluster.num_blocks(); i++) sum += *cluster.map_shared_rank(&own, i);
    out[blockIdx.x] = sum + kind;
  }
  cluster.sync();
}

extern "C" int launch_NAME(const float* x, float* out, int blocks, int cluster, int early, size_t shared) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(64);
  config.dynamicSmemBytes = shared;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (cluster) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = cluster;
    attributes[config.numAttrs].val.clusterDim.y = attributes[config.numAttrs].val.clusterDim.z = 1;
    config.numAttrs++;
  }
  if (early) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs++;
  }
  if (shared > 48 * 1024)
    if (cudaError_t error = cudaFuncSetAttribute(
            total_NAME, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)))
      return error;
  cudaFuncAttributes found;
  if (cudaError_t error = cudaFuncGetAttributes(&found, total_NAME)) return error;
  return cudaLaunchKernelEx(&config, total_NAME, x, out);
}

extern "C" int device_NAME(int* shared, int* processors) {
  cudaDeviceGetAttribute(shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  return cudaDeviceGetAttribute(processors, cudaDevAttrMultiProcessorCount, 0);
}
"""


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Two sources with variables of one name."""
    folder = tmp_path_factory.mktemp("clusters")
    sources = [folder / "first.cu", folder / "second.cu"]
    for source, kind in zip(sources, ("10", "20"), strict=True):
        source.write_text(LAUNCHES.replace("KIND", kind).replace("NAME", source.stem))
    inputs = (sources, "compute_90a", ["-std=c++17"])
    return compile_library(*inputs), compile_ptx(*inputs)


@needs_nvcc
def test_launches_with_attributes(clusters):
    library = HostLibrary(*clusters, capability=90)
    x, out = torch.arange(8.0), torch.zeros(8)
    for name, kind in (("first", 10), ("second", 20)):
        for cluster in (1, 2, 4, 8):
            library.call(f"launch_{name}", x, out, 8, cluster, 1, 0)
            assert torch.equal(out, x.view(-1, cluster).sum(1).repeat_interleave(cluster) + kind)
    launch = library.launches[2]
    assert (launch.grid, launch.cluster, launch.dependent) == ((8, 1, 1), (4, 1, 1), True)
    library.call("launch_first", x, out, 8, 0, 0, 0)
    assert torch.equal(out, x + 10)
    assert not library.launches[-1].dependent
    assert library.call("launch_first", x, out, 16, 16, 0, 0, check=False) == 1
    assert library.call("launch_first", x, out, 6, 4, 0, 0, check=False) == 1
    with pytest.raises(PtxError, match=r"returned CUDA error 1 \(cudaErrorInvalidValue\)"):
        library.call("launch_first", x, out, 6, 4, 0, 0)
    older = HostLibrary(*clusters, capability=80)
    assert older.call("launch_first", x, out, 8, 2, 0, 0, check=False) == 1
    assert older.call("launch_first", x, out, 8, 0, 1, 0, check=False) == 1


@needs_nvcc
@pytest.mark.parametrize(
    ("capability", "kilobytes", "processors"),
    [(80, 163, 108), (86, 99, 84), (89, 99, 128), (90, 227, 132), (100, 227, 148), (120, 99, 170)],
)
def test_devices(clusters, capability, kilobytes, processors):
    library = HostLibrary(*clusters, capability=capability)
    shared, count = np.zeros(1, np.int32), np.zeros(1, np.int32)
    library.call("device_first", shared, count)
    assert (shared[0], count[0]) == (kilobytes * 1024, processors)
    x, out = torch.ones(1), torch.zeros(1)
    most = kilobytes * 1024

    def launch(size: int) -> int:
        return library.call("launch_second", x, out, 1, 0, 0, ctypes.c_size_t(size), check=False)

    assert launch(most - 16) == 0
    assert launch(most) == 1  # the variable of the kernel has no place
    assert launch(most + 16) == 1


@needs_nvcc
def test_what_is_compiled_is_kept_until_an_input_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    headers = tmp_path / "headers"
    headers.mkdir()
    (headers / "value.h").write_text("#define VALUE 3\n")
    source = tmp_path / "one.cu"
    source.write_text('#include "value.h"\nextern "C" __global__ void f(int* x) { *x = VALUE + EXTRA; }\n')

    def library(extra: int) -> Path:
        return compile_library([source], "compute_80", [f"-I{headers}", f"-DEXTRA={extra}"], headers)

    first = library(1)
    written = first.stat().st_ino
    assert library(1) == first
    assert first.stat().st_ino == written
    assert library(2) != first
    (headers / "value.h").write_text("#define VALUE 4\n")
    assert library(1) != first
    (text,) = compile_ptx([source], "compute_80", [f"-I{headers}", "-DEXTRA=1"], headers)
    out = np.zeros(1, np.int32)
    run_kernel(Module(text), "f", (1, 1, 1), (32, 1, 1), 0, [out])
    assert out[0] == 5
    source.write_text("nonsense")
    with pytest.raises(RuntimeError, match=r"nvcc .* failed"):
        library(1)
