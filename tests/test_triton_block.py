"""A transformer block by Triton's kernels, compiled for a GPU and executed without one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import timm.models.vision_transformer
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from crossvit_kernels import BlockWeights, transformer_block
from crossvit_kernels.transformer_block import gpu_op
from tests.by_definition import normal
from tests.contract import STORED, check_values
from tests.test_triton_linear import on, saved_by

NAMES = ("x", *BlockWeights.__dataclass_fields__)
targets = pytest.mark.parametrize("target", ["sm_80", pytest.param("sm_90", marks=pytest.mark.sweep)])
# (B, N, C, H, hidden): nothing that fills a tile; several tiles, and a last one of half a width; one token.
SIZES = ((2, 19, 48, 3, 72), (1, 133, 64, 2, 192), (3, 1, 32, 1, 40))
FAST = (
    *(("sm_80", torch.float32, SIZES[0], False), ("sm_80", torch.bfloat16, SIZES[0], True)),
    *(("sm_90", torch.bfloat16, SIZES[1], True), ("sm_90", torch.float16, SIZES[2], False)),
)
CASES = [
    case if case in FAST else pytest.param(*case, marks=pytest.mark.sweep)
    for case in itertools.product(("sm_80", "sm_90"), STORED, SIZES, (False, True))
]


def inputs(size: Sequence[int]) -> list[Tensor]:
    """x, then the weights, in float64."""
    batch, tokens, width, _, hidden = size

    def layer(outputs: int, channels: int) -> list[Tensor]:
        return [normal(outputs, channels) / channels**0.5, normal(outputs) / 3]

    def norm() -> list[Tensor]:
        return [1 + 0.3 * normal(width), 0.3 * normal(width)]

    return [
        *(normal(batch, tokens, width) * 2 + 1, *norm(), *layer(3 * width, width), *layer(width, width)),
        *(*norm(), *layer(hidden, width), *layer(width, hidden)),
    ]


def oracle(x: Sequence[Tensor], size: Sequence[int], scales: Sequence[Tensor | None]) -> Tensor:
    """timm's block, its drop-path replaced by the numbers that were drawn."""
    _, _, width, heads, hidden = size
    block = timm.models.vision_transformer.Block(
        width,
        heads,
        mlp_ratio=hidden / width,
        qkv_bias=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    ).to(x[0].dtype)
    paths = [lambda y, s=s: y if s is None else y * s.to(y.dtype)[:, None, None] for s in scales]
    block.drop_path1.forward, block.drop_path2.forward = paths
    names = (
        *("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias"),
        *("attn.proj.weight", "attn.proj.bias", "norm2.weight", "norm2.bias"),
        *("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
    )
    return torch.func.functional_call(block, dict(zip(names, x[1:], strict=True)), (x[0],))


def run(
    x: Sequence[Tensor],
    size: Sequence[int],
    scales: Sequence[Tensor | None] = (None, None),
    backend: str = "triton",
) -> Tensor:
    if backend == "oracle":
        return oracle(x, size, scales)
    return transformer_block(
        x[0], BlockWeights(*x[1:]), num_heads=size[3], residual_scales=tuple(scales), backend=backend
    )


def both(x: Sequence[Tensor], size: Sequence[int], backend: str, **options: Any) -> dict[str, Tensor]:
    """y, and the gradients of all tensors, for a loss that weighs every element by itself."""
    leaves = [t.detach().requires_grad_() for t in x]
    y = run(leaves, size, backend=backend, **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).bfloat16().to(y.dtype)
    grads = torch.autograd.grad(y, leaves, weights)
    return {"y": y.detach(), **dict(zip(NAMES, grads, strict=True))}


def drawn(size: Sequence[int]) -> list[Tensor]:
    """As drop-path draws them: the first image keeps its attention, the last its MLP."""
    first, second = (torch.full(size[:1], 1.25) for _ in range(2))
    first[-1] = 0
    second[0] = 0 if size[0] > 1 else 1.5
    return [first, second]


def check(mine: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """By the rule for kernels; the key's bias, which cancels, has no gradient of a size to compare with."""
    for name, want in exact.items():
        found = [g[name] for g in (mine, eager, exact)]
        if name == "qkv_bias":
            width = len(want) // 3
            found = [torch.cat((g[:width], g[2 * width :])) for g in found]
        check_values(*found, name)


@pytest.mark.parametrize(("target", "dtype", "size", "drops"), CASES, ids=str)
def test_values_and_gradients(target, dtype, size, drops):
    x = [t.to(dtype) for t in inputs(size)]
    scales = drawn(size) if drops else (None, None)
    with on(target):
        mine = both(x, size, "triton", scales=scales)
    eager = both(x, size, "oracle", scales=scales)
    check(mine, eager, both([t.double() for t in x], size, "oracle", scales=scales))


@targets
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("drops", [False, True])
def test_under_autocast(target, dtype, drops):
    """float32 tokens and weights, products in 16 bits; gradients of weights are not rounded to these."""
    size = SIZES[0]
    x = [t.float() for t in inputs(size)]
    scales = drawn(size) if drops else (None, None)
    with on(target), torch.autocast("cpu", dtype):
        mine = both(x, size, "triton", scales=scales)
    with torch.autocast("cpu", dtype):
        eager = both(x, size, "oracle", scales=scales)
    assert all(g.dtype == torch.float32 for g in mine.values())
    exact = both([t.double() for t in x], size, "oracle", scales=scales)
    check(*({name: g.to(dtype) for name, g in found.items()} for found in (mine, eager)), exact)
    assert any((g != g.to(dtype)).any() for name, g in mine.items() if name.endswith("weight"))


def test_the_definitions_are_timms():
    size = SIZES[0]
    x, scales = inputs(size), [s.double() for s in drawn(size)]
    want = both(x, size, "oracle", scales=scales)
    for backend in ("reference", "torch"):
        found = both(x, size, backend, scales=scales)
        for name, exact in want.items():
            torch.testing.assert_close(found[name], exact, rtol=1e-9, atol=1e-9, msg=name)


@targets
def test_without_biases(target):
    size = SIZES[0]
    x: list[Any] = [t.bfloat16() for t in inputs(size)]
    without = [None if i in (2, 4, 6, 8, 10, 12) else t for i, t in enumerate(x)]
    zeros = [torch.zeros_like(t) if i in (2, 4, 6, 8, 10, 12) else t for i, t in enumerate(x)]
    with on(target):
        found = []
        for tensors in (without, zeros):
            leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
            y = run(leaves, size)
            kept = [t for t in leaves[::2] if t is not None] + leaves[1::2]
            found.append([y, *torch.autograd.grad(y.square().sum(), [leaves[0], *leaves[1::2]])])
            assert kept
    for mine, want in zip(*found, strict=True):
        assert torch.equal(mine, want)


def test_strides_and_the_settings():
    """Tokens of any strides, another scale of the scores, another eps in either LayerNorm."""
    size = SIZES[0]
    x = [t.float() for t in inputs(size)]
    x[0] = x[0].mT.contiguous().mT
    options = {"num_heads": 3, "attention_scale": 0.7, "eps": (0.5, 0.1)}
    found = []
    for backend in ("triton", "reference"):
        leaves = [t.detach().requires_grad_() for t in x]
        with on("sm_80"):
            y = transformer_block(leaves[0], BlockWeights(*leaves[1:]), backend=backend, **options)
            found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for mine, want in zip(*found, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=2e-4 * want.abs().max().item())


@pytest.mark.parametrize(
    ("dtype", "autocast", "of_token"),
    [
        # Elements of 2 bytes: qkv, attention, u, z, beside x itself; of 4 under autocast: none, but
        # normalised rows in 2.
        (torch.bfloat16, False, 2 * (3 * 48 + 48 + 48 + 72)),
        (torch.float32, False, 4 * (3 * 48 + 48 + 48 + 72)),
        (torch.float32, True, 2 * (3 * 48 + 48 + 72 + 2 * 48)),
    ],
    ids=str,
)
def test_what_is_saved(dtype, autocast, of_token):
    size = SIZES[0]
    leaves = [t.to(dtype).requires_grad_() for t in inputs(size)]
    with on("sm_90"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        saved = saved_by(lambda: run(leaves, size))
    own = {t.data_ptr() for t in leaves}
    beyond = sum(t.nbytes for t in saved if t.data_ptr() not in own)
    numbers = 4 * (3 + 2 * 2)  # log-sum-exp of each head, and two statistics of each LayerNorm
    assert beyond == 38 * (of_token + numbers)
    assert (leaves[0].data_ptr() in {t.data_ptr() for t in saved}) is not autocast


def test_no_product_is_done_twice():
    """Four forward, four of them to the inputs and four to the weights backward."""
    x = [t.bfloat16() for t in inputs(SIZES[0])]
    with on("sm_90") as recorder:
        both(x, SIZES[0], "triton")
    names = [launch.name for launch in recorder.launches]
    counts = {name: names.count(name) for name in ("product", "weight_gradient", "attend", "statistics")}
    assert counts == {"product": 8, "weight_gradient": 4, "attend": 1, "statistics": 1}
    assert names.count("gradient_of_rows") == 1


def test_only_what_is_wanted_is_computed():
    x = [t.bfloat16() for t in inputs(SIZES[0])]
    with on("sm_90") as recorder:
        leaf = x[0].detach().requires_grad_()
        y = run([leaf, *x[1:]], SIZES[0])
        torch.autograd.grad(y.sum(), leaf)
        assert "weight_gradient" not in {launch.name for launch in recorder.launches}
        with torch.no_grad():
            assert torch.equal(run(x, SIZES[0]), y)


def test_the_same_bits_and_memory_that_holds_anything():
    """In deterministic mode PyTorch fills what is allocated with NaN."""
    x = [t.bfloat16() for t in inputs(SIZES[1])]
    with on("sm_90", multiprocessors=4):
        first = both(x, SIZES[1], "triton")
        torch.use_deterministic_algorithms(True)
        try:
            second = both(x, SIZES[1], "triton")
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_second_derivatives():
    size = SIZES[0]
    x = [t.float() for t in inputs(size)]
    found = []
    for backend in ("triton", "reference"):
        leaves = [t.detach().requires_grad_() for t in x]
        with on("sm_80"):
            grads = torch.autograd.grad(
                run(leaves, size, backend=backend).sum(), leaves[0], create_graph=True
            )
            found.append(torch.autograd.grad(grads[0].square().sum(), leaves[:4]))
    for mine, want in zip(*found, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())
    leaves = [t.detach().requires_grad_() for t in x]
    with on("sm_80"), torch.autocast("cpu", torch.bfloat16):
        y = run(leaves, size)
    with pytest.raises(RuntimeError, match="call it with backend='torch'"):
        torch.autograd.grad(y.sum(), leaves[0], create_graph=True)


def test_the_operator_itself():
    size = SIZES[0]
    with on("sm_80"):
        for dtype, scales in ((torch.float32, drawn(size)), (torch.bfloat16, (None, None))):
            leaves = [t.float().requires_grad_() for t in inputs(size)]
            arguments = (leaves[0], leaves[1:], *scales, 3, 0.25, 1e-6, 1e-5, dtype, True)
            torch.library.opcheck(gpu_op.FORWARD, arguments)
            y, *saved = (t.detach() for t in gpu_op.FORWARD(*arguments))
            plain = [t.detach() for t in leaves]
            x = plain[0] if dtype == torch.float32 else None
            given = (torch.ones_like(y), x, plain[1:], *scales, saved, *arguments[4:9], [True] * 12)
            torch.library.opcheck(gpu_op.BACKWARD, given)


def test_compiling_and_checkpointing():
    """torch.compile in one graph; a checkpoint, which runs forward again within backward."""
    size = SIZES[0]
    x = [t.float() for t in inputs(size)]

    def through(tokens: Tensor) -> Tensor:
        return run([tokens, *x[1:]], size) * 2

    def again(tokens: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(through, tokens, use_reentrant=False)

    with on("sm_80"):
        results = []
        for function in (through, torch.compile(through, fullgraph=True, backend="aot_eager"), again):
            leaf = x[0].detach().requires_grad_()
            y = function(leaf)
            results.append((y.detach(), torch.autograd.grad(y.sum(), leaf)[0]))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=0, atol=0)


def test_another_batch_compiles_nothing():
    with on("sm_90") as recorder:
        counts = []
        for batch in (2, 3, 5):
            both([t.bfloat16() for t in inputs((batch, 64, 32, 2, 64))], (batch, 64, 32, 2, 64), "triton")
            counts.append(recorder.compilations)
    assert len(set(counts[1:])) == 1


def test_no_images():
    size = (0, 19, 48, 3, 72)
    with on("sm_80") as recorder:
        for name, found in both([t.float() for t in inputs(size)], size, "triton").items():
            assert not found.any(), name
    assert not recorder.launches


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"backend": "triton"}, RuntimeError, "triton: it runs on cuda, the tokens are on cpu"),
        ({"backend": "cpu"}, RuntimeError, "cpu: it does not implement transformer_block"),
        ({"num_heads": 5}, ValueError, "num_heads must divide C = 48, got 5"),
        ({"attention_scale": float("inf")}, ValueError, "attention_scale must be a finite number"),
        (
            {"residual_scales": (torch.ones(3), None)},
            ValueError,
            r"residual_scales\[0\] must have shape \[B\]",
        ),
        (
            {"residual_scales": (torch.ones(2, requires_grad=True), None), "backend": "triton"},
            RuntimeError,
            "triton: it has no gradients of the residual scales",
        ),
        ({"num_heads": 6, "backend": "triton"}, RuntimeError, "it takes heads of 16, 32"),
        ({"attention_scale": -1.0, "backend": "triton"}, RuntimeError, "it takes positive scales"),
    ],
)
def test_what_it_refuses(options, error, words):
    x = [t.float() for t in inputs(SIZES[0])]
    with pytest.raises(error, match=words):
        transformer_block(x[0], BlockWeights(*x[1:]), **{"num_heads": 3, **options})


@pytest.mark.parametrize("name", [name for name in NAMES[1:] if name.endswith("weight")])
def test_shapes_are_checked(name):
    x = dict(zip(NAMES, (t.float() for t in inputs(SIZES[0])), strict=True))
    x[name] = x[name][..., 1:]
    with pytest.raises(ValueError, match=f"weights.{name} must have shape"):
        transformer_block(x.pop("x"), BlockWeights(**x), num_heads=3)
