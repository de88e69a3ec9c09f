"""The Triton kernels, as compiled, executed without a GPU.

Here is what every run takes: each kernel in each dtype, and what only this backend has. The whole contract
runs on them too, in parts, as the tests marked `interpreted`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor

from crossvit_kernels import backends, validate, validation
from tests import layouts
from tests.contract import Subject, check, check_against, results, without_a_gpu
from tests.operations import OPERATIONS, CrossAttention, CrossFusion, Size, leaves, relative_error

MODULE = sys.modules["crossvit_kernels.backends"]  # the package's attribute of this name is the function
ATTENTION, FUSION = OPERATIONS
# No size is a multiple of a tile: patches, channels, heads and head widths all leave some of theirs empty.
RAGGED = Size(3, 19, 40, 5, 21, 36, 3)


targets = pytest.mark.parametrize("target", ["sm_80", "sm_90"])


def contract_of(operation: CrossAttention | CrossFusion, target: str, size: Size, dtype: torch.dtype) -> dict:
    """Values and gradients; returns the grid of each kernel."""
    with without_a_gpu(target) as recorder:
        check(Subject(operation, "triton", target), operation.inputs(size, dtype), size)
    return {launch.name: launch.grid for launch in recorder.launches}


# One target a dtype, in turn, for the sake of time: the contract has all of them.
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
@pytest.mark.parametrize(
    ("dtype", "target"),
    [(torch.float32, "sm_80"), (torch.bfloat16, "sm_90"), (torch.float16, "sm_80")],
    ids=str,
)
def test_every_kernel_in_every_dtype(operation, dtype, target):
    grids = contract_of(operation, target, RAGGED, dtype)
    directions = 1 if operation is ATTENTION else 2
    assert len(grids) == (11 if operation is ATTENTION else 15)
    # Whatever grows with the batch is along the first axis: the others end at 65,535.
    assert grids.pop("parameters_backward")[1:] == ((9, 1) if operation is ATTENTION else (34, 1))
    assert {grid[1:] for grid in grids.values()} == {(directions, 1)}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
@pytest.mark.parametrize(
    ("weights", "target"), [(torch.bfloat16, "sm_80"), (torch.float16, "sm_90")], ids=str
)
def test_float32_tokens_with_weights_of_16_bits(operation, weights, target):
    """As under autocast: the error is that of the weights' dtype, which eager has too."""
    subject = Subject(operation, "triton", target)
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


def test_tf32_only_where_it_is_allowed():
    """The products then have 10 bits, and the results show it."""
    subject = Subject(ATTENTION, "triton", "sm_80")
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


def test_everything_at_once():
    """Dropout, scales, the attention and its gradient, tokens with gaps, two tiles of heads."""
    size = Size(2, 33, 24, 12, 18, 40, 5)
    subject, exact = Subject(FUSION, "triton", "sm_90"), Subject(FUSION, "reference")
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
def test_more_than_one_tile_of_everything(size, target):
    contract_of(ATTENTION, target, size, torch.float32)


def test_tokens_that_are_nearly_the_same():
    """As in a trained transformer: gradients of queries and keys are small sums of large terms that cancel.

    Eager is no measure of them: in bfloat16 it is wrong by several times their size.
    """
    size = Size(2, 40, 64, 2)
    tensors = ATTENTION.inputs(size, torch.bfloat16)
    common = torch.randn(64) * 2
    for i in ATTENTION.tokens:
        tensors[i] = (common + tensors[i].float() / 40).bfloat16()
    subject = Subject(ATTENTION, "triton", "sm_90")
    with subject.ready():
        got = results(lambda x: subject.run(x, size), tensors)
    want = results(lambda x: ATTENTION.oracle(x, size)[:1], [x.double() for x in tensors])
    for name, a, b in zip(["output", *ATTENTION.names], got, want, strict=True):
        if b.abs().max() > 1e-9:
            assert relative_error(a, b) < 0.02, name


def test_another_length_or_batch_compiles_nothing():
    with without_a_gpu() as recorder:
        counts = []
        for batch, patches in ((2, 196), (2, 197), (2, 16), (1, 208), (16, 5), (3, 1)):
            tensors = leaves(ATTENTION.inputs(Size(batch, patches, 32, 2), torch.float32))
            (y,) = Subject(ATTENTION, "triton").run(tensors, Size(batch, patches, 32, 2))
            torch.autograd.grad(y.sum(), tensors)
            counts.append(recorder.compilations)
    parts = ["in one part", "in parts"]
    assert len(set(counts[:2])) == 1, f"196 and 197 patches, both {parts[1]}: compiled again"
    assert len(set(counts[2:])) == 1, f"short sequences, all {parts[0]}: compiled again"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is taken before it is written")
def test_offsets_beyond_32_bits():
    """Images, tokens or channels 2^31 elements apart; what lies between is never touched."""
    far, size = 2**31 + 64, Size(2, 2, 16, 2)
    tensors = ATTENTION.inputs(size, torch.bfloat16)
    (want,) = ATTENTION.run(tensors, size, "reference")
    buffer = torch.empty(far + 2**13, dtype=torch.bfloat16)
    with without_a_gpu():
        for strides in ((far, 16, 1), (32, far, 1)):
            view = buffer.as_strided(tensors[1].shape, strides)
            view.copy_(tensors[1])
            (got,) = ATTENTION.run([tensors[0], view, *tensors[2:]], size, "triton")
            assert relative_error(got, want) < 0.05


def test_an_empty_batch_launches_nothing():
    size = Size(0, 5, 24, 3, 6, 16, 2)
    with without_a_gpu() as recorder:
        tensors = leaves(FUSION.inputs(size, torch.float32))
        outputs = Subject(FUSION, "triton").run(tensors, size)
        found = torch.autograd.grad(sum(y.sum() for y in outputs), tensors)
        assert not recorder.launches
    assert all(not g.any() for g in found)


# The choice of the backend


def test_why_it_cannot_be_taken(monkeypatch):
    tensors = ATTENTION.inputs(RAGGED, torch.float32)
    with pytest.raises(RuntimeError, match="triton: it runs on cuda, the tokens are on cpu"):
        ATTENTION.run(tensors, RAGGED, "triton")
    monkeypatch.setattr(MODULE, "_TRITON_ERROR", "Triton is not installed")
    with pytest.raises(RuntimeError, match="triton: Triton is not installed"):
        ATTENTION.run(tensors, RAGGED, "triton")
    assert "triton" in backends()


@pytest.mark.parametrize(
    ("size", "dtype", "words"),
    [
        (Size(1, 3, 1040, 2), torch.float32, "widths up to 1024, got 1040"),
        (Size(1, 3, 130, 65), torch.float32, "up to 64 heads, got 65"),
        (RAGGED, torch.float64, "does not take torch.float64 tokens"),
    ],
)
def test_what_it_does_not_take(size, dtype, words):
    with without_a_gpu(), pytest.raises(RuntimeError, match=words):
        ATTENTION.run(ATTENTION.inputs(size, dtype), size, "triton")


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


def triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that "auto" does not take the CPU's kernels for the tensors, which are on the CPU here."""
    monkeypatch.setattr(MODULE, "_NATIVE_ERROR", "left out for this test")


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_auto_tries_the_kernels_once_and_takes_them(operation, untried, monkeypatch, caplog):
    triton_alone(monkeypatch)
    with without_a_gpu() as recorder:
        got, want = outputs_and_gradients(operation)
        tried = len(recorder.launches)
        again, _ = outputs_and_gradients(operation)
    assert tried > 2 * (len(recorder.launches) - tried) > 0, "the first call tries, the second does not"
    for i, (a, b, c) in enumerate(zip(got, want, again, strict=True)):
        assert torch.equal(a, c)
        if b.abs().max() > 1e-9:
            assert relative_error(a, b) < 1e-5, i
    assert not caplog.records


def without_one_addition(kernel: str) -> Callable[[str, str], str]:
    """Makes the compiled text of a kernel wrong."""

    def rewrite(name: str, ptx: str) -> str:
        if name != kernel:
            return ptx
        wrong = ptx.replace("add.f32", "sub.f32", 1)
        assert wrong != ptx
        return wrong

    return rewrite


@pytest.mark.parametrize(
    ("operation", "kernel"),
    [(ATTENTION, "attend"), (ATTENTION, "attend_backward"), (FUSION, "attend_backward")],
    ids=["cross_attention-attend", "cross_attention-attend_backward", "cross_fusion-attend_backward"],
)
def test_auto_stays_away_from_kernels_that_are_wrong(operation, kernel, untried, monkeypatch, caplog):
    """Of forward or of backward alone; it says so once, and results and gradients are right."""
    triton_alone(monkeypatch)
    with without_a_gpu(rewrite=without_one_addition(kernel)), caplog.at_level(logging.WARNING):
        for _ in range(2):
            got, want = outputs_and_gradients(operation)
            for i, (a, b) in enumerate(zip(got, want, strict=True)):
                if b.abs().max() > 1e-9:
                    assert relative_error(a, b) < 1e-5, i
    (record,) = caplog.records
    assert "does not use Triton in this process but PyTorch's operators" in record.getMessage()


def test_validate(untried):
    what = {"widths": (16,), "num_heads": (2,), "dtype": torch.float32, "device": "cpu"}
    with without_a_gpu() as recorder:
        assert validate("cross_attention", **what, gradients=False) is None
        assert recorder.launches
    validation.forget()
    with without_a_gpu(rewrite=without_one_addition("attend")):
        assert "relative error" in validate("cross_attention", **what, gradients=False)


def test_inference_mode_and_frozen_weights():
    tensors = ATTENTION.inputs(SMALL, torch.float32)
    with without_a_gpu():
        for context in (torch.inference_mode(), torch.no_grad(), nullcontext()):
            with context:
                (y,) = Subject(ATTENTION, "triton").run(tensors, SMALL)
            assert relative_error(y, ATTENTION.oracle([x.double() for x in tensors], SMALL)[0]) < 1e-5


# Defects in the compiled text

SEED = int(os.environ.get("FAULT_SEED", "0"))
DEFECTS = 4  # of each kind, in each of the two kernels over the tokens


@pytest.mark.interpreted
@pytest.mark.parametrize("kernel", ["attend", "attend_backward"])
@targets
def test_defects_of_the_compiled_text_are_noticed(kernel, target):
    """Most of them by the interpreter's checks or by a wrong result; many of the others change nothing."""
    from tests.ptx.formats import PtxError
    from tests.ptx.mutations import OFTEN_HARMLESS, Mutant, sample

    size = Size(2, 37, 40, 5)
    subject = Subject(ATTENTION, "triton", target)
    tensors = ATTENTION.inputs(size, torch.bfloat16)

    def survives(mutant: Mutant | None, max_steps: int) -> bool:
        def rewrite(name: str, ptx: str) -> str:
            return mutant.text if mutant is not None and name == kernel else ptx

        try:
            with without_a_gpu(target, rewrite=rewrite, max_steps=max_steps):
                check(subject, tensors, size)
        except (PtxError, AssertionError):
            return False
        return True

    with without_a_gpu(target) as recorder:
        check(subject, tensors, size)
    launch = next(x for x in recorder.launches if x.name == kernel)
    steps = 2 * max(x.steps for x in recorder.launches)
    assert survives(None, steps)
    chosen = sample(launch.ptx, DEFECTS, SEED)
    left = [m for m in chosen if survives(m, steps)]
    names = "\n".join(m.name for m in left)
    words = f"FAULT_SEED={SEED}: {len(left)} of {len(chosen)} were not noticed:\n{names}"
    telling = [m for m in chosen if m.kind not in OFTEN_HARMLESS]
    assert sum(m.kind not in OFTEN_HARMLESS for m in left) <= 0.25 * len(telling), words
