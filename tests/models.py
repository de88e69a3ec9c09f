"""Models small enough for every test, and what they are compared by; without timm, which child processes
would have to import."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossvit import CrossViT
from crossvit_kernels import use_backend


def small_model(**options: object) -> CrossViT:
    """A CrossViT of 48 pixels that is large enough to have every part."""
    arguments: dict[str, object] = {
        "img_size": 48,
        "embed_dim": (24, 48),
        "num_heads": (3, 3),
        "depth": ((1, 2, 0),) * 2,
        "mlp_ratio": (2, 2, 1),
        "num_classes": 5,
    }
    return CrossViT(**{**arguments, **options}).eval()


def spread(model: CrossViT, by: float = 0.05) -> CrossViT:
    """Parameters away from the initial ones, so that no gain or bias is trivial."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * by)
    return model.eval()


def drawn(model: CrossViT) -> CrossViT:
    """Parameters for a model that was built without any."""
    with torch.no_grad():
        for name, p in model.to_empty(device="cpu").named_parameters():
            p.normal_(std=0.03)
            if p.ndim == 1 and name.endswith("weight"):
                p.add_(1)
    return model.eval()


def small(**options: Any) -> CrossViT:
    return spread(small_model(**options))


def image(model: CrossViT, batch: int = 2) -> Tensor:
    return torch.randn(batch, model.in_chans, *model.img_size)


def exact(model: CrossViT, x: Tensor) -> Tensor:
    """The model's logits in float64, by torch's operators."""
    with torch.no_grad():
        return copy.deepcopy(model).unfreeze().double()(x.double())


def trained(model: CrossViT, steps: int) -> list[float]:
    """Losses of a few steps on a toy task; every parameter gets a finite gradient in each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x, labels = torch.randn(8, 3, 48, 48), torch.arange(8) % 5
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses


def distance(got: Tensor, want: Tensor) -> float:
    """Of the whole, in proportion: what two precisions are compared by."""
    assert torch.isfinite(got).all()
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def through_modules(of: nn.Module, x: Tensor) -> Tensor:
    """What its submodules compute, called one by one, with torch's operators."""
    with use_backend("reference"), torch.no_grad():
        return of(x)
