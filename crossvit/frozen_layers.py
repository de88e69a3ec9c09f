"""The layers of a frozen model on a GPU: packed weights, and launches on memory that is given.

`TritonLayers` are the kernels of this package, `TorchLayers` PyTorch's operators, for GPUs where those are
not known to be ahead, and where there is no Triton. What both launch can be recorded as a CUDA graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossvit_kernels import BlockWeights, FusionWeights, cross_fusion, validation
from crossvit_kernels.backends import selected
from crossvit_kernels.cross_attention.directions import Direction, ForwardOutputs
from crossvit_kernels.cross_attention.gpu_preference import chosen
from crossvit_kernels.cross_attention.op import engine
from crossvit_kernels.patch_embed import reference as patch_reference
from crossvit_kernels.self_attention import reasons_of_triton
from crossvit_kernels.transformer_block import reference
from crossvit_kernels.transformer_block.prepared import PreparedBlock, PreparedLayer, Space
from crossvit_kernels.validation import Kind

from .encoder import MultiScaleBlock
from .fusion import CrossAttentionBlock
from .layers import Attention, Block, PatchEmbed, resize_position_embedding
from .native_block import parameters_of, settings_of

if TYPE_CHECKING:
    from .model import CrossViT

Standardisation = tuple[Sequence[float], Sequence[float]]  # mean and std


class Layers(ABC):
    """What both kinds have in common. Weights are copies in `dtype`; tokens are of it, too.

    A branch's tokens are [B, 1 + P, C], contiguous, and changed in place. `room` is what `room` gave.
    """

    def __init__(self, model: CrossViT, dtype: torch.dtype, standardisation: Standardisation | None) -> None:
        self.dtype, self.standardisation = dtype, standardisation
        self.device = next(model.parameters()).device
        mean, std = standardisation or ((0.0,) * model.in_chans, (1.0,) * model.in_chans)
        self.mean, self.std = (torch.tensor(x, device=self.device)[:, None, None] for x in (mean, std))
        self.widths = model.embed_dim
        self.patch_size, self.in_chans = model.patch_size, model.in_chans
        self.crop_scale = model.crop_scale
        self.stems = [self._stem(cast(PatchEmbed, embed)) for embed in model.patch_embed]
        self.positions = [self._copy(model._position(b)) for b in range(2)]
        self.cls_tokens = [self._copy(model._cls_token(b)).flatten() for b in range(2)]
        self.grids = model.grid_sizes(model.img_size)  # of the positions
        encoders = [cast(MultiScaleBlock, encoder) for encoder in model.blocks]
        self.fusions = [self._fusion(encoder) for encoder in encoders]
        self.blocks: list[list[list[Any]]] = [
            [[self._block(block) for block in branch] for branch in cast(Any, encoder).blocks]
            for encoder in encoders
        ]
        self.norms = [_copied(n.weight, n.bias, n.eps) for n in cast(Any, model.norm)]
        self.head: tuple[Tensor, Tensor] | None = None
        if model.num_classes:
            heads = cast(Any, model.head)
            weight = torch.cat([head.weight.detach().float() for head in heads], dim=1) / 2
            biases = [head.bias.detach().float() for head in heads if head.bias is not None]
            self.head = weight, sum(biases, start=weight.new_zeros(weight.shape[0])) / 2
        self.classes = sum(self.widths) if self.head is None else len(self.head[0])

    def _copy(self, x: Tensor) -> Tensor:
        return x.detach().to(self.dtype, copy=True)

    def _stem(self, embed: PatchEmbed) -> list[tuple[Tensor, Tensor | None, Any, Any]]:
        """Weight, bias, stride and padding of each convolution."""
        proj: Any = embed.proj
        convolutions: Any = proj[::2] if isinstance(proj, nn.Sequential) else [proj]
        return [
            (self._copy(c.weight), None if c.bias is None else self._copy(c.bias), c.stride, c.padding)
            for c in convolutions
        ]

    def _fusion(self, encoder: MultiScaleBlock) -> tuple[list[FusionWeights], tuple[int, int], float]:
        weights = encoder._weights()
        assert weights is not None
        found = []
        for w in weights:
            given = {f.name: getattr(w, f.name) for f in fields(w)}
            kept: dict[str, Any] = {
                name: None if t is None else t.detach().float().clone() if "norm" in name else self._copy(t)
                for name, t in given.items()
            }
            found.append(FusionWeights(**kept))
        blocks = cast(list[CrossAttentionBlock], list(cast(nn.ModuleList, encoder.fusion)))
        eps = cast(nn.LayerNorm, blocks[0].norm1).eps
        return found, (blocks[0].attn.num_heads, blocks[1].attn.num_heads), eps

    @abstractmethod
    def _block(self, block: Block) -> Any:
        """What computes a block."""

    def tensors(self) -> list[Tensor]:
        """All that is packed, but what blocks keep."""
        found: list[Tensor | None] = [*self.positions, *self.cls_tokens]
        found += [t for stem in self.stems for layer in stem for t in layer[:2]]
        found += [t for weights, _, _ in self.fusions for w in weights for t in w.tensors()]
        found += [t for norm in self.norms for t in norm[:2]]
        found += list(self.head or ())
        return [t for t in found if t is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights."""
        blocks = (block for encoder in self.blocks for branch in encoder for block in branch)
        return sum(t.nbytes for t in self.tensors()) + sum(block.nbytes for block in blocks)

    def room(self, branch: int, images: int, tokens: int) -> Any:
        """Memory that a branch needs beside its tokens, for so many images at most."""
        return None

    def position(self, branch: int, grid: tuple[int, int]) -> Tensor:
        """[1 + P, C], for patches of another grid than the model is built for."""
        return resize_position_embedding(self.positions[branch], self.grids[branch], grid)[0]

    def embed(
        self, b: int, images: Tensor, seen: tuple[int, int], position: Tensor, tokens: Tensor, room: Any
    ) -> None:
        """Tokens of a branch that sees images as so many (height, width) pixels."""
        size = (images.shape[2], images.shape[3])
        if seen != size and self.crop_scale and seen[0] <= size[0] and seen[1] <= size[1]:
            top, left = (round((size[i] - seen[i]) / 2.0) for i in range(2))
            images = images[..., top : top + seen[0], left : left + seen[1]]
        resized = None if tuple(images.shape[2:]) == seen else seen
        stem = self.stems[b]
        if len(stem) == 1:
            weight, bias, _, _ = stem[0]
            of_bytes = self.standardisation if images.dtype == torch.uint8 else None
            given = (images, weight, bias, position, self.cls_tokens[b], resized, *(of_bytes or (None, None)))
            self._embed_at_once(given, tokens, room)
            return
        if images.dtype == torch.uint8:
            images = ((images.float() / 255 - self.mean) / self.std).to(self.dtype)
        if resized is not None:
            images = F.interpolate(images, size=resized, mode="bicubic", align_corners=False)
        side = self.patch_size[b]
        y = images[..., : seen[0] // side * side, : seen[1] // side * side]
        for i, (weight, bias, stride, padding) in enumerate(stem):
            y = F.conv2d(F.relu(y) if i else y, weight, bias, stride, padding)
        self._add_position(y.flatten(2).mT, position, self.cls_tokens[b], tokens)

    @abstractmethod
    def _embed_at_once(self, given: tuple[Any, ...], tokens: Tensor, room: Any) -> None:
        """From what the operators of patch_embed take."""

    @abstractmethod
    def _add_position(self, patches: Tensor, position: Tensor, cls_token: Tensor, tokens: Tensor) -> None:
        """As the operation of this name, into the tokens."""

    @abstractmethod
    def run_blocks(self, encoder: int, branch: int, tokens: Tensor, room: Any) -> None:
        """The transformer blocks of a branch."""

    def fuse(self, encoder: int, tokens: Sequence[Tensor]) -> None:
        """The fusion of the tokens of both branches: their CLS rows change."""
        weights, heads, eps = self.fusions[encoder]
        new = cross_fusion(tokens[0], tokens[1], weights[0], weights[1], num_heads=heads, eps=eps)
        for old, fused in zip(tokens, new, strict=True):
            old[:, 0].copy_(fused[:, 0])

    def classify(self, tokens: Sequence[Tensor], logits: Tensor) -> None:
        """The mean of both heads, or without classes the normalised CLS rows side by side; float32."""
        features = torch.cat(
            [
                F.layer_norm(x[:, 0].float(), weight.shape, weight, bias, eps)
                for x, (weight, bias, eps) in zip(tokens, self.norms, strict=True)
            ],
            dim=1,
        )
        logits.copy_(features if self.head is None else F.linear(features, *self.head))


def _copied(weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, float]:
    return weight.detach().float().clone(), bias.detach().float().clone(), eps


class TorchBlock:
    """A block by PyTorch's operators."""

    def __init__(
        self, weights: list[Tensor | None], heads: int, scale: float, eps: tuple[float, float]
    ) -> None:
        self.weights, self.options = weights, (heads, scale, eps)

    @property
    def nbytes(self) -> int:
        return sum(w.nbytes for w in self.weights if w is not None)

    def run(self, x: Tensor) -> None:
        """Changes the tokens x."""
        x.copy_(reference.fused(x, self.weights, (None, None), *self.options, x.dtype))


class TorchLayers(Layers):
    """By PyTorch's operators, and the fusion as "auto" takes it."""

    def _block(self, block: Block) -> TorchBlock:
        settings = settings_of(block)
        weights = [None if p is None else self._copy(p) for p in parameters_of(block)]
        return TorchBlock(weights, settings.heads, settings.scale, settings.eps)

    def _embed_at_once(self, given: tuple[Any, ...], tokens: Tensor, room: Any) -> None:
        tokens.copy_(patch_reference.patch_embed(*given))

    def _add_position(self, patches: Tensor, position: Tensor, cls_token: Tensor, tokens: Tensor) -> None:
        tokens.copy_(patch_reference.add_position(patches, position, cls_token))

    def run_blocks(self, encoder: int, branch: int, tokens: Tensor, room: Any) -> None:
        for block in self.blocks[encoder][branch]:
            block.run(tokens)


class TritonLayers(Layers):
    """By the kernels of this package: LayerNorms are within the products behind them, statistics of rows are
    left by the products before, residuals are added in place."""

    def __init__(self, model: CrossViT, dtype: torch.dtype, standardisation: Standardisation | None) -> None:
        from crossvit_kernels.patch_embed.triton_launch import table_of_bytes

        super().__init__(model, dtype, standardisation)
        self.named = selected() == "triton"
        self.heads: list[PreparedLayer] = []
        if model.num_classes:  # each counts half
            self.heads = [
                PreparedLayer((norm[0], norm[1]), (h.weight.detach(), h.bias), norm[2], dtype, share=0.5)
                for norm, h in zip(self.norms, cast(Any, model.head), strict=True)
            ]
        if standardisation is not None:  # both branches read it, on streams that do not wait for each other
            table_of_bytes(model.in_chans, *map(tuple, standardisation), self.device)

    def _block(self, block: Block) -> PreparedBlock:
        settings = settings_of(block)
        weights = BlockWeights(*cast(Any, parameters_of(block)))
        return PreparedBlock(weights, settings.heads, settings.scale, settings.eps, self.dtype)

    def room(self, branch: int, images: int, tokens: int) -> Space:
        hidden = [b.hidden for encoder in self.blocks for b in encoder[branch]]
        pixels = self.in_chans * self.patch_size[branch] ** 2
        widest = max(3 * self.widths[branch], pixels, *hidden, 0)
        return Space(images, tokens, self.widths[branch], widest, self.dtype, self.device)

    def _embed_at_once(self, given: tuple[Any, ...], tokens: Tensor, room: Space) -> None:
        from crossvit_kernels.patch_embed import triton_launch

        arguments = (*given, tokens, room.wide)
        triton_launch.forward(*arguments)

    def _add_position(self, patches: Tensor, position: Tensor, cls_token: Tensor, tokens: Tensor) -> None:
        from crossvit_kernels.patch_embed import triton_launch

        triton_launch.add_position(patches, position, cls_token, into=tokens)

    def run_blocks(self, encoder: int, branch: int, tokens: Tensor, room: Space) -> None:
        known = None  # the fusion has changed the CLS rows
        for block in self.blocks[encoder][branch]:
            known = block.run(tokens, room, known)

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(head.nbytes for head in self.heads)

    def classify(self, tokens: Sequence[Tensor], logits: Tensor) -> None:
        if self.head is None:
            super().classify(tokens, logits)
        for b, head in enumerate(self.heads):
            before = head.normed(tokens[b][:, 0], None)
            before.product(logits, residual=logits if b else None)

    def fuse(self, encoder: int, tokens: Sequence[Tensor]) -> None:
        weights, heads, eps = self.fusions[encoder]
        kind = Kind("cross_fusion", self.device, self.widths, heads, self.dtype, self.dtype)
        name = "triton" if self.named else chosen(kind, len(tokens[0]), backward=False)
        if name == "torch":
            super().fuse(encoder, tokens)
            return
        directions = []
        for b, own in enumerate(tokens):
            other = tokens[1 - b][:, 1:]
            direction = Direction(own[:, :1], other, weights[b].tensors(), heads[b], stream=b)
            columns = engine(name).saved_floats(other.shape[2], heads[b])
            saved = own.new_empty((len(own), columns), dtype=torch.float32)
            # The CLS rows are read before they are written, and no direction reads the other's.
            directions.append((direction, ForwardOutputs(own[:, :1], None, None, saved)))
        engine(name).forward(directions, eps, 0.0)


def kinds_of(model: CrossViT, dtype: torch.dtype) -> list[Kind]:
    """What has to be right for `TritonLayers` to compute a model."""
    device = next(model.parameters()).device
    found = []
    for b, embed in enumerate(cast(Any, model.patch_embed)):
        width, side = model.embed_dim[b], model.patch_size[b]
        blocks = [block for encoder in cast(Any, model.blocks) for block in encoder.blocks[b]]
        sizes = {(block.mlp.fc1.weight.shape[0], block.attn.num_heads) for block in blocks}
        found += [
            Kind("transformer_block", device, (width, hidden), (heads,), dtype, dtype)
            for hidden, heads in sizes
        ]
        if isinstance(embed.proj, nn.Sequential):
            found.append(Kind("add_position", device, (width,), (), dtype, dtype))
        else:
            found.append(Kind("patch_embed", device, (width, side), (), dtype, dtype))
    return found


def reason_against_triton(model: CrossViT, dtype: torch.dtype, named: bool) -> str | None:
    """Why `TritonLayers` cannot compute a model; None when they can. They are tried, unless `named`."""
    for module in model.modules():
        if isinstance(module, Attention):
            channels = module.qkv.weight.shape[1] // module.num_heads
            if reasons := reasons_of_triton(channels, module.scale):
                return "; ".join(reasons)
    for kind in kinds_of(model, dtype):
        if reasons := kind.reasons_against("triton"):
            return "; ".join(reasons)
        if not named and not validation.trusted("triton", kind, False):
            return f"its kernels of {kind.operation} were found to be wrong on this GPU"
    return None
