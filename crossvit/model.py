"""CrossViT: two branches of patch tokens that exchange information through their CLS tokens.

Attributes, methods and parameter names are those of timm's model, so that it can take its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import frozen_gpu
from .encoder import FUSIONS, MultiScaleBlock
from .freezable import remembered
from .frozen import Evaluation, Frozen
from .fusion import attention_grid
from .layers import (
    Block,
    NormLayer,
    PatchEmbed,
    embedded,
    embeds_at_once,
    init_linear_and_norm,
    init_weight,
    resize_position_embedding,
    with_cls,
    with_mean,
)
from .other_fusions import Grids
from .tokens_to_token import TokensToToken

Size = int | tuple[int, int]
_POOLS = ("token", "avg")
_LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


class AttentionMaps(NamedTuple):
    """What the CLS tokens look at in one encoder's fusion: softmax weights, before dropout.

    Attributes:
        small: [B, H, height, width]: S's CLS token over L's grid of patches.
        large: [B, H, height, width]: L's CLS token over S's grid of patches.
    """

    small: Tensor
    large: Tensor


class CrossViT(nn.Module):
    """CrossViT (Chen, Fan, Panda, ICCV 2021). Branch 0 is S (small patches), branch 1 is L (large ones).

    Args:
        img_size: the image the model is built for: pixels a side, or (height, width).
        img_scale: what each branch sees of it. A branch at 1.0 takes the image as it is; another one takes
            it resized by that factor, rounded to the nearest multiple of its patch on each axis.
        patch_size: pixels a side of each branch's patches.
        in_chans, num_classes: 0 classes leave the head out; the output is then pre-logits.
        embed_dim: C of each branch.
        depth: (S blocks, L blocks, cross-attentions in a row, where 0 means one) of each encoder.
        num_heads, mlp_ratio: of each branch.
        multi_conv: the dagger models' stem of three convolutions.
        t2t: patch tokens by soft splits and small transformers in both branches (tokens_to_token.py).
        crop_scale: give L a centre crop instead of a resized image, where it is no larger.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: before the head, after the
            position embedding, after projections and in MLPs, on attention, of residual branches.
        norm_layer: width -> LayerNorm; the default has eps 1e-6.
        global_pool: "token" or "avg", what the head reads of each branch.
        dynamic_img_size: take images of any size in forward; position embeddings are resized each time.
        fusion: "cross", or one that the paper compares it with, for which no weights were released: "all"
            for all-attention (Eq. 2), "class" for the sum of the CLS tokens (Eq. 3), "pairwise" for the sum
            of all tokens (Eq. 4), "none" for none before the heads. other_fusions.py says how they are read.
        identity_projections: f and g of the cross-attention are the identity where the widths are equal, as
            Table 7's row B counts its parameters.
        attends_again: of several cross-attentions in a row, the later ones see the patches as well. In the
            released code they see the CLS token alone.
        class_token: False for the model without CLS tokens: the mean of a branch's patch tokens takes the
            place of its CLS token, row 0. It is taken of the embedded patches, and again before each fusion,
            so that what a fusion wrote there acts on the patches through the blocks behind it, and the head
            reads what the last one wrote.
        backend: of the cross-attention, a name from crossvit_kernels.backends() or "auto".

    Raises:
        ValueError: an argument has a value that no model can have.
    """

    def __init__(
        self,
        img_size: Size = 240,
        img_scale: Sequence[float] = (1.0, 224 / 240),
        patch_size: Sequence[int] = (12, 16),
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: Sequence[int] = (192, 384),
        depth: Sequence[Sequence[int]] = ((1, 4, 0), (1, 4, 0), (1, 4, 0)),
        num_heads: Sequence[int] = (6, 6),
        mlp_ratio: Sequence[float] = (4.0, 4.0, 1.0),
        multi_conv: bool = False,
        crop_scale: bool = False,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: NormLayer = _LAYER_NORM,
        global_pool: str = "token",
        dynamic_img_size: bool = False,
        fusion: str = "cross",
        identity_projections: bool = False,
        attends_again: bool = False,
        class_token: bool = True,
        t2t: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_choice("global_pool", global_pool, _POOLS)
        _check_choice("fusion", fusion, FUSIONS)
        for name, pair in (("patch_size", patch_size), ("embed_dim", embed_dim), ("img_scale", img_scale)):
            if len(pair) != 2:
                raise ValueError(f"{name} must have one value for S and one for L, got {pair}")
        if multi_conv and t2t:
            raise ValueError("multi_conv and t2t exclude each other: both say how patches become tokens")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.img_scale = tuple(img_scale)
        self.patch_size = tuple(patch_size)
        self.crop_scale = crop_scale
        self.dynamic_img_size = dynamic_img_size
        self.fusion = fusion
        self.class_token = class_token
        self.num_branches = 2
        self.embed_dim = tuple(embed_dim)
        self.num_features = self.head_hidden_size = sum(embed_dim)
        self.grad_checkpointing = False
        self._frozen: Frozen | None = None
        self._evaluation = Evaluation()
        # What timm's data helpers read; create_model fills them.
        self.pretrained_cfg: dict[str, Any] = {}
        self.default_cfg: dict[str, Any] = {}

        self.img_size = self._check_built_size(_pair(img_size))
        for b, (rows, columns) in enumerate(self.grid_sizes(self.img_size)):
            shape = (1, int(class_token) + rows * columns, embed_dim[b])
            self.register_parameter(f"pos_embed_{b}", nn.Parameter(torch.zeros(shape, **factory)))
            if class_token:
                self.register_parameter(
                    f"cls_token_{b}", nn.Parameter(torch.zeros(1, 1, embed_dim[b], **factory))
                )
        self.patch_embed = nn.ModuleList(
            TokensToToken(patch_size[b], in_chans, embed_dim[b], norm_layer, **factory)
            if t2t
            else PatchEmbed(patch_size[b], in_chans, embed_dim[b], multi_conv, **factory)
            for b in range(2)
        )
        self._describe_sizes()
        self.pos_drop = nn.Dropout(pos_drop_rate)

        # Stochastic depth grows linearly over all blocks; within an encoder, S and L share their rates.
        lengths = [max(counts[:-1]) + counts[-1] for counts in depth]
        rates = torch.linspace(0, drop_path_rate, sum(lengths), device="cpu").tolist()
        starts = [sum(lengths[:k]) for k in range(len(lengths))]
        self.blocks = nn.ModuleList(
            MultiScaleBlock(
                embed_dim,
                counts,
                num_heads,
                mlp_ratio,
                qkv_bias=qkv_bias,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=rates[start : start + length],
                norm_layer=norm_layer,
                fusion=fusion,
                identity_projections=identity_projections,
                attends_again=attends_again,
                class_token=class_token,
                backend=backend,
                **factory,
            )
            for counts, start, length in zip(depth, starts, lengths, strict=True)
        )
        self.num_feature_blocks = len(depth)
        self.feature_info = [
            {
                "num_chs": embed_dim[b],
                "reduction": round(patch_size[b] / img_scale[b]),
                "module": f"blocks.{k}",
            }
            for b in range(2)
            for k in range(len(depth))
        ]
        self.norm = nn.ModuleList(norm_layer(width, **factory) for width in embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._new_head(**factory)

        for b in range(2):
            init_weight(self._position(b))
            if class_token:
                init_weight(self._cls_token(b))
        self.apply(init_linear_and_norm)

    def _new_head(self, **factory: Any) -> nn.ModuleList:
        return nn.ModuleList(
            nn.Linear(width, self.num_classes, **factory) if self.num_classes > 0 else nn.Identity()
            for width in self.embed_dim
        )

    def _position(self, branch: int) -> nn.Parameter:
        return getattr(self, f"pos_embed_{branch}")

    def _cls_token(self, branch: int) -> nn.Parameter:
        return getattr(self, f"cls_token_{branch}")

    # Image sizes

    def branch_sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """(height, width) in pixels that each branch sees of an image of `size`."""

        def scaled(pixels: int, scale: float, patch: int) -> int:
            return pixels if scale == 1.0 else max(1, math.floor(pixels * scale / patch + 0.5)) * patch

        return [
            (scaled(size[0], scale, patch), scaled(size[1], scale, patch))
            for scale, patch in zip(self.img_scale, self.patch_size, strict=True)
        ]

    def grid_sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """(rows, columns) of patches in each branch for an image of `size`."""
        return [
            (height // patch, width // patch)
            for (height, width), patch in zip(self.branch_sizes(size), self.patch_size, strict=True)
        ]

    def set_input_size(self, img_size: Size) -> None:
        """Rebuild for another image size: position embeddings are resized (bicubic), all else is kept.

        Raises:
            ValueError: the size is below one patch.
        """
        size = self._check_built_size(_pair(img_size))
        grids = zip(self.grid_sizes(self.img_size), self.grid_sizes(size), strict=True)
        for b, (old, new) in enumerate(grids):
            position = self._position(b)
            resized = resize_position_embedding(position.detach(), old, new)
            setattr(self, f"pos_embed_{b}", nn.Parameter(resized.clone(), position.requires_grad))
        self.img_size = size
        self._describe_sizes()

    def _describe_sizes(self) -> None:
        """What timm's users read of the sizes a model is built for."""
        self.img_size_scaled = self.branch_sizes(self.img_size)
        grids = self.grid_sizes(self.img_size)
        for embed, size, grid in zip(self.patch_embed, self.img_size_scaled, grids, strict=True):
            assert isinstance(embed, PatchEmbed | TokensToToken)
            embed.img_size, embed.num_patches = size, grid[0] * grid[1]

    def _nearest_sizes(self, size: tuple[int, int]) -> str:
        patch = self._smallest()
        below = tuple(max(patch, pixels // patch * patch) for pixels in size)
        above = tuple(-(-max(patch, pixels) // patch) * patch for pixels in size)
        if above == below:
            above = tuple(pixels + patch for pixels in below)
        return f"{below[0]}x{below[1]} and {above[0]}x{above[1]}"

    def _smallest(self) -> int:
        """The largest patch among the branches that take the image as it is."""
        sizes = zip(self.patch_size, self.img_scale, strict=True)
        return max([1, *(patch for patch, scale in sizes if scale == 1.0)])

    def _check_built_size(self, size: tuple[int, int]) -> tuple[int, int]:
        if min(size) < self._smallest():
            raise ValueError(
                f"an image of {size[0]}x{size[1]} is smaller than one patch of {self._smallest()} pixels; "
                f"the two nearest sizes that work are {self._nearest_sizes(size)}"
            )
        return size

    def _check_image(self, x: Tensor, may_be_bytes: bool = False) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"images must have shape [B, {self.in_chans}, height, width], got {list(x.shape)}"
            )
        if not x.is_floating_point() and not (may_be_bytes and x.dtype == torch.uint8):
            raise TypeError(f"images must be floating-point and normalised, got {x.dtype}")
        size = (x.shape[2], x.shape[3])
        if self.dynamic_img_size:
            self._check_built_size(size)
        elif size != self.img_size:
            raise ValueError(
                f"the model is built for images of {self.img_size[0]}x{self.img_size[1]}, got "
                f"{size[0]}x{size[1]}: resize the image, call set_input_size, or build the model with "
                f"dynamic_img_size=True; the two nearest sizes without a cut-off remainder are "
                f"{self._nearest_sizes(size)}"
            )

    # Forward

    def _embed(self, x: Tensor) -> list[Tensor]:
        """Images -> [B, 1 + P, C] of each branch, positions added."""
        self._check_image(x)
        size = (x.shape[2], x.shape[3])
        grids = zip(self.grid_sizes(self.img_size), self.grid_sizes(size), strict=True)
        tokens = []
        for b, (built, grid) in enumerate(grids):
            position = resize_position_embedding(self._position(b), built, grid)
            seen = self.branch_sizes(size)[b]
            stem, image = self.patch_embed[b], self._cropped(x, seen)
            if self.class_token and embeds_at_once(stem, x):
                found = embedded(image, stem, position, self._cls_token(b), seen)
                tokens.append(self.pos_drop(found))
                continue
            patches = stem(_resized(image, seen))
            if self.class_token:
                tokens.append(self.pos_drop(with_cls(patches, position, self._cls_token(b))))
            else:
                tokens.append(with_mean(self.pos_drop(patches + position)))
        return tokens

    def _cropped(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The image, or its centre of `size` where branches are given that and it is no larger."""
        height, width = x.shape[-2:]
        if (height, width) == size or not (self.crop_scale and size[0] <= height and size[1] <= width):
            return x
        top, left = round((height - size[0]) / 2.0), round((width - size[1]) / 2.0)
        return x[..., top : top + size[0], left : left + size[1]]

    def _scale_image(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return _resized(self._cropped(x, size), size)

    def _grids(self, x: Tensor) -> list[tuple[int, int]] | None:
        """Of the patches of images, where the fusion asks for them."""
        return self.grid_sizes((x.shape[2], x.shape[3])) if self.fusion == "pairwise" else None

    def _encode(
        self,
        tokens: list[Tensor],
        attention_maps: list[list[Tensor]] | None = None,
        grids: Grids | None = None,
    ) -> list[Tensor]:
        for encoder in self.blocks:
            tokens = self._run_encoder(encoder, tokens, attention_maps, grids)
        return tokens

    def _run_encoder(
        self,
        encoder: nn.Module,
        tokens: list[Tensor],
        attention_maps: list[list[Tensor]] | None = None,
        grids: Grids | None = None,
    ) -> list[Tensor]:
        given = {"attention_maps": attention_maps, "grids": grids}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if self.grad_checkpointing and torch.is_grad_enabled() and attention_maps is None:
            return checkpoint(encoder, tokens, use_reentrant=False, **options)
        return encoder(tokens, **options)

    def freeze(
        self,
        dtype: torch.dtype | None = None,
        check: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        batch_sizes: Sequence[int] = (),
        images_at_once: int | None = None,
    ) -> CrossViT:
        """Pack the weights for inference; `forward` is then one call into compiled code, or one CUDA graph.

        The model is put into eval mode, keeps its parameters, and gives logits without a gradient. Autocast
        is ignored: `dtype` says it all. Methods other than `forward` run as before.

        On a GPU a graph is recorded for each size of batch and image that comes a second time, at most eight
        are kept, and the S branch runs beside the L branch. A graph that cannot be recorded is done without,
        which is logged. Within `torch.cuda.graph` the model can be called where it was called with such
        images before; it must then stay frozen as long as that graph is used.

        Args:
            dtype: what matrices are multiplied in, by default bfloat16 for a model in bfloat16, on a GPU
                float16 for one in float16, else float32. On the CPU torch.float32 or torch.bfloat16, tokens
                stay float32; on a GPU torch.float16 as well, and tokens are of it, too.
            check: look for changes of the weights before each forward, and pack them again after one. Writes
                that torch does not count (`p.data.mul_()`, another process) are seen where they meet one of
                the elements that are compared, the first of every 4 KiB of each parameter and its last, on a
                GPU one call late. False leaves all of it out: what is frozen then stays as it is.
            mean, std: of each channel, of pixels between 0 and 1, as `default_cfg` has them. The frozen model
                then takes images in uint8 as well, as (pixel / 255 - mean) / std.
            batch_sizes: on a GPU, for which graphs are recorded now, for images of the size that the model is
                built for; in uint8 if there is a mean.
            images_at_once: on a GPU, how many images go through the layers together, None for the whole
                batch. Fewer stay in a cache that is large enough; measure before you set it.

        Returns:
            The model.

        Raises:
            ValueError: `dtype` is another one, mean and std do not fit, or a number of images is below 1.
            RuntimeError: the model cannot be frozen; the message has every reason.
        """
        on_gpu = frozen_gpu.is_on_gpu(self)
        allowed = (torch.float32, torch.bfloat16, *((torch.float16,) if on_gpu else ()))
        if dtype is None:
            dtype = next(self.parameters()).dtype
            dtype = dtype if dtype in allowed else torch.float32
        if dtype not in allowed:
            raise ValueError(f"dtype must be {' or '.join(map(str, allowed))}, got {dtype}")
        for name, numbers in (("batch_sizes", batch_sizes), ("images_at_once", [images_at_once])):
            for number in numbers:
                if number is not None and number < 1:
                    raise ValueError(f"{name} must be at least 1, got {number}")
        if (batch_sizes or images_at_once) and not on_gpu:
            raise ValueError("batch_sizes and images_at_once are for models on a GPU: move the model first")
        if (mean is None) != (std is None):
            raise ValueError("mean and std must be given together, or neither")
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            self._frozen = Frozen(self, dtype, check, mean, std, images_at_once, batch_sizes)
            self._evaluation.clear()
        except BaseException:
            for module in training:
                module.training = True
            raise
        return self

    def unfreeze(self) -> CrossViT:
        """Drop what `freeze` packed. The parameters, which it did not touch, are the model's again."""
        self._frozen = None
        return self

    def train(self, mode: bool = True) -> CrossViT:
        """Training mode; a frozen model has none.

        Raises:
            RuntimeError: the model is frozen.
        """
        if mode and self._frozen is not None:
            raise RuntimeError("a frozen model cannot be trained: call unfreeze() first")
        if mode:
            self._evaluation.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **options: Any) -> CrossViT:
        self._evaluation.clear()
        return super()._apply(*args, **options)

    @property
    def packed_nbytes(self) -> int:
        """Bytes beside the parameters: packed copies of them, memory for tokens, and that of CUDA graphs.

        They come with `freeze`, or with the first call in eval mode without a gradient, and go with `train`
        and `to`.
        """
        blocks = sum(m._packed.nbytes for m in self.modules() if isinstance(m, Block))
        frozen = 0 if self._frozen is None else self._frozen.nbytes
        return frozen + self._evaluation.nbytes + blocks

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Images [B, in_chans, height, width] -> normalised tokens [B, 1 + P, C] of S and of L."""
        tokens = self._encode(self._embed(x), grids=self._grids(x))
        return [norm(y) for norm, y in zip(self.norm, tokens, strict=True)]

    def _pool(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        if self.global_pool == "avg":
            return [x[:, 1:].mean(dim=1) for x in tokens]
        return [x[:, 0] for x in tokens]

    def _head(self, pooled: Sequence[Tensor], pre_logits: bool = False) -> Tensor:
        pooled = [self.head_drop(x) for x in pooled]
        if pre_logits or self.num_classes == 0:
            return torch.cat(pooled, dim=1)
        return torch.stack([head(x) for head, x in zip(self.head, pooled, strict=True)]).mean(dim=0)

    def forward_head(self, xs: Sequence[Tensor], pre_logits: bool = False) -> Tensor:
        """Normalised tokens of both branches -> logits [B, num_classes], the mean over the branches' heads;
        or, with pre_logits, the pooled features side by side [B, C_S + C_L]."""
        return self._head(self._pool(xs), pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, height, width] -> logits [B, num_classes].

        In eval mode, without a gradient, on the CPU, one program of the compiled module computes them from a
        packed copy of the weights, which is made at the first such call and again after every change that is
        noticed (all but single elements written past torch's count, through `.data`: `train` drops the copy).
        Where someone has changed or hooked a submodule, and everywhere else, the submodules are called.
        """
        if self._frozen is not None:
            return self._frozen(self, x)
        if self.global_pool == "avg":
            return self.forward_head(self.forward_features(x))
        if type(self) is CrossViT:
            logits = self._evaluation.logits(self, x)
            if logits is not None:
                return logits
        # The head reads the CLS rows only, so only those are normalised.
        tokens = self._encode(self._embed(x), grids=self._grids(x))
        return self._head([norm(y[:, 0]) for norm, y in zip(self.norm, tokens, strict=True)])

    def forward_branches(self, x: Tensor) -> list[Tensor]:
        """Images -> logits of the heads of S and of L, [B, num_classes] each; forward gives their mean.

        Each alone is what the paper's Table 6 evaluates in its last two columns.

        Raises:
            RuntimeError: the model has no heads.
        """
        if self.num_classes == 0:
            raise RuntimeError("the model has no heads: build it with num_classes above 0")
        pooled = self._pool(self.forward_features(x))
        return [head(self.head_drop(y)) for head, y in zip(self.head, pooled, strict=True)]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]:
        """Patch tokens after each encoder, and the final features.

        With K encoders, indices 0 to K-1 are S after each of them, K to 2K-1 are L.

        Args:
            x: images [B, in_chans, height, width].
            indices: which to give: these, the last n, or all (None).
            norm: apply the branch's final LayerNorm to them.
            stop_early: do not run encoders after the last one asked for.
            output_fmt: "NCHW" for [B, C, rows, columns], "NLC" for [B, P, C].
            intermediates_only: leave the final features out of the result.

        Raises:
            ValueError: an index or output_fmt is out of range.
        """
        _check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        wanted = self._feature_indices(indices)
        last = max(index % self.num_feature_blocks for index in wanted)
        tokens = self._embed(x)
        grids = self.grid_sizes((x.shape[2], x.shape[3]))
        found: dict[int, Tensor] = {}
        for k, encoder in enumerate(self.blocks):
            if stop_early and k > last:
                break
            tokens = self._run_encoder(encoder, tokens, grids=self._grids(x))
            for b, y in enumerate(tokens):
                index = b * self.num_feature_blocks + k
                if index in wanted:
                    y = (self.norm[b](y) if norm else y)[:, 1:]
                    if output_fmt == "NCHW":
                        y = y.unflatten(1, grids[b]).permute(0, 3, 1, 2).contiguous()
                    found[index] = y
        intermediates = [found[index] for index in sorted(found)]
        if intermediates_only:
            return intermediates
        return [final(y) for final, y in zip(self.norm, tokens, strict=True)], intermediates

    def _feature_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        count = self.num_branches * self.num_feature_blocks
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            if not 0 < indices <= count:
                raise ValueError(f"indices must ask for 1 to {count} features, got {indices}")
            return list(range(count - indices, count))
        wanted = [index + count if index < 0 else index for index in indices]
        if not wanted or any(not 0 <= index < count for index in wanted):
            raise ValueError(f"indices must lie in -{count} … {count - 1}, got {list(indices)}")
        return wanted

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the encoders after the last one that `indices` needs (see forward_intermediates), and the
        final norms and the head where asked. Returns the indices as a list."""
        wanted = self._feature_indices(indices)
        self.blocks = self.blocks[: max(index % self.num_feature_blocks for index in wanted) + 1]
        if prune_norm:
            self.norm = nn.ModuleList(nn.Identity() for _ in range(self.num_branches))
        if prune_head:
            self.reset_classifier(0)
        return wanted

    def get_attention_maps(self, x: Tensor) -> list[AttentionMaps]:
        """What each branch's CLS token attends to in each encoder's fusion, as grids of patches.

        The weights over the patches sum to 1 minus what the CLS token gives to itself. In training mode the
        maps are those of this pass, dropout elsewhere included; call eval() first for the model's own.

        Raises:
            RuntimeError: the model was built with another fusion than "cross".
        """
        if any(not hasattr(encoder, "projs") for encoder in self.blocks):
            raise RuntimeError('attention maps of the CLS tokens need a model with fusion="cross"')
        collected: list[list[Tensor]] = []
        self._encode(self._embed(x), collected)
        small_grid, large_grid = self.grid_sizes((x.shape[2], x.shape[3]))
        return [
            AttentionMaps(attention_grid(small, large_grid), attention_grid(large, small_grid))
            for small, large in collected
        ]

    # What training scripts and timm's tools ask a model for

    def get_classifier(self) -> nn.ModuleList:
        """The heads of S and of L."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for `num_classes` (0 for none), on the device and in the dtype of the model."""
        if global_pool is not None:
            _check_choice("global_pool", global_pool, _POOLS)
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = self._position(0)
        self.head = self._new_head(device=like.device, dtype=like.dtype)
        self.head.apply(init_linear_and_norm)
        self.head.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each encoder in backward instead of keeping its activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimiser should not decay."""
        return {name for name, _ in self.named_parameters(recurse=False)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that assign parameters to layers, for layer-wise learning rates (timm's format)."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


remembered(CrossViT)


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(image.shape[-2:]) == size:
        return image
    return F.interpolate(image, size=size, mode="bicubic", align_corners=False)


def _pair(size: Size) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if len(size) != 2:
        raise ValueError(f"img_size must be an int or (height, width), got {size}")
    return int(size[0]), int(size[1])


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
