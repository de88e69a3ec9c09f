"""A transformer block as steps of a program, and as one of its own where its values alone are wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from crossvit_kernels import native
from crossvit_kernels.backends import selected
from crossvit_kernels.linear.packed import PackedCache, PackedLinear
from crossvit_kernels.modes import autocast_enabled, only_values_count
from crossvit_kernels.program import (
    Activation,
    Base,
    Kind,
    Place,
    Precision,
    Program,
    plain,
    precision_of,
    rows_of,
    threads_for,
)
from crossvit_kernels.program import run as run_program
from crossvit_kernels.self_attention.native import attention_step

if TYPE_CHECKING:
    from .layers import Block

_HERE = native.load_error() is None


def taken(block: Block, x: Tensor) -> list[Tensor | None] | None:
    """The block's parameters, where `run` may take the call, else None.

    It may where values alone are wanted, and block and tokens are what the program is made for.
    """
    if block.training or not only_values_count((x,)):
        return None
    if x.dtype not in (torch.float32, torch.bfloat16) or x.ndim != 3 or x.numel() == 0:
        return None
    if not _HERE or selected() not in ("auto", "cpu") or autocast_enabled("cpu"):
        return None
    if not block.is_as_built() or not block.attn.scale > 0:
        return None
    attn, mlp, norms, width = block.attn, block.mlp, _norms(block), x.shape[2]
    parameters = parameters_of(block)
    if not only_values_count(parameters):
        return None
    for p in (x, *parameters):
        if p is not None and (p.dtype != x.dtype or not p.is_cpu or (p is not x and p.is_inference())):
            return None
    fits = (
        attn.num_heads > 0
        and width % attn.num_heads == 0
        and all(norm.normalized_shape == (width,) for norm in norms)
        and attn.qkv.weight.shape == (3 * width, width)
        and attn.proj.weight.shape == (width, width)
        and mlp.fc1.weight.shape[1] == width
        and mlp.fc2.weight.shape == (width, mlp.fc1.weight.shape[0])
    )
    return parameters if fits else None


@dataclass
class Layers:
    """The packed layers of a block."""

    qkv: PackedLinear
    proj: PackedLinear
    fc1: PackedLinear
    fc2: PackedLinear

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in (self.qkv, self.proj, self.fc1, self.fc2))


@dataclass
class Settings:
    """Of a block, that are no parameters; eps of its two norms."""

    eps: tuple[float, float]
    heads: int
    scale: float


def settings_of(block: Block) -> Settings:
    norm1, norm2 = _norms(block)
    return Settings((norm1.eps, norm2.eps), block.attn.num_heads, block.attn.scale)


def parameters_of(block: Block) -> list[Tensor | None]:
    """Weights and biases in the order in which `packed` takes them."""
    attn, mlp, norms = block.attn, block.mlp, _norms(block)
    layers: Any = (norms[0], attn.qkv, attn.proj, norms[1], mlp.fc1, mlp.fc2)
    return [p for layer in layers for p in (layer.weight, layer.bias)]


def packed(parameters: list[Any], precision: Precision) -> Layers:
    """A copy of a block's parameters."""
    norm1, qkv, proj, norm2, fc1, fc2 = zip(parameters[::2], parameters[1::2], strict=True)
    return Layers(
        PackedLinear(*qkv, *norm1, precision=precision),
        PackedLinear(*proj, precision=precision),
        PackedLinear(*fc1, *norm2, precision=precision),
        PackedLinear(*fc2, precision=precision),
    )


def add_steps(
    program: Program, layers: Layers, settings: Settings, tokens: int, x: Place, out: Place,
    qkv: Place, attended: Place, hidden: Place,
) -> None:  # fmt: skip
    """The block on each image, from x [tokens, C] to `out`, which may be x.

    The other places are a worker's own; `hidden` may lie where `qkv` does.
    """
    head_channels = layers.proj.channels // settings.heads
    precision = layers.qkv.precision
    program.images()
    program.add(Kind.LINEAR, layers.qkv.step(x, qkv, tokens, eps=settings.eps[0]))
    heads = attention_step(qkv, attended, tokens, settings.heads, head_channels, precision, settings.scale)
    program.add(Kind.SELF_ATTENTION, heads)
    program.add(Kind.LINEAR, layers.proj.step(attended, out, tokens, residual=x))
    program.add(Kind.LINEAR, layers.fc1.step(out, hidden, tokens, Activation.GELU, eps=settings.eps[1]))
    program.add(Kind.LINEAR, layers.fc2.step(hidden, out, tokens, residual=out))


def run(block: Block, x: Tensor, parameters: list[Tensor | None], cache: PackedCache) -> Tensor:
    """What the block's submodules would give for tokens [B, N, C], from the parameters that are `taken`."""
    layers = cache.get(parameters, lambda: packed(parameters, precision_of(x.dtype)))
    x = plain(x)
    batch, tokens, width = x.shape
    hidden = layers.fc1.outputs
    out = torch.empty((batch, tokens, width), dtype=x.dtype, device="cpu")
    operations = 2 * batch * tokens * (width * (4 * width + 2 * hidden) + 2 * tokens * width)
    threads = threads_for(operations)

    # Of each thread: what a step takes, and what it gives; they change places from step to step.
    size = x.element_size()
    wide = -(-tokens * max(3 * width, hidden) * size // 64) * 64
    narrow = -(-tokens * width * size // 64) * 64
    memory = torch.empty((threads, wide + narrow), dtype=torch.uint8, device="cpu")

    def scratch(offset: int, columns: int) -> Place:
        at = memory.data_ptr() + offset
        return Place(Base.FIXED, at, x.dtype, columns * size, of_worker=wide + narrow)

    program = Program()
    places = (scratch(0, 3 * width), scratch(wide, width), scratch(0, hidden))
    add_steps(program, layers, settings_of(block), tokens, rows_of(x), rows_of(out), *places)
    run_program(program.packed(), batch, threads=threads)
    return out


def _norms(block: Block) -> tuple[nn.LayerNorm, nn.LayerNorm]:
    return cast(nn.LayerNorm, block.norm1), cast(nn.LayerNorm, block.norm2)
