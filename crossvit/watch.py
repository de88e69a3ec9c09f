"""Whether a model is still what it was."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from crossvit_kernels.fingerprint import Fingerprint

_DTYPE, _VERSION = attrgetter("dtype"), attrgetter("_version")
_SETTINGS = ("eps", "scale", "num_heads")  # of modules, which may be set


class Watch:
    """Notices that a model is no longer what it was.

    Seen at once: a parameter or module that was replaced, another dtype or device, another eps, scale or
    number of heads, writes in place (torch counts them). Writes past that count, through `.data` or by
    another process, are seen where they meet one of the elements that are compared (`Fingerprint`).
    """

    def __init__(self, model: nn.Module) -> None:
        self._children = [(module._modules, tuple(module._modules.values())) for module in model.modules()]
        self._parameters = [
            (module._parameters, name, p)
            for module in model.modules()
            for name, p in module._parameters.items()
        ]
        self._settings = [
            (module, name, getattr(module, name))
            for module in model.modules()
            for name in _SETTINGS
            if hasattr(module, name)
        ]
        found = [p for _, _, p in self._parameters if p is not None]
        self._present = found
        self._counted = [p for p in found if not p.is_inference()]  # the others have no count of writes
        self._state = self._look()
        self._fingerprint = Fingerprint(found)

    def _look(self) -> list[Any]:
        """Addresses, dtypes and counts of writes; some hundred parameters, before each forward."""
        return [
            *map(Tensor.data_ptr, self._present),
            *map(_DTYPE, self._present),
            *map(_VERSION, self._counted),
        ]

    def changed(self) -> bool:
        """Whether the model was replaced, in part, or written to since."""
        if any(tuple(modules.values()) != children for modules, children in self._children):
            return True
        if any(parameters.get(name) is not p for parameters, name, p in self._parameters):
            return True
        if self._look() != self._state:
            return True
        if any(getattr(module, name) != value for module, name, value in self._settings):
            return True
        return self._fingerprint.differs()
