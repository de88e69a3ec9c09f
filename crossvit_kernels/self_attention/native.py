"""The step of the compiled module that computes self-attention."""

from __future__ import annotations

from ..program import Place, Precision, bits


def attention_step(
    qkv: Place, out: Place, tokens: int, heads: int, head_channels: int, precision: Precision, scale: float
) -> list[int]:
    """The words of struct SelfAttentionStep: qkv [tokens, 3 H d] to [tokens, H d]; the scale is positive."""
    return [*qkv.words(), *out.words(), tokens, heads, head_channels, int(precision), bits(scale)]
