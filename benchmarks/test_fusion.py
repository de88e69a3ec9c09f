"""The fusion: the operation against the eager definition, and both directions against all-attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Race, assert_close, large
from crossvit import CrossViT, create_model
from crossvit_kernels import cross_attention, use_backend

# (B, C, H, P): S and L of crossvit_18 and S of the base model, eight images and one; larger ones.
SHAPES = [(b, *shape) for b in (8, 1) for shape in ((224, 7, 400), (448, 7, 196), (384, 12, 400))]
SHAPES += map(large, [(64, 224, 7, 400), (64, 448, 7, 196), (8, 224, 7, 1156)])
THREADS = ["all threads"] if torch.cuda.is_available() else ["one thread", "all threads"]


def ids(shape: tuple[int, ...]) -> str:
    return "B{}-C{}-H{}-P{}".format(*shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("threads", THREADS, indirect=True)
@pytest.mark.benchmark(group="cross_attention")
def test_cross_attention(shape, mode, dtype, threads, device, race: Race):
    """Against eager PyTorch, and against reading every input and writing every result once."""
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
    grad = torch.randn_like(cls)

    def forward(backend: str, args: list[Tensor] = inputs) -> list[Tensor]:
        return [cross_attention(*args, num_heads=heads, backend=backend)]

    def training(backend: str, args: list[Tensor] = inputs) -> list[Tensor]:
        (y,) = forward(backend, args)
        return [y, *torch.autograd.grad(y, args, grad.to(y.dtype))]

    run = forward if mode == "forward" else training
    with torch.set_grad_enabled(mode == "training"):
        for x in inputs:
            x.requires_grad_(mode == "training")
        exact = [x.detach().double().requires_grad_(mode == "training") for x in inputs]
        assert_close(run("auto"), run("reference", exact), 1e-5 if dtype == torch.float32 else 5e-2)
        results = run("auto")
        limit = bytes_once([x.detach() for x in inputs], [x.detach() for x in results])
        race(lambda: run("auto"), {"eager": lambda: run("reference"), "bytes once": limit})


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
