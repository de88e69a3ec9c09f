"""What the Triton kernels of a block's layers compile to: linear layers, self-attention, patch embedding.

The package's own launchers run, as in compiled.py, forward and backward, on as few rows as make a GPU take
its large tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from crossvit.variants import VARIANTS
from crossvit_kernels.linear import gpu_op as linear_op
from crossvit_kernels.patch_embed import triton_launch as patch_launch
from crossvit_kernels.self_attention import triton_launch as attention_launch
from crossvit_kernels.transformer_block import triton_launch as block_launch

from .compiled import DTYPES, Layer, Resources, compiling, resources

ROWS = 128 * 140  # more tiles than multiprocessors
WITH_PRODUCTS = ("product", "weight_gradient", "embed", "attend", "to_queries", "to_keys")
Call = Callable[[], object]


def linear(
    channels: int, outputs: int, dtype: torch.dtype, norm: bool, activation: str | None, residual: bool
) -> Call:
    """Forward, and all gradients."""

    def call() -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype)

        x, weight, bias, y = (
            zeros(ROWS, channels),
            zeros(outputs, channels),
            zeros(outputs),
            zeros(ROWS, outputs),
        )
        gamma = zeros(channels) if norm else None
        args = (x, weight, bias, gamma, gamma, y if residual else None, None, 1e-6, activation)
        y, z, *kept = linear_op._forward(*args, True)
        needed, other = linear_op._keeps_z(args)
        saved = (z if other else y) if needed else None
        linear_op._backward(
            *(
                y,
                x,
                weight,
                gamma,
                gamma,
                None,
                saved,
                *kept,
                1e-6,
                activation,
                [True] * linear_op._DIFFERENTIABLE,
            )
        )

    return call


def block(tokens: int, heads: int, channels: int, hidden: int, tokens_dtype: torch.dtype) -> Call:
    """A whole block with drop-path, in bfloat16: what it has beside its layers alone."""

    def call() -> None:
        dtype = torch.bfloat16
        batch = -(-ROWS // tokens)
        x = torch.zeros(batch, tokens, channels, dtype=tokens_dtype)
        scale = torch.zeros(batch, dtype=tokens_dtype)
        shapes = [(channels,), (3 * channels, channels), (channels, channels)]
        shapes += [(channels,), (hidden, channels), (channels, hidden)]
        weights = [torch.zeros(shape, dtype=tokens_dtype) for of in shapes for shape in (of, of[:1])]
        options = (weights, (scale, scale), heads, 0.125, (1e-6, 1e-6), dtype)
        y, saved = block_launch.forward(x, *options, True)
        kept = x if tokens_dtype == dtype else None
        given = (*options[:2], saved, *options[2:])
        block_launch.backward(y, kept, *given, [True] * 12)

    return call


def self_attention(tokens: int, heads: int, channels: int, dtype: torch.dtype) -> Call:
    """Forward and backward, of heads of so many channels."""

    def call() -> None:
        qkv = torch.zeros(2, tokens, 3 * heads * channels, dtype=dtype)
        y, lse = attention_launch.forward(qkv, heads, channels**-0.5, dtype, True)
        attention_launch.backward(y, qkv, y, lse, heads, channels**-0.5, dtype)

    return call


def patches(pixels: int, side: int, channels: int, size: tuple[int, int] | None, dtype: torch.dtype) -> Call:
    """Forward, and cutting the image, which backward begins with."""

    def call() -> None:
        image, weight = (
            torch.zeros(64, 3, pixels, pixels, dtype=dtype),
            torch.zeros(channels, 3, side, side, dtype=dtype),
        )
        height, width = size or (pixels, pixels)
        position = torch.zeros(1 + height // side * (width // side), channels, dtype=dtype)
        patch_launch.forward(image, weight, position[0], position, position[0], size, None, None)
        patch_launch.cut(image, side, dtype, size, None, None)

    return call


def position(count: int, channels: int, dtype: torch.dtype) -> Call:
    """Behind convolutions, which leave patches channel by channel."""

    def call() -> None:
        found = torch.zeros(64, channels, count, dtype=dtype).mT
        table = torch.zeros(1 + count, channels, dtype=dtype)
        patch_launch.add_position(found, table, table[0])

    return call


def linear_layers(
    channels: int, hidden: int
) -> Iterator[tuple[str, tuple[int, int, bool, str | None, bool]]]:
    """The four linear layers of a block: name, and (C_in, C_out, LayerNorm, activation, residual)."""
    yield "qkv", (channels, 3 * channels, True, None, False)
    yield "proj", (channels, channels, False, None, True)
    yield "fc1", (channels, hidden, True, "gelu", False)
    yield "fc2", (hidden, channels, False, None, True)


def layers_of_crossvit_18(dtype: str = "bf16") -> dict[Layer, Call]:
    """At 240 px, both branches."""
    found: dict[Layer, Call] = {}
    of_dtype = DTYPES[dtype]
    for branch, channels in (("S", 224), ("L", 448)):
        for name, (k, n, *around) in linear_layers(channels, 3 * channels):
            found[Layer(f"{branch} {name} {k} to {n}", dtype)] = linear(k, n, of_dtype, *around)  # type: ignore[arg-type]
    for branch, tokens, channels in (("S", 401, 32), ("L", 197, 64)):
        if of_dtype == torch.bfloat16:
            sizes = (tokens, 7, 7 * channels, 21 * channels)
            found[Layer(f"{branch} block", dtype)] = block(*sizes, of_dtype)
            found[Layer(f"{branch} block, autocast", dtype)] = block(*sizes, torch.float32)
        found[Layer(f"{branch} attention {tokens} of {channels}", dtype)] = self_attention(
            tokens, 7, channels, of_dtype
        )
    found[Layer("S patches 12 to 224", dtype)] = patches(240, 12, 224, None, of_dtype)
    found[Layer("L patches 16 to 448, resized", dtype)] = patches(240, 16, 448, (224, 224), of_dtype)
    found[Layer("L position of 448, dagger", dtype)] = position(196, 448, of_dtype)
    return found


def shapes_of_variants() -> list[tuple[str, tuple[int, int, bool, str | None, bool]]]:
    """The linear layers of all variants, each once."""
    widths = {(c, v.mlp_ratio * c) for v in VARIANTS.values() for c in v.widths}
    found = {around: name for c, hidden in sorted(widths) for name, around in linear_layers(c, hidden)}
    return [(name, around) for around, name in found.items()]


def compile_layers(layers: Mapping[Layer, Call], architecture: str) -> Iterator[Resources]:
    """Each kernel once, with the first layer that needs it."""
    seen: set[str] = set()
    for layer, call in layers.items():
        with compiling(architecture) as kernels:
            call()
        for kernel in kernels:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                found = resources(kernel, architecture, layer)
                found.kernel = named(kernel)
                yield found


def named(kernel: Any) -> str:
    """A kernel's name with what it was compiled for: its epilogue, its activation."""
    constants = {
        kernel.src.fn.arg_names[at[0]]: value for at, value in kernel.src.constants.items() if len(at) == 1
    }
    words = [kernel.metadata.name, constants.get("EPILOGUE"), constants.get("ACTIVATION")]
    if kernel.metadata.name == "product" and constants.get("left", ...) is not None:
        words.append("statistics")
    return " ".join(word for word in words if word)
