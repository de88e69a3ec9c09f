"""Linear layers: values at odd sizes on every instruction set, prepared weights, what bad input is told."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F

from crossvit_kernels import linear, native, pack_linear
from tests import layouts
from tests.by_definition import linear_inputs, linear_oracle, normal, run_linear
from tests.contract import STORED, check_values, every_isa, needs_module

pytestmark = needs_module

WIDTHS = (1, 3, 17, 33, 65, 448)
ROWS = (1, 2, 13, 14, 15, 197)
# Every width as channels and as outputs, every number of rows, and all options, in some mixture.
SIZES = (
    *zip(ROWS, WIDTHS, WIDTHS[::-1], strict=True),
    (29, 448, 65),
    (15, 65, 448),
    (3, 3, 1),
    (400, 96, 96),
)
OPTIONS = tuple(itertools.product((True, False), (True, False), (None, "gelu", "relu"), (True, False)))


def without(tensors, bias, norm, residual):
    kept = (True, True, bias, norm, norm, residual)
    return [x if keep else None for x, keep in zip(tensors, kept, strict=True)]


def compare(tensors, activation, what, backend="cpu"):
    exact = linear_oracle([None if x is None else x.double() for x in tensors], activation)
    mine = run_linear(tensors, backend, activation)
    check_values(mine, linear_oracle(tensors, activation), exact, what)


@every_isa
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_odd_sizes(isa, dtype):
    options = itertools.cycle(OPTIONS)
    with native.use_isa(isa):
        for rows, channels, outputs in SIZES:
            for _ in range(2):
                bias, norm, activation, residual = next(options)
                drawn = [x.to(dtype) for x in linear_inputs((rows,), channels, outputs)]
                what = (rows, channels, outputs, bias, norm, activation, residual)
                compare(without(drawn, bias, norm and channels > 1, residual), activation, what)


@every_isa
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_every_option(isa, dtype):
    drawn = [x.to(dtype) for x in linear_inputs((2, 7), 19, 37)]
    with native.use_isa(isa):
        for bias, norm, activation, residual in OPTIONS:
            what = (bias, norm, activation, residual)
            compare(without(drawn, bias, norm, residual), activation, what)


@every_isa
def test_weights_and_tokens_of_other_dtypes(isa):
    """As autocast gives them."""
    drawn = linear_inputs((13,), 33, 17)
    with native.use_isa(isa):
        for tokens, weights in itertools.product(STORED, STORED):
            x = [t.to(weights if i in (1, 2) else tokens) for i, t in enumerate(drawn)]
            with torch.autocast("cpu", enabled=False):
                mine = torch.ops.crossvit_kernels.linear(*x, 1e-6, "gelu")
            exact = linear_oracle([t.double() for t in x])
            error = (mine.double() - exact).abs().max() / exact.abs().max()
            assert mine.dtype == tokens
            assert error < 4 * max(torch.finfo(t).eps for t in (tokens, weights)) + 1e-5


def test_norm_in_float32_and_eps():
    tensors = [x.bfloat16() for x in linear_inputs((5,), 40, 8)]
    tensors[3:5] = (x.float() for x in tensors[3:5])
    exact = linear_oracle([x.double() for x in tensors], eps=0.3)
    assert (run_linear(tensors, eps=0.3).double() - exact).abs().max() < 0.05
    assert (run_linear(tensors, eps=1e-6).double() - exact).abs().max() > 0.05


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4), (2, 0, 4), (1, 1)], ids=str)
def test_any_leading_dimensions(shape):
    tensors = [x.float() for x in linear_inputs(shape, 17, 5)]
    got = run_linear(tensors)
    assert got.shape == (*shape, 5)
    flat = [tensors[0].reshape(-1, 17), *tensors[1:5], tensors[5].reshape(-1, 5)]
    assert torch.equal(got.reshape(-1, 5), run_linear(flat))


def test_rows_with_gaps_and_repeated_rows():
    """Patches without the CLS token, as the models have them, and one row for all images."""
    tensors = [x.float() for x in linear_inputs((3, 15), 33, 17)]
    residual = tensors[5]
    for views in (
        [tensors[0][:, 1:], residual[:, 1:]],
        [tensors[0][:, :1], residual[:, :1]],
        [tensors[0].transpose(0, 1), residual.transpose(0, 1)],
        [tensors[0][:1, 1:].expand(3, -1, -1), residual[:, 1:]],
        [tensors[0][:, 2:], residual[:, 2:].contiguous()],
    ):
        dense = [x.contiguous() for x in views]
        got = run_linear([views[0], *tensors[1:5], views[1]])
        assert torch.equal(got, run_linear([dense[0], *tensors[1:5], dense[1]]))


@every_isa
def test_nan_stays_in_its_row(isa):
    for dtype in STORED:
        tensors = [x.to(dtype) for x in linear_inputs((29,), 65, 33)]
        with native.use_isa(isa):
            want = run_linear(tensors)
            for bad in (float("nan"), float("inf")):
                spoilt = [tensors[0].clone(), *tensors[1:]]
                spoilt[0][14, 3] = bad
                got = run_linear(spoilt)
                assert got[14].isnan().all()
                rest = torch.arange(29) != 14
                assert torch.equal(got[rest], want[rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    tensors = [x.to(dtype) for x in linear_inputs((5, 97), 96, 130)]
    views = [tensors[0][:, 3:], *tensors[1:5], tensors[5][:, 3:]]  # images that threads share out
    before, want = torch.get_num_threads(), None
    try:
        for threads in range(1, 9):
            torch.set_num_threads(threads)
            got = [run_linear(tensors), run_linear(views)]
            want = want or got
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), threads
    finally:
        torch.set_num_threads(before)


# Prepared weights


def prepared(dtype=torch.float32, shape=(2, 7), channels=33, outputs=17):
    """A function of x, its tensors, and what `linear` makes of them."""
    tensors = [x.to(dtype) for x in linear_inputs(shape, channels, outputs)]
    return pack_linear(*tensors[1:5]), tensors


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_a_prepared_layer_is_the_layer(dtype):
    layer, tensors = prepared(dtype)
    for layout in layouts.ALL:
        x, residual = layout(tensors[0]), layout(tensors[5])
        got = layer(x, activation="gelu", residual=residual)
        assert torch.equal(got, run_linear(tensors))
    assert layer.nbytes > 0


def test_a_prepared_layer_follows_its_parameters():
    layer, tensors = prepared()
    layer(tensors[0])
    tensors[1].mul_(-3)
    tensors[4].add_(1)
    assert torch.equal(layer(tensors[0]), run_linear([*tensors[:5], None], activation=None))


def test_what_a_prepared_layer_cannot_take_is_the_definitions():
    layer, tensors = prepared()
    tensors[1].requires_grad_()
    y = layer(tensors[0], activation="relu")
    assert y.requires_grad
    y.sum().backward()
    assert tensors[1].grad is not None
    with torch.no_grad():
        for backend in ("torch", "reference"):
            want = run_linear([*tensors[:5], None], backend, "relu")
            assert torch.equal(layer(tensors[0], activation="relu", backend=backend), want)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(tensors[0]).dtype == torch.float32
        rows = torch.func.vmap(layer)(tensors[0])
        assert torch.allclose(rows, layer(tensors[0]), atol=1e-5)
        compiled = torch.compile(lambda x: layer(x), fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(tensors[0]), layer(tensors[0]), atol=1e-5)
    exact, x = pack_linear(*(t.double() for t in tensors[1:5])), tensors[0].double()
    assert exact(x).dtype == torch.float64


def test_copies_of_a_prepared_layer_pack_for_themselves():
    layer, tensors = prepared()
    want = layer(tensors[0])
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.nbytes == 0
        assert torch.equal(other(tensors[0]), want)


# Against others


def test_a_block_of_timm():
    """Each of its four layers."""
    from timm.models.vision_transformer import Block

    block = Block(48, 3, qkv_bias=True).eval()
    x = torch.randn(2, 13, 48)
    with torch.no_grad():
        qkv = linear(
            *(x, block.attn.qkv.weight, block.attn.qkv.bias),
            norm_weight=block.norm1.weight,
            norm_bias=block.norm1.bias,
            eps=block.norm1.eps,
            backend="cpu",
        )
        assert torch.allclose(qkv, block.attn.qkv(block.norm1(x)), atol=1e-5)
        fc1 = linear(
            *(x, block.mlp.fc1.weight, block.mlp.fc1.bias),
            norm_weight=block.norm2.weight,
            norm_bias=block.norm2.bias,
            eps=block.norm2.eps,
            activation="gelu",
            backend="cpu",
        )
        assert torch.allclose(fc1, block.mlp.act(block.mlp.fc1(block.norm2(x))), atol=1e-5)
        fc2 = linear(fc1, block.mlp.fc2.weight, block.mlp.fc2.bias, residual=x, backend="cpu")
        assert torch.allclose(fc2, x + block.mlp(block.norm2(x)), atol=1e-5)


@every_isa
def test_gelu_over_its_whole_range(isa):
    """By the error function: steps of float32 of x, not those of the tanh formula, 5e-4."""
    x = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -100, 100, 1e4])))[:, None]
    with native.use_isa(isa):
        got = linear(x, torch.ones(1, 1), activation="gelu", backend="cpu")
    error = (got.double() - F.gelu(x.double())).abs()
    assert (error <= 2e-7 * x.abs().clamp_min(1)).all()


# Errors: before anything is computed, in words


NAMES = ("x", "weight", "bias", "norm_weight", "norm_bias", "residual")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": normal(2, 5, 9)}, ValueError, r"x must have shape .* with C_in = 7 .* got \[2, 5, 9\]"),
        ({"x": torch.tensor(1.0).double()}, ValueError, r"got \[\]: is the weight transposed"),
        ({"weight": normal(7)}, ValueError, r"weight must have shape \[C_out, C_in\], both .* got \[7\]"),
        ({"weight": normal(0, 7)}, ValueError, r"both at least 1, got \[0, 7\]"),
        ({"bias": normal(7)}, ValueError, r"bias must have shape \[C_out\] = \[9\], got \[7\]"),
        ({"norm_weight": normal(9)}, ValueError, r"norm_weight must have shape .* = \[7\], got \[9\]"),
        ({"norm_bias": normal(1, 7)}, ValueError, r"norm_bias must have shape \[C_in\] = \[7\]"),
        ({"norm_weight": None}, ValueError, "norm_bias must be None where norm_weight is"),
        ({"residual": normal(5, 9)}, ValueError, r"residual must have .* = \[2, 5, 9\] .* got \[5, 9\]"),
        ({"activation": "tanh"}, ValueError, "activation must be None, 'gelu' or 'relu', got 'tanh'"),
        ({"weight": normal(9, 7).float()}, TypeError, "weight must have the dtype of x, torch.float64"),
        ({"residual": normal(2, 5, 9).float()}, TypeError, "residual must have the dtype of x"),
        ({"x": torch.zeros(2, 5, 7).long()}, TypeError, "x must be a floating-point tensor, got torch.int64"),
        ({"bias": normal(9).to("meta")}, RuntimeError, "bias is on meta, x on cpu: move them together"),
        ({"backend": "fast"}, ValueError, "backend must be one of auto, cpu"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_words(changes, error, words):
    arguments = {**dict(zip(NAMES, linear_inputs(), strict=True)), **changes}
    with pytest.raises(error, match=words):
        linear(arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias"), **arguments)
    if changes.keys() & set(NAMES[1:5]):
        parameters = [changes.get(name, x) for name, x in zip(NAMES, linear_inputs(), strict=True)][1:5]
        with pytest.raises(error):
            pack_linear(*parameters)


def test_a_prepared_layer_refuses_other_tokens():
    layer, tensors = prepared()
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., C_in\] with C_in = 33"):
        layer(tensors[0][..., 1:])
    with pytest.raises(ValueError, match="residual must have shape"):
        layer(tensors[0], residual=tensors[5][..., 1:])
    with pytest.raises(TypeError, match="weight must have the dtype of x"):
        layer(tensors[0].bfloat16())
    with pytest.raises(RuntimeError, match="cuda: it does not implement linear"):
        layer(tensors[0], backend="cuda")
