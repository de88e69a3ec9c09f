"""Weights of linear layers as the CPU's kernels read them, LayerNorm folded in."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .. import native
from ..fingerprint import Fingerprint
from ..program import DTYPES, NOWHERE, Activation, Place, Precision, bits

_PANEL = 64  # at least the columns of a panel, on any instruction set


class PackedLinear:
    """W [outputs, channels] and its bias, copied and laid out for the instruction set in use.

    Args:
        weight: [outputs, channels].
        bias: [outputs], or None.
        norm_weight, norm_bias: of a LayerNorm in front, folded into weight and bias: W (g * x^ + b) + c is
            (W * g) x^ + (W b + c).
        scale: multiplies weight and bias.
        precision: what they are multiplied in.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        scale: float = 1.0,
        precision: Precision = Precision.FLOAT32,
    ) -> None:
        self.outputs, self.channels = weight.shape
        self.precision = precision
        self.isa = native.load().isa()
        exact = weight.detach().double() * scale
        added = torch.zeros(self.outputs, dtype=torch.float64, device="cpu")
        if bias is not None:
            added += bias.detach().double() * scale
        if norm_bias is not None:
            added += exact @ norm_bias.detach().double()
        if norm_weight is not None:
            exact = exact * norm_weight.detach().double()
        exact = exact.to(torch.bfloat16 if precision == Precision.BFLOAT16 else torch.float32)
        self._pack(exact.contiguous())
        padded = -(-self.outputs // _PANEL) * _PANEL
        self.bias = torch.zeros(padded, dtype=torch.float32, device="cpu")
        self.bias[: self.outputs] = added

    def _pack(self, weight: Tensor) -> None:
        module = native.load()
        shape = (self.outputs, self.channels, int(self.precision))
        words = module.packed_weight_words(self.isa, *shape)
        # Panels begin at whole cache lines; what is prefetched may lie behind the last one.
        memory = torch.empty(words + 32, dtype=torch.int32, device="cpu")
        self.words = memory[-memory.data_ptr() % 64 // 4 :][:words]
        module.pack_weight(
            self.isa, weight.data_ptr(), weight.stride(0), DTYPES[weight.dtype], *shape,
            torch.get_num_threads(), self.words.data_ptr(),
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.bias.nbytes

    def step(
        self,
        x: Place,
        out: Place,
        rows: int,
        activation: Activation = Activation.NONE,
        eps: float | None = None,
        residual: Place | None = None,
    ) -> list[int]:
        """The words of struct LinearStep. `eps` of the LayerNorm in front, where there is one."""
        return [
            *(*x.words(), *(NOWHERE if residual is None else residual.words()), *out.words()),
            *(rows, self.channels, self.outputs, int(self.precision)),
            *(self.words.data_ptr(), self.bias.data_ptr(), int(activation)),
            *(int(eps is not None), bits(eps or 0.0)),
        ]


class _Packed(Protocol):
    @property
    def nbytes(self) -> int: ...


P = TypeVar("P", bound=_Packed)


class PackedCache:
    """What was packed from some tensors, as long as they are what they were. Copies and pickles are empty.

    Seen at once: another tensor, dtype, shape or address, and writes that torch counts. Writes past that
    count are seen where they meet one of the elements that are compared (`Fingerprint`). Callable from
    several threads.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def get(self, tensors: Sequence[Tensor | None], pack: Callable[[], P]) -> P:
        """What `pack` made of these tensors, which it is called for where they are not those of before."""
        if any(x is not None and x.is_inference() for x in tensors):
            return pack()  # torch does not count what is written to them
        entry, isa = self._entry, native.load().isa()
        if entry is None or entry.isa != isa or entry.changed(tensors):
            # What is compared is read first: a write while packing is then seen by the next call.
            entry = _Entry(isa, tensors)
            entry.packed = pack()
            self._entry = entry
        return entry.packed

    def clear(self) -> None:
        self._entry = None

    @property
    def nbytes(self) -> int:
        """Bytes of what is packed now."""
        entry = self._entry
        return 0 if entry is None else entry.packed.nbytes

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedCache:
        return PackedCache()

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedCache, ()


class _Entry:
    packed: Any

    def __init__(self, isa: str, tensors: Sequence[Tensor | None]) -> None:
        self.isa = isa
        # Weak: parameters that were replaced do not live on here.
        self.references = [_absent if x is None else weakref.ref(x) for x in tensors]
        self.states = [None if x is None else _state(x) for x in tensors]
        self.fingerprint = Fingerprint([x for x in tensors if x is not None])

    def changed(self, tensors: Sequence[Tensor | None]) -> bool:
        if len(tensors) != len(self.references):
            return True
        for x, reference, state in zip(tensors, self.references, self.states, strict=True):
            if reference() is not x or (x is not None and _state(x) != state):
                return True
        return self.fingerprint.differs()


def _absent() -> None:
    """The reference to what is not there."""


def _state(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x._version, x.dtype, x.shape, x.stride()
