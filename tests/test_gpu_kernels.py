"""The kernels of GPUs, as compiled, executed without a GPU: Triton's and those of CUDA C++.

Here is what every run takes: each kernel in each dtype. The whole contract runs on them too, in parts, as the
tests marked `sweep`. What only one backend has: test_triton.py, test_cuda.py.
"""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from crossvit_kernels import validation
from tests import layouts
from tests.contract import GPU_BACKENDS, Subject, check, check_against, results, without_a_gpu
from tests.operations import OPERATIONS, CrossAttention, CrossFusion, Size, leaves, relative_error

ATTENTION, FUSION = OPERATIONS
# No size is a multiple of a tile: patches, channels, heads and head widths all leave some of theirs empty.
RAGGED = Size(3, 19, 40, 5, 21, 36, 3)

of_gpu = pytest.mark.parametrize("backend", GPU_BACKENDS)
operations = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
targets = pytest.mark.parametrize("target", ["sm_80", "sm_90"])
# How many kernels compute each operation with its gradients.
KERNELS = {"cuda": (12, 15), "triton": (11, 15)}


def contract_of(subject: Subject, size: Size, dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
    """Values and gradients; returns the grid of each kernel."""
    with without_a_gpu(subject.target, subject.backend) as recorder:
        check(subject, subject.operation.inputs(size, dtype), size)
    return {launch.name: launch.grid for launch in recorder.launches}


# One target a dtype, in turn, for the sake of time: the contract has all of them.
@pytest.mark.each(1)
@of_gpu
@operations
@pytest.mark.parametrize(
    ("dtype", "target"),
    [(torch.float32, "sm_80"), (torch.bfloat16, "sm_90"), (torch.float16, "sm_80")],
    ids=str,
)
def test_every_kernel_in_every_dtype(backend, operation, dtype, target):
    """Whatever grows with the batch is along the first axis of the grid: the others end at 65,535."""
    few = contract_of(Subject(operation, backend, target), RAGGED, dtype)
    assert len(few) == KERNELS[backend][OPERATIONS.index(operation)]
    with without_a_gpu(target, backend) as recorder:
        size = replace(RAGGED, batch=33)
        operation.run(operation.inputs(size, dtype), size, backend)
    assert recorder.launches
    for launch in recorder.launches:
        assert launch.grid[1:] == few[launch.name][1:]


@of_gpu
@operations
@pytest.mark.parametrize(
    ("weights", "target"), [(torch.bfloat16, "sm_80"), (torch.float16, "sm_90")], ids=str
)
def test_float32_tokens_with_weights_of_16_bits(backend, operation, weights, target):
    """As under autocast: the error is that of the weights' dtype, which eager has too."""
    subject = Subject(operation, backend, target)
    exact = Subject(operation, "reference")

    def run(of: Subject, x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=weights):
            return of.run(x, RAGGED)

    with subject.ready():
        check_against(
            subject,
            operation.inputs(RAGGED, torch.float32),
            run=partial(run, subject),
            oracle=lambda x: operation.oracle(x, RAGGED)[: len(operation.outputs)],
            eager=partial(run, exact),
            rounding=weights,
        )


@of_gpu
def test_tf32_only_where_it_is_allowed(backend):
    """The products then have 10 bits, and the results show it."""
    subject = Subject(ATTENTION, backend, "sm_80")
    tensors = ATTENTION.inputs(RAGGED, torch.float32)
    truth = results(lambda x: ATTENTION.oracle(x, RAGGED)[:1], [x.double() for x in tensors])

    def errors() -> list[float]:
        got = results(lambda x: subject.run(x, RAGGED), tensors)
        return [
            relative_error(a, b)
            for i, (a, b) in enumerate(zip(got, truth, strict=True))
            if i - 1 not in ATTENTION.zero_gradients
        ]

    with subject.ready():
        exact = errors()
        before = torch.backends.cuda.matmul.fp32_precision
        try:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            rounded = errors()
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
    assert max(exact) < 1e-5
    assert 1e-5 < max(rounded) < 2e-2


@of_gpu
def test_everything_at_once(backend):
    """Dropout, scales, the attention and its gradient, tokens with gaps, two tiles of heads."""
    size = Size(2, 33, 24, 12, 18, 40, 5)
    subject, exact = Subject(FUSION, backend, "sm_90"), Subject(FUSION, "reference")
    count = len(FUSION.names)
    tensors = FUSION.inputs(size, torch.float32)
    tensors += [torch.rand(2, 1, 40), torch.rand(2, 1, 24)]

    def run(of: Subject, x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        given = [layouts.lay_out(t, layouts.embedded_in_nan) for t in x[:2]]
        scales = (x[count], x[count + 1])
        options = {"dropout_p": 0.3, "return_attention": True, "residual_scales": scales}
        return of.run([*given, *x[2:count]], size, **options)

    with subject.ready():
        got = results(partial(run, subject), tensors)
    want = results(partial(run, exact), [x.double() for x in tensors])
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if i - 4 not in FUSION.zero_gradients:
            assert relative_error(a, b) < 1e-5, i


@of_gpu
@pytest.mark.parametrize("chosen", [0, 1])
def test_the_gradient_of_one_attention_alone(backend, chosen):
    """The fusion returns two; the other one has no gradient."""

    def run(of: Subject, x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (of.run(x, RAGGED, return_attention=True)[2 + chosen],)

    tensors = FUSION.inputs(RAGGED, torch.float32)
    subject, exact = Subject(FUSION, backend, "sm_90"), Subject(FUSION, "reference")
    with subject.ready():
        got = results(partial(run, subject), tensors)
    want = results(partial(run, exact), [x.double() for x in tensors])
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if i - 1 not in FUSION.zero_gradients:
            assert relative_error(a, b) < 1e-5, i


@of_gpu
@targets
@pytest.mark.parametrize(
    "size",
    [
        pytest.param(Size(1, 300, 32, 2), id="an image in parts"),
        pytest.param(Size(1, 20, 48, 12), id="two tiles of heads"),
        pytest.param(Size(2, 3, 88, 4), id="two blocks of channels"),
        pytest.param(Size(70, 2, 16, 2), id="more than one tile of images, of 16 and of 64"),
    ],
)
def test_more_than_one_tile_of_everything(backend, size, target):
    contract_of(Subject(ATTENTION, backend, target), size, torch.float32)


@of_gpu
def test_tokens_that_are_nearly_the_same(backend):
    """As in a trained transformer: gradients of queries and keys are small sums of large terms that cancel.

    Eager is no measure of them: in bfloat16 it is wrong by several times their size.
    """
    size = Size(2, 40, 64, 2)
    tensors = ATTENTION.inputs(size, torch.bfloat16)
    common = torch.randn(64) * 2
    for i in ATTENTION.tokens:
        tensors[i] = (common + tensors[i].float() / 40).bfloat16()
    subject = Subject(ATTENTION, backend, "sm_90")
    with subject.ready():
        got = results(lambda x: subject.run(x, size), tensors)
    want = results(lambda x: ATTENTION.oracle(x, size)[:1], [x.double() for x in tensors])
    for name, a, b in zip(["output", *ATTENTION.names], got, want, strict=True):
        if b.abs().max() > 1e-9:
            assert relative_error(a, b) < 0.02, name


@of_gpu
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is taken before it is written")
def test_offsets_beyond_32_bits(backend):
    """Images, tokens or channels 2^31 elements apart; what lies between is never touched."""
    far, size = 2**31 + 64, Size(2, 2, 16, 2)
    tensors = ATTENTION.inputs(size, torch.bfloat16)
    (want,) = ATTENTION.run(tensors, size, "reference")
    buffer = torch.empty(far + 2**13, dtype=torch.bfloat16)
    with without_a_gpu("sm_80", backend):
        for strides in ((far, 16, 1), (32, far, 1)):
            view = buffer.as_strided(tensors[1].shape, strides)
            view.copy_(tensors[1])
            (got,) = ATTENTION.run([tensors[0], view, *tensors[2:]], size, backend)
            assert relative_error(got, want) < 0.05


@of_gpu
def test_an_empty_batch_launches_nothing(backend):
    size = Size(0, 5, 24, 3, 6, 16, 2)
    with without_a_gpu("sm_80", backend) as recorder:
        tensors = leaves(FUSION.inputs(size, torch.float32))
        outputs = Subject(FUSION, backend).run(tensors, size)
        found = torch.autograd.grad(sum(y.sum() for y in outputs), tensors)
        assert not recorder.launches
    assert all(not g.any() for g in found)


@of_gpu
@pytest.mark.parametrize(
    ("size", "dtype", "words"),
    [
        (Size(1, 3, 1040, 2), torch.float32, "widths up to 1024, got 1040"),
        (Size(1, 3, 130, 65), torch.float32, "up to 64 heads, got 65"),
        (RAGGED, torch.float64, "does not take torch.float64 tokens"),
    ],
)
def test_what_it_does_not_take(backend, size, dtype, words):
    with without_a_gpu("sm_80", backend), pytest.raises(RuntimeError, match=words):
        ATTENTION.run(ATTENTION.inputs(size, dtype), size, backend)


@pytest.fixture
def untried():
    validation.forget()
    yield
    validation.forget()


SMALL = Size(2, 7, 16, 2, 5, 16, 2)


def outputs_and_gradients(operation: CrossAttention | CrossFusion) -> tuple[list[Tensor], list[Tensor]]:
    """With the backend "auto", and of the definition in float64."""
    torch.manual_seed(2)
    tensors = operation.inputs(SMALL, torch.float32)

    def run(backend: str, x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return operation.run(x, SMALL, backend, dropout_p=0.2, return_attention=True)

    return (
        results(partial(run, "auto"), tensors),
        results(partial(run, "reference"), [x.double() for x in tensors]),
    )


@of_gpu
@operations
def test_auto_tries_the_kernels_once_and_takes_them(backend, operation, untried, caplog):
    with without_a_gpu("sm_80", backend) as recorder:
        got, want = outputs_and_gradients(operation)
        tried = len(recorder.launches)
        again, _ = outputs_and_gradients(operation)
    assert tried > 2 * (len(recorder.launches) - tried) > 0, "the first call tries, the second does not"
    for i, (a, b, c) in enumerate(zip(got, want, again, strict=True)):
        assert torch.equal(a, c)
        if b.abs().max() > 1e-9:
            assert relative_error(a, b) < 1e-5, i
    assert not caplog.records


@pytest.mark.parametrize("first", GPU_BACKENDS)
def test_the_other_one_goes_on_in_backward(first):
    """Both leave the same for it."""
    (second,) = (name for name in GPU_BACKENDS if name != first)
    op = sys.modules["crossvit_kernels.cross_fusion.op"]
    engine = op.engine

    def run(backend: str, x: Sequence[Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        outputs = FUSION.run(x, RAGGED, backend, dropout_p=0.2, return_attention=True)
        with mock.patch.object(op, "engine", return_value=engine(second)):
            return list(torch.autograd.grad(outputs, x, [y.detach() for y in outputs]))

    tensors = FUSION.inputs(RAGGED, torch.float32)
    with without_a_gpu("sm_80", first), without_a_gpu("sm_80", second):
        got = run(first, leaves(tensors))
    want = run("reference", leaves(tensors, torch.float64))
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if i not in FUSION.zero_gradients:
            assert relative_error(a, b) < 1e-5, i


@of_gpu
def test_inference_mode_and_frozen_weights(backend):
    tensors = ATTENTION.inputs(SMALL, torch.float32)
    with without_a_gpu("sm_80", backend):
        for context in (torch.inference_mode(), torch.no_grad(), nullcontext()):
            with context:
                (y,) = Subject(ATTENTION, backend).run(tensors, SMALL)
            assert relative_error(y, ATTENTION.oracle([x.double() for x in tensors], SMALL)[0]) < 1e-5


# Defects in the compiled text

DRAW = 0  # the same in each run: the shares below are those that this draw was seen to keep
DEFECTS = 4  # of each kind, in each of the two kernels over the tokens
# The share that may be missed. In CUDA rows and lanes are unrolled, and those of an absent head or of absent
# the channels whose error is below that of bfloat16 but not of float32, sizes that agree at these widths.
# the channels whose error is below bfloat16's but not float32's, sizes that agree at these widths.
UNNOTICED = {"cuda": 0.5, "triton": 0.25}


def keys(lines: Iterable[str]) -> list[tuple[str, int]]:
    """The beginning of each instruction, by which it is found again in another listing: its registers are
    its own. Without registers, as those of barriers, the how manieth it is that begins so."""
    found, seen = [], Counter[str]()
    for line in lines:
        code = re.sub(r" \[[\w.]+:\d+.*", "", line)  # without its place in the source
        words = " ".join(code.split(";")[0].split())[:95]
        found.append((words, 0 if "%" in words else seen[words]))
        seen[words] += 1
    return found


@contextmanager
def collecting_executed(kernel: str) -> Iterator[set[tuple[str, int]]]:
    """The keys of instructions of a kernel that any thread executes meanwhile."""
    from tests.ptx.machine import Machine

    found: set[tuple[str, int]] = set()
    original = Machine._active
    # Of each machine: the keys of its code, and those of the steps that it has run, by their identity.
    seen: dict[Machine, tuple[list[tuple[str, int]], dict[int, tuple[str, int]]]] = {}

    def active(self: Machine, step: Any, mask: Any) -> Any:
        if re.search(rf"(?<![a-z_]){kernel}(_kernel|$)", self.kernel.name):
            if self not in seen:
                seen[self] = keys(instruction.line for instruction in self.kernel.code), {}
            of_code, of_steps = seen[self]
            if id(step) not in of_steps:
                of_steps |= {id(s): of_code[place] for place, s in self.code.items()}
            found.add(of_steps[id(step)])
        return original(self, step, mask)

    with mock.patch.object(Machine, "_active", active):
        yield found


@pytest.mark.sweep
@of_gpu
@pytest.mark.parametrize("kernel", ["attend", "attend_backward"])
@targets
def test_defects_of_the_compiled_text_are_noticed(backend, kernel, target, monkeypatch):
    """Most of them by the interpreter's checks or by a wrong result; many of the others change nothing."""
    from tests.ptx import host_library, triton_driver
    from tests.ptx.formats import PtxError
    from tests.ptx.mutations import KINDS, OFTEN_HARMLESS, Mutant, mutants

    # On a GPU of one multiprocessor, so that a block has several tiles.
    for properties in (triton_driver.PROPERTIES, host_library.DEVICES):
        for capability, (shared, _) in properties.items():
            monkeypatch.setitem(properties, capability, (shared, 1))
    size = Size(2, 37, 56, 7)  # channels for every warp, a head too few
    subject = Subject(ATTENTION, backend, target)
    tensors = ATTENTION.inputs(size, torch.bfloat16)

    def survives(mutant: Mutant | None, max_steps: int) -> bool:
        def rewrite(name: str, ptx: str) -> str:
            # Of the variants of a kernel, the one that is launched.
            return mutant.text if mutant is not None and ptx == launch.ptx else ptx

        try:
            with without_a_gpu(target, backend, rewrite=rewrite, max_steps=max_steps):
                check(subject, tensors, size)
        except (PtxError, AssertionError):
            return False
        return True

    with without_a_gpu(target, backend) as recorder, collecting_executed(kernel) as executed:
        check(subject, tensors, size)
    launch = next(x for x in recorder.launches if x.name == kernel)
    steps = 2 * max(x.steps for x in recorder.launches)
    assert survives(None, steps)
    of_line = keys(launch.ptx.split("\n"))
    possible = [m for m in mutants(launch.ptx) if of_line[m.line - 1] in executed]
    by_kind = ([m for m in possible if m.kind == kind] for kind in KINDS)
    draw = random.Random(DRAW)
    chosen = [m for some in by_kind for m in draw.sample(some, min(DEFECTS, len(some)))]
    assert chosen
    left = [m for m in chosen if survives(m, steps)]
    names = "\n".join(m.name for m in left)
    words = f"{len(left)} of {len(chosen)} were not noticed:\n{names}"
    telling = [m for m in chosen if m.kind not in OFTEN_HARMLESS]
    assert sum(m.kind not in OFTEN_HARMLESS for m in left) <= UNNOTICED[backend] * len(telling), words
