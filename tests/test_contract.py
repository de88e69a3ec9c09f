"""The contract of every backend of the cross-attention and of the fusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crossvit_kernels import native
from crossvit_kernels.measure import peak_bytes
from tests import layouts
from tests.contract import (
    DEFAULT,
    LOW,
    SUBJECTS,
    Subject,
    all_subjects,
    check,
    check_against,
    gradients,
    native_subjects,
    results,
    subjects,
)
from tests.operations import Size, Spread, leaves, relative_error

# Values and gradients


@pytest.mark.parametrize(
    ("subject", "size"),
    [
        pytest.param(subject, size, id=f"{subject}-{i}")
        for subject in SUBJECTS
        for i, size in enumerate(subject.operation.sizes)
    ],
    indirect=["subject"],
)
def test_equals_multi_head_attention(subject, size):
    # Products of float32 do not run on tensor cores: wide ones take minutes to interpret.
    wide = subject.interpreted and max(size.width, size.other_width) > 128
    dtype = torch.bfloat16 if wide else subject.exact
    check(subject, subject.operation.inputs(size, dtype), size)


@all_subjects
@pytest.mark.parametrize("sharpness", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_structured_inputs(subject, sharpness, mean):
    """Large means, an outlier channel, constant rows, scores up to some 1e4."""
    tensors = subject.operation.inputs(DEFAULT, subject.exact, Spread(mean, 2.0, sharpness))
    for i in subject.operation.tokens:
        if tensors[i].shape[1] > 3:
            tensors[i][:, :, 5] *= 30
            tensors[i][:, 3] = 2.5  # its variance is zero
    check(subject, tensors, DEFAULT, saturated=sharpness > 1)


@all_subjects
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    "kind",
    ["plain", "mean of 30 deviations", "outlier channel", "sharp scores", "large", "nearly the same tokens"],
)
def test_low_precision_is_as_good_as_eager(subject, dtype, kind):
    spread = {
        "mean of 30 deviations": Spread(mean=60.0),
        "sharp scores": Spread(sharpness=3.0),
        "large": Spread(deviation=3000.0),
    }
    size = Size(4, 196, 192, 6, 100, 96, 3)
    tensors = subject.operation.inputs(size, dtype, spread.get(kind, Spread()))
    if kind == "outlier channel":
        for i in subject.operation.tokens:
            if tensors[i].shape[1] > 1:
                tensors[i][:, :, 11] *= 30
    if kind == "nearly the same tokens":
        # What they have in common must not come back multiplied by sums that are zero but for rounding.
        for i in subject.operation.tokens:
            x = tensors[i].double()
            tensors[i] = (torch.randn(1, 1, x.shape[2], dtype=x.dtype) * 2 + x / 40).to(dtype)
    check(subject, tensors, size, saturated=kind == "sharp scores")


@native_subjects
def test_huge_constant_rows(subject):
    """0 - mean overflows in the padding of a vector, and must not come near what counts."""
    size = Size(2, 5, 20, 4, 6, 21, 3)
    tensors = subject.operation.inputs(size, torch.float32)
    for i in subject.operation.tokens:
        tensors[i].fill_(3e36)
    assert all(torch.isfinite(y).all() for y in subject.run(tensors, size))


@native_subjects
def test_any_instruction_set_goes_on_where_another_stopped(subject):
    size = Size(2, 30, 20, 5, 11, 33, 3)
    tensors = leaves(subject.operation.inputs(size, torch.float32))
    want = gradients(subject.run(tensors, size), tensors)
    outputs = subject.run(tensors, size)
    with native.use_isa("baseline"):
        got = gradients(outputs, tensors)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(got, want, strict=True))


@native_subjects
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e4])
def test_low_precision_is_storage_only(subject, dtype, scale):
    """All results are the bits of the float32 ones, rounded as torch rounds: subnormals and overflow too."""
    tensors = subject.operation.inputs(DEFAULT, dtype)
    for i, name in enumerate(subject.operation.names):
        if i in subject.operation.tokens or name.endswith(("wo", "bo", "back_weight")):
            tensors[i] = tensors[i] * scale

    def outputs_and_gradients(x: Sequence[Tensor]) -> list[Tensor]:
        ins = leaves(x)
        outputs = subject.run(ins, DEFAULT)
        ones = [torch.ones_like(y) for y in outputs]
        return [*outputs, *torch.autograd.grad(outputs, ins, ones)]

    low, full = outputs_and_gradients(tensors), outputs_and_gradients([x.float() for x in tensors])
    for got, want in zip(low, full, strict=True):
        assert got.dtype == dtype
        assert torch.equal(got.nan_to_num(nan=1.0), want.to(dtype).nan_to_num(nan=1.0))


@all_subjects
def test_the_attention(subject):
    """It and the gradients through it, against multi-head attention and the definition in the same dtype."""
    tensors = subject.operation.inputs(DEFAULT, subject.exact)
    definition = Subject(subject.operation, "reference")
    check_against(
        subject,
        tensors,
        run=lambda x: subject.run(x, DEFAULT, return_attention=True),
        oracle=lambda x: subject.operation.oracle(x, DEFAULT),
        eager=lambda x: definition.run(x, DEFAULT, return_attention=True),
    )
    count = len(subject.operation.outputs)
    check_against(
        subject,
        tensors,
        run=lambda x: subject.run(x, DEFAULT, return_attention=True)[count:],
        oracle=lambda x: subject.operation.oracle(x, DEFAULT)[count:],
        eager=lambda x: definition.run(x, DEFAULT, return_attention=True)[count:],
    )


@all_subjects
def test_another_eps(subject):
    tensors = subject.operation.inputs(DEFAULT, subject.exact, Spread(deviation=0.1))
    (got, *_), (want, *_), (other, *_) = (
        subject.run(tensors, DEFAULT, eps=0.1),
        subject.operation.oracle([x.double() for x in tensors], DEFAULT, eps=0.1),
        subject.operation.oracle([x.double() for x in tensors], DEFAULT),
    )
    assert relative_error(got, want) < 1e-6
    assert relative_error(other, want) > 1e-3
    (got, *_), (want, *_) = (
        subject.run(tensors, DEFAULT, eps=0.0),
        subject.operation.oracle([x.double() for x in tensors], DEFAULT, eps=0.0),
    )
    assert relative_error(got, want) < 1e-6


@all_subjects
def test_the_gradient_of_each_tensor_alone(subject):
    """What is not asked for is not computed; what is, comes out the same."""
    tensors = subject.operation.inputs(DEFAULT, subject.exact)
    trained = leaves(tensors)
    every = gradients(subject.run(trained, DEFAULT), trained)
    for i, want in enumerate(every):
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(tensors)]
        (got,) = gradients(subject.run(alone, DEFAULT), [alone[i]])
        if subject.native:
            assert torch.equal(got, want), subject.operation.names[i]
        else:
            tolerance = 1e-9 if got.dtype == torch.float64 else 1e-5
            assert torch.allclose(got, want, rtol=tolerance, atol=tolerance), subject.operation.names[i]


@all_subjects
@pytest.mark.parametrize("kind", ["bq", "bk", "bv", "bo", "bias"])
def test_biases_may_be_absent(subject, kind):
    """As zeros would be: values, gradients of the others, and none for what is not there."""
    tensors = subject.operation.inputs(DEFAULT, subject.exact)
    absent = [i for i, name in enumerate(subject.operation.names) if name.endswith(kind)]
    assert absent
    for i in absent:
        tensors[i].zero_()
    want = results(lambda x: subject.run(x, DEFAULT), tensors)

    def without(x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return subject.run([None if i in absent else t for i, t in enumerate(x)], DEFAULT)

    got = results(without, tensors)
    count = len(subject.operation.outputs)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if i - count in absent:
            assert not a.any()
        else:
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@all_subjects
def test_residual_scale(subject):
    """[B] and [B, 1, C], with the gradient of the scale, against the definition with the scale outside."""
    operation, dtype = subject.operation, subject.exact
    tensors = operation.inputs(DEFAULT, dtype)
    exact = Subject(operation, "reference")
    widths = (DEFAULT.width,) if operation.name == "cross_attention" else (DEFAULT.other_width, DEFAULT.width)
    for shape in ((2,), (2, 1)):
        scales = [torch.rand(*shape, *([w] if len(shape) > 1 else []), dtype=torch.float64) for w in widths]
        scales[0].view(-1)[0] = 0.0

        def run(of: Subject, x: Sequence[Tensor]) -> tuple[Tensor, ...]:
            given = x[len(tensors) :]
            options = {"residual_scale": given[0]} if len(given) == 1 else {"residual_scales": tuple(given)}
            return of.run(x[: len(tensors)], DEFAULT, **options)

        got = results(partial(run, subject), [*tensors, *(s.to(dtype) for s in scales)])
        want = results(partial(run, exact), [*(x.double() for x in tensors), *scales])
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            if i - len(operation.outputs) not in operation.zero_gradients:
                assert relative_error(a, b) < (1e-5 if dtype == torch.float32 else 1e-12), i
    if operation.name == "cross_attention":
        cls, y = tensors[0].double(), operation.oracle([x.double() for x in tensors], DEFAULT)[0]
        scale = scales[0].view(2, 1, -1)
        got = subject.run(tensors, DEFAULT, residual_scale=scale)[0]
        assert relative_error(got, cls + scale * (y - cls)) < 1e-6


# Layouts


@all_subjects
@pytest.mark.parametrize("layout", layouts.ALL[1:])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_any_strides_and_offsets(subject, layout, dtype):
    size = Size(1, 17, 48, 4, 1, 24, 3) if layout is layouts.wild_singletons else DEFAULT
    tensors = subject.operation.inputs(size, dtype)
    want = results(lambda x: subject.run(x, size), tensors)

    def run(x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return subject.run([layouts.lay_out(t, layout) for t in x], size)

    for got, other in zip(results(run, tensors), want, strict=True):
        assert torch.isfinite(got).all()
        if subject.native:
            assert torch.equal(got, other)
        else:
            assert (got - other).abs().max() <= 100 * torch.finfo(dtype).eps * (1 + other.abs().max())


@all_subjects
def test_weights_that_stand_for_their_negative(subject):
    """Views with the negative bit, as the imaginary part of a conjugate is."""
    tensors = subject.operation.inputs(DEFAULT, subject.exact)
    views = [torch._neg_view(x) for x in tensors]
    for mine, other in zip(
        subject.run(views, DEFAULT), subject.run([-x for x in tensors], DEFAULT), strict=True
    ):
        assert relative_error(mine, other) < 1e-6


@all_subjects
def test_odd_strides_of_the_incoming_gradient(subject):
    tensors = leaves(subject.operation.inputs(DEFAULT, subject.exact))
    outputs = subject.run(tensors, DEFAULT, return_attention=True)
    for make in (
        lambda y: torch.ones((1,) * y.ndim, dtype=y.dtype).expand_as(y),
        lambda y: layouts.every_second(torch.randn_like(y)),
        lambda y: layouts.embedded_in_nan(torch.randn_like(y)),
        lambda y: layouts.backwards_in_memory(torch.randn_like(y)),
        lambda y: torch._neg_view(torch.randn_like(y)),
    ):
        grads = [make(y) for y in outputs]
        got = torch.autograd.grad(outputs, tensors, grads, retain_graph=True)
        dense = [g.resolve_neg().clone(memory_format=torch.contiguous_format) for g in grads]
        want = torch.autograd.grad(outputs, tensors, dense, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@all_subjects
def test_one_output_alone_may_be_used(subject):
    """The other outputs' gradients are None, not zeros."""
    tensors = leaves(subject.operation.inputs(DEFAULT, subject.exact))
    count = len(subject.run(tensors, DEFAULT, return_attention=True))
    for i in range(count):
        outputs = subject.run(tensors, DEFAULT, return_attention=True)
        got = gradients(outputs[i : i + 1], tensors)
        grads = [torch.ones_like(y) if i == j else torch.zeros_like(y) for j, y in enumerate(outputs)]
        want = torch.autograd.grad(outputs, tensors, grads, allow_unused=True, materialize_grads=True)
        for a, b in zip(got, want, strict=True):
            assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max())


@subjects(lambda subject: subject.operation.name == "cross_attention")
def test_rows_of_one_buffer(subject):
    """Row 0 and rows 1..P of one buffer, and the gradient of it whole; the fusion takes whole ones."""
    tensors = subject.operation.inputs(DEFAULT, subject.exact)
    buffer = torch.cat(tensors[:2], 1).requires_grad_()
    (y,) = subject.run([buffer[:, :1], buffer[:, 1:], *tensors[2:]], DEFAULT)
    (got,) = gradients((y,), [buffer])
    separate = leaves(tensors)
    want = gradients(subject.run(separate, DEFAULT), separate[:2])
    assert relative_error(got, torch.cat(want, 1)) < (1e-12 if got.dtype == torch.float64 else 1e-6)


@native_subjects
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_nothing_unwritten_is_read(subject, dtype, monkeypatch):
    """Empty tensors full of NaN change no result: outputs are written, scratch is filled first."""
    for size in (DEFAULT, *subject.operation.sizes[1:4], Size(2, 37, 20, 5, 150, 33, 3)):
        tensors = subject.operation.inputs(size, dtype)

        def compute(x: Sequence[Tensor], size: Size = size) -> tuple[Tensor, ...]:
            torch.manual_seed(4)
            return subject.run(x, size, dropout_p=0.2, return_attention=True)

        want = results(compute, tensors)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", poisoned(torch.empty))
            patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
            got = results(compute, tensors)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def make(*args: object, **options: object) -> Tensor:
        return empty(*args, **options).fill_(float("nan"))

    return make


@all_subjects
def test_nan_stays_in_its_image(subject):
    """One image of NaN or infinity gives NaN there, and the other images come out as without it."""
    size = Size(batch=3)
    tensors = subject.operation.inputs(size, subject.exact)
    want = subject.run(tensors, size)
    for bad in (float("nan"), float("inf")):
        spoilt = [x.clone() for x in tensors]
        spoilt[1][1, -1, 3] = bad
        for got, other in zip(subject.run(spoilt, size), want, strict=True):
            assert torch.equal(got[0::2], other[0::2]) or torch.allclose(got[0::2], other[0::2], rtol=1e-12)
        assert subject.run(spoilt, size)[0][1, 0].isnan().all()


# Randomness


@all_subjects
def test_dropout_follows_the_generator(subject):
    """Masks advance from call to call, `manual_seed` repeats them, and they are the definition's."""
    tensors = subject.operation.inputs(DEFAULT, subject.exact)

    def call(of: Subject, seed: int | None = None) -> list[Tensor]:
        if seed is not None:
            torch.manual_seed(seed)
        outputs = of.run(tensors, DEFAULT, dropout_p=0.4, proj_dropout_p=0.2, return_attention=True)
        return list(outputs)

    first = call(subject, seed=3)
    assert not torch.equal(first[0], call(subject)[0])
    assert all(torch.equal(a, b) for a, b in zip(first, call(subject, seed=3), strict=True))
    for mine, other in zip(first, call(Subject(subject.operation, "reference"), seed=3), strict=True):
        assert relative_error(mine, other) < 1e-5


@all_subjects
@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_gradients_under_dropout(subject, rate):
    """The mask of forward is that of backward: against the definition in float64 under the same seed."""
    tensors = subject.operation.inputs(DEFAULT, subject.exact)
    options = {"dropout_p": rate, "return_attention": True}

    def run(of: Subject, x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        return of.run(x, DEFAULT, **options)

    exact = Subject(subject.operation, "reference")
    check_against(
        subject, tensors, run=partial(run, subject), oracle=partial(run, exact), eager=partial(run, exact)
    )


@all_subjects
def test_dropout_keeps_the_mean(subject):
    size = Size(1, 6, 8, 2, 5, 8, 2)
    tensors = subject.operation.inputs(size, subject.exact)
    count = subject.times(3000)
    calls = [subject.run(tensors, size, dropout_p=0.3)[0] for _ in range(count)]
    if (
        subject.operation.name == "cross_attention"
    ):  # linear in the dropped attention; the fusion ends in a GELU
        mean = torch.stack(calls).mean(0)
        assert relative_error(mean, subject.run(tensors, size)[0]) < 0.05 * (3000 / count) ** 0.5
    assert len({tuple(y.flatten().tolist()) for y in calls}) > count // 6


@all_subjects
def test_checkpointing_recomputes_the_same_masks(subject):
    tensors = subject.operation.inputs(DEFAULT, subject.exact)

    def run(*x: Tensor) -> tuple[Tensor, ...]:
        return subject.run(x, DEFAULT, dropout_p=0.3, proj_dropout_p=0.3)

    def under_one_seed(x: Sequence[Tensor], use_reentrant: bool | None) -> tuple[Tensor, ...]:
        torch.manual_seed(6)
        return run(*x) if use_reentrant is None else checkpoint(run, *x, use_reentrant=use_reentrant)

    want = results(partial(under_one_seed, use_reentrant=None), tensors)
    got = results(partial(under_one_seed, use_reentrant=False), tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# Bits


@native_subjects
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_every_time_and_on_any_number_of_threads(subject, dtype):
    size = Size(5, 300, 96, 3, 200, 64, 4)
    tensors = subject.operation.inputs(size, dtype)
    before = torch.get_num_threads()
    want = None
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for _ in range(13):
                got = results(lambda x: subject.run(x, size, return_attention=True), tensors)
                want = want or got
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    finally:
        torch.set_num_threads(before)


@native_subjects
def test_an_image_has_the_same_bits_in_any_batch(subject):
    size = Size(6, 150, 96, 3, 40, 64, 4)
    tensors = subject.operation.inputs(size, torch.float32)
    whole = subject.run(tensors, size)
    count = len(subject.operation.tokens)
    for i in range(6):
        one = [x[i : i + 1] for x in tensors[:count]]
        alone = subject.run([*one, *tensors[count:]], Size(1, 150, 96, 3, 40, 64, 4))
        for a, b in zip(alone, whole, strict=True):
            assert relative_error(a, b[i : i + 1]) < 1e-5


@all_subjects
def test_concurrent_callers(subject):
    size = Size(3, 60, 96, 3, 40, 64, 4)
    jobs = [subject.operation.inputs(size, subject.exact) for _ in range(4)]

    def compute(tensors: Sequence[Tensor]) -> list[Tensor]:
        return results(lambda x: subject.run(x, size), tensors)

    want = [compute(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(subject.times(5)):
            for got, other in zip(pool.map(compute, jobs), want, strict=True):
                assert all(
                    torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(got, other, strict=True)
                )


# Memory


@subjects(lambda subject: subject.backend != "reference")
@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "tokens frozen"])
def test_saves_nothing_of_the_size_of_the_tokens(subject, frozen):
    size = Size(2, 400, 96, 3, 420, 96, 3)
    tensors = leaves(subject.operation.inputs(size, torch.float32))
    for i in subject.operation.tokens:
        tensors[i].requires_grad_(not frozen)
    given = {x.untyped_storage().data_ptr() for x in tensors}
    sizes = []

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in given:
            sizes.append(x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        subject.run(tensors, size)
    tokens = tensors[1].nbytes
    assert sizes, "the hook saw nothing"
    assert max(sizes) < tokens / 10
    assert sum(sizes) < tokens / 2


@native_subjects
def test_memory_does_not_grow_with_the_patches(subject):
    """Beyond inputs, outputs and their gradients."""

    def peak(patches: int, differentiate: bool) -> int:
        size = Size(2, patches, 64, 4, patches, 64, 4)
        tensors = leaves(subject.operation.inputs(size, torch.float32))

        def call() -> object:
            outputs = subject.run(tensors, size)
            return gradients(outputs, tensors) if differentiate else outputs

        made = call()
        known = sum(x.nbytes for x in made)
        if differentiate:
            # The outputs and their gradients, which the test makes itself.
            known += 2 * sum(x.nbytes for x in subject.run(tensors, size))
        del made
        return peak_bytes(call) - known

    for differentiate in (False, True):
        # An image is cut into 16 chunks at the most; from some 2,000 tokens on nothing grows.
        assert peak(8000, differentiate) <= 1.01 * peak(4000, differentiate)
