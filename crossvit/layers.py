"""Layers of one branch, under the names that the released checkpoints use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from crossvit_kernels import add_position, patch_embed, self_attention
from crossvit_kernels.backends import selected
from crossvit_kernels.linear.packed import PackedCache
from crossvit_kernels.patch_embed import ADD_POSITION
from crossvit_kernels.self_attention import IMPLEMENTATIONS

from . import gpu_block, native_block

NormLayer = Callable[..., nn.Module]


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether calling the module would do what its class does with plain tensors, and nothing else."""
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    if module._backward_hooks or module._backward_pre_hooks:
        return False
    for parameter in module._parameters.values():
        if type(parameter) is not nn.Parameter and is_traceable_wrapper_subclass(parameter):
            return False  # quantised or sharded
    return True


def check_heads(dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide the branch's width {dim}, got {num_heads}")


def _dagger_stem(patch_size: int, in_chans: int, width: int, **factory: Any) -> nn.Sequential:
    """Three convolutions (the paper's dagger models) that together stride over one patch."""
    strides = {12: ((3, 0), (1, 1)), 16: ((2, 1), (2, 1))}
    if patch_size not in strides:
        raise ValueError(f"multi_conv knows patch sizes 12 and 16, got {patch_size}")
    (stride1, padding1), (stride2, padding2) = strides[patch_size]
    return nn.Sequential(
        nn.Conv2d(in_chans, width // 4, kernel_size=7, stride=4, padding=3, **factory),
        nn.ReLU(inplace=True),
        nn.Conv2d(width // 4, width // 2, kernel_size=3, stride=stride1, padding=padding1, **factory),
        nn.ReLU(inplace=True),
        nn.Conv2d(width // 2, width, kernel_size=3, stride=stride2, padding=padding2, **factory),
    )


class PatchEmbed(nn.Module):
    """Image [B, in_chans, height, width] -> patch tokens [B, P, C], row by row.

    A remainder below one patch at the right and at the bottom is not seen. `img_size` and `num_patches` say
    what the model is built for; forward takes any image.
    """

    img_size: tuple[int, int]
    num_patches: int

    def __init__(
        self, patch_size: int, in_chans: int, embed_dim: int, multi_conv: bool = False, **factory: Any
    ) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        if multi_conv:
            self.proj: nn.Module = _dagger_stem(patch_size, in_chans, embed_dim, **factory)
        else:
            self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, **factory)

    def forward(self, image: Tensor) -> Tensor:
        # The three-convolution stem pads, so it would see part of the remainder; the single one would not.
        height, width = (size // p * p for size, p in zip(image.shape[-2:], self.patch_size, strict=True))
        if (height, width) != image.shape[-2:]:
            image = image[..., :height, :width]
        return self.proj(image).flatten(2).transpose(1, 2)


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch per image and scales the kept ones by 1 / (1 - drop_prob)."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def scales(self, x: Tensor) -> Tensor | None:
        """What multiplies each image of x, [B] in its dtype; None for 1."""
        if self.drop_prob == 0.0 or not self.training:
            return None
        keep = 1.0 - self.drop_prob
        scales = x.new_empty(x.shape[0]).bernoulli_(keep)
        return scales.div_(keep) if keep > 0.0 else scales

    def forward(self, x: Tensor) -> Tensor:
        scales = self.scales(x)
        return x if scales is None else x * scales.view(-1, *[1] * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


def _passes(module: nn.Module) -> bool:
    """Whether it hands on what it is given."""
    if isinstance(module, DropPath) and is_plain(module, DropPath):
        return not module.training or module.drop_prob == 0.0
    return is_plain(module, nn.Identity)


class Attention(nn.Module):
    """Multi-head self-attention, [B, N, C] -> [B, N, C]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5  # timm's attribute, which may be set
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.attn_drop.p if self.attn_drop.training else 0.0, scale=self.scale
        )  # [B, H, N, d]
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    """Linear, exact GELU, Linear; dropout after each."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **factory)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim, **factory)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class Block(nn.Module):
    """Eq. 1: x + MSA(LN(x)), then x + FFN(LN(x)).

    Without a gradient, on the CPU, it is one program of the compiled module (`native_block`), on a packed
    copy of the weights that is made at the first such call and dropped by train() and to(). On a GPU it is
    `crossvit_kernels.transformer_block` where Triton's kernels are ahead (`gpu_block`). Where someone has
    changed or hooked a submodule, and everywhere else, the submodules are called.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        proj_drop: float,
        attn_drop: float,
        drop_path: float,
        norm_layer: NormLayer,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim, **factory)
        self.attn = Attention(dim, num_heads, qkv_bias, attn_drop, proj_drop, **factory)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop, **factory)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self._packed = PackedCache()

    def is_as_built(self, may_drop_paths: bool = False) -> bool:
        """Whether nothing but this class's own forward, without dropout, has to run."""
        attn, mlp = self.attn, self.mlp
        if not (is_plain(attn, Attention) and is_plain(mlp, Mlp)):
            return False
        linear = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
        norms = (self.norm1, self.norm2)
        dropouts = (attn.attn_drop, attn.proj_drop, mlp.drop1, mlp.drop2)
        paths = (self.drop_path1, self.drop_path2)
        return (
            all(is_plain(m, nn.Linear) for m in linear)
            and all(is_plain(m, nn.LayerNorm) and m.weight is not None for m in norms)
            and all(is_plain(m, nn.Dropout) and not (m.training and m.p > 0) for m in dropouts)
            and all(_passes(m) or (may_drop_paths and is_plain(m, DropPath)) for m in paths)
            and (is_plain(mlp.act, nn.GELU) and mlp.act.approximate == "none")
            and not nn.modules.module._has_any_global_hook()
        )

    def train(self, mode: bool = True) -> Block:
        if mode:
            self._packed.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **options: Any) -> Block:
        self._packed.clear()
        return super()._apply(*args, **options)

    def forward(self, x: Tensor) -> Tensor:
        parameters = native_block.taken(self, x)
        if parameters is not None:
            return native_block.run(self, x, parameters, self._packed)
        weights = gpu_block.taken(self, x)
        if weights is not None:
            return gpu_block.run(self, x, weights)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


def projection(dim_in: int, dim_out: int, norm_layer: NormLayer, **factory: Any) -> nn.Sequential:
    """f and g of Eq. 2-7 as the released models have them: LayerNorm, GELU, Linear."""
    return nn.Sequential(norm_layer(dim_in, **factory), nn.GELU(), nn.Linear(dim_in, dim_out, **factory))


def attend(qkv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """`crossvit_kernels.self_attention`; PyTorch's operators where the selected backend has none."""
    return self_attention(qkv, num_heads, scale=scale, backend=_selected_of(IMPLEMENTATIONS))


def with_cls(patches: Tensor, position: Tensor, cls_token: Tensor) -> Tensor:
    """`crossvit_kernels.add_position`; PyTorch's operators where the selected backend has none."""
    return add_position(patches, position, cls_token, backend=_selected_of(ADD_POSITION))


def embeds_at_once(stem: nn.Module, image: Tensor) -> bool:
    """Whether `embedded` is to compute what this stem is for: one convolution, on a GPU."""
    name = selected()
    if not isinstance(image, Tensor):  # a proxy of torch.fx
        return False
    if name not in ("auto", "triton") or (name == "auto" and not image.is_cuda):
        return False
    if not is_plain(stem, PatchEmbed) or nn.modules.module._has_any_global_hook():
        return False
    convolution: Any = stem.proj
    if not is_plain(convolution, nn.Conv2d) or (torch.compiler.is_compiling() and name == "auto"):
        return False
    if image.dtype != convolution.weight.dtype:  # under autocast tokens take the wider of both
        return False
    side = stem.patch_size
    windows = (convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation)
    return windows == (side, side, (0, 0), (1, 1)) and convolution.groups == 1


def embedded(
    image: Tensor, stem: nn.Module, position: Tensor, cls_token: Tensor, size: tuple[int, int]
) -> Tensor:
    """`crossvit_kernels.patch_embed` of the image resized to `size`, with the stem's convolution."""
    convolution: Any = stem.proj
    resized = None if tuple(image.shape[-2:]) == size else size
    weights = (convolution.weight, convolution.bias)
    return patch_embed(image, *weights, position, cls_token, size=resized)


def _selected_of(implementations: Mapping[str, Callable]) -> str:
    return "auto" if selected() in ("auto", *implementations) else "torch"


def with_mean(patches: Tensor) -> Tensor:
    """[B, P, C] -> [B, 1 + P, C]: the mean of the rows before them, in the place of a CLS token."""
    return torch.cat((patches.mean(dim=1, keepdim=True), patches), dim=1)


def init_weight(weight: Tensor) -> None:
    """Truncated normal, std 0.02, drawn in float32: drawn in bfloat16 it has outliers at the cut-off, 2.0."""
    with torch.no_grad():
        weight.copy_(nn.init.trunc_normal_(torch.empty_like(weight, dtype=torch.float32), std=0.02))


def init_linear_and_norm(module: nn.Module) -> None:
    """Truncated normal (std 0.02) for Linear, ones and zeros for LayerNorm; for `Module.apply`."""
    if isinstance(module, nn.Linear):
        init_weight(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        if module.weight is not None:
            nn.init.ones_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def resize_position_embedding(embedding: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """[1, 1 + P, C] for one grid of patches -> another: bicubic over the patches, the CLS row kept.

    [1, P, C] has none.
    """
    if grid == new_grid:
        return embedding
    rows = embedding.shape[1] - grid[0] * grid[1]
    cls, patches = embedding[:, :rows], embedding[:, rows:]
    image = patches.reshape(1, *grid, -1).permute(0, 3, 1, 2).float()
    image = F.interpolate(image, size=new_grid, mode="bicubic", antialias=True, align_corners=False)
    patches = image.permute(0, 2, 3, 1).flatten(1, 2).to(embedding.dtype)
    return torch.cat((cls, patches), dim=1)
