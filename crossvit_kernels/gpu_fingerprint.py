"""`fingerprint.py` for tensors on a GPU, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import triton_runtime
from .cross_attention.gpu import on_device_of


class GpuFingerprint:
    """Of the first four bytes of every 4 KiB of each tensor, and of its last four.

    `differs` launches a comparison on the current stream, whose outcome a later call tells: what was written
    is noticed one call late, or later where the GPU is behind, and no call waits. Without Triton nothing is
    compared. Whoever keeps it sees to it that the tensors are still in the same place, and on one GPU.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        from .fingerprint import bytes_spanned

        self._compared: tuple[Any, Tensor] | None = None  # an event, and whether something differed
        self._made: Any = None
        spans = [
            (x.data_ptr(), bytes_spanned(x) // 2) for x in tensors if x.numel() > 0 and x.element_size() > 1
        ]
        self._active = bool(spans) and triton_runtime.load_error() is None
        if not self._active:
            return
        from .triton_fingerprint import STEP, samples_of

        device = tensors[0].device
        regions, first = [], 0
        for pointer, pairs in spans:
            regions.append((pointer, pairs, first))
            first += samples_of(pairs, STEP)
        self._regions = torch.tensor(regions, dtype=torch.int64, device=device)
        self._was = torch.empty(first, dtype=torch.int32, device=device)
        self._changed = torch.zeros(1, dtype=torch.int32, device=device)
        self._launch(compares=False)
        self._made = self._event()

    def __del__(self) -> None:
        # A comparison reads what this keeps, on whichever stream it was launched.
        if self._compared is not None and self._compared[0] is not None:
            self._compared[0].synchronize()

    def _event(self) -> Any:
        """Of what is launched on the current stream by now; None on the CPU."""
        if not self._was.is_cuda:
            return None
        with on_device_of(self._was):
            event = torch.cuda.Event()
            event.record()
        return event

    def _launch(self, compares: bool) -> None:
        from .triton_fingerprint import sample

        with on_device_of(self._was):
            sample[(len(self._regions),)](self._regions, self._was, self._changed, COMPARES=compares)

    def differs(self) -> bool:
        """Whether an earlier call found another one; compares again."""
        if not self._active or (self._was.is_cuda and torch.cuda.is_current_stream_capturing()):
            return False
        if self._compared is not None:
            event, outcome = self._compared
            if event is not None and not event.query():
                return False  # asked again when it is done
            if int(outcome) != 0:
                return True
        if self._made is not None:
            with on_device_of(self._was):
                self._made.wait()  # on this stream, which may be another one
        self._launch(compares=True)
        self._compared = self._outcome()
        return False

    def _outcome(self) -> tuple[Any, Tensor]:
        if not self._was.is_cuda:
            return None, self._changed
        with on_device_of(self._was):
            outcome = torch.empty(1, dtype=torch.int32, pin_memory=True)  # into other memory CUDA would wait
            outcome.copy_(self._changed, non_blocking=True)
        return self._event(), outcome
