"""Inference on a GPU: the whole forward of a model on memory of its own, recorded as a CUDA graph.

    stream of the caller   images ─┬─ L: patches, blocks ─┬─ fusion ─┬─ L: blocks ─┬─ fusion … heads ─ logits
    a second stream                └─ S: patches, blocks ─┘          └─ S: blocks ─┘

Everything between the copy of the images and that of the logits is launched into the same memory each time,
so that it can be recorded once and replayed: for each size of images and of batch that comes a second time,
or that `freeze` is told of. Where it cannot be recorded, it is launched each time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, cuda

from crossvit_kernels import kernel_preference
from crossvit_kernels.backends import selected
from crossvit_kernels.cross_attention.gpu import architecture_of
from crossvit_kernels.dependent_launch import dependent_launches
from crossvit_kernels.modes import without_autocast

from .frozen_layers import Layers, Standardisation, TorchLayers, TritonLayers, reason_against_triton
from .watch import Watch

if TYPE_CHECKING:
    from .model import CrossViT

_LOG = logging.getLogger("crossvit")
_KEPT = 8  # sizes of images and batches whose memory and graph are kept
_RECORDING = threading.Lock()

Key = tuple[torch.dtype, tuple[int, ...], str]


def is_on_gpu(model: CrossViT) -> bool:
    """Whether the model's parameters are where `PackedOnGpu` computes."""
    return any(p.is_cuda for p in model.parameters())


def is_recorded() -> bool:
    """Whether the caller records a CUDA graph now."""
    return cuda.is_current_stream_capturing()


class PackedOnGpu:
    """Everything that is packed of a model on a GPU, and what runs it. Callable from several threads.

    Args:
        dtype: of tokens and matrices: float32, bfloat16 or float16.
        check: whether `outdated` looks for changes of the model.
        standardisation: mean and std of each channel, for images in uint8.
        images_at_once: how many images go through the model together; None for the whole batch.
        batch_sizes: for which graphs are recorded now.
    """

    def __init__(
        self,
        model: CrossViT,
        dtype: torch.dtype,
        check: bool,
        standardisation: Standardisation | None = None,
        images_at_once: int | None = None,
        batch_sizes: Sequence[int] = (),
    ) -> None:
        self.watch = Watch(model) if check else None  # first: changes while it is packed count
        self.dtype, self.images_at_once = dtype, images_at_once
        self.device = next(model.parameters()).device
        self.logits_dtype = next(model.parameters()).dtype
        self.widths, self.in_chans, self.standardisation = model.embed_dim, model.in_chans, standardisation
        self._named = selected()  # what is asked for now holds for as long as the model is frozen
        self._lock = threading.RLock()
        self._layers: dict[str, Layers] = {}
        self._packed: dict[str, Any] = {}  # events: they may be used on another stream
        self._instances: dict[Key, Instance] = {}
        with self._for_values():
            self.against_triton = self._why_not_triton(model)
            for name in self._names() if not check else self._names()[:1]:
                self._pack(name, model)
        for batch in batch_sizes:
            self.record(model, batch)

    def _why_not_triton(self, model: CrossViT) -> str | None:
        if self._named not in ("auto", "triton"):
            return f"the backend {self._named} is selected"
        named = self._named == "triton"
        if not named and not any(self._prefers("frozen_model", 2**i) for i in range(12)):
            return "PyTorch's operators are ahead"  # and nothing needs to be compiled and tried
        reason = reason_against_triton(model, self.dtype, named)
        if named and reason is not None:
            raise RuntimeError(f"the backend triton cannot run this frozen model: {reason}")
        return reason

    @contextmanager
    def _for_values(self) -> Iterator[None]:
        """On this GPU, without gradients or autocast; and what is made here can be written to in any mode."""
        on_device = cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), on_device, without_autocast(self.device.type):
            yield

    def outdated(self, model: CrossViT) -> bool:
        """Whether it was packed from other weights, where that is watched."""
        return self.watch is not None and self.watch.outdated(model)

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights, of memory for tokens, and of graphs."""
        with self._lock:
            instances = sum(instance.nbytes for instance in self._instances.values())
            return sum(layers.nbytes for layers in self._layers.values()) + instances

    def _names(self) -> list[str]:
        """Of the kinds of layers that may compute this model."""
        if self.against_triton is not None:
            return ["torch"]
        return ["triton"] if self._named == "triton" else ["triton", "torch"]

    def _ahead(self, images: int) -> str:
        """The kind that is ahead on so many images."""
        names = self._names()
        if len(names) == 1:
            return names[0]
        return "triton" if self._prefers("frozen_model", images) else "torch"

    def launches_dependently(self, images: int) -> bool:
        """Whether kernels for so many images begin before those before them have ended."""
        return self._prefers("dependent_launches", images)

    def _prefers(self, what: str, images: int) -> bool:
        given = (architecture_of(self.device), what, self.widths, images, False, self.dtype)
        return kernel_preference.ahead(*given)

    def _pack(self, name: str, model: CrossViT) -> Layers:
        with self._lock:
            if name not in self._layers:
                kind = TritonLayers if name == "triton" else TorchLayers
                self._layers[name] = kind(model, self.dtype, self.standardisation)
                self._packed[name] = cuda.Event()
                self._packed[name].record(cuda.current_stream())
            return self._layers[name]

    def run(self, model: CrossViT, x: Tensor) -> Tensor:
        """Images [B, in_chans, height, width] -> logits, in the dtype of the model."""
        if x.device != self.device:
            raise ValueError(
                f"images of a frozen model must be on {self.device}, as the model is, got {x.device}"
            )
        if x.shape[1] != self.in_chans:
            raise ValueError(f"the model was packed for {self.in_chans} channels, got {list(x.shape)}")
        if x.shape[0] == 0:
            classes = self._pack(self._names()[0], model).classes
            return torch.empty((0, classes), dtype=self.logits_dtype, device=self.device)
        with self._for_values():
            if is_recorded():
                return self._within_a_graph(model, x)
            return self._instance(model, x).run(x)

    def record(self, model: CrossViT, batch: int) -> None:
        """Prepares for so many images of the size that the model is built for, and records the graph."""
        shape = (batch, self.in_chans, *model.img_size)
        dtype = self.dtype if self.standardisation is None else torch.uint8
        x = torch.zeros(shape, dtype=dtype, device=self.device)
        for _ in range(2):
            self.run(model, x)

    def _key(self, x: Tensor) -> Key:
        dtype = torch.uint8 if x.dtype == torch.uint8 else self.dtype
        return dtype, tuple(x.shape), self._ahead(len(x))

    def _instance(self, model: CrossViT, x: Tensor) -> Instance:
        key = self._key(x)
        with self._lock:
            found = self._instances.pop(key, None)
            if found is None:
                layers = self._pack(key[2], model)
                cuda.current_stream().wait_event(self._packed[key[2]])
                found = Instance(self, layers, model, key)
            self._instances[key] = found
            while len(self._instances) > _KEPT:
                del self._instances[next(iter(self._instances))]
        return found

    def _within_a_graph(self, model: CrossViT, x: Tensor) -> Tensor:
        """Into a graph that the caller records: on memory of that graph, which nothing else uses."""
        key = self._key(x)
        with self._lock:
            known = key in self._instances
        if not known:
            raise RuntimeError(
                f"a CUDA graph is recorded around a frozen model that has seen no images of {list(x.shape)}: "
                "call it once with such images before, so that its kernels are compiled and tried"
            )
        return Instance(self, self._pack(key[2], model), model, key).launched(x)


class Instance:
    """Memory for images of one size, and the graph that runs on it."""

    _calls = 0

    def __init__(self, packed: PackedOnGpu, layers: Layers, model: CrossViT, key: Key) -> None:
        dtype, shape, _ = key
        self.layers, self.logits_dtype = layers, packed.logits_dtype
        size = (shape[2], shape[3])
        self.seen = model.branch_sizes(size)
        grids = model.grid_sizes(size)
        counts = [1 + rows * columns for rows, columns in grids]
        at_once = min(shape[0], packed.images_at_once or shape[0])
        options: dict[str, Any] = {"device": packed.device}
        self.images = torch.empty(shape, dtype=dtype, **options)
        self.logits = torch.empty((shape[0], layers.classes), dtype=torch.float32, **options)
        self.positions = [layers.position(b, grid).contiguous() for b, grid in enumerate(grids)]
        self.tokens = [
            torch.empty((at_once, n, c), dtype=layers.dtype, **options)
            for n, c in zip(counts, layers.widths, strict=True)
        ]
        self.rooms = [layers.room(b, at_once, n) for b, n in enumerate(counts)]
        # Of its own: libraries keep memory for each stream that they are recorded on.
        self.side, self.recording = (cuda.Stream(packed.device) for _ in range(2))
        self.dependent = packed.launches_dependently(at_once)
        self.graph: Any = None
        self.graph_bytes = 0
        self._lock = threading.Lock()
        self._done = cuda.Event()  # what uses its memory: another stream has to wait for that
        self._done.record(cuda.current_stream())

    @property
    def nbytes(self) -> int:
        """Bytes of its memory and of its graph's."""
        tensors = [self.images, self.logits, *self.positions, *self.tokens]
        rooms = sum(room.nbytes for room in self.rooms if room is not None)
        return sum(t.nbytes for t in tensors) + rooms + self.graph_bytes

    def run(self, x: Tensor) -> Tensor:
        """The logits of images x; from the second call on by the graph."""
        with self._lock:
            stream = cuda.current_stream()
            stream.wait_event(self._done)
            self._calls += 1
            try:
                self.images.copy_(x)
                if self._calls == 2:
                    self._record()
                if self.graph is None:
                    self._launch()
                else:
                    self.graph.replay()
                return self.logits.to(self.logits_dtype, copy=True)
            finally:
                self._done.record(stream)

    def launched(self, x: Tensor) -> Tensor:
        """The logits of images x, without a graph of its own."""
        self.images.copy_(x)
        self._launch()
        return self.logits.to(self.logits_dtype, copy=True)

    def __del__(self) -> None:
        # What was launched needs the memory, on whichever stream it was.
        if self._calls:
            self._done.synchronize()

    def _record(self) -> None:
        main, graph = cuda.current_stream(), cuda.CUDAGraph()
        try:
            # A process records one graph at a time. One that fails may leave its stream as the current one.
            with _RECORDING, cuda.stream(main):
                self._after(main, self.recording)
                with cuda.stream(self.recording):  # what libraries prepare for a stream and a thread
                    self._launch()
                # Other threads may go on: what they do does not belong to this graph.
                with cuda.graph(graph, stream=self.recording, capture_error_mode="thread_local"):
                    before = cuda.memory_reserved()
                    self._launch()
                    self.graph_bytes = max(0, cuda.memory_reserved() - before)
            self.graph = graph
        except RuntimeError as reason:  # no memory is one too
            _LOG.warning(
                "the frozen model runs without a CUDA graph for images of %s, which takes longer where they "
                "are few: %s: %s",
                *(list(self.images.shape), type(reason).__name__, str(reason).partition("\n")[0]),
            )
            self.graph_bytes = 0
        finally:
            self._after(self.recording, main)

    def _launch(self) -> None:
        """Everything from the images to the logits, on the current stream and beside it."""
        at_once = len(self.tokens[0])
        with dependent_launches(self.dependent):
            for first in range(0, len(self.images), at_once):
                images = self.images[first : first + at_once]
                self._forward(images, self.logits[first : first + at_once])

    def _forward(self, images: Tensor, logits: Tensor) -> None:
        layers = self.layers
        tokens = [x[: len(images)] for x in self.tokens]
        main = cuda.current_stream()
        for k in range(len(layers.blocks)):
            self._after(main, self.side)
            try:
                for b, stream in enumerate((self.side, main)):
                    with cuda.stream(stream):
                        if k == 0:
                            place = self.positions[b], tokens[b], self.rooms[b]
                            layers.embed(b, images, self.seen[b], *place)
                        layers.run_blocks(k, b, tokens[b], self.rooms[b])
            finally:
                self._after(self.side, main)
            layers.fuse(k, tokens)
        layers.classify(tokens, logits)

    def _after(self, first: Any, then: Any) -> None:
        """What is launched on the second stream from now on waits for what the first one has now."""
        event = cuda.Event()
        event.record(first)
        then.wait_event(event)
