"""Triton kernels, compiled for two compute capabilities and run as PTX, against torch; and the driver.

Kernels run on a GPU too where there is one: what the interpreter is held to must hold there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from tests.ptx import PtxError  # noqa: E402
from tests.ptx import tutorial_kernels as tutorial  # noqa: E402
from tests.ptx.asynchronous import TensorMap  # noqa: E402
from tests.ptx.triton_driver import Recorder, interpreted  # noqa: E402

both = pytest.mark.parametrize("capability", [80, 90])
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"
)
everywhere = pytest.mark.parametrize(
    "where", [80, 90, pytest.param("cuda", marks=needs_gpu, id="on_the_gpu")]
)


@contextmanager
def running(where: int | str) -> Iterator[Recorder | None]:
    """On the interpreter for a compute capability, or on a GPU, as are the tensors made within."""
    if where == "cuda":
        with torch.device(where):
            yield None
    else:
        with interpreted(where) as recorder:
            yield recorder


@everywhere
@pytest.mark.parametrize(
    "case",
    [
        tutorial.vector_add,
        tutorial.softmax,
        tutorial.layer_norm,
        tutorial.attention,
        tutorial.histogram,
        tutorial.dropout,
        tutorial.gelu,
    ],
    ids=lambda case: case.__name__,
)
def test_kernel(where, case):
    with running(where):
        case()


@everywhere
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.bfloat16, "tf32"),
        (torch.float16, "tf32"),
        (torch.float32, "tf32"),
        (torch.float32, "tf32x3"),
        (torch.float32, "ieee"),
    ],
    ids=str,
)
def test_matmul(where, dtype, precision, stages):
    with running(where):
        tutorial.matmul(dtype, precision, stages)


@everywhere
@pytest.mark.parametrize("tile", [(16, 64, 32), (64, 128, 64), (128, 32, 32)], ids=str)
def test_layouts_of_matmul(where, tile):
    with running(where):
        tutorial.matmul(shape=(80, 136, 96), tile=tile)


@triton.jit
def scale_kernel(pair, out, n, factor, enabled, extra, BLOCK: tl.constexpr):
    """Takes a tuple of a tensor and its stride, and a tensor that may be None."""
    at = tl.arange(0, BLOCK)
    value = tl.load(pair[0] + at * pair[1], mask=at < n)
    if extra is not None:
        value += tl.load(extra + at, mask=at < n)
    if enabled:
        value *= factor
    tl.store(out + at, value, mask=at < n)


@everywhere
@pytest.mark.parametrize("with_extra", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_arguments_of_every_kind(where, with_extra, enabled):
    with running(where) as recorder:
        x, out = torch.randn(50, 3)[:, 1], torch.full((50,), float("nan"))
        extra = torch.randn(50) if with_extra else None
        scale_kernel[(1,)]((x, x.stride(0)), out, 50, 2.5, enabled, extra, BLOCK=64)
    want = x + extra if with_extra else x
    assert torch.equal(out, want * 2.5 if enabled else want)
    if recorder is not None:
        launches = [(launch.name, launch.grid, launch.num_warps) for launch in recorder.launches]
        assert launches == [("scale_kernel", (1, 1, 1), 4)]


def test_compilations_are_those_of_triton():
    def launch(n: int, shift: int = 0) -> None:
        x = torch.zeros(n + shift)[shift:]
        tutorial.vector_add_kernel[(1,)](x, x, torch.zeros(n), n, BLOCK=256)

    with interpreted() as recorder:
        launch(160)
        launch(160)
        assert recorder.compilations == 1
        launch(176)  # divisible by 16 too
        assert recorder.compilations == 1
        launch(161)
        assert recorder.compilations == 2
        launch(1)  # a constant
        assert recorder.compilations == 3
        launch(160, shift=1)  # the address is not divisible by 16
        assert recorder.compilations == 4
    assert len(recorder.launches) == 6
    assert len({launch.hash for launch in recorder.launches}) == 4


def test_a_grid_without_blocks_launches_nothing():
    x = torch.zeros(16)
    with interpreted() as recorder:
        tutorial.vector_add_kernel[(0,)](x, x, x, 16, BLOCK=256)
    assert recorder.launches == []


def test_rewritten_ptx_is_what_runs():
    seen = []

    def rewrite(name: str, ptx: str) -> str:
        seen.append(name)
        return ptx.replace("add.f32", "sub.f32")

    x, y, out = torch.randn(100), torch.randn(100), torch.zeros(100)
    with interpreted(rewrite=rewrite):
        tutorial.vector_add_kernel[(1,)](x, y, out, 100, BLOCK=128)
    assert seen == ["vector_add_kernel"]
    assert torch.equal(out, x - y)


def test_contexts_nest_and_end():
    with interpreted(80) as outer:
        with interpreted(90) as inner:
            tutorial.vector_add()
        tutorial.vector_add()
    assert [launch.ptx.split(".target ")[1][:5] for launch in (*outer.launches, *inner.launches)] == [
        "sm_80",
        "sm_90",
    ]
    assert not torch.cuda.is_initialized()


def test_several_threads_may_launch():
    errors = []

    def work() -> None:
        try:
            for _ in range(3):
                tutorial.vector_add()
        except BaseException as error:
            errors.append(error)

    with interpreted() as recorder:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    assert len(recorder.launches) == 12


@triton.jit
def gather_kernel(addresses, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    source = tl.load(addresses).to(tl.pointer_type(tl.float32))
    tl.store(out + at, tl.load(source + at))


def test_addresses_in_memory_need_registered_tensors():
    x, out = torch.randn(32), torch.zeros(32)
    addresses = torch.tensor([x.data_ptr()])
    with interpreted() as recorder:
        with pytest.raises(PtxError, match="out of bounds"):
            gather_kernel[(1,)](addresses, out, BLOCK=32)
        recorder.register(x)
        gather_kernel[(1,)](addresses, out, BLOCK=32)
    assert torch.equal(out, x)


@triton.jit
def transpose_kernel(source, target, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    target.store([column, row], source.load([row, column]).T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("tile", [(16, 32), (32, 64), (64, 128)], ids=str)
def test_descriptors_made_on_the_host(dtype, tile):
    """Of a part of a larger tensor, with tiles beyond its edge: zeros are read there, nothing is written."""
    rows, columns = tile
    whole = torch.randint(-100, 100, (80, 160)).to(dtype)
    source, target = whole[:70, :144], torch.full((160, 80), 77).to(dtype)
    with interpreted(90) as recorder:
        transpose_kernel[-(-70 // rows), -(-144 // columns)](
            TensorDescriptor.from_tensor(source, [rows, columns]),
            TensorDescriptor.from_tensor(target[:150, :72], [columns, rows]),
            *tile,
        )
    assert torch.equal(target[:144, :70], source.T)
    reached = min(150, -(-144 // columns) * columns)
    assert not target[144:reached, :72].any()
    assert not target[:144, 70:72].any()
    assert (target[reached:] == 77).all()
    assert (target[:, 72:] == 77).all()
    assert "cp.async.bulk.tensor" in recorder.launches[0].ptx


def test_descriptors_whose_tensor_is_too_short():
    """The driver would not know it either: what is read beyond the tensor is an error here."""
    source, target = torch.zeros(32, 32), torch.zeros(32, 32)
    long = TensorDescriptor(source, [64, 32], [32, 1], [32, 32])
    with interpreted(90), pytest.raises(PtxError, match="out of bounds"):
        transpose_kernel[2, 1](long, TensorDescriptor.from_tensor(target, [32, 32]), 32, 32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"address": 8}, "multiples of 16 bytes"),
        ({"strides": (36, 1)}, "multiples of 16 bytes"),
        ({"strides": (64, 2)}, "multiples of 16 bytes"),
        ({"box": (257, 64)}, "cannot have a box"),
        ({"box": (16, 4)}, "cannot have a box"),
    ],
)
def test_tensor_maps_that_the_driver_refuses(arguments, words):
    good = {
        "address": 1024,
        "element": 10,
        "swizzle": 3,
        "box": (16, 64),
        "shape": (70, 64),
        "strides": (64, 1),
    }
    assert len(TensorMap.tiled(**good)) == 128
    with pytest.raises(PtxError, match=words):
        TensorMap.tiled(**{**good, **arguments})


def test_clusters_are_refused():
    x = torch.zeros(16)
    with interpreted(90), pytest.raises(PtxError, match="cluster"):
        tutorial.vector_add_kernel[(1,)](x, x, x, 16, BLOCK=256, num_ctas=2)
