"""A stand-in for torch.cuda where there is no GPU: streams, events and graphs that keep account of memory.

    with fake_cuda() as cuda:             # takes the place of torch.cuda in crossvit.frozen_gpu
        model.freeze()
        model(x)
    assert cuda.log[-1].stream == 0

Everything runs at once, in the order of the program. What it reads and writes, Triton's launches (by the
interpreter) and PyTorch's operators, is kept with the stream that is current, and held against all that came
before: two accesses to the same bytes, one of them a write, must be ordered by streams and events. Memory
that is allocated on the way must stay within its stream. A graph records what is launched, and runs it again.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crossvit import frozen_gpu, watch
from tests.ptx import triton_driver

Clock = dict[int, int]


class Hazard(AssertionError):
    """What would go wrong on a GPU, now or at another time."""


@dataclass
class Access:
    """Bytes [start, end) of the memory, and when they were read or written."""

    start: int
    end: int
    writes: bool
    stream: int
    tick: int
    what: str

    def words(self) -> str:
        return f"{self.what}, which {'writes' if self.writes else 'reads'} on stream {self.stream},"


@dataclass
class Launch:
    """What ran, and on which stream."""

    name: str
    stream: int
    replayed: bool


class Stream:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.number = cuda, len(cuda.streams)
        self.clock: Clock = {self.number: 0}
        self.capture: Graph | None = None
        cuda.streams.append(self)

    def wait_event(self, event: Event) -> None:
        if event.clock is None:
            return  # as CUDA has it: there is nothing to wait for
        inside = self.cuda.capturing
        if inside is not None and event.capture is not inside:
            raise RuntimeError("capture isolation: an event of another capture, or of none, is waited for")
        if event.capture is not inside:
            raise RuntimeError("an event that was recorded in a graph is waited for outside of it")
        if inside is not None:
            self.capture = inside
        for stream, tick in event.clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), tick)


class Event:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.clock: Clock | None = None
        self.capture: Graph | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.cuda.current
        if self.cuda.capturing is not None and stream.capture is not self.cuda.capturing:
            raise RuntimeError("an event of a stream that does not belong to the capture is recorded in it")
        self.clock, self.capture = dict(stream.clock), stream.capture

    def synchronize(self) -> None:
        self.cuda.synchronized += 1


class Graph:
    """Steps that were recorded."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.steps: list[tuple[str, Stream, Callable[[], None], list[tuple[int, int, bool]]]] = []

    def replay(self) -> None:
        cuda = self.cuda
        if not self.steps or cuda.capturing is not None:
            raise RuntimeError("a graph is replayed that has nothing in it, or within a capture")
        outer = cuda.current
        start, before = dict(outer.clock), len(cuda.accesses)
        own: dict[int, Stream] = {}
        for name, stream, again, ranges in self.steps:
            if (
                stream.number not in own
            ):  # a replay runs on streams of its own, which begin where it is launched
                own[stream.number] = Stream(cuda)
                own[stream.number].clock.update(start)
            at = own[stream.number]
            at.clock[at.number] = at.clock.get(at.number, 0) + 1
            cuda.account(name, at, ranges, replayed=True, against=cuda.accesses[:before])
            with cuda.silent():
                again()
        for stream in own.values():
            for number, tick in stream.clock.items():
                outer.clock[number] = max(outer.clock.get(number, 0), tick)


@dataclass
class FakeCuda:
    """What crossvit.frozen_gpu asks of torch.cuda."""

    streams: list[Stream] = field(default_factory=list)
    accesses: list[Access] = field(default_factory=list)
    log: list[Launch] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)  # so that no address is used twice
    # Memory that was allocated on the way, and the stream that did, which may use it again.
    born: list[tuple[int, int, int]] = field(default_factory=list)  # from, to, stream
    on_the_way: bool = False
    capturing: Graph | None = None
    fails_to_record: str | None = None
    fails_at_the_end: str | None = None
    synchronized: int = 0
    _captured: list[Access] = field(default_factory=list)  # of the capture that is under way
    _silent: bool = False

    def __post_init__(self) -> None:
        self.current = Stream(self)

    # What takes the place of torch.cuda

    def Stream(self, device: Any = None) -> Stream:
        return Stream(self)

    def Event(self) -> Event:
        return Event(self)

    def CUDAGraph(self) -> Graph:
        return Graph(self)

    def current_stream(self) -> Stream:
        return self.current

    def is_current_stream_capturing(self) -> bool:
        return self.current.capture is not None

    def memory_reserved(self) -> int:
        return sum(t.nbytes for t in self.kept if isinstance(t, Tensor))

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(
        self, graph: Graph, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        if self.capturing is not None:
            raise RuntimeError("another capture is under way")
        if self.fails_to_record is not None:
            raise torch.OutOfMemoryError(self.fails_to_record)
        origin, outer = stream or Stream(self), self.current
        before = {known.number: dict(known.clock) for known in self.streams}
        origin.clock.update(outer.clock)
        self.capturing = origin.capture = graph
        self._captured = []
        self.current = origin
        try:
            yield
            for other in self.streams:
                if other.capture is graph and other.clock[other.number] > origin.clock.get(other.number, 0):
                    raise RuntimeError(f"stream {other.number} was not joined before the capture ended")
            if self.fails_at_the_end is not None:
                raise RuntimeError(self.fails_at_the_end)
        finally:
            if self.fails_at_the_end is None:  # else torch leaves the stream of the capture as it is
                self.current = outer
            self.capturing = None
            for other in self.streams:  # nothing ran
                if other.capture is graph:
                    other.capture = None
                    other.clock = before.get(other.number, {other.number: 0})

    # Accounts

    @contextmanager
    def silent(self) -> Iterator[None]:
        before, self._silent = self._silent, True
        try:
            yield
        finally:
            self._silent = before

    def ran(
        self, name: str, ranges: list[tuple[int, int, bool]], again: Callable[[], None], keeps: list[Any]
    ) -> None:
        """Something that was launched on the current stream."""
        if self._silent:
            return
        self.kept += keeps
        stream = self.current
        if self.capturing is not None:
            if stream.capture is not self.capturing:
                raise RuntimeError(f"{name} is launched on a stream outside of the capture")
            self.capturing.steps.append((name, stream, again, ranges))
        stream.clock[stream.number] = stream.clock.get(stream.number, 0) + 1
        for start, end, _ in ranges:
            for first, last, owner in self.born:
                if first < end and start < last and owner != stream.number:
                    raise Hazard(f"{name} on stream {stream.number} uses memory of stream {owner}")
        self.account(name, stream, ranges, replayed=False)

    def account(
        self,
        name: str,
        stream: Stream,
        ranges: list[tuple[int, int, bool]],
        replayed: bool,
        against: list[Access] | None = None,
    ) -> None:
        """A replay is held `against` what was before it: its own order was checked when it was recorded."""
        self.log.append(Launch(name, stream.number, replayed))
        kept = self.accesses if self.capturing is None else self._captured
        tick = stream.clock[stream.number]
        mine = [Access(start, end, writes, stream.number, tick, name) for start, end, writes in ranges]
        for other in kept if against is None else against:
            if other.stream == stream.number or stream.clock.get(other.stream, 0) >= other.tick:
                continue
            for access in mine:
                if other.start < access.end and access.start < other.end and (access.writes or other.writes):
                    raise Hazard(f"nothing orders {access.words()} and {other.words()}")
        kept += mine


def _range(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _checksum(tensor: Tensor) -> int:
    with torch.utils._python_dispatch._disable_current_modes():
        return zlib.crc32(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())


class _Operators(TorchDispatchMode):
    """Hands PyTorch's operators to the account."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.numel()]
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.numel()]
        own = {t.untyped_storage().data_ptr() for t in inputs}
        new = [t for t in outputs if t.untyped_storage().data_ptr() not in own]
        if not self.cuda._silent and self.cuda.on_the_way:
            for t in new:
                self.cuda.born.append((*_range(t), self.cuda.current.number))
        self.cuda.kept += new
        name = func._schema.name
        mutated = [
            t
            for argument, t in zip(func._schema.arguments, args, strict=False)
            if isinstance(t, Tensor) and argument.alias_info is not None and argument.alias_info.is_write
        ]
        if name in ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided") or not (
            new or mutated
        ):
            return result  # nothing was computed: memory alone, or a view

        def again() -> None:
            found = func(*args, **kwargs)
            for old, t in zip(
                outputs, (t for t in tree_leaves(found) if isinstance(t, Tensor)), strict=False
            ):
                if old.data_ptr() != t.data_ptr():
                    old.copy_(t)

        ranges = [(*_range(t), False) for t in inputs]
        ranges += [(*_range(t), True) for t in (*new, *mutated) if t.numel()]
        self.cuda.ran(name, ranges, again, [*inputs, *outputs])
        return result


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Models on the CPU count as on a GPU in crossvit.frozen_gpu, with this in the place of torch.cuda."""
    cuda = FakeCuda()
    execute = triton_driver.Launcher._run

    def run(self: Any, grid: Any, kernel: Any, arguments: Any) -> None:
        tensors = [
            getattr(argument, "base", argument)
            for kind, argument in triton_driver._flatten(self.signature, arguments)
            if isinstance(getattr(argument, "base", argument), Tensor)
        ]
        tensors = [t for t in tensors if t.numel()]

        def again() -> None:
            execute(self, grid, kernel, arguments)

        if cuda._silent:
            again()
            return
        before = [_checksum(t) for t in tensors]
        with cuda.silent():
            again()
        changed = [_checksum(t) != old for t, old in zip(tensors, before, strict=True)]
        ranges = [(*_range(t), writes) for t, writes in zip(tensors, changed, strict=True)]
        cuda.ran(kernel.name, ranges, again, tensors)

    launch_all = frozen_gpu.Instance._launch

    def launch(self: frozen_gpu.Instance) -> None:
        cuda.on_the_way = True
        try:
            launch_all(self)
        finally:
            cuda.on_the_way = False
            cuda.born.clear()  # what is left is kept by somebody

    with (
        mock.patch.object(frozen_gpu.Instance, "_launch", launch),
        mock.patch.object(frozen_gpu, "cuda", cuda),
        mock.patch.object(frozen_gpu, "is_on_gpu", return_value=True),
        # Which reads the memory of the CPU; gpu_fingerprint.py has tests of its own.
        mock.patch.object(watch, "Fingerprint", return_value=SimpleNamespace(differs=lambda: False)),
        mock.patch.object(triton_driver.Launcher, "_run", run),
        _Operators(cuda),
    ):
        yield cuda
