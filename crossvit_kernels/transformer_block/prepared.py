"""Transformer blocks for inference alone, with their weights laid out once, in memory that is given."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import BlockWeights

if TYPE_CHECKING:
    from ..linear.triton_launch import Statistics


class Space:
    """What the blocks of a branch pass from step to step, for as many images at most.

    Attributes:
        wide: for queries, keys and values, and for the hidden channels of the MLP; before the first block,
            for the patches of images.
        narrow: for rows behind a LayerNorm where these are written, and for the attention.
        sums: for statistics of rows.
    """

    def __init__(
        self,
        images: int,
        tokens: int,
        channels: int,
        widest: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        from ..linear.triton_launch import most_statistics

        count = images * tokens
        self.wide = torch.empty(count * widest, dtype=dtype, device=device)
        self.narrow = torch.empty(count * channels, dtype=dtype, device=device)
        self.sums = torch.empty(count * most_statistics(channels), dtype=torch.float32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(x.nbytes for x in (self.wide, self.narrow, self.sums))


def _view(memory: Tensor, *shape: int) -> Tensor:
    return memory[: math.prod(shape)].view(shape)


class PreparedBlock:
    """A block by Triton's kernels. What it keeps of the weights are copies.

    Args:
        weights: the parameters.
        num_heads, attention_scale, eps: as in `transformer_block`.
        dtype: of the tokens and of the matrices.
    """

    def __init__(
        self,
        weights: BlockWeights,
        num_heads: int,
        attention_scale: float,
        eps: tuple[float, float],
        dtype: torch.dtype,
    ) -> None:
        from ..linear import triton_launch as linear
        from .triton_launch import layers_of

        layers = layers_of([None if w is None else w.detach() for w in weights.tensors()])
        norm1, qkv, proj, norm2, fc1, fc2 = layers
        self.num_heads, self.attention_scale, self.eps, self.dtype = num_heads, attention_scale, eps, dtype
        self.behind_norms = [
            linear.fold(*layer, *norm, dtype) for layer, norm in ((qkv, norm1), (fc1, norm2))
        ]
        self.others = [
            (weight.to(dtype, copy=True).contiguous(), None if bias is None else bias.float().clone())
            for weight, bias in (proj, fc2)
        ]

    @property
    def hidden(self) -> int:
        """Channels within the MLP."""
        return len(self.behind_norms[1][0])

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        tensors = [t for pair in (*self.behind_norms, *self.others) for t in pair if t is not None]
        return sum(t.nbytes for t in tensors)

    def run(self, x: Tensor, space: Space, known: Statistics | None = None) -> Statistics | None:
        """Changes the tokens x [B, N, C], contiguous, into what the block makes of them.

        known: statistics of their rows, which lie in `space`, from the block before.
        Returns those of the new ones, where the next block can use them.
        """
        from ..linear import triton_launch as linear
        from ..self_attention import triton_launch as attention
        from .triton_launch import Normed

        batch, tokens, channels = x.shape
        rows = x.view(-1, channels)
        narrow = _view(space.narrow, batch * tokens, channels)

        def normed(which: int, known: Statistics | None) -> Normed:
            weight, vectors = self.behind_norms[which]
            before, deferred = rows, linear.defers(rows, weight)
            if not deferred or known is None:
                room = _view(space.sums, 1, 2, len(rows))
                if deferred:
                    linear.statistics(rows, room)
                else:
                    before, _ = linear.normalise(rows, self.eps[which], self.dtype, (narrow, room))
                known = linear.Statistics(room)
            norm = linear.Norm(weight, vectors[0], vectors[1], known, self.eps[which], deferred)
            return Normed(before, norm)

        def residual(which: int, of: Tensor, leaves: bool) -> Statistics | None:
            """In place: a tile is read and written by one program."""
            weight, bias = self.others[which]
            left = linear.statistics_for(of, channels, space.sums) if leaves else None
            values = None if left is None else left.values
            linear.product(of, weight, rows, bias=bias, residual=rows, left=values)
            return left

        first = normed(0, known)
        qkv = _view(space.wide, batch, tokens, 3 * channels)
        first.product(qkv.view(len(rows), -1))
        attention.forward(
            *(qkv, self.num_heads, self.attention_scale, self.dtype, False),
            into=narrow.view(batch, tokens, channels),
        )
        left = residual(0, narrow, first.norm.deferred)
        hidden = _view(space.wide, len(rows), self.hidden)
        normed(1, left).product(hidden, activation="gelu")
        return residual(1, hidden, first.norm.deferred)
