"""Which models can be frozen: those that are as they were built, for then the program computes the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from crossvit_kernels import native

from .encoder import MultiScaleBlock
from .fusion import CrossAttention, CrossAttentionBlock, is_plain
from .layers import Attention, Block, DropPath, Mlp, PatchEmbed
from .tokens_to_token import TokensToToken
from .watch import is_plain_value, settings_of

if TYPE_CHECKING:
    from .model import CrossViT


def reasons_against(model: CrossViT, on_gpu: bool = False) -> list[str]:
    """Why a model in eval mode cannot be frozen, in words; empty when it can."""
    reasons = []
    if native.load_error() is not None and not on_gpu:
        reasons.append(f"the compiled module is not here: {native.load_error()}")
    if model.global_pool != "token":
        reasons.append(f"it pools with global_pool={model.global_pool!r}, not 'token'")
    if any(getattr(module, "class_token", True) is False for module in model.modules()):
        reasons.append("it has no CLS tokens")
    if any(isinstance(embed, TokensToToken) for embed in model.modules()):
        return [*reasons, "it makes T2T tokens"]
    devices = {p.device for p in model.parameters()}
    if on_gpu and len(devices) > 1:
        reasons.append("it is on several devices: " + ", ".join(sorted(map(str, devices))))
    elif not on_gpu and any(device.type != "cpu" for device in devices):
        reasons.append("it is neither on the CPU nor on a CUDA device")
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        reasons.append(
            "its parameters are not all float32, bfloat16 or float16: " + ", ".join(map(str, dtypes))
        )
    if not methods_as_imported():
        reasons.append("a method of one of its classes was replaced")
    reasons += [f"{name} is in training mode" for name, module in model.named_modules() if _drops(module)]
    reasons += [f"{name} was replaced or has hooks" for name in _changed(model)]
    names = {module: name for name, module in model.named_modules()}
    for module, setting in settings_of(model):
        value = getattr(module, setting, None)
        if not is_plain_value(value):
            reasons.append(f"{names[module]}.{setting}".lstrip(".") + f" is no plain number, but {value!r}")
    if not reasons:
        reasons += _of_other_kind(model)
    for k, encoder in enumerate(model.blocks if isinstance(model.blocks, nn.ModuleList) else ()):
        crosses = isinstance(encoder, MultiScaleBlock) and isinstance(encoder.fusion, nn.ModuleList)
        if not crosses or cast(MultiScaleBlock, encoder)._weights() is None:
            reasons.append(f"the fusion of blocks.{k} is not one cross-attention in each direction as built")
    return reasons


def methods_as_imported() -> bool:
    """Whether nobody has put another function in the place of a method of these classes."""
    return all(cls.__dict__.get(name) is function for cls, name, function in _METHODS)


def remembered(cls: type[nn.Module]) -> type[nn.Module]:
    """Adds the functions of a class to those that `methods_as_imported` looks at."""
    _METHODS.extend((cls, name, value) for name, value in vars(cls).items() if callable(value))
    return cls


def _drops(module: nn.Module) -> bool:
    rate = {nn.Dropout: "p", DropPath: "drop_prob"}.get(type(module))
    return rate is not None and module.training and getattr(module, rate) > 0


_PLAIN = (
    *(nn.Linear, nn.LayerNorm, nn.GELU, nn.ReLU, nn.Conv2d, nn.Dropout, nn.Identity, nn.Sequential),
    *(nn.ModuleList, Attention, Mlp, Block, DropPath, PatchEmbed, CrossAttention, CrossAttentionBlock),
    MultiScaleBlock,
)
_METHODS: list[tuple[type[nn.Module], str, Any]] = []
for _kind in _PLAIN:
    remembered(_kind)
_OWN_METHODS = {name for cls, name, _ in _METHODS if cls.__module__.startswith("crossvit.")}


# What each part of a module is as built; those of a fusion are looked at by MultiScaleBlock.
_INERT = (nn.Dropout, nn.Identity, DropPath)  # in eval mode
_PARTS: dict[str, dict[str, tuple[type[nn.Module], ...]]] = {
    "": {  # the model itself
        **{"pos_drop": _INERT, "head_drop": _INERT},
        **dict.fromkeys(("patch_embed", "blocks", "norm", "head"), (nn.ModuleList,)),
    },
    "PatchEmbed": {"proj": (nn.Conv2d, nn.Sequential)},
    "Block": {
        **{"norm1": (nn.LayerNorm,), "attn": (Attention,), "drop_path1": _INERT},
        **{"norm2": (nn.LayerNorm,), "mlp": (Mlp,), "drop_path2": _INERT},
    },
    "Attention": {"qkv": (nn.Linear,), "attn_drop": _INERT, "proj": (nn.Linear,), "proj_drop": _INERT},
    "Mlp": {"fc1": (nn.Linear,), "act": (nn.GELU,), "drop1": _INERT, "fc2": (nn.Linear,), "drop2": _INERT},
}


def _changed(model: CrossViT) -> list[str]:
    """Names of the submodules whose own forward has to run."""
    names = []

    def look(name: str, module: Any, *kinds: type[nn.Module]) -> None:
        plain = any(is_plain(module, kind) for kind in kinds)
        plain = plain and _OWN_METHODS.isdisjoint(module.__dict__)
        if isinstance(module, (nn.LayerNorm, nn.Linear, nn.Conv2d)):  # and not buffers or plain tensors
            plain = plain and {"weight", "bias"} <= module._parameters.keys()
        if isinstance(module, nn.LayerNorm):
            plain = plain and module.weight is not None and module.bias is not None
            plain = plain and len(module.normalized_shape) == 1
        if isinstance(module, nn.GELU):
            plain = plain and module.approximate == "none"
        if not plain:
            names.append(name)

    def look_at_each(name: str, modules: Any, *kinds: type[nn.Module]) -> None:
        if isinstance(modules, (nn.ModuleList, nn.Sequential)):
            for i, module in enumerate(modules):
                look(f"{name}.{i}", module, *kinds)

    if type(model).__dict__.keys() & model.__dict__.keys():
        names.append("a method of the model")
    tensors = [f"{name}_{b}" for name in ("pos_embed", "cls_token") for b in range(2)]
    tensors = tensors if model.class_token else []
    names += [name for name in tensors if name not in model._parameters]
    for name, module in model.named_modules():
        if module is not model:
            look(name, module, *_PLAIN)
        for part, kinds in _PARTS.get(type(module).__name__ if name else "", {}).items():
            look(f"{name}.{part}".lstrip("."), getattr(module, part, None), *kinds)
    if {"patch_embed", "blocks", "norm", "head"} & set(names):
        return list(dict.fromkeys(names))
    look_at_each("patch_embed", model.patch_embed, PatchEmbed)
    for b, embed in enumerate(model.patch_embed):
        stem: Any = getattr(embed, "proj", None)
        if isinstance(stem, nn.Sequential) and len(stem) % 2 == 0:  # behind the last convolution is nothing
            names.append(f"patch_embed.{b}.proj")
        for i, module in enumerate(stem if isinstance(stem, nn.Sequential) else [stem]):
            name = f"patch_embed.{b}.proj" + (f".{i}" if isinstance(stem, nn.Sequential) else "")
            look(name, module, nn.ReLU if i % 2 else nn.Conv2d)
            if isinstance(module, nn.Conv2d) and not _is_square(module):
                names.append(name)
    for k, encoder in enumerate(model.blocks):
        branches: Any = getattr(encoder, "blocks", ())
        for b, branch in enumerate(branches):
            look(f"blocks.{k}.blocks.{b}", branch, nn.Sequential)
            look_at_each(f"blocks.{k}.blocks.{b}", branch, Block)
    look_at_each("norm", model.norm, nn.LayerNorm)
    look_at_each("head", model.head, nn.Linear if model.num_classes else nn.Identity)
    return list(dict.fromkeys(names))


def _is_square(convolution: nn.Conv2d) -> bool:
    """Whether its windows are those of struct Windows: alike on both axes, dense, padded with zeros."""
    pairs = (convolution.kernel_size, convolution.stride, convolution.padding)
    return (
        all(not isinstance(pair, str) and pair[0] == pair[1] for pair in pairs)
        and (convolution.dilation, convolution.groups) == ((1, 1), 1)
        and convolution.padding_mode == "zeros"
    )


def _of_other_kind(model: CrossViT) -> Iterator[str]:
    """What the program does not count on, though the model itself may take it."""
    for b, embed in enumerate(cast(Any, model.patch_embed)):
        first: Any = embed.proj[0] if isinstance(embed.proj, nn.Sequential) else embed.proj
        if first.weight.shape[1] != model.in_chans:
            yield f"patch_embed.{b} takes {first.weight.shape[1]} channels, the model {model.in_chans}"
    for k, encoder in enumerate(model.blocks):
        branches: Any = getattr(encoder, "blocks", ())
        for b, branch in enumerate(branches):
            for i, block in enumerate(branch):
                name = f"blocks.{k}.blocks.{b}.{i}.attn"
                if block.attn.qkv.weight.shape[0] != 3 * model.embed_dim[b]:
                    yield f"{name} has another width than its branch"
                if not block.attn.scale > 0:
                    yield f"{name}.scale must be positive, got {block.attn.scale}"
