"""A model small enough for every test; without timm, which child processes would have to import."""

from __future__ import annotations

from crossvit import CrossViT


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
