"""The fusion: the operation against other ways to compute it, and both directions against all-attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.conftest import Race, assert_close, large
from crossvit import CrossViT, create_model
from crossvit._timm import import_timm
from crossvit_kernels import cross_attention, use_backend

Way = Callable[..., Tensor]
EPS = 1e-6

# (B, C, H, P): S and L of crossvit_18, eight images and one; S of the base model, larger ones.
SHAPES = [(b, *shape) for b in (8, 1) for shape in ((224, 7, 400), (448, 7, 196))]
COMPILED = SHAPES[:1]  # of the default run; compiling takes longer than all the rest
LARGE = [(8, 384, 12, 400), (1, 384, 12, 400), (64, 224, 7, 400), (64, 448, 7, 196), (8, 224, 7, 1156)]
THREADS = ["all threads"] if torch.cuda.is_available() else ["one thread", "all threads"]


def ids(shape: tuple[int, ...]) -> str:
    return "B{}-C{}-H{}-P{}".format(*shape)


def with_fused_attention(
    cls: Tensor, patches: Tensor, norm_weight: Tensor, norm_bias: Tensor, *matrices: Tensor, num_heads: int
) -> Tensor:
    """Eq. 6 and 7 with torch's fused attention, as one would write it today."""
    wq, bq, wk, bk, wv, bv, wo, bo = matrices
    tokens = torch.cat((cls, patches), dim=1)
    x = F.layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias, EPS)
    q, k, v = (
        F.linear(rows, w, bias).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        for rows, w, bias in ((x[:, :1], wq, bq), (x, wk, bk), (x, wv, bv))
    )
    heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return cls + F.linear(heads, wo, bo)


def why_not(compiled: Callable[[], object]) -> str:
    """Why it cannot be compiled here, in a line; empty when it can."""
    try:
        compiled()
    except torch._dynamo.exc.BackendCompilerFailed as error:
        return str(error).partition("\n")[0]
    return ""


def timms_module(weights: list[Tensor], heads: int) -> nn.Module:
    module = import_timm().models.crossvit.CrossAttentionBlock(
        weights[0].numel(), heads, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=EPS)
    )
    module.to(weights[0].device, weights[0].dtype)
    for p, value in zip(module.parameters(), weights, strict=True):
        p.data.copy_(value)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("shape", [*SHAPES, *map(large, LARGE)], ids=ids)
@pytest.mark.parametrize("threads", THREADS, indirect=True)
@pytest.mark.benchmark(group="cross_attention")
def test_cross_attention(shape, mode, dtype, threads, device, race: Race, benchmark, request):
    """Against the definition in eager PyTorch, with its fused attention, compiled; timm's module; this
    package's other backends; and reading every input and writing every result once.
    """
    batch, width, heads, patches = shape
    torch.manual_seed(0)
    tokens = torch.randn(batch, 1 + patches, width, dtype=dtype, device=device)
    weights = [1 + torch.randn(width) / 10, torch.randn(width) / 10]
    for _ in range(4):
        weights += [torch.randn(width, width) / width**0.5, torch.randn(width) / 10]
    weights = [w.to(device, dtype) for w in weights]
    cls = torch.randn(batch, 1, width, dtype=dtype, device=device)
    # The rows behind the CLS token, as they lie in a branch's buffer.
    inputs = [cls, tokens[:, 1:], *weights]
    module = timms_module(weights, heads)

    def ours(backend: str) -> Way:
        return lambda *x: cross_attention(*x, num_heads=heads, backend=backend)

    ways: dict[str, Way] = {
        "eager": ours("reference"),
        "SDPA": partial(with_fused_attention, num_heads=heads),
        "timm": lambda cls, patches, *_: module(torch.cat((cls, patches), dim=1)),
    }
    if request.config.getoption("--full") or (shape in COMPILED and dtype == torch.float32):
        torch.compiler.reset()
        ways["torch.compile"] = torch.compile(ours("reference"), fullgraph=True, dynamic=False)
    for backend in ("triton", "cuda", "torch") if device.type == "cuda" else ("torch",):
        ways[f"backend {backend}"] = ours(backend)

    training = mode == "training"
    grad = torch.randn_like(cls)

    def run(way: Way, args: list[Tensor], of: list[Tensor] | None = None) -> list[Tensor]:
        y = way(*args)
        return [y, *torch.autograd.grad(y, of or args, grad.to(y.dtype))] if training else [y]

    with torch.set_grad_enabled(training):
        for x in inputs:
            x.requires_grad_(training)
        exact = [x.detach().double().requires_grad_(training) for x in inputs]
        bound = 1e-5 if dtype == torch.float32 else 5e-2
        want = run(ours("reference"), exact)
        leaves = {"timm": [*inputs[:2], *module.parameters()]}
        assert_close(run(ours("auto"), inputs), want, bound)
        if "torch.compile" in ways and (reason := why_not(lambda: run(ways["torch.compile"], inputs))):
            benchmark.extra_info["not run torch.compile"] = reason
            del ways["torch.compile"]
        for name, way in ways.items():  # whose rounding is not ours to bound
            assert_close(run(way, inputs, leaves.get(name)), want, 10 * bound)
        limit = bytes_once([x.detach() for x in inputs], [x.detach() for x in run(ours("auto"), inputs)])
        rivals = {n: (lambda n=n, w=w: run(w, inputs, leaves.get(n))) for n, w in ways.items()}
        given = [*inputs, *module.parameters()] if training else None
        race(lambda: run(ours("auto"), inputs), {**rivals, "bytes once": limit}, given)


def bytes_once(inputs: list[Tensor], results: list[Tensor]) -> Callable[[], object]:
    """Reads as many bytes as the inputs have and writes as many as the results have."""

    def as_floats(tensors: list[Tensor]) -> Tensor:
        return torch.zeros(sum(x.nbytes for x in tensors) // 4, device=tensors[0].device)

    read, written = as_floats(inputs), as_floats(results)

    def run() -> None:
        read.sum()
        written.fill_(1.0)

    return run


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.benchmark(group="fusion of both branches")
def test_fusion_of_both_branches(batch, mode, device, race: Race):
    """One encoder of crossvit_18: f, cross-attention and g in both directions; also by timm's modules."""

    def encoder(fusion: str) -> nn.Module:
        torch.manual_seed(0)
        model: CrossViT = create_model("crossvit_18", fusion=fusion)
        return model.blocks[0].to(device)

    cross, everything = encoder("cross"), encoder("all")
    theirs: Any = import_timm().create_model("crossvit_18_240").blocks[0].to(device)
    theirs.load_state_dict(cross.state_dict())
    tokens = [torch.randn(batch, n, c, device=device) for n, c in ((401, 224), (197, 448))]

    def of_timm() -> list[Tensor]:
        """As its encoder's forward goes on behind the blocks."""
        projected = [project(x[:, :1]) for project, x in zip(theirs.projs, tokens, strict=True)]
        fused = []
        for b, (fusion, back) in enumerate(zip(theirs.fusion, theirs.revert_projs, strict=True)):
            row = fusion(torch.cat((projected[b], tokens[1 - b][:, 1:]), dim=1))
            fused.append(torch.cat((back(row[:, :1]), tokens[b][:, 1:]), dim=1))
        return fused

    def fuse(module: nn.Module, backend: str = "auto") -> list[Tensor]:
        with use_backend(backend):
            return module.fuse(tokens)

    ways = {
        "ours": (cross, lambda: fuse(cross)),
        "eager": (cross, lambda: fuse(cross, "reference")),
        "timm": (theirs, of_timm),
        "all-attention": (everything, lambda: fuse(everything)),
    }

    def run(name: str) -> list[Tensor]:
        module, way = ways[name]
        outputs = way()
        if mode == "forward":
            return outputs
        leaves = [*tokens, *(p for n, p in module.named_parameters() if not n.startswith("blocks"))]
        return [*outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), leaves)]

    with torch.set_grad_enabled(mode == "training"):
        for x in tokens:
            x.requires_grad_(mode == "training")
        for name in ("ours", "timm"):
            assert_close(run(name), run("eager"), 1e-4)
        modules = (cross, theirs, everything)
        given = [*tokens, *(p for m in modules for p in m.parameters())] if mode == "training" else None
        race(lambda: run("ours"), {name: (lambda n=name: run(n)) for name in ways if name != "ours"}, given)
