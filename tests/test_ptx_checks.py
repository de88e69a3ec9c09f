"""Every check of the interpreter fires on a kernel with that defect, and names the instruction."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ptx import Module, PtxError, run_kernel
from tests.ptx.host_library import compile_ptx
from tests.ptx.snippets import entry, run

THREAD = "mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 2; mov.b32 %r2, sm; add.s32 %r2, %r2, %r1;"
POINTER = "ld.param.b64 %q0, [p]; mov.u32 %r0, %tid.x; mul.wide.u32 %q1, %r0, 4; add.s64 %q1, %q0, %q1;"

DEFECTS = {
    "exited threads": (
        "mov.u32 %r0, %tid.x; setp.lt.u32 %p0, %r0, 32; @%p0 bra A; bar.sync 0;\nA: ",
        "barrier divergence: threads exited while others wait at bar.sync 0",
    ),
    "different barriers": (
        "mov.u32 %r0, %tid.x; setp.lt.u32 %p0, %r0, 32; @%p0 bra A; bar.sync 0; bra B;\nA: bar.sync 1;\nB: ",
        "barrier divergence: threads wait at different barriers: bar.sync 0 / bar.sync 1",
    ),
    "uninitialised shared": (
        "ld.shared.b32 %r0, [sm];",
        "read of uninitialised shared memory: ld.shared.b32",
    ),
    "shared out of bounds": (
        "mov.u32 %r0, 1; st.shared.b32 [sm+256], %r0;",
        "shared access out of bounds, 4 bytes at 256 of 256: st.shared.b32",
    ),
    "shared misaligned": (
        "mov.u32 %r0, 1; st.shared.b32 [sm+2], %r0;",
        "misaligned shared access.*st.shared.b32",
    ),
    "several writers": (
        "mov.u32 %r0, %tid.x; st.shared.b32 [sm], %r0;",
        "several threads write different values to one shared address: st.shared",
    ),
    "global out of bounds": (
        f"{POINTER} ld.global.b32 %r1, [%q1+16];",
        r"global access out of bounds, 4 bytes at 0x\w+, 0 bytes past the end of the nearest.*: ld.global",
    ),
    "global misaligned": (
        f"{POINTER} ld.global.b32 %r1, [%q0+2];",
        "misaligned global access.*ld.global.b32",
    ),
    "vector misaligned": (
        f"{POINTER} ld.global.v2.b32 {{%r1, %r2}}, [%q0+4];",
        "misaligned global access, not a multiple of 8 bytes: ld.global.v2",
    ),
    "read after write": (
        f"{THREAD} st.shared.b32 [%r2], %r0; xor.b32 %r3, %r1, 128; mov.b32 %r4, sm; add.s32 %r4, %r4, %r3;"
        "ld.shared.b32 %r5, [%r4];",
        "race on shared memory .read after write.*: ld.shared.b32",
    ),
    "write after read": (
        f"{THREAD} st.shared.b32 [%r2], %r0; bar.sync 0; xor.b32 %r3, %r1, 128; mov.b32 %r4, sm;"
        "add.s32 %r4, %r4, %r3; ld.shared.b32 %r5, [%r4]; st.shared.b32 [%r2], %r5;",
        "race on shared memory .write after read.*: st.shared.b32",
    ),
    "race inside a warp": (
        f"{THREAD} st.shared.b32 [%r2], %r0; xor.b32 %r3, %r1, 4; mov.b32 %r4, sm; add.s32 %r4, %r4, %r3;"
        "ld.shared.b32 %r5, [%r4];",
        "race on shared memory .read after write.*: ld.shared.b32",
    ),
    "endless loop": ("L: bra L;", "more than 1000 steps"),
    "unwritten register": (f"{POINTER} st.global.b32 [%q0], %r9;", "register %r9 is used in thread 0"),
    "unwritten register, computed with": (
        f"{POINTER} add.s32 %r8, %r9, 1; st.global.b32 [%q0], %r8;",
        "register %r8 is used in thread 0",
    ),
    "register written by some": (
        f"{POINTER} setp.lt.u32 %p0, %r0, 40; @%p0 mov.u32 %r9, 1; setp.lt.u32 %p1, %r0, 50;"
        "@%p1 st.global.b32 [%q0], %r9;",
        "register %r9 is used in thread 40",
    ),
    "unwritten predicate": (f"{POINTER} @%p7 st.global.b32 [%q0], %r0;", "predicate %p7 was never written"),
    "early cp.async": (
        f"{POINTER} setp.eq.u32 %p0, %r0, 0; @%p0 cp.async.ca.shared.global [sm], [%q0], 16;"
        "cp.async.commit_group; @%p0 ld.shared.b32 %r3, [sm]; cp.async.wait_group 0;",
        "read of uninitialised shared memory: @%p0 ld.shared",
    ),
    "cp.async of another group": (
        f"{POINTER} setp.eq.u32 %p0, %r0, 0; @%p0 cp.async.ca.shared.global [sm], [%q0], 16;"
        "cp.async.commit_group; cp.async.wait_group 1; @%p0 ld.shared.b32 %r3, [sm];",
        "read of uninitialised shared memory: @%p0 ld.shared",
    ),
    "cp.async without barrier": (
        f"{POINTER} setp.eq.u32 %p0, %r0, 0; @%p0 cp.async.ca.shared.global [sm], [%q0], 16;"
        "cp.async.commit_group; cp.async.wait_group 0; ld.shared.b32 %r3, [sm];",
        "race on shared memory .read after write.*: ld.shared",
    ),
    "cp.async never waited for": (
        f"{POINTER} setp.eq.u32 %p0, %r0, 0; @%p0 cp.async.ca.shared.global [sm], [%q0], 16;",
        "cp.async copies of f were never waited for",
    ),
    "cp.async overwrites": (
        f"{POINTER} st.shared.b32 [sm+128], 1; setp.eq.u32 %p0, %r0, 0; bar.sync 0;"
        "ld.shared.b32 %r3, [sm+128];"
        "@%p0 cp.async.ca.shared.global [sm+128], [%q0], 16; cp.async.wait_all;",
        "race on shared memory .write after read.*: @%p0 cp.async",
    ),
    "shuffle of an inactive lane": (
        "mov.u32 %r0, %tid.x; setp.lt.u32 %p0, %r0, 16; @%p0 shfl.sync.down.b32 %r1, %r0, 15, 31, 0xffff;",
        "shuffle reads an inactive lane: @%p0 shfl",
    ),
    "vote outside the mask": (
        "mov.u32 %r0, %tid.x; setp.lt.u32 %p0, %r0, 16; vote.sync.ballot.b32 %r1, %p0, 0xffff;",
        "member mask leaves out lanes that execute the instruction: vote.sync",
    ),
    "warp that never meets": (
        "mov.u32 %r0, %tid.x; and.b32 %r1, %r0, 31; setp.lt.u32 %p0, %r1, 16; @%p0 bra A;"
        "vote.sync.ballot.b32 %r2, %p0, -1; bra B;\nA: bar.sync 0;\nB: bar.sync 0;",
        "deadlock: .*threads wait in",
    ),
    "mbarrier not initialised": (
        "mbarrier.arrive.shared.b64 _, [sm];",
        "mbarrier not initialised: mbarrier.arrive",
    ),
    "mbarrier that never completes": (
        "mov.u32 %r0, %tid.x; setp.eq.u32 %p0, %r0, 0; @%p0 mbarrier.init.shared.b64 [sm], 2; bar.sync 0;"
        "@%p0 mbarrier.arrive.shared.b64 _, [sm];\nW: mbarrier.try_wait.parity.shared.b64 %p1, [sm], 0;",
        "deadlock: .*64 threads wait in an mbarrier at mbarrier.try_wait",
    ),
    "wgmma without fence": (
        "mov.b64 %q0, 0; setp.eq.b64 %p0, %q0, %q0; mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0;"
        "mov.f32 %f2, %f0; mov.f32 %f3, %f0;"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %q0, %q0, %p0,"
        "1, 1, 0, 0;",
        "wgmma without wgmma.fence: wgmma.mma_async",
    ),
    "trap": ("trap;", "trap: trap"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defect(name):
    body, words = DEFECTS[name]
    memory = np.zeros(64 if "global" not in name or "misaligned" in name else 4, np.float32)
    threads = 128 if "wgmma" in name else 64
    with pytest.raises(PtxError, match=words):
        run(entry(body), [memory], threads=threads, shared=256, max_steps=1000)


GLOBAL_RACES = {
    "between blocks": (
        "mov.u32 %r1, %ctaid.x; st.global.b32 [%q0], %r1;",
        "several threads write different values to one global address",
    ),
    "between blocks, later": (
        "mov.u32 %r1, %ctaid.x; setp.eq.u32 %p0, %r1, 0; @%p0 st.global.b32 [%q1], %r1;"
        "@!%p0 ld.global.b32 %r2, [%q1];",
        "race on global memory .read after write",
    ),
    "third reader in another block": (
        "mov.u32 %r1, %ctaid.x; setp.eq.u32 %p0, %r1, 1; @%p0 ld.global.b32 %r2, [%q0];"
        "@!%p0 ld.global.b32 %r2, [%q0]; bar.sync 0; setp.eq.u32 %p1, %r0, 0; and.pred %p1, %p1, !%p0;"
        "@%p1 st.global.b32 [%q0], %r1;",
        "race on global memory .write after read",
    ),
    "atomic after write": (
        "mov.u32 %r1, %ctaid.x; setp.eq.u32 %p0, %r1, 0; @%p0 st.global.b32 [%q1], %r1;"
        "@!%p0 atom.global.add.u32 %r2, [%q1], 1;",
        "race on global memory .atomic operation after write",
    ),
}


@pytest.mark.parametrize("name", GLOBAL_RACES)
def test_races_between_blocks(name):
    body, words = GLOBAL_RACES[name]
    with pytest.raises(PtxError, match=words):
        run(entry(f"{POINTER} {body}"), [np.zeros(64, np.uint32)], blocks=2)


# ---- a grid in parts ----


@pytest.mark.parametrize("part", [64, 128, 10**6])
@pytest.mark.parametrize("name", GLOBAL_RACES)
def test_races_between_blocks_of_different_parts(name, part, monkeypatch):
    monkeypatch.setattr("tests.ptx.machine.PART", part)
    body, _ = GLOBAL_RACES[name]
    with pytest.raises(PtxError, match=r"race on global memory|several threads write different values"):
        run(entry(f"{POINTER} {body}"), [np.zeros(64, np.uint32)], blocks=5)


def test_races_with_the_first_of_many_parts(monkeypatch):
    """Block 0 writes what block 6 reads, or reads what it writes, and the other way round."""
    monkeypatch.setattr("tests.ptx.machine.PART", 64)
    for first, last, words in (
        (
            "st.global.b32 [%q1], %r1;",
            "ld.global.b32 %r2, [%q1];",
            "read after write, thread 384 after thread 0",
        ),
        (
            "ld.global.b32 %r2, [%q1];",
            "st.global.b32 [%q1], %r1;",
            "write after read, thread 384 after thread 0",
        ),
        ("st.global.b32 [%q1], %r1;", "st.global.b32 [%q1], %r1;", "write after write, thread 384 after"),
    ):
        body = f"""{POINTER} mov.u32 %r1, %ctaid.x; setp.eq.u32 %p0, %r1, 0; setp.eq.u32 %p1, %r1, 6;
@%p0 {first} bar.sync 0; @%p1 {last}"""
        with pytest.raises(PtxError, match=f"race on global memory .{words}"):
            run(entry(body), [np.zeros(64, np.uint32)], blocks=7)


@pytest.mark.parametrize("part", [32, 64, 200, 128, 10**6])
def test_a_grid_in_parts_is_a_grid(part, monkeypatch):
    """Blocks reverse rows through shared memory and read variables of the module."""
    monkeypatch.setattr("tests.ptx.machine.PART", part)
    body = f"""ld.param.b64 %q0, [p]; ld.param.b64 %q1, [o]; mov.u32 %r9, %tid.x;
mov.u32 %r10, %ctaid.x; mov.u32 %r11, %ctaid.y; mov.u32 %r12, %nctaid.x; mad.lo.u32 %r10, %r11, %r12, %r10;
shl.b32 %r13, %r10, 6; add.u32 %r13, %r13, %r9; mul.wide.u32 %q2, %r13, 4; add.s64 %q3, %q0, %q2;
{THREAD} ld.global.b32 %r14, [%q3]; st.shared.b32 [%r2], %r14; bar.sync 0;
xor.b32 %r3, %r1, 252; mov.b32 %r4, sm; add.s32 %r4, %r4, %r3; ld.shared.b32 %r5, [%r4];
ld.const.b32 %r6, [three]; mul.lo.u32 %r5, %r5, %r6; ld.global.b32 %r7, [seven]; add.u32 %r5, %r5, %r7;
add.s64 %q4, %q1, %q2; st.global.b32 [%q4], %r5;"""
    head = ".const .b32 three = 3; .global .b32 seven = 7;"
    data, out = np.arange(15 * 64, dtype=np.uint32), np.zeros(15 * 64, np.uint32)
    module = entry(body, ".param .u64 p, .param .u64 o", head=head)
    run_kernel(module, "f", (5, 3, 1), (64, 1, 1), 256, [data, out])
    np.testing.assert_array_equal(out.reshape(15, 64), data.reshape(15, 64)[:, ::-1] * 3 + 7)


def test_blocks_that_wait_for_one_another_are_one_part(monkeypatch):
    monkeypatch.setattr("tests.ptx.machine.PART", 64)
    data = np.zeros(16, np.uint32)
    run(entry(LAST_BLOCK), [data], blocks=14)
    assert data[1] == 14 * 15 // 2
    test_a_lock_orders_what_it_guards()
    test_a_flag_orders_what_was_written_before_it()


def test_what_is_ordered_is_no_race():
    barrier = (
        f"{THREAD} st.shared.b32 [%r2], %r0; bar.sync 0; xor.b32 %r3, %r1, 128; mov.b32 %r4, sm;"
        "add.s32 %r4, %r4, %r3; ld.shared.b32 %r5, [%r4]; bar.sync 0; st.shared.b32 [%r2], %r5;"
    )
    run(entry(barrier), [np.zeros(1, np.float32)], shared=256)
    same_value = "st.shared.b32 [sm], 7;"
    run(entry(same_value), [np.zeros(1, np.float32)], shared=256)
    warp = barrier.replace("bar.sync 0", "bar.warp.sync -1").replace("%r1, 128", "%r1, 4")
    run(entry(warp), [np.zeros(1, np.float32)], shared=256)


def test_a_shuffle_passes_on_what_a_lane_wrote():
    """Lane 0 alone has the value that all lanes take from it."""
    body = f"""{POINTER} and.b32 %r1, %r0, 31; setp.eq.u32 %p0, %r1, 0; @%p0 mov.u32 %r9, 7;
shfl.sync.idx.b32 %r9, %r9, 0, 31, -1; st.global.b32 [%q1], %r9;"""
    out = np.zeros(64, np.uint32)
    run(entry(body), [out])
    assert (out == 7).all()
    with pytest.raises(PtxError, match=r"register %r9 is used in thread 0, which never wrote it: st.global"):
        run(entry(body.replace("%r9, 0, 31", "%r9, 1, 31")), [out])


def test_a_lock_orders_what_it_guards():
    """Every block adds to a counter under a spin lock with acquire and release."""
    body = """ld.param.b64 %q0, [p]; mov.u32 %r0, %tid.x; setp.ne.u32 %p0, %r0, 0; @%p0 bra END;
TAKE: atom.global.acquire.gpu.cas.b32 %r1, [%q0], 0, 1; setp.ne.u32 %p1, %r1, 0; @%p1 bra TAKE;
ld.global.b32 %r2, [%q0+4]; add.s32 %r2, %r2, 1; st.global.b32 [%q0+4], %r2;
atom.global.release.gpu.exch.b32 %r3, [%q0], 0;
END:"""
    counter = np.zeros(2, np.uint32)
    run(entry(body), [counter], blocks=7)
    assert counter.tolist() == [0, 7]
    with pytest.raises(PtxError, match="race on global memory"):
        run(entry(body.replace("release", "relaxed")), [np.zeros(2, np.uint32)], blocks=7)


LAST_BLOCK = """ld.param.b64 %q0, [p]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r9, %nctaid.x;
setp.ne.u32 %p0, %r0, 0; @%p0 bra END;
mul.wide.u32 %q1, %r1, 4; add.s64 %q1, %q1, %q0; add.s32 %r2, %r1, 1; st.global.b32 [%q1+8], %r2;
membar.gl;
atom.global.add.u32 %r3, [%q0], 1;
membar.gl;
add.s32 %r3, %r3, 1; setp.ne.u32 %p1, %r3, %r9; @%p1 bra END;
mov.u32 %r4, 0; mov.u32 %r5, 0; mov.b64 %q2, %q0;
SUM: ld.global.b32 %r6, [%q2+8]; add.s32 %r4, %r4, %r6; add.s64 %q2, %q2, 4; add.s32 %r5, %r5, 1;
setp.lt.u32 %p2, %r5, %r9; @%p2 bra SUM;
st.global.b32 [%q0+4], %r4;
END:"""


def test_fences_order_what_the_last_block_reads():
    data = np.zeros(8, np.uint32)
    run(entry(LAST_BLOCK), [data], blocks=6)
    assert data[1] == 21
    for text in (LAST_BLOCK.replace("membar.gl;", "", 1), LAST_BLOCK.replace("1;\nmembar.gl;", "1;")):
        with pytest.raises(PtxError, match=r"race on global memory .read after write"):
            run(entry(text), [np.zeros(8, np.uint32)], blocks=6)


def test_a_flag_orders_what_was_written_before_it():
    body = """ld.param.b64 %q0, [p]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x;
setp.ne.u32 %p0, %r0, 0; @%p0 bra END;
setp.ne.u32 %p1, %r1, 1; @%p1 bra READ;
mov.u32 %r2, 5; st.global.b32 [%q0+4], %r2; mov.u32 %r3, 1; st.release.gpu.global.b32 [%q0], %r3; bra END;
READ: ld.acquire.gpu.global.b32 %r4, [%q0]; setp.eq.u32 %p2, %r4, 0; @%p2 bra READ;
ld.global.b32 %r5, [%q0+4]; st.global.b32 [%q0+8], %r5;
END:"""
    data = np.zeros(3, np.uint32)
    run(entry(body), [data], blocks=2)
    assert data.tolist() == [1, 5, 5]
    for strong, weak in (("release", "relaxed"), ("acquire", "relaxed"), ("ld.acquire.gpu", "ld")):
        with pytest.raises(PtxError, match=r"race on global memory .read after write"):
            run(entry(body.replace(strong, weak)), [np.zeros(3, np.uint32)], blocks=2)


def add_one(view: torch.Tensor, count: int) -> Callable[[], None]:
    """Adds 1 to `count` elements, a stride of two floats apart."""
    from tests.ptx import GlobalMemory
    from tests.ptx.triton_driver import add_tensor

    body = (
        "ld.param.b64 %q0, [p]; mov.u32 %r0, %tid.x; mul.wide.u32 %q1, %r0, 8; add.s64 %q1, %q0, %q1;"
        f"setp.lt.u32 %p0, %r0, {count}; @%p0 ld.global.f32 %f0, [%q1];"
        "@%p0 add.f32 %f0, %f0, 0f3F800000; @%p0 st.global.f32 [%q1], %f0;"
    )

    def launch() -> None:
        memory = GlobalMemory()
        add_tensor(memory, view)
        run_kernel(entry(body), "f", (1, 1, 1), (32, 1, 1), 0, [view.data_ptr()], memory)

    return launch


def test_one_element_past_a_view_inside_its_storage():
    storage = torch.zeros(40)
    view = storage[3:23:2]
    add_one(view, 10)()
    assert storage.nonzero().flatten().tolist() == list(range(3, 23, 2))
    with pytest.raises(PtxError, match=r"bytes past the end|are not part of any argument"):
        add_one(view, 11)()


def test_between_the_elements_of_a_view():
    view = torch.zeros(40)[::4]
    with pytest.raises(PtxError, match=r"are not part of any argument: @%p0 ld.global.f32"):
        add_one(view, 5)()


UNSUPPORTED = {
    "opcode": ("fancy.b32 %r0, %r1;", "unsupported instruction: fancy.b32"),
    "modifier": ("add.fancy.s32 %r0, %r1, %r2;", "unsupported modifier or type fancy: add.fancy.s32"),
    "type": ("add.b128 %r0, %r1, %r2;", "unsupported modifier or type b128: add.b128"),
    "directive": (".fancy 3;", "unsupported directive: .fancy 3"),
    "label": ("bra NOWHERE;", "no label NOWHERE: bra NOWHERE"),
    "half barrier": ("bar.sync 1, 32;", "barriers of a part of a block are not supported: bar.sync 1, 32"),
    "call": ("call.uni printf;", "unsupported instruction: call.uni printf"),
    "operand": ("mov.u32 %r0, %smid;", "unknown operand %smid: mov.u32 %r0, %smid"),
    "width": ("mov.b64 %q0, %r0;", r"register %r0 \(b32\) read as b64: mov.b64"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported(name):
    text, words = UNSUPPORTED[name]
    with pytest.raises(PtxError, match=words):
        run(entry(text), [np.zeros(1, np.float32)])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (".func (.param .b32 r) f() { ret; }", "device functions"),
        (".visible .entry f() .fancy 3 { ret; }", "unsupported directive: .fancy 3"),
        (".fancy .b32 x;", "unsupported directive: .fancy .b32 x"),
        (".tex .u64 t;", "unsupported directive"),
        (".visible .entry f() { .reg .b128 %x; ret; }", "unsupported type of a register"),
        (".visible .entry f() { add.s32 ", "a brace is never closed"),
    ],
)
def test_modules_that_are_not_supported(text, words):
    with pytest.raises(PtxError, match=words):
        Module(text)


def test_messages_name_the_source_line(tmp_path: Path):
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    source = tmp_path / "rotate.cu"
    source.write_text(
        """extern "C" __global__ void f(float* p) {
  __shared__ float s[64];
  s[threadIdx.x] = p[threadIdx.x];
  p[threadIdx.x] = s[threadIdx.x ^ 32];
}
"""
    )
    (text,) = compile_ptx([source])
    module = Module(text)
    with pytest.raises(PtxError, match=r"race on shared memory .read after write.*\[rotate.cu:4\]"):
        run(module, [np.zeros(64, np.float32)])
    with pytest.raises(PtxError, match=r"global access out of bounds.*\[rotate.cu:3\]"):
        run(module, [np.zeros(63, np.float32)])


# A jump table

JUMP = """
    ld.param.b64 %q1, [p];
    mov.u32 %r1, %tid.x;
    rem.u32 %r2, %r1, INDEX;
    $targets: .branchtargets $zero, $one, $two;
    brx.idx %r2, $targets;
$zero:
    mov.u32 %r3, 100; bra.uni $end;
$one:
    mov.u32 %r3, 200; bra.uni $end;
$two:
    mov.u32 %r3, 300;
$end:
    mad.wide.u32 %q2, %r1, 4, %q1; st.global.b32 [%q2], %r3;
"""


def test_an_indexed_branch_takes_each_thread_to_its_target():
    result = np.zeros(64, np.uint32)
    run(entry(JUMP.replace("INDEX", "3")), [result])
    assert result.tolist() == [100 * (1 + i % 3) for i in range(64)]


def test_an_indexed_branch_beyond_its_targets():
    with pytest.raises(PtxError, match=r"brx\.idx beyond its 3 targets"):
        run(entry(JUMP.replace("INDEX", "4")), [np.zeros(64, np.uint32)])
