"""Self-attention: values at odd sizes on every instruction set, its options, what bad input is told."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from crossvit_kernels import native, self_attention
from tests.by_definition import attention_oracle, heads_of, normal
from tests.contract import STORED, check_values, every_isa, needs_module
from tests.operations import leaves, relative_error

pytestmark = needs_module

# (B, N, H, d): every number of tokens, of heads and of head channels, in some mixture.
SIZES = (
    *((1, 1, 1, 1), (2, 2, 3, 3), (1, 13, 7, 24), (2, 14, 3, 32), (1, 15, 1, 64), (1, 197, 7, 64)),
    *((3, 33, 5, 1), (1, 65, 3, 17), (2, 197, 1, 3), (1, 32, 2, 33), (1, 16, 2, 16), (1, 401, 3, 32)),
)


@every_isa
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_odd_sizes(isa, dtype):
    with native.use_isa(isa):
        for batch, tokens, heads, channels in SIZES:
            qkv = (normal(batch, tokens, 3 * heads * channels) * 2 + 0.5).to(dtype)
            exact = attention_oracle(qkv.double(), heads)
            eager = attention_oracle(qkv, heads)
            check_values(
                self_attention(qkv, heads, backend="cpu"), eager, exact, (batch, tokens, heads, channels)
            )


@every_isa
def test_sharp_scores(isa):
    """A softmax that is all but one-hot, with scores of hundreds, and one whose scores are all alike."""
    for factor in (0.0, 1.0, 30.0):
        qkv = normal(2, 47, 3 * 3 * 24) * factor
        exact = attention_oracle(qkv.float().double(), 3, 4.0)
        with native.use_isa(isa):
            got = self_attention(qkv.float(), 3, scale=4.0, backend="cpu")
        assert (got.double() - exact).abs().max() <= 2e-4 * max(1.0, exact.abs().max())


def test_against_multi_head_attention():
    """PyTorch's module with projections that change nothing."""
    qkv, heads, width = normal(2, 17, 3 * 24), 3, 24
    mha = nn.MultiheadAttention(width, heads, bias=False, batch_first=True).double()
    with torch.no_grad():
        mha.in_proj_weight.copy_(torch.eye(width).repeat(3, 1))
        mha.out_proj.weight.copy_(torch.eye(width))
        want, want_attention = mha(*qkv.chunk(3, dim=-1), average_attn_weights=False)
    y, attention = self_attention(qkv, heads, return_attention=True)
    assert relative_error(y, want) < 1e-13
    assert relative_error(attention, want_attention) < 1e-13
    assert relative_error(self_attention(qkv.float(), heads, backend="cpu"), want) < 1e-6


def test_against_timms_module():
    from timm.models.vision_transformer import Attention

    module = Attention(48, 3, qkv_bias=True).eval()
    x = torch.randn(2, 13, 48)
    with torch.no_grad():
        got = module.proj(self_attention(module.qkv(x), 3, backend="cpu"))
        assert relative_error(got, module(x)) < 1e-5


@pytest.mark.parametrize("scale", [0.3, 2.0, 0.0, -0.7])
def test_scales(scale):
    """The kernel takes positive ones; "auto" takes the definition for others."""
    qkv = normal(2, 15, 54).float()
    exact = attention_oracle(qkv.double(), 3, scale)
    assert relative_error(self_attention(qkv, 3, scale=scale), exact) < 1e-5
    if scale > 0:
        assert relative_error(self_attention(qkv, 3, scale=scale, backend="cpu"), exact) < 1e-5
        return
    with pytest.raises(RuntimeError, match=f"cpu: it takes positive scales, got {scale}"):
        self_attention(qkv, 3, scale=scale, backend="cpu")


def test_the_attention_and_its_gradient():
    qkv = normal(2, 7, 36).requires_grad_()
    y, attention = self_attention(qkv, 3, return_attention=True)
    q, k, v = heads_of(qkv, 3)
    want = (q @ k.mT * 4**-0.5).softmax(-1)
    assert relative_error(attention, want) < 1e-13
    assert relative_error(y, (want @ v).transpose(1, 2).flatten(2)) < 1e-13
    (got,) = torch.autograd.grad(attention.square().sum(), qkv, retain_graph=True)
    (other,) = torch.autograd.grad(want.square().sum(), qkv)
    assert relative_error(got, other) < 1e-12
    low = self_attention(qkv.detach().bfloat16(), 3, return_attention=True)
    assert [x.dtype for x in low] == [torch.bfloat16, torch.float32]


def test_dropout():
    """Rates, means, the generator; the attention that is returned is that before it."""
    qkv = normal(2, 31, 36).float()
    options = {"dropout_p": 0.4, "return_attention": True}
    torch.manual_seed(3)
    first, attention = self_attention(qkv, 3, **options)
    torch.manual_seed(3)
    assert torch.equal(self_attention(qkv, 3, **options)[0], first)
    assert not torch.equal(self_attention(qkv, 3, **options)[0], first)
    plain, other = self_attention(qkv, 3, return_attention=True)
    assert torch.equal(attention, other)
    mean = torch.stack([self_attention(qkv, 3, dropout_p=0.4) for _ in range(500)]).mean(0)
    assert relative_error(mean, plain) < 0.1
    assert not self_attention(qkv, 3, dropout_p=1.0).any()
    assert torch.autograd.gradcheck(lambda x: self_attention(x, 3, dropout_p=1.0), leaves([normal(1, 3, 9)]))


@every_isa
def test_nan_stays_in_its_image_and_head(isa):
    for dtype in STORED:
        qkv = normal(3, 33, 3 * 3 * 17).to(dtype)
        with native.use_isa(isa):
            want = self_attention(qkv, 3, backend="cpu")
            spoilt = qkv.clone()
            spoilt[1, 5, 51 + 17] = float("nan")  # a key of head 1
            spoilt[2, 7, 3] = float("nan")  # a query of head 0
            got = self_attention(spoilt, 3, backend="cpu")
        assert torch.equal(got[0], want[0])
        assert got[1, :, 17:34].isnan().all()
        assert torch.equal(got[1, :, :17], want[1, :, :17])
        assert torch.equal(got[1, :, 34:], want[1, :, 34:])
        assert got[2, 7, :17].isnan().all()
        rest = torch.arange(33) != 7
        assert torch.equal(got[2, rest], want[2, rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    qkv = normal(5, 101, 3 * 96).to(dtype)
    before, want = torch.get_num_threads(), None
    try:
        for threads in range(1, 9):
            torch.set_num_threads(threads)
            got = self_attention(qkv, 3, backend="cpu")
            want = got if want is None else want
            assert torch.equal(got, want), threads
    finally:
        torch.set_num_threads(before)


def test_long_sequences_are_left_to_pytorch(monkeypatch):
    """Where the kernel's scores leave the caches; by name it takes them all the same."""
    module = sys.modules["crossvit_kernels.self_attention"]
    qkv = normal(1, 21, 144).float()
    of = {name: self_attention(qkv, 3, backend=name) for name in ("cpu", "torch")}
    assert not torch.equal(of["cpu"], of["torch"])
    assert torch.equal(self_attention(qkv, 3), of["cpu"])
    monkeypatch.setattr(module, "_LONGEST_ON_CPU", 20)
    assert torch.equal(self_attention(qkv, 3), of["torch"])
    assert torch.equal(self_attention(qkv, 3, backend="cpu"), of["cpu"])


def test_no_tokens_at_all():
    for shape in ((0, 5, 18), (2, 0, 18)):
        for backend in ("auto", "cpu", "reference"):
            assert self_attention(torch.zeros(shape), 3, backend=backend).shape == (*shape[:2], 6)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"qkv": normal(5, 18)}, ValueError, r"qkv must have shape \[B, N, 3 C\], got \[5, 18\]: put"),
        ({"qkv": normal(2, 5, 17)}, ValueError, r"got \[2, 5, 17\]"),
        ({"qkv": normal(2, 5, 0)}, ValueError, "C must be at least 1, got 0"),
        ({"num_heads": 4}, ValueError, "num_heads must divide C = 6, got 4"),
        ({"num_heads": 0}, ValueError, "num_heads must divide C = 6, got 0"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must lie between 0 and 1, got 1.5"),
        ({"scale": float("nan")}, ValueError, "scale must be a finite number"),
        ({"qkv": torch.zeros(2, 5, 18).int()}, TypeError, "qkv must be a floating-point tensor"),
        ({"dropout_p": 0.1, "backend": "cpu"}, RuntimeError, "cpu: it has no dropout, got dropout_p = 0.1"),
        ({"return_attention": True, "backend": "torch"}, RuntimeError, "torch: it does not return"),
        ({"backend": "cuda"}, RuntimeError, "cuda: it does not implement self_attention"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_words(changes, error, words):
    arguments = {"qkv": normal(2, 5, 18).float(), "num_heads": 3, **changes}
    with pytest.raises(error, match=words):
        self_attention(**arguments)
