"""Programs of the compiled module: what is written, how it runs, what is refused; the fingerprint."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from crossvit_kernels import native
from crossvit_kernels.linear.packed import PackedLinear
from crossvit_kernels.patch_embed.native import copy_step
from crossvit_kernels.program import Activation, Base, Kind, Place, Precision, Program, rows_of, run
from tests.contract import needs_module
from tests.operations import relative_error
from tests.test_native import isas

pytestmark = needs_module
THREADS = (1, 2, 3, 8)


def image_rows(base: Base, channels: int, rows: int) -> Place:
    """Of the input or the output: images of float32 rows, one behind the other."""
    return Place(base, 0, torch.float32, 4 * channels, of_image=4 * channels * rows)


# What is written


def test_records_are_kind_count_and_words():
    program = Program()
    program.images()
    program.add(Kind.LINEAR, (7, -1, 2**62))
    program.batch()
    assert struct.unpack("9q", program.packed()) == (0, 0, 2, 3, 7, -1, 2**62, 1, 0)


def test_places_of_tensors():
    x = torch.zeros(5, 4, 16, dtype=torch.bfloat16)[1:, ::2, 3:9]
    place = rows_of(x)
    assert place.words() == [Base.FIXED, x.data_ptr(), 4 * 16 * 2, 0, 2 * 16 * 2, 1]
    assert place.row(1).words() == rows_of(x[:, 1:]).words()
    assert rows_of(x[0]).of_image == 0


# How it runs


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("images", [0, 1, 2, 3, 9])
def test_steps_run_in_order_on_every_image_and_on_no_other(images, threads):
    """Two copies, the second over a part of the first: each result has both, in that order."""
    x = torch.randn(images, 3, 5)
    constant = torch.full((1, 5), 7.0)
    y = torch.full((images + 2, 3, 5), float("nan"))
    source, out = image_rows(Base.INPUT, 5, 3), image_rows(Base.OUTPUT, 5, 3)
    for mode in (Program.images, Program.batch):
        program = Program()
        mode(program)
        program.add(Kind.COPY, copy_step(source, out, 3, 5))
        program.add(Kind.COPY, copy_step(rows_of(constant), out.row(1), 1, 5))
        y.fill_(float("nan"))
        run(program.packed(), images, x.data_ptr(), y[1:].data_ptr(), threads)
        assert torch.equal(y[1:-1, 0::2], x[:, 0::2])
        assert (y[1:-1, 1] == 7).all()
        assert y[0].isnan().all()
        assert y[-1].isnan().all()


@pytest.mark.parametrize("threads", THREADS)
def test_what_passes_between_steps_is_of_one_image(threads):
    """In segments of images, a worker has memory for one of them only."""
    x, y = torch.randn(7, 4, 6), torch.empty(7, 4, 6)
    between = torch.full((threads, 4, 6), float("nan"), dtype=torch.bfloat16)
    place = Place(Base.FIXED, between.data_ptr(), torch.bfloat16, 12, of_worker=48)
    program = Program()
    program.images()
    program.add(Kind.COPY, copy_step(image_rows(Base.INPUT, 6, 4), place, 4, 6))
    program.add(Kind.COPY, copy_step(place, image_rows(Base.OUTPUT, 6, 4), 4, 6))
    run(program.packed(), 7, x.data_ptr(), y.data_ptr(), threads)
    assert torch.equal(y, x.bfloat16().float())


@pytest.mark.parametrize("isa", isas())
def test_a_batch_of_one_row_each_is_one_product(isa):
    """A linear layer behind `batch` takes a row of every image; bits are those of any number of threads."""
    torch.manual_seed(1)
    x, residual = torch.randn(9, 2, 50), torch.randn(9, 2, 33)
    weight, bias = torch.randn(33, 50, dtype=torch.float64) / 7, torch.randn(33, dtype=torch.float64)
    want = torch.relu(x[:, 1].double() @ weight.T + bias) + residual[:, 0].double()
    with native.use_isa(isa):
        packed = PackedLinear(weight, bias)
        results = []
        for threads in THREADS:
            y = torch.full((9, 33), float("nan"))
            out = Place(Base.FIXED, y.data_ptr(), torch.float32, 4 * 33, of_image=4 * 33)
            program = Program()
            program.batch()
            step = packed.step(rows_of(x[:, 1:]), out, 1, Activation.RELU, residual=rows_of(residual))
            program.add(Kind.LINEAR, step)
            run(program.packed(), 9, threads=threads)
            results.append(y)
    assert relative_error(results[0], want) < 1e-6
    assert all(torch.equal(y, results[0]) for y in results)


def test_a_program_without_steps():
    run(b"", 3)
    program = Program()
    program.images()
    program.batch()
    run(program.packed(), 3, threads=2)


# What is refused


def test_dtypes_that_the_module_does_not_know():
    with pytest.raises(KeyError, match="float64"):
        rows_of(torch.zeros(2, 3, dtype=torch.float64)).words()


@pytest.mark.parametrize("name", ["mmx", "", "AVX2"])
def test_instruction_sets_that_are_not_there(name):
    module = native.load()
    for call in (
        lambda: module.use_isa(name),
        lambda: module.packed_weight_words(name, 1, 1, 0),
        lambda: module.pack_weight(name, 0, 0, 0, 1, 1, 0, 1, 0),
    ):
        with pytest.raises(ValueError, match=rf"isa must be auto or one that .* \(.*baseline\), got {name}"):
            call()


@pytest.mark.parametrize(
    ("weight", "bias"), [((4,), None), ((4, 5), 3), ((4, 5, 6), None)], ids=["1-d", "bias", "3-d"]
)
def test_weights_that_are_no_matrix_or_do_not_fit(weight, bias):
    with pytest.raises((ValueError, RuntimeError), match=r"expected 2|must match"):
        PackedLinear(torch.zeros(weight), None if bias is None else torch.zeros(bias))


@pytest.mark.parametrize("precision", Precision)
def test_packed_weights_do_not_depend_on_how_they_lie(precision):
    weight = torch.randn(33, 50)
    bias = torch.randn(33)
    want = PackedLinear(weight, bias, precision=precision)
    for other in (weight.T.contiguous().T, torch.randn(66, 70)[::2, 10:60].copy_(weight)):
        got = PackedLinear(other, bias, precision=precision)
        assert torch.equal(got.words, want.words)
        assert torch.equal(got.bias, want.bias)


# The fingerprint


def fingerprint(*tensors: Tensor) -> int:
    regions = torch.tensor([(x.data_ptr(), x.nbytes) for x in tensors], dtype=torch.int64).reshape(-1, 2)
    return native.load().fingerprint(regions.data_ptr(), len(regions))


def bump(x: Tensor, at: int) -> None:
    """Another value, by its bits."""
    x.view(torch.int16 if x.element_size() == 2 else torch.int32)[at] += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_first_element_of_every_4_kib_and_the_last_are_seen(dtype):
    """And no other one, so that a gigabyte of weights is looked at in less than a millisecond."""
    of_page = 4096 // torch.empty(0, dtype=dtype).element_size()
    x = torch.randn(3 * of_page + 77).to(dtype)
    neighbours = torch.randn(10), torch.randn(4 * of_page).to(dtype)
    seen = (0, of_page, 2 * of_page, 3 * of_page, len(x) - 1)
    before = fingerprint(neighbours[0], x, neighbours[1])
    assert fingerprint(neighbours[0], x, neighbours[1]) == before
    for at in seen:
        bump(x, at)
        assert fingerprint(neighbours[0], x, neighbours[1]) != before, at
        bump(x, at)  # not back: one and one more
        before = fingerprint(neighbours[0], x, neighbours[1])
    for at in (2, of_page - 1, of_page + 2, 2 * of_page + of_page // 2, len(x) - 3):
        bump(x, at)
        assert fingerprint(neighbours[0], x, neighbours[1]) == before, at


@pytest.mark.parametrize("length", [1, 2, 3, 1023, 1024, 1025, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_of_tensors_of_any_length(length, dtype):
    """Nothing behind the last element is read into it."""
    wide = torch.randn(length + 2).to(dtype)
    x = wide[1:-1]
    before = fingerprint(x)
    bump(wide, 0)
    bump(wide, -1)
    assert fingerprint(x) == before
    for at in (0, -1):
        bump(x, at)
        assert fingerprint(x) != before
        before = fingerprint(x)


def test_what_moves_is_seen():
    """Elements, pages or tensors that change places."""
    a, b = torch.randn(3000), torch.randn(3000)
    before = fingerprint(a, b)
    assert fingerprint(b, a) != before
    assert fingerprint(a) != before
    a[[0, 1024]] = a[[1024, 0]].clone()
    assert fingerprint(a, b) != before


def test_a_sign_is_seen():
    x = torch.zeros(5)
    before = fingerprint(x)
    x[0] = -0.0
    assert fingerprint(x) != before
