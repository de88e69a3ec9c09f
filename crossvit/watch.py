"""Whether a model is still what it was."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

from crossvit_kernels.fingerprint import Fingerprint

_DTYPE, _VERSION, _TRAINING = attrgetter("dtype"), attrgetter("_version"), attrgetter("training")
_SETTINGS = ("eps", "scale", "num_heads")  # of modules, which may be set
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watch:
    """Notices that a model is no longer what it was.

    Seen at once: a parameter or module that was replaced, another dtype or device, another eps, scale or
    number of heads, hooks, a forward of one's own and training mode of a submodule, writes in place (torch
    counts them). Writes past that count, through `.data` or by another process, are seen where they meet one
    of the elements that are compared (`Fingerprint`).

    Args:
        model: what is watched.
        writes: whether writes to parameters count, or only what the model consists of.
    """

    def __init__(self, model: nn.Module, writes: bool = True) -> None:
        self._modules = list(model.modules())
        self._children = list(_children_of(self._modules))
        self._parameters = list(_parameters_of(self._modules))
        self._attributes = [module.__dict__ for module in self._modules]
        # Those of the model itself are torch's to call.
        self._hooks = [getattr(module, name) for module in self._modules[1:] for name in _HOOKS]
        self._settings = [
            (module, name, getattr(module, name))
            for module in self._modules
            for name in _SETTINGS
            if hasattr(module, name)
        ]
        found = [p for p in self._parameters if p is not None]
        self.parameters = found
        self._written = found if writes else []
        self._counted = [p for p in self._written if not p.is_inference()]  # the others have no count
        self._state = self._look()
        self._fingerprint = Fingerprint(found) if writes else None

    def _look(self) -> list[Any]:
        """What is compared by its value: some thousand words, before each forward."""
        return [
            *map(len, self._hooks),
            *map(type, self._modules),
            *map(_TRAINING, self._modules),
            *("forward" in attributes for attributes in self._attributes),
            *map(_DTYPE, self.parameters),
            *map(Tensor.data_ptr, self._written),
            *map(_VERSION, self._counted),
        ]

    def changed(self) -> bool:
        """Whether the model was replaced, in part, or written to since."""
        if not _same(self._children, _children_of(self._modules)):
            return True
        if not _same(self._parameters, _parameters_of(self._modules)):
            return True
        if self._look() != self._state:
            return True
        if any(getattr(module, name) != value for module, name, value in self._settings):
            return True
        return self._fingerprint is not None and self._fingerprint.differs()


def _children_of(modules: list[nn.Module]) -> Iterator[nn.Module | None]:
    return (child for module in modules for child in module._modules.values())


def _parameters_of(modules: list[nn.Module]) -> Iterator[Tensor | None]:
    return (p for module in modules for p in module._parameters.values())


def _same(before: list[Any], now: Iterator[Any]) -> bool:
    found = list(now)
    return len(found) == len(before) and all(map(is_, before, found))
