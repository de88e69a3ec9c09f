"""The contract of cross_attention, the same for every backend: values and gradients against PyTorch's own
multi-head attention and timm's module, layouts, dtypes, randomness, errors, compilation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crossvit_kernels import backends, cross_attention, use_backend
from tests.operands import KEY_BIAS, NAMES, eager, leaves, operands, oracle, relative_error

BACKENDS = backends()
both = pytest.mark.parametrize("backend", BACKENDS)


def check_against_oracle(tensors: list[Tensor], num_heads: int, backend: str, bound: float) -> None:
    """y, attention and every gradient, of a loss in which y and the attention both have varied weights."""
    got_leaves, want_leaves = leaves(tensors), leaves(tensors)
    got = cross_attention(*got_leaves, num_heads=num_heads, return_attention=True, backend=backend)
    want = oracle(want_leaves, num_heads)
    weights = [torch.randn_like(x) for x in want]
    for ours, theirs in zip(got, want, strict=True):
        assert relative_error(ours, theirs) < bound
    got_grads, want_grads = (
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(outs, weights, strict=True)), ins)
        for outs, ins in ((got, got_leaves), (want, want_leaves))
    )
    for name, ours, theirs in zip(NAMES, got_grads, want_grads, strict=True):
        if name == "bk":
            assert ours.abs().max() < 1e-10
        else:
            assert relative_error(ours, theirs) < bound, name


@both
@pytest.mark.parametrize(
    ("batch", "patches", "width", "num_heads"),
    [
        (2, 17, 48, 4),
        (1, 1, 8, 8),
        (3, 2, 33, 1),
        (2, 0, 24, 3),
        (0, 5, 24, 3),
        (1, 400, 224, 7),
        (2, 196, 448, 7),
        (1, 129, 96, 3),
        (1, 31, 768, 12),
    ],
)
def test_equals_multi_head_attention(batch, patches, width, num_heads, backend):
    check_against_oracle(operands(batch, patches, width), num_heads, backend, bound=1e-11)


@both
def test_another_eps(backend):
    tensors = operands(spread=0.1)
    got = cross_attention(*leaves(tensors), num_heads=4, eps=0.1, backend=backend)
    want, other = oracle(tensors, 4, eps=0.1)[0], oracle(tensors, 4)[0]
    assert relative_error(got, want) < 1e-12
    assert relative_error(other, want) > 1e-3


@both
@pytest.mark.parametrize("wanted", NAMES)
def test_the_gradient_of_each_tensor_alone(wanted, backend):
    index = NAMES.index(wanted)
    every, one = leaves(operands()), operands()
    one = [x.detach() for x in every]
    one[index].requires_grad_()
    grads = [
        torch.autograd.grad(cross_attention(*t, num_heads=4, backend=backend).square().sum(), t[index])[0]
        for t in (every, one)
    ]
    assert (grads[0] - grads[1]).abs().max() < 1e-12 * every[index].numel()


@both
@pytest.mark.parametrize("sharpness", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_equals_multi_head_attention_on_structured_inputs(sharpness, mean, backend):
    tensors = operands(sharpness=sharpness, mean=mean)
    tensors[1][:, :, 5] *= 30  # one outlier channel
    tensors[1][:, 3] = 2.5  # a constant token: its variance is zero
    check_against_oracle(tensors, 4, backend, bound=1e-7 if sharpness > 1 else 1e-8)


def test_backends_agree_with_timm_in_float64():
    tensors = operands(3, 40, 96)
    for backend in BACKENDS:
        assert (
            relative_error(cross_attention(*tensors, num_heads=3, backend=backend), eager(tensors, 3)) < 1e-13
        )


@both
def test_gradient_and_second_gradient(backend):
    tensors = leaves(operands(2, 3, 8))

    def function(*args: Tensor) -> Tensor:
        return cross_attention(*args, num_heads=2, backend=backend)

    assert torch.autograd.gradcheck(function, tensors)
    # The key's bias has gradient zero everywhere, so its second derivative is zero too.
    assert torch.autograd.gradgradcheck(function, tensors)


@both
def test_gradient_through_the_attention_alone(backend):
    tensors = leaves(operands(2, 3, 8))

    def function(*args: Tensor) -> Tensor:
        return cross_attention(*args, num_heads=2, return_attention=True, backend=backend)[1]

    assert torch.autograd.gradcheck(function, tensors)


def test_the_key_bias_has_a_gradient_of_zeros():
    tensors = leaves(operands(dtype=torch.float32))
    cross_attention(*tensors, num_heads=4).square().sum().backward()
    assert tensors[KEY_BIAS].grad is not None
    assert torch.equal(tensors[KEY_BIAS].grad, torch.zeros(48))


@both
@pytest.mark.parametrize("absent", [("bq",), ("bk",), ("bv",), ("bo",), ("norm_bias",), ("bq", "bk", "bv")])
def test_biases_may_be_absent(absent, backend):
    tensors = operands()
    for name in absent:
        tensors[NAMES.index(name)].zero_()
    want = oracle(tensors, 4)[0]
    given = [None if name in absent else x for name, x in zip(NAMES, tensors, strict=True)]
    ins = [None if x is None else x.requires_grad_() for x in given]
    y = cross_attention(*ins, num_heads=4, backend=backend)
    assert relative_error(y, want) < 1e-13
    y.sum().backward()


# Layouts


def embedded_in_nan(x: Tensor, pad: int = 3) -> Tensor:
    """The same values as a view into a wider buffer of NaN, no stride contiguous with the next."""
    wide = torch.full([size + 2 * pad for size in x.shape], float("nan"), dtype=x.dtype)
    view = wide[tuple(slice(pad, pad + size) for size in x.shape)]
    view.copy_(x)
    return view


@both
def test_any_strides_and_offsets(backend):
    tensors = operands()
    want = cross_attention(*tensors, num_heads=4, backend=backend)
    views = [embedded_in_nan(x) if x.ndim > 1 else x for x in tensors]
    views[4] = tensors[4].T.contiguous().T
    got = cross_attention(*views, num_heads=4, backend=backend)
    assert relative_error(got, want) < 1e-13
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[:2]]
    got = cross_attention(*transposed, *tensors[2:], num_heads=4, backend=backend)
    assert relative_error(got, want) < 1e-13


@both
def test_rows_of_one_buffer(backend):
    """As the model calls it: row 0 and rows 1..P of one buffer, and the gradient of the whole buffer."""
    tensors = operands()
    buffer = torch.cat(tensors[:2], 1).requires_grad_()
    y = cross_attention(buffer[:, :1], buffer[:, 1:], *tensors[2:], num_heads=4, backend=backend)
    weight = torch.randn_like(y)
    (got,) = torch.autograd.grad((y * weight).sum(), buffer)
    separate = leaves(tensors)
    want = torch.autograd.grad((oracle(separate, 4)[0] * weight).sum(), separate[:2])
    assert relative_error(got, torch.cat(want, 1)) < 1e-12


@both
def test_odd_strides_of_the_incoming_gradient(backend):
    tensors = leaves(operands())
    y = cross_attention(*tensors, num_heads=4, backend=backend)
    expanded = torch.ones(1, 1, 1, dtype=y.dtype).expand_as(y)
    transposed = torch.randn(48, 1, 2, dtype=y.dtype).permute(2, 1, 0)
    sliced = torch.randn(2, 1, 96, dtype=y.dtype)[..., ::2]
    for grad in (expanded, transposed, sliced):
        got = torch.autograd.grad(y, tensors, grad, retain_graph=True)
        want = torch.autograd.grad(y, tensors, grad.contiguous().clone(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@both
def test_odd_strides_of_singleton_dimensions(backend):
    tensors = operands(batch=1)
    want = cross_attention(*tensors, num_heads=4, backend=backend)
    cls = torch.as_strided(tensors[0].clone(), (1, 1, 48), (7, 5, 1))
    assert torch.equal(cross_attention(cls, *tensors[1:], num_heads=4, backend=backend), want)


@both
def test_same_bits_every_time(backend):
    def gradients() -> list[Tensor]:
        tensors = leaves(operands(4, 100, 96, torch.float32))
        y = cross_attention(*tensors, num_heads=3, backend=backend)
        return [y, *torch.autograd.grad(y.square().sum(), tensors)]

    torch.manual_seed(1)
    first = gradients()
    for _ in range(10):
        torch.manual_seed(1)
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


@pytest.mark.parametrize("frozen", [0, 2], ids=["all trained", "tokens frozen"])
def test_saves_nothing_of_the_size_of_the_tokens(frozen):
    tensors = leaves(operands(2, 400, 96, torch.float32))
    for x in tensors[:frozen]:
        x.requires_grad_(False)
    given = {x.untyped_storage().data_ptr() for x in tensors}
    sizes = []

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in given:
            sizes.append(x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        cross_attention(*tensors, num_heads=3)
    tokens = tensors[1].nbytes
    assert sizes, "the hook saw nothing"
    assert max(sizes) < tokens / 10
    assert sum(sizes) < tokens / 5


# Dtypes


LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@both
@LOW
@pytest.mark.parametrize("kind", ["plain", "mean of 30 deviations", "outlier channel", "sharp scores"])
def test_low_precision_is_as_good_as_eager(dtype, kind, backend):
    """At most twice the error that timm's module makes in the same dtype, both against float64."""
    options = {"mean of 30 deviations": {"mean": 60.0}, "sharp scores": {"sharpness": 3.0}}.get(kind, {})
    tensors = operands(4, 196, 192, dtype, **options)
    if kind == "outlier channel":
        tensors[1][:, :, 11] *= 30
    ours, theirs, exact = leaves(tensors), leaves(tensors), leaves(tensors, torch.float64)
    results = []
    for function, ins in (
        (lambda *a: cross_attention(*a, num_heads=6, backend=backend), ours),
        (lambda *a: eager(list(a), 6), theirs),
        (lambda *a: oracle(list(a), 6)[0], exact),
    ):
        y = function(*ins)
        grads = torch.autograd.grad(y.double().square().sum(), ins, allow_unused=True)
        results.append([y, *grads])
    step = torch.finfo(dtype).eps
    for name, mine, eager_value, truth in zip(("y", *NAMES), *results, strict=True):
        if name == "bk":
            continue
        bound = 2 * relative_error(eager_value, truth) + step
        assert relative_error(mine, truth) <= bound, name
        assert mine.dtype == dtype


@both
def test_float32_is_as_good_as_eager(backend):
    tensors = operands(4, 400, 224, torch.float32)
    truth = oracle([x.double() for x in tensors], 7)[0]
    error = relative_error(cross_attention(*tensors, num_heads=7, backend=backend), truth)
    assert error <= 2 * relative_error(eager(tensors, 7), truth) + torch.finfo(torch.float32).eps


@both
@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16])
@LOW
def test_autocast_keeps_the_dtype_of_the_tokens(dtype, tokens, backend):
    tensors = leaves(operands(2, 40, 96, torch.float32))
    patches = tensors[1].detach().to(tokens).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y, attention = cross_attention(
            tensors[0], patches, *tensors[2:], num_heads=3, return_attention=True, backend=backend
        )
        y.float().square().sum().backward()  # inside on purpose: the backward must not be cast
    assert y.dtype == tokens
    assert attention.dtype == torch.float32
    assert patches.grad.dtype == tokens
    assert all(x.grad.dtype == torch.float32 for i, x in enumerate(tensors) if i != 1)
    truth = oracle([x.double() for x in [tensors[0], patches, *tensors[2:]]], 3)[0]
    assert relative_error(y, truth) < 4 * torch.finfo(torch.bfloat16).eps


@both
def test_autocast_leaves_float64_alone(backend):
    tensors = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            relative_error(cross_attention(*tensors, num_heads=4, backend=backend), oracle(tensors, 4)[0])
            < 1e-13
        )


# Randomness


@both
def test_dropout_follows_the_generator(backend):
    tensors = operands()

    def call(seed: int | None = None) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return cross_attention(*tensors, num_heads=4, dropout_p=0.4, proj_dropout_p=0.2, backend=backend)

    first = call(seed=3)
    assert not torch.equal(first, call())
    assert torch.equal(first, call(seed=3))
    torch.manual_seed(3)
    with use_backend("reference"):
        assert (
            relative_error(cross_attention(*tensors, num_heads=4, dropout_p=0.4, proj_dropout_p=0.2), first)
            < 1e-12
        )


@both
def test_dropout_keeps_the_mean(backend):
    tensors = operands(1, 6, 8)
    mean = torch.stack(
        [cross_attention(*tensors, num_heads=2, dropout_p=0.3, backend=backend) for _ in range(3000)]
    ).mean(0)
    # The output is linear in the dropped attention, so its mean is the output without dropout.
    assert relative_error(mean, oracle(tensors, 2)[0]) < 0.05


@both
def test_gradients_under_dropout(backend):
    def function(*args: Tensor) -> Tensor:
        torch.manual_seed(5)
        return cross_attention(*args, num_heads=2, dropout_p=0.4, proj_dropout_p=0.3, backend=backend)

    tensors = leaves(operands(2, 4, 8))
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@both
def test_residual_scale(backend):
    tensors = operands()
    cls, y = tensors[0], oracle(tensors, 4)[0]
    for scale in (torch.tensor([0.0, 1.25]), torch.rand(2, 1, 48)):
        scale = scale.double()
        want = cls + scale.view(2, 1, -1) * (y - cls)
        got = cross_attention(*tensors, num_heads=4, residual_scale=scale, backend=backend)
        assert relative_error(got, want) < 1e-13


@both
def test_an_empty_batch_with_everything_random(backend):
    tensors = leaves(operands(batch=0))
    y = cross_attention(
        *tensors,
        num_heads=4,
        dropout_p=0.2,
        proj_dropout_p=0.1,
        residual_scale=torch.ones(0),
        backend=backend,
    )
    y.sum().backward()
    assert y.shape == (0, 1, 48)
    assert all(x.grad is not None and not x.grad.any() for x in tensors)


@both
@LOW
def test_dropout_in_low_precision(dtype, backend):
    """The masks are drawn in float32, so that rates are exact; a float32 scale keeps the tokens' dtype."""
    tensors = operands(4, 40, 96, dtype)
    options = {"num_heads": 3, "dropout_p": 0.3, "proj_dropout_p": 0.2, "backend": backend}
    scale = torch.tensor([0.0, 1.5, 1.0, 2.0])
    torch.manual_seed(9)
    low = cross_attention(*tensors, **options, residual_scale=scale)
    torch.manual_seed(9)
    exact = cross_attention(*(x.float() for x in tensors), **options, residual_scale=scale)
    assert low.dtype == dtype
    assert relative_error(low, exact) < 0.05


def test_projection_dropout_and_residual_scale_together():
    tensors = operands()
    cls, y = tensors[0], oracle(tensors, 4)[0]
    got = cross_attention(
        *tensors, num_heads=4, proj_dropout_p=0.5, residual_scale=torch.tensor([0.5, 3.0]).double()
    )
    factors = ((got - cls) / (y - cls)).squeeze(1)
    for row, scale in zip(factors, (0.5, 3.0), strict=True):
        kept = row.abs() > 1e-9
        assert 10 < kept.sum() < 38
        assert torch.allclose(row[kept], torch.tensor(2 * scale).double())


# Errors: before anything is computed, in words


def replaced(**changes: object) -> dict[str, object]:
    arguments: dict[str, object] = dict(zip(NAMES, operands(), strict=True))
    return {**arguments, "num_heads": 4, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"patches": torch.zeros(2, 17, 96).double()}, ValueError, r"patches must have shape .* with C = 48"),
        ({"patches": torch.zeros(17, 48).double()}, ValueError, r"\[17, 48\]: did you pass your own branch"),
        ({"cls": torch.zeros(3, 1, 48).double()}, ValueError, r"cls must have shape .* = \[2, 1, 48\]"),
        ({"cls": torch.zeros(2, 2, 48).double()}, ValueError, r"got \[2, 2, 48\]"),
        ({"wk": torch.zeros(48, 24).double()}, ValueError, r"wk must have shape \[C, C\] = \[48, 48\]"),
        ({"bo": torch.zeros(24).double()}, ValueError, r"bo must have shape \[C\] = \[48\], got \[24\]"),
        ({"norm_bias": torch.zeros(1, 48).double()}, ValueError, r"norm_bias must have shape \[C\]"),
        ({"num_heads": 5}, ValueError, "num_heads must divide C = 48, got 5"),
        ({"num_heads": 0}, ValueError, "num_heads must divide C = 48, got 0"),
        ({"dropout_p": 1.1}, ValueError, "dropout_p must lie between 0 and 1, got 1.1"),
        ({"proj_dropout_p": -0.1}, ValueError, "proj_dropout_p must lie between 0 and 1"),
        ({"residual_scale": torch.ones(2).int()}, TypeError, "residual_scale must be a floating-point"),
        ({"residual_scale": torch.ones(2, device="meta")}, RuntimeError, "residual_scale is on meta"),
        ({"residual_scale": torch.ones(3)}, ValueError, r"residual_scale must have shape \[B\] = \[2\]"),
        ({"wq": torch.zeros(48, 48)}, TypeError, "wq must have the dtype of patches, torch.float64"),
        ({"patches": torch.zeros(2, 17, 48).long()}, TypeError, "patches must be a floating-point tensor"),
        ({"wv": torch.zeros(48, 48, device="meta").double()}, RuntimeError, "wv is on meta, patches on cpu"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_words(changes, error, words):
    with pytest.raises(error, match=words):
        cross_attention(**replaced(**changes))


# Transformations


@both
def test_meta_tensors_get_the_shapes(backend):
    tensors = [x.to("meta") for x in operands()]
    y, attention = cross_attention(*tensors, num_heads=4, return_attention=True, backend=backend)
    assert (y.shape, attention.shape) == ((2, 1, 48), (2, 4, 18))


def test_compiles_as_one_graph_for_any_number_of_patches():
    """Forward and backward in one graph; after the sizes turned dynamic, no further compilation."""

    def loss(*args: Tensor) -> Tensor:
        return cross_attention(*args, num_heads=4).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for i, patches in enumerate((17, 18, 40, 5)):
        tensors = leaves(operands(patches=patches))
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            got = torch.autograd.grad(compiled(*tensors), tensors)
        want = torch.autograd.grad(loss(*tensors), tensors)
        assert all(relative_error(a, b) < 1e-12 for a, b in zip(got, want, strict=True) if b.abs().max() > 0)


def test_compiles_under_autocast():
    tensors = leaves(operands(2, 40, 96, torch.float32))

    def function(*args: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return cross_attention(*args, num_heads=3)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(*tensors), function(*tensors)) < 1e-2


def test_gradients_of_each_image_by_vmap():
    """torch.func: the gradients of each image alone, all at once."""
    tensors = operands(batch=5)
    cls, patches, *weights = tensors

    def loss(wq: Tensor, one_cls: Tensor, one_patches: Tensor) -> Tensor:
        others = [*weights[:2], wq, *weights[3:]]
        return cross_attention(one_cls[None], one_patches[None], *others, num_heads=4).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights[2], cls, patches)
    for i in range(5):
        ins = leaves([cls[i : i + 1], patches[i : i + 1], *weights])
        (want,) = torch.autograd.grad(oracle(ins, 4)[0].square().sum(), ins[4])
        assert relative_error(got[i], want) < 1e-12


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_traces_to_plain_operators():
    traced = torch.jit.trace(
        lambda *args: cross_attention(*args, num_heads=4), tuple(leaves(operands(dtype=torch.float32)))
    )
    assert "PythonOp" not in str(traced.graph)
    others = operands(batch=3, patches=30, dtype=torch.float32)
    assert relative_error(traced(*others), cross_attention(*others, num_heads=4)) < 1e-6
