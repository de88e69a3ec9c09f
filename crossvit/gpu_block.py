"""A transformer block as one operation, where Triton's kernels of it are to compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from crossvit_kernels import BlockWeights, transformer_block
from crossvit_kernels.backends import selected
from crossvit_kernels.modes import autocast_enabled, plain_operators_only
from crossvit_kernels.transformer_block import preferred

from .native_block import parameters_of

if TYPE_CHECKING:
    from .layers import Block


def taken(block: Block, x: Tensor) -> BlockWeights | None:
    """The block's parameters, where `run` is to take the call, else None.

    It does where the backend triton is selected, or "auto" and its kernels are ahead, and block and tokens
    are what they compute. Within torch.compile "auto" leaves a block to PyTorch's operators.
    """
    name = selected()
    if not isinstance(x, Tensor):  # a proxy of torch.fx
        return None
    if name not in ("auto", "triton") or (name == "auto" and not x.is_cuda):
        return None
    if x.ndim != 3 or x.numel() == 0 or plain_operators_only() or not block.is_as_built(may_drop_paths=True):
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:  # which differentiates what may be so once
        return None
    parameters = parameters_of(block)
    if not _fits(block, x, parameters):
        return None
    weights = BlockWeights(*cast(Any, parameters))
    attn = block.attn
    backend = preferred(x, weights, num_heads=attn.num_heads, attention_scale=attn.scale)
    return weights if backend == "triton" else None


def _fits(block: Block, x: Tensor, parameters: list[Any]) -> bool:
    """Whether shapes, dtypes and devices are those that the operation takes."""
    attn, mlp, width = block.attn, block.mlp, x.shape[2]
    norms: Any = (block.norm1, block.norm2)
    if any(p is not None and p.device != x.device for p in parameters):
        return False
    alike = {p.dtype for i, p in enumerate(parameters) if p is not None and i not in (0, 1, 6, 7)} == {
        x.dtype
    }
    of_norms = {p.dtype for p in (parameters[i] for i in (0, 1, 6, 7)) if p is not None}
    if not autocast_enabled(x.device.type) and not (alike and of_norms <= {x.dtype, torch.float32}):
        return False
    return (
        all(norm.normalized_shape == (width,) for norm in norms)
        and attn.qkv.weight.shape == (3 * width, width)
        and attn.proj.weight.shape == (width, width)
        and mlp.fc1.weight.shape[1] == width
        and mlp.fc2.weight.shape == (width, mlp.fc1.weight.shape[0])
    )


def run(block: Block, x: Tensor, weights: BlockWeights) -> Tensor:
    """What the block's submodules would give for tokens [B, N, C]."""
    norms: Any = (block.norm1, block.norm2)
    paths: Any = (block.drop_path1, block.drop_path2)
    scales = [None if isinstance(path, nn.Identity) else path.scales(x) for path in paths]
    return transformer_block(
        x,
        weights,
        num_heads=block.attn.num_heads,
        attention_scale=block.attn.scale,
        eps=(norms[0].eps, norms[1].eps),
        residual_scales=(scales[0], scales[1]),
        backend="triton",
    )
