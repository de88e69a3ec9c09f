"""The fusion: the operation against the eager definition, and both directions against all-attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Race, assert_close, large
from crossvit import CrossViT, create_model
from crossvit_kernels import cross_attention, use_backend

# (B, C, H, P): S and L of crossvit_18, one image and eight; the base model; larger batches.
SHAPES = [(8, 224, 7, 400), (8, 448, 7, 196), (1, 224, 7, 400), (1, 448, 7, 196)]
SHAPES += map(large, [(8, 384, 12, 400), (64, 224, 7, 400), (64, 448, 7, 196), (8, 224, 7, 1156)])


def ids(shape: tuple[int, ...]) -> str:
    return "B{}-C{}-H{}-P{}".format(*shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.benchmark(group="cross_attention")
def test_cross_attention(shape, mode, dtype, device, race: Race):
    batch, width, heads, patches = shape
    torch.manual_seed(0)
    tokens = torch.randn(batch, 1 + patches, width, dtype=dtype, device=device)
    weights = [1 + torch.randn(width) / 10, torch.randn(width) / 10]
    for _ in range(4):
        weights += [torch.randn(width, width) / width**0.5, torch.randn(width) / 10]
    weights = [w.to(device, dtype) for w in weights]
    cls = torch.randn(batch, 1, width, dtype=dtype, device=device)
    inputs = [cls, tokens, *weights]
    grad = torch.randn_like(cls)

    def forward(backend: str, args: list[Tensor] = inputs) -> list[Tensor]:
        cls, tokens, *weights = args
        return [cross_attention(cls, tokens[:, 1:], *weights, num_heads=heads, backend=backend)]

    def training(backend: str, args: list[Tensor] = inputs) -> list[Tensor]:
        (y,) = forward(backend, args)
        return [y, *torch.autograd.grad(y, args, grad.to(y.dtype))]

    run = forward if mode == "forward" else training
    with torch.set_grad_enabled(mode == "training"):
        for x in inputs:
            x.requires_grad_(mode == "training")
        exact = [x.detach().double().requires_grad_(mode == "training") for x in inputs]
        assert_close(run("auto"), run("reference", exact), 1e-5 if dtype == torch.float32 else 5e-2)
        race(lambda: run("auto"), {"eager": lambda: run("reference")})


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.benchmark(group="fusion of both branches")
def test_fusion_of_both_branches(batch, mode, device, race: Race):
    """One encoder of crossvit_18: f, cross-attention and g in both directions."""

    def encoder(fusion: str) -> torch.nn.Module:
        torch.manual_seed(0)
        model: CrossViT = create_model("crossvit_18", fusion=fusion)
        return model.blocks[0].to(device)

    cross, everything = encoder("cross"), encoder("all")
    tokens = [torch.randn(batch, n, c, device=device) for n, c in ((401, 224), (197, 448))]

    def forward(module: torch.nn.Module, backend: str = "auto") -> list[Tensor]:
        with use_backend(backend):
            return module.fuse(tokens)

    def training(module: torch.nn.Module, backend: str = "auto") -> list[Tensor]:
        leaves = [*tokens, *(p for name, p in module.named_parameters() if not name.startswith("blocks"))]
        outputs = forward(module, backend)
        return [*outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), leaves)]

    run = forward if mode == "forward" else training
    rivals = {"eager": (cross, "reference"), "all-attention": (everything, "auto")}
    with torch.set_grad_enabled(mode == "training"):
        for x in tokens:
            x.requires_grad_(mode == "training")
        assert_close(run(cross), run(cross, "reference"), 1e-4)
        race(lambda: run(cross), {name: (lambda a=args: run(*a)) for name, args in rivals.items()})
