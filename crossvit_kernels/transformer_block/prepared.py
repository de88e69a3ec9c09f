"""Transformer blocks for inference alone, with their weights laid out once, in memory that is given."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import BlockWeights

if TYPE_CHECKING:
    from ..linear.triton_launch import Statistics
    from .triton_launch import Layer, Normed


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


class PreparedLayer:
    """A LayerNorm and the linear layer behind it, on rows [M, C] of its dtype; copies of the weights.

    Args:
        norm, layer: weight and bias of each.
        share: what the layer's result is multiplied by.
    """

    def __init__(self, norm: Layer, layer: Layer, eps: float, dtype: torch.dtype, share: float = 1.0) -> None:
        from ..linear import triton_launch as linear

        weight, bias = layer
        if share != 1.0:
            weight, bias = weight.float() * share, None if bias is None else bias.float() * share
        self.weight, self.vectors = linear.fold(weight, bias, *norm, dtype)
        self.eps = eps

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return self.weight.nbytes + self.vectors.nbytes

    def normed(
        self, rows: Tensor, known: Statistics | None, room: tuple[Tensor, Tensor] | None = None
    ) -> Normed:
        """The rows before it; `room` is for them, normalised, and for their statistics, unless `known`."""
        from ..linear import triton_launch as linear
        from .triton_launch import Normed

        deferred = linear.defers(rows, self.weight)
        if not deferred:
            rows, found = linear.normalise(rows, self.eps, self.weight.dtype, room)
            known = linear.Statistics(found)
        elif known is None:
            known = linear.Statistics(linear.statistics(rows, None if room is None else room[1]))
        norm = linear.Norm(self.weight, self.vectors[0], self.vectors[1], known, self.eps, deferred)
        return Normed(rows, norm)


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
        from .triton_launch import layers_of

        layers = layers_of([None if w is None else w.detach() for w in weights.tensors()])
        norm1, qkv, proj, norm2, fc1, fc2 = layers
        self.num_heads, self.attention_scale, self.dtype = num_heads, attention_scale, dtype
        self.qkv = PreparedLayer(norm1, qkv, eps[0], dtype)
        self.fc1 = PreparedLayer(norm2, fc1, eps[1], dtype)
        self.proj, self.fc2 = (
            (weight.to(dtype, copy=True).contiguous(), None if bias is None else bias.float().clone())
            for weight, bias in (proj, fc2)
        )

    @property
    def hidden(self) -> int:
        """Channels within the MLP."""
        return len(self.fc1.weight)

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        others = sum(t.nbytes for t in (*self.proj, *self.fc2) if t is not None)
        return others + self.qkv.nbytes + self.fc1.nbytes

    def run(self, x: Tensor, space: Space, known: Statistics | None = None) -> Statistics | None:
        """Changes the tokens x [B, N, C], contiguous, into what the block makes of them.

        known: statistics of their rows, which lie in `space`, from the block before.
        Returns those of the new ones, where the next block can use them.
        """
        from ..linear import triton_launch as linear
        from ..self_attention import triton_launch as attention

        batch, tokens, channels = x.shape
        rows = x.view(-1, channels)
        narrow = _view(space.narrow, batch * tokens, channels)
        room = narrow, _view(space.sums, 1, 2, len(rows))

        def add(of: Tensor, layer: Layer, leaves: bool) -> Statistics | None:
            """To the rows, in place: a tile is read and written by one program."""
            left = linear.statistics_for(of, channels, space.sums) if leaves else None
            values = None if left is None else left.values
            linear.product(of, layer[0], rows, bias=layer[1], residual=rows, left=values)
            return left

        first = self.qkv.normed(rows, known, room)
        qkv = _view(space.wide, batch, tokens, 3 * channels)
        first.product(qkv.view(len(rows), -1))
        attention.forward(
            *(qkv, self.num_heads, self.attention_scale, self.dtype, False),
            into=narrow.view(batch, tokens, channels),
        )
        left = add(narrow, self.proj, first.norm.deferred)
        hidden = _view(space.wide, len(rows), self.hidden)
        self.fc1.normed(rows, left, room).product(hidden, activation="gelu")
        return add(hidden, self.fc2, first.norm.deferred)
