"""Whether a model is still what it was."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

from crossvit_kernels.fingerprint import Fingerprint
from crossvit_kernels.gpu_fingerprint import GpuFingerprint

from .encoder import MultiScaleBlock
from .fusion import CrossAttention, CrossAttentionBlock
from .layers import Attention, DropPath, PatchEmbed

_DTYPE, _SHAPE, _VERSION = attrgetter("dtype"), attrgetter("shape"), attrgetter("_version")
# Attributes that say what a module computes, and may be set.
_SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.LayerNorm: ("eps", "normalized_shape"),
    nn.GELU: ("approximate",),
    nn.Dropout: ("p",),
    DropPath: ("drop_prob",),
    nn.Conv2d: ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    Attention: ("scale", "num_heads"),
    CrossAttention: ("scale", "num_heads"),
    CrossAttentionBlock: ("backend",),
    PatchEmbed: ("patch_size",),
    MultiScaleBlock: ("class_token",),
}
_OF_MODEL = (
    *("num_classes", "in_chans", "img_size", "img_scale", "patch_size", "crop_scale", "global_pool"),
    "class_token",
)
_PLAIN = (int, float, bool, str, tuple, type(None))


def settings_of(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules and the names of their settings."""
    for module in model.modules():
        names = _OF_MODEL if module is model else _SETTINGS.get(type(module), ())
        yield from ((module, name) for name in names)


def is_plain_value(value: object) -> bool:
    """Whether a setting is a number or the like, which cannot change in place."""
    return type(value) in _PLAIN


class Watch:
    """Notices that a model is no longer what it was. It keeps nothing of the model alive.

    Seen at once: a parameter or module that was replaced, another dtype, shape or device, settings as eps or
    stride, hooks, methods that were overridden on an instance, training mode of a submodule, writes in place
    (torch counts them). Writes past that count, through `.data` or by another process, are seen where they
    meet one of the elements that are compared (`Fingerprint`), on a GPU one call late (`GpuFingerprint`).

    Args:
        model: what is watched.
        writes: whether writes to parameters count, or only what the model consists of.
    """

    def __init__(self, model: nn.Module, writes: bool = True) -> None:
        modules = list(model.modules())
        place = {id(module): i for i, module in enumerate(modules)}
        self._modules = [weakref.ref(module) for module in modules]
        self._children = [place.get(id(child), -1) for child in _children_of(modules)]
        self._parameters = [None if p is None else weakref.ref(p) for p in _parameters_of(modules)]
        self._settings = [
            (place[id(module)], name, module.__dict__.get(name)) for module, name in settings_of(model)
        ]
        self._writes = writes
        found = [p for p in _parameters_of(modules) if p is not None]
        self._state = self._look(modules, found)
        self._fingerprint: Fingerprint | GpuFingerprint | None = None
        if writes:
            of_gpu = any(p.device.type == "cuda" for p in found)
            self._fingerprint = GpuFingerprint(found) if of_gpu else Fingerprint(found)

    def _look(self, modules: list[nn.Module], parameters: list[Tensor]) -> list[Any]:
        """What is compared by its value: some thousand words, before each forward."""
        attributes = [module.__dict__ for module in modules]
        state = [
            *map(type, modules),
            *map(len, attributes),  # a method of one's own is one more
            *(module.training for module in modules),
            # Those of the model itself are torch's to call.
            *(len(d["_forward_hooks"]) + len(d["_forward_pre_hooks"]) for d in attributes[1:]),
            *map(_DTYPE, parameters),
        ]
        if self._writes:
            state += [*map(Tensor.data_ptr, parameters), *map(_SHAPE, parameters)]
            state += [*map(Tensor.stride, parameters)]
            state += [p._version for p in parameters if not p.is_inference()]  # the others have no count
        return state

    def outdated(self, model: nn.Module) -> bool:
        """Whether the model is another one, was replaced in part, or written to since."""
        modules: list[Any] = [module() for module in self._modules]
        if modules[0] is not model or None in modules:
            return True
        children = [modules[i] if i >= 0 else None for i in self._children]
        if not _same(children, _children_of(modules)):
            return True
        parameters = [None if p is None else p() for p in self._parameters]
        if not _same(parameters, _parameters_of(modules)):
            return True
        if self._look(modules, [p for p in parameters if p is not None]) != self._state:
            return True
        for i, name, value in self._settings:
            now = modules[i].__dict__.get(name)
            if now is not value and not (is_plain_value(now) and is_plain_value(value) and now == value):
                return True
        return self._fingerprint is not None and self._fingerprint.differs()


def _children_of(modules: list[Any]) -> Iterator[nn.Module | None]:
    return (child for module in modules for child in module.__dict__["_modules"].values())


def _parameters_of(modules: list[Any]) -> Iterator[Tensor | None]:
    return (p for module in modules for p in module.__dict__["_parameters"].values())


def _same(before: list[Any], now: Iterator[Any]) -> bool:
    found = list(now)
    return len(found) == len(before) and all(map(is_, before, found))
