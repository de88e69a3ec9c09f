"""The engine of the CPU: the call into csrc/cross_attention."""

from __future__ import annotations

import struct

import torch

from .. import native
from ..program import bits
from .directions import Direction, ForwardOutputs, Gradients
from .packing import pack_backward, pack_forward


def saved_floats(width: int, heads: int) -> int:
    """What forward leaves for backward, an image; csrc/cross_attention/cross_attention.h lays it out."""
    return (4 + heads) * ((width + 15) // 16 * 16) + (2 * heads + 15) // 16 * 16


def forward(directions: list[tuple[Direction, ForwardOutputs]], eps: float, dropout_p: float) -> None:
    """One or two directions, into their outputs. An empty batch has nothing to compute."""
    if directions[0][0].patches.shape[0] > 0:
        _run(pack_forward(directions), False, eps, dropout_p)


def backward(directions: list[tuple[Direction, Gradients]], eps: float, dropout_p: float) -> None:
    """One or two directions, into their gradients."""
    if directions[0][0].patches.shape[0] > 0:
        _run(pack_backward(directions), True, eps, dropout_p)


def _run(packed: list[bytes], backward: bool, eps: float, dropout_p: float) -> None:
    module = native.load()
    # Asked of torch: OpenMP's own number is each thread's, and torch sets it when a thread first asks.
    isa, threads, floats = module.cross_attention_plan(packed, backward, torch.get_num_threads())
    scratch = torch.empty(floats, dtype=torch.float32, device="cpu")
    module.cross_attention(packed, backward, scratch.data_ptr(), isa, threads, eps, dropout_p)


def fusion_step(directions: list[tuple[Direction, ForwardOutputs]], eps: float) -> list[int]:
    """The words of struct FusionStep: forward of both directions, of the images whose first one they show."""
    words = [bits(eps)]
    length = native.load().direction_words
    for packed in pack_forward(directions):
        fields = list(struct.unpack(f"{len(packed) // 8}q", packed))
        words += fields + [0] * (length - len(fields))
    return words
