"""Inference: the whole forward of a model, on a CPU as one program of the compiled module.

(On a GPU it is frozen_gpu.py's.) Weights are folded and packed once: LayerNorm's into the linear layers
behind them, the mean over the two heads into the heads. The model keeps its parameters as they are; what was
packed is a copy, and each call first looks whether it is still the model's (watch.py). freezable.py says
what cannot be packed, and frozen_program.py writes the program.

`Frozen` is what `freeze` asks for, and raises where it cannot be had. `Evaluation` is the same for a model
that nobody froze, in its own dtype, where it can be had and nothing but logits is wanted.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from crossvit_kernels import native
from crossvit_kernels.backends import selected
from crossvit_kernels.linear.packed import PackedLinear
from crossvit_kernels.modes import autocast_enabled, only_values_count
from crossvit_kernels.patch_embed.native import levels
from crossvit_kernels.program import Precision

from . import frozen_gpu
from .encoder import MultiScaleBlock
from .freezable import methods_as_imported, reasons_against
from .frozen_gpu import PackedOnGpu
from .frozen_program import Instance
from .fusion import CrossAttentionBlock
from .layers import PatchEmbed
from .native_block import packed, parameters_of, settings_of
from .watch import Watch

if TYPE_CHECKING:
    from .model import CrossViT

_LOG = logging.getLogger("crossvit")
_SLICE = 32  # images that are in memory at once
_KEPT = 8  # image sizes, dtypes and numbers of threads whose memory is kept
_MEAN = 0.5  # of the two heads
_OF_ONE = ("_lock", "_weights", "_recorded")  # attributes that a copy has for itself
_OPERATORS = ("auto", "cpu")  # the backends that a program stands for


class Frozen:
    """A model's weights, packed, and programs for the images it meets. Callable from several threads.

    Args:
        dtype: what matrices are multiplied in, float32 or bfloat16; the residual stream is float32.
        check: whether each call looks for changes of the model.
        mean, std: of each channel, for images in uint8; None for those that are standardised alone.
        images_at_once, batch_sizes: of a model on a GPU, see frozen_gpu.py.
    """

    def __init__(
        self,
        model: CrossViT,
        dtype: torch.dtype,
        check: bool,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        images_at_once: int | None = None,
        batch_sizes: Sequence[int] = (),
    ) -> None:
        self.dtype, self.check, self.images_at_once = dtype, check, images_at_once
        self._standardisation = None if mean is None or std is None else (tuple(mean), tuple(std))
        self._levels = None if mean is None else levels(model.in_chans, mean, std)
        self._lock = threading.Lock()
        self._recorded: list[Any] = []  # what graphs of callers read, as long as the model is frozen
        self._pack(model, batch_sizes)

    def __getstate__(self) -> dict[str, Any]:
        # A copy packs for itself, when it is called.
        return {name: value for name, value in self.__dict__.items() if name not in _OF_ONE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._recorded = []
        self._weights: PackedModel | PackedOnGpu | None = None

    def _pack(self, model: CrossViT, batch_sizes: Sequence[int] = ()) -> None:
        on_gpu = frozen_gpu.is_on_gpu(model)
        reasons = reasons_against(model, on_gpu)
        if reasons:
            raise RuntimeError("this model cannot be frozen: " + "; ".join(reasons))
        given = (model, self.dtype, self.check)
        if on_gpu:
            options = (self._standardisation, self.images_at_once, batch_sizes)
            self._weights = PackedOnGpu(*given, *options)
        elif self.dtype == torch.float16:
            raise RuntimeError(
                "this model cannot be frozen in float16: on CPUs it takes float32 and bfloat16"
            )
        else:
            self._weights = PackedModel(*given, self._levels)

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights and of memory for tokens."""
        with self._lock:
            return 0 if self._weights is None else self._weights.nbytes

    def __call__(self, model: CrossViT, x: Tensor) -> Tensor:
        """Images [B, in_chans, height, width] -> logits [B, num_classes], without a gradient."""
        if torch.jit.is_tracing():
            raise RuntimeError("a frozen model cannot be traced: call unfreeze() first")
        # Within torch.compile, nothing that is called here is to be compiled.
        return _undisturbed()(self, model, x) if "torch._dynamo" in sys.modules else self._logits(model, x)

    # What torch.compiler.disable sets; that would import all of torch.compile.
    __call__._torchdynamo_disable = True  # type: ignore[attr-defined]

    def _logits(self, model: CrossViT, x: Tensor) -> Tensor:
        may_be_recorded = not isinstance(self._weights, PackedModel) and frozen_gpu.is_on_gpu(model)
        recorded = may_be_recorded and frozen_gpu.is_recorded()
        with self._lock:
            weights = self._weights
            if weights is None or weights.outdated(model):
                if recorded:
                    raise RuntimeError(
                        "a CUDA graph is recorded around a frozen model whose weights have to be packed: "
                        "call it once before"
                    )
                if weights is not None:
                    _LOG.info("the frozen model was changed: its weights are packed again")
                self._pack(model)
                weights = cast(PackedModel, self._weights)
            if recorded and weights not in self._recorded:
                self._recorded.append(weights)
        model._check_image(x, self._levels is not None)
        return weights.run(model, x.detach())


@cache
def _undisturbed() -> Any:
    return torch.compiler.disable(Frozen._logits)


class Evaluation:
    """What is packed of a model that is not frozen, from its first forward in eval mode that asks for logits
    alone. Copies and pickles are empty. Callable from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Packed; or what was watched when it could not be.
        self._state: PackedModel | Watch | _Never | None = None

    def logits(self, model: CrossViT, x: Tensor) -> Tensor | None:
        """Of images [B, in_chans, height, width], or None where the submodules have to be called."""
        if model.training or not _asks_for_logits(model, x):
            return None
        with self._lock:
            state = self._state
            if state is None or state.outdated(model):
                self._state = None
                state = self._state = _packed(model)
        if not isinstance(state, PackedModel) or state.dtype != x.dtype:
            return None
        model._check_image(x)
        return state.run(model, x.detach())

    def clear(self) -> None:
        with self._lock:
            self._state = None

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights and of memory for tokens."""
        with self._lock:
            return self._state.nbytes if isinstance(self._state, PackedModel) else 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Evaluation:
        return Evaluation()

    def __reduce__(self) -> tuple[Any, ...]:
        return Evaluation, ()


def _asks_for_logits(model: CrossViT, x: Tensor) -> bool:
    """Whether a call wants values alone, of a dtype and from operators that the program has."""
    return (
        only_values_count((x,))
        and x.is_cpu
        and x.dtype in (torch.float32, torch.bfloat16)
        and selected() in _OPERATORS
        and not autocast_enabled("cpu")
        and not nn.modules.module._has_any_global_hook()
        and methods_as_imported()
        and not (torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()))
    )


class _Never:
    """Stands for a model with scripted parts, which cannot be watched."""

    def outdated(self, model: CrossViT) -> bool:
        return False


def _packed(model: CrossViT) -> PackedModel | Watch | _Never:
    """The model, packed in its own dtype; where it cannot be, what has to change before it can."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return _Never()
    parameters = list(model.parameters())
    dtype = parameters[0].dtype if parameters else None  # none where something else manages the weights
    backends = {m.backend for m in model.modules() if isinstance(m, CrossAttentionBlock)}
    if (
        dtype in (torch.float32, torch.bfloat16)
        and backends <= {*_OPERATORS}
        and not reasons_against(model)
        and only_values_count(parameters)
        and not any(p.is_inference() for p in parameters)  # torch does not count what is written to them
    ):
        return PackedModel(model, dtype, check=True)
    return Watch(model, writes=False)


class PackedModel:
    """Everything that is packed of a model, and the programs that use it."""

    def __init__(
        self, model: CrossViT, dtype: torch.dtype, check: bool, levels: Tensor | None = None
    ) -> None:
        self.levels, self.in_chans = levels, model.in_chans
        self.isa = native.load().isa()
        self.dtype = dtype
        self.precision = Precision.BFLOAT16 if dtype == torch.bfloat16 else Precision.FLOAT32
        self.watch = Watch(model) if check else None
        self.widths = model.embed_dim
        self.stems = [self._stem(cast(PatchEmbed, embed)) for embed in model.patch_embed]
        self.blocks = [
            [
                [(packed(parameters_of(block), self.precision), settings_of(block)) for block in branch]
                for branch in cast(Any, encoder).blocks
            ]
            for encoder in model.blocks
        ]
        self.fusions = [self._fusion(cast(MultiScaleBlock, encoder)) for encoder in model.blocks]
        self.positions = [model._position(b).detach().float().clone() for b in range(2)]
        self.cls = [model._cls_token(b).detach().float().clone() for b in range(2)]
        self.grids = model.grid_sizes(model.img_size)  # of the positions
        self.classes = _classes(model)
        norms = cast(list[nn.LayerNorm], list(model.norm))
        self.norms = [(n.weight.detach().clone(), n.bias.detach().clone(), n.eps) for n in norms]
        self.heads = [
            PackedLinear(head.weight, head.bias, norm.weight, norm.bias, scale=_MEAN)
            for head, norm in zip(cast(Any, model.head), norms, strict=True)
            if self.classes
        ]
        self.logits_dtype = next(model.parameters()).dtype
        self._lock = threading.Lock()
        self._free: dict[tuple, list[Instance]] = {}

    def outdated(self, model: CrossViT) -> bool:
        """Whether it was packed for another instruction set or, where that is watched, from other weights."""
        if self.isa != native.load().isa():
            return True
        return self.watch is not None and self.watch.outdated(model)

    @property
    def nbytes(self) -> int:
        with self._lock:
            instances = [instance for free in self._free.values() for instance in free]
            arenas = sum(i.arena.nbytes + i.scratch.nbytes for i in instances)
        blocks = sum(x.nbytes for encoder in self.blocks for branch in encoder for x, _ in branch)
        stems = sum(x.nbytes for stem in self.stems for x, _ in stem)
        return arenas + blocks + stems + sum(x.nbytes for x in self.heads)

    def _stem(self, embed: PatchEmbed) -> list[tuple[PackedLinear, nn.Conv2d]]:
        """The convolutions of a stem as linear layers; those behind the first read channels last."""
        proj = embed.proj
        convolutions = (
            [m for m in proj if isinstance(m, nn.Conv2d)] if isinstance(proj, nn.Sequential) else [proj]
        )
        found = []
        for i, convolution in enumerate(convolutions):
            convolution = cast(nn.Conv2d, convolution)
            weight = convolution.weight.permute(0, 2, 3, 1) if i else convolution.weight
            found.append(
                (PackedLinear(weight.flatten(1), convolution.bias, precision=self.precision), convolution)
            )
        return found

    def _fusion(self, encoder: MultiScaleBlock) -> tuple[list[tuple[Any, ...]], list[int], float]:
        weights = encoder._weights()
        assert weights is not None
        heads = [cast(CrossAttentionBlock, f).attn.num_heads for f in cast(nn.ModuleList, encoder.fusion)]
        eps = cast(nn.LayerNorm, cast(Any, encoder.fusion)[0].norm1).eps

        def copied(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            dtype = self.dtype if x.ndim == 2 else torch.float32
            return x.detach().to(dtype, copy=True).contiguous()

        found = [tuple(copied(getattr(w, f.name)) for f in fields(w)) for w in weights]
        return found, heads, eps

    def run(self, model: CrossViT, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            raise ValueError(f"images of a frozen model must be on the CPU, got {x.device}")
        if x.shape[1] != self.in_chans:
            raise ValueError(
                f"the model was packed for images of {self.in_chans} channels, got {list(x.shape)}"
            )
        if x.dtype == torch.float64:
            x = x.float()
        x = x.contiguous()
        width = self.classes or sum(self.widths)
        logits = torch.empty(x.shape[0], width, dtype=torch.float32, device="cpu")
        for first in range(0, x.shape[0], _SLICE):
            images = x[first : first + _SLICE]
            instance = self._instance(model, images)
            instance.run(self, images, logits[first : first + _SLICE])
            with self._lock:
                self._free[instance.key] = [*self._free.pop(instance.key, []), instance]
                while len(self._free) > _KEPT:
                    del self._free[next(iter(self._free))]
        return logits.to(self.logits_dtype)

    def _instance(self, model: CrossViT, x: Tensor) -> Instance:
        threads = torch.get_num_threads()
        capacity = next(size for size in (1, 2, 4, 8, 16, _SLICE) if size >= x.shape[0])
        key = (x.dtype, x.shape[2:], threads, tuple(model.img_scale), model.crop_scale)
        with self._lock:
            free = self._free.get(key, [])
            while free:
                instance = free.pop()
                if instance.capacity >= capacity:
                    return instance
        return Instance(self, model, x, capacity, threads, key)


def _classes(model: CrossViT) -> int:
    """Of the heads as they are. The model's own operators, on no image, refuse what does not fit together."""
    parameter = next(model.parameters())
    with torch.no_grad():
        tokens = model._encode(model._embed(parameter.new_zeros(0, model.in_chans, *model.img_size)))
        logits = model._head([norm(y[:, 0]) for norm, y in zip(model.norm, tokens, strict=True)])
    return logits.shape[1] if model.num_classes else 0
