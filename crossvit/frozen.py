"""Frozen inference on a CPU: the whole forward of a model as one program of the compiled module.

Weights are folded and packed once: LayerNorm's into the linear layers behind them, the mean over the two
heads into the heads. The model keeps its parameters as they are; what was packed is a copy, and each call
first looks whether it is still the model's (`Watch`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossvit_kernels import native
from crossvit_kernels.cross_attention.directions import Direction, ForwardOutputs
from crossvit_kernels.cross_attention.native import fusion_step
from crossvit_kernels.linear.packed import PackedLinear
from crossvit_kernels.patch_embed.native import Pixels, Resizing, Windows, copy_step, patch_step
from crossvit_kernels.program import Activation, Base, Kind, Place, Precision, Program, rows_of
from crossvit_kernels.self_attention.native import attention_step

from .encoder import MultiScaleBlock
from .fusion import CrossAttention, CrossAttentionBlock, is_plain
from .layers import Attention, Block, DropPath, Mlp, PatchEmbed, resize_position_embedding

if TYPE_CHECKING:
    from .model import CrossViT

_LOG = logging.getLogger("crossvit")
_DTYPE, _VERSION = attrgetter("dtype"), attrgetter("_version")
_SLICE = 32  # images that are in memory at once
_KEPT = 8  # image sizes, dtypes and numbers of threads whose memory is kept


def reasons_against(model: CrossViT) -> list[str]:
    """Why a model cannot be frozen, in words; empty when it can."""
    reasons = []
    if native.load_error() is not None:
        reasons.append(f"the compiled module is not here: {native.load_error()}")
    if model.global_pool != "token":
        reasons.append(f"it pools with global_pool={model.global_pool!r}, not 'token'")
    if any(p.device.type != "cpu" for p in model.parameters()):
        reasons.append("it is not on the CPU")
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        reasons.append(
            "its parameters are not all float32, bfloat16 or float16: " + ", ".join(map(str, dtypes))
        )
    reasons += [f"{name} was replaced or has hooks" for name in _changed(model)]
    if not reasons:
        reasons += _of_other_shape(model)
    for k, encoder in enumerate(model.blocks if isinstance(model.blocks, nn.ModuleList) else ()):
        crosses = isinstance(encoder, MultiScaleBlock) and isinstance(encoder.fusion, nn.ModuleList)
        if not crosses or cast(MultiScaleBlock, encoder)._weights() is None:
            reasons.append(f"the fusion of blocks.{k} is not one cross-attention in each direction as built")
    return reasons


_PLAIN = (
    *(nn.Linear, nn.LayerNorm, nn.GELU, nn.ReLU, nn.Conv2d, nn.Dropout, nn.Identity, nn.Sequential),
    *(nn.ModuleList, Attention, Mlp, Block, DropPath, PatchEmbed, CrossAttention, CrossAttentionBlock),
    MultiScaleBlock,
)


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
        if isinstance(module, nn.LayerNorm):
            plain = plain and module.weight is not None and module.bias is not None
        if isinstance(module, nn.GELU):
            plain = plain and module.approximate == "none"
        if not plain:
            names.append(name)

    def look_at_each(name: str, modules: Any, *kinds: type[nn.Module]) -> None:
        if isinstance(modules, (nn.ModuleList, nn.Sequential)):
            for i, module in enumerate(modules):
                look(f"{name}.{i}", module, *kinds)

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


def _of_other_shape(model: CrossViT) -> Iterator[str]:
    """What is of another width than the program counts on, though the model itself may take it."""
    for k, encoder in enumerate(model.blocks):
        branches: Any = getattr(encoder, "blocks", ())
        for b, branch in enumerate(branches):
            for i, block in enumerate(branch):
                qkv = getattr(getattr(block, "attn", None), "qkv", None)
                if isinstance(qkv, nn.Linear) and qkv.weight.shape[0] != 3 * model.embed_dim[b]:
                    yield f"blocks.{k}.blocks.{b}.{i}.attn has another width than its branch"


def _classes(model: CrossViT) -> int:
    """Of the heads as they are. The model's own operators, on no image, refuse what does not fit together."""
    parameter = next(model.parameters())
    with torch.no_grad():
        tokens = model._encode(model._embed(parameter.new_zeros(0, model.in_chans, *model.img_size)))
        logits = model._head([norm(y[:, 0]) for norm, y in zip(model.norm, tokens, strict=True)])
    return logits.shape[1] if model.num_classes else 0


class Watch:
    """Notices that a model is no longer what it was.

    Seen at once: a parameter or module that was replaced, another dtype or device, writes in place (torch
    counts them). Writes past that count, through `.data` or by another process, are seen where they meet one
    of the elements that are compared: the first of every 4 KiB of each parameter, and its last.
    """

    def __init__(self, model: nn.Module) -> None:
        self._children = [(module._modules, tuple(module._modules.values())) for module in model.modules()]
        self._parameters = [
            (module._parameters, name, p)
            for module in model.modules()
            for name, p in module._parameters.items()
        ]
        found = [p for _, _, p in self._parameters if p is not None]
        self._present = found
        self._counted = [p for p in found if not p.is_inference()]  # the others have no count of writes
        self._state = self._look()
        sizes = [(p.data_ptr(), _spanned(p) * p.element_size()) for p in found]
        self._regions = torch.tensor(sizes, dtype=torch.int64, device="cpu").reshape(-1, 2)
        self._fingerprint = self._read()

    def _look(self) -> list[Any]:
        """Addresses, dtypes and counts of writes; some hundred parameters, before each forward."""
        return [
            *map(Tensor.data_ptr, self._present),
            *map(_DTYPE, self._present),
            *map(_VERSION, self._counted),
        ]

    def _read(self) -> int:
        return native.load().fingerprint(self._regions.data_ptr(), len(self._regions))

    def changed(self) -> bool:
        """Whether the model was replaced, in part, or written to since."""
        if any(tuple(modules.values()) != children for modules, children in self._children):
            return True
        if any(parameters.get(name) is not p for parameters, name, p in self._parameters):
            return True
        if self._look() != self._state:
            return True
        return self._read() != self._fingerprint


def _spanned(p: Tensor) -> int:
    """Elements in memory from the first to the last one, in any layout."""
    distances = zip(p.shape, p.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in distances) if p.numel() else 0


@dataclass
class _Layers:
    """The packed layers of one transformer block."""

    qkv: PackedLinear
    proj: PackedLinear
    fc1: PackedLinear
    fc2: PackedLinear
    eps: tuple[float, float]
    heads: int
    scale: float


class Frozen:
    """A model's weights, packed, and programs for the images it meets. Callable from several threads.

    Args:
        dtype: what matrices are multiplied in, float32 or bfloat16; the residual stream is float32.
        check: whether each call looks for changes of the model.
    """

    def __init__(self, model: CrossViT, dtype: torch.dtype, check: bool) -> None:
        self.dtype, self.check = dtype, check
        self._lock = threading.Lock()
        self._pack(model)

    def __getstate__(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "check": self.check}  # a copy packs for itself, when it is called

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._weights: _Weights | None = None

    def _pack(self, model: CrossViT) -> None:
        reasons = reasons_against(model)
        if reasons:
            raise RuntimeError("this model cannot be frozen: " + "; ".join(reasons))
        self._weights = _Weights(model, self.dtype, self.check)

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights and of memory for tokens."""
        with self._lock:
            return 0 if self._weights is None else self._weights.nbytes

    def __call__(self, model: CrossViT, x: Tensor) -> Tensor:
        """Images [B, in_chans, height, width] -> logits [B, num_classes], without a gradient."""
        if torch.jit.is_tracing():
            raise RuntimeError("a frozen model cannot be traced: call unfreeze() first")
        with self._lock:
            weights = self._weights
            if weights is None or weights.isa != native.load().isa() or weights.outdated():
                if weights is not None:
                    _LOG.info("the frozen model was changed: its weights are packed again")
                self._pack(model)
                weights = cast(_Weights, self._weights)
        model._check_image(x)
        if x.device.type != "cpu":
            raise ValueError(f"images of a frozen model must be on the CPU, got {x.device}")
        return weights.run(model, x.detach())


class _Weights:
    """Everything that is packed of a model, and the programs that use it."""

    def __init__(self, model: CrossViT, dtype: torch.dtype, check: bool) -> None:
        self.isa = native.load().isa()
        self.dtype = dtype
        self.precision = Precision.BFLOAT16 if dtype == torch.bfloat16 else Precision.FLOAT32
        self.watch = Watch(model) if check else None
        self.widths = model.embed_dim
        self.packed: list[PackedLinear] = []
        self.stems = [self._stem(cast(PatchEmbed, embed)) for embed in model.patch_embed]
        self.blocks = [
            [[self._block(block) for block in branch] for branch in cast(Any, encoder).blocks]
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
            self._linear(head, norm, scale=0.5, precision=Precision.FLOAT32)
            for head, norm in zip(model.head, model.norm, strict=True)
            if self.classes
        ]
        self.logits_dtype = next(model.parameters()).dtype
        self._lock = threading.Lock()
        self._free: dict[tuple, list[_Instance]] = {}

    def outdated(self) -> bool:
        return self.watch is not None and self.watch.changed()

    @property
    def nbytes(self) -> int:
        with self._lock:
            instances = [instance for free in self._free.values() for instance in free]
            arenas = sum(i.arena.nbytes + i.scratch.nbytes for i in instances)
        return arenas + sum(p.nbytes for p in self.packed)

    def _linear(
        self, layer: Any, norm: Any = None, scale: float = 1.0, precision: Precision | None = None
    ) -> PackedLinear:
        packed = PackedLinear(
            layer.weight.flatten(1).contiguous(),
            layer.bias,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
            scale=scale,
            precision=self.precision if precision is None else precision,
        )
        self.packed.append(packed)
        return packed

    def _block(self, block: Any) -> _Layers:
        attn, mlp = block.attn, block.mlp
        return _Layers(
            qkv=self._linear(attn.qkv, block.norm1),
            proj=self._linear(attn.proj),
            fc1=self._linear(mlp.fc1, block.norm2),
            fc2=self._linear(mlp.fc2),
            eps=(block.norm1.eps, block.norm2.eps),
            heads=attn.num_heads,
            scale=attn.scale,
        )

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
            weight = weight.flatten(1).contiguous()
            packed = PackedLinear(weight, convolution.bias, precision=self.precision)
            self.packed.append(packed)
            found.append((packed, convolution))
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
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
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

    def _instance(self, model: CrossViT, x: Tensor) -> _Instance:
        threads = torch.get_num_threads()
        capacity = next(size for size in (1, 2, 4, 8, 16, _SLICE) if size >= x.shape[0])
        key = (x.dtype, x.shape[2:], threads)
        with self._lock:
            free = self._free.get(key, [])
            while free:
                instance = free.pop()
                if instance.capacity >= capacity:
                    return instance
        return _Instance(self, model, x, capacity, threads, key)


class _Instance:
    """Memory for some images of one size, and the program that runs in it. For one caller at a time."""

    def __init__(
        self, weights: _Weights, model: CrossViT, x: Tensor, capacity: int, threads: int, key: tuple
    ) -> None:
        self.weights, self.capacity, self.threads, self.key = weights, capacity, threads, key
        self.program = Program()
        size = (x.shape[2], x.shape[3])
        grids = model.grid_sizes(size)
        self.tokens_of = [1 + rows * columns for rows, columns in grids]
        self._arena(model, size, grids)
        for b in range(2):
            self._embed(model, b, x, size, grids[b])
        for k in range(len(weights.blocks)):
            for b in range(2):
                for layers in weights.blocks[k][b]:
                    self._block(b, layers)
            self._fuse(*weights.fusions[k])
        if weights.classes:
            self._classify(model)
        self.words = self.program.packed()
        # Kept, as taking it for each call would leave holes between what callers keep.
        self.isa, _, scratch = native.load().program_plan(self.words, self.capacity, self.threads)
        self.scratch = torch.empty(scratch + 16, dtype=torch.int32, device="cpu")
        del self.weights  # which hold this: without a cycle, all of it goes with its last user

    def _arena(self, model: CrossViT, size: tuple[int, int], grids: list[tuple[int, int]]) -> None:
        """Tokens of every image, and for each worker what a block passes from step to step."""
        weights = self.weights
        wide = self.temporary = 0
        of_tokens = [n * c for n, c in zip(self.tokens_of, weights.widths, strict=True)]
        for b in range(2):
            hidden = max((layers.fc1.outputs for blocks in weights.blocks for layers in blocks[b]), default=0)
            wide = max(wide, self.tokens_of[b] * (max(3 * weights.widths[b], hidden) + weights.widths[b]))
            wide = max(wide, *(_stem_elements(weights.stems[b], model.branch_sizes(size)[b])))
        of_worker = -(-2 * wide // 16) * 16  # the input of a step and its output, at most float32
        total = self.capacity * sum(of_tokens) + self.threads * of_worker
        self.arena = torch.empty(total + 16, dtype=torch.float32, device="cpu")
        at = -self.arena.data_ptr() % 64 // 4
        self.tokens: list[Tensor] = []
        for n, c in zip(self.tokens_of, weights.widths, strict=True):
            self.tokens.append(self.arena[at : at + self.capacity * n * c].view(self.capacity, n, c))
            at += self.capacity * n * c
        self._workers = self.arena.data_ptr() + 4 * at
        self._of_worker = 4 * of_worker

    def _scratch(self, offset: int, columns: int, dtype: torch.dtype) -> Place:
        """Rows of a worker, `offset` bytes into its memory."""
        size = dtype.itemsize
        return Place(Base.FIXED, self._workers + offset, dtype, columns * size, 0, self._of_worker)

    def _embed(
        self, model: CrossViT, b: int, x: Tensor, size: tuple[int, int], grid: tuple[int, int]
    ) -> None:
        weights, program = self.weights, self.program
        tokens = rows_of(self.tokens[b])
        position = resize_position_embedding(weights.positions[b], weights.grids[b], grid)
        position = position[0].expand(self.tokens_of[b], weights.widths[b]).contiguous()
        first = (position[0] + weights.cls[b][0, 0])[None].contiguous()
        program.keep += [position, first]
        program.images()
        program.add(Kind.COPY, copy_step(rows_of(first), tokens, 1, weights.widths[b]))
        bytes_of = x.element_size()
        place = Place(Base.INPUT, 0, x.dtype, 0, of_image=x.stride(0) * bytes_of)
        strides = cast(tuple[int, int, int], tuple(s * bytes_of for s in x.stride()[1:]))
        pixels = Pixels(place, x.shape[1], *size, *strides)
        seen = model.branch_sizes(size)[b]
        resizing = None
        if seen != size and model.crop_scale and seen[0] <= size[0] and seen[1] <= size[1]:
            top, left = round((size[0] - seen[0]) / 2.0), round((size[1] - seen[1]) / 2.0)
            place = Place(
                Base.INPUT, top * strides[1] + left * strides[2], x.dtype, 0, of_image=place.of_image
            )
            pixels = Pixels(place, x.shape[1], *seen, *strides)
        elif seen != size:
            resizing = Resizing(size, seen)
            program.keep.append(resizing)
        patch = model.patch_size[b]
        seen = (seen[0] // patch * patch, seen[1] // patch * patch)
        if resizing is None:
            pixels = Pixels(pixels.place, x.shape[1], *seen, *strides)
        half = self._of_worker // 2
        stem = weights.stems[b]
        for i, (packed, convolution) in enumerate(stem):
            last = i == len(stem) - 1
            windows = _windows(convolution, seen)
            count = windows.rows * windows.columns
            if last and count != self.tokens_of[b] - 1:
                raise RuntimeError(f"patch_embed.{b} gives {count} patches, not {self.tokens_of[b] - 1}")
            columns = self._scratch(0, packed.channels, weights.dtype)
            program.add(Kind.PATCHES, patch_step(pixels, columns, windows, seen, resizing))
            out = tokens.row(1) if last else self._scratch(half, packed.outputs, weights.dtype)
            step = packed.step(
                columns, out, count,
                activation=Activation.NONE if last else Activation.RELU,
                residual=rows_of(position).row(1) if last else None,
            )  # fmt: skip
            program.add(Kind.LINEAR, step)
            bytes_of = weights.dtype.itemsize
            of_pixel = packed.outputs * bytes_of
            seen, resizing = (windows.rows, windows.columns), None
            pixels = Pixels(
                out, packed.outputs, *seen, 0, of_pixel * windows.columns, of_pixel, channels_last=True
            )

    def _block(self, b: int, layers: _Layers) -> None:
        program, dtype = self.program, self.weights.dtype
        n, c = self.tokens_of[b], self.weights.widths[b]
        x = rows_of(self.tokens[b])
        wide = self._scratch(0, layers.qkv.outputs, dtype)
        narrow = self._scratch(self._of_worker // 2, c, dtype)
        hidden = self._scratch(0, layers.fc1.outputs, dtype)
        precision = self.weights.precision
        program.images()
        program.add(Kind.LINEAR, layers.qkv.step(x, wide, n, eps=layers.eps[0]))
        heads = attention_step(wide, narrow, n, layers.heads, c // layers.heads, precision, layers.scale)
        program.add(Kind.SELF_ATTENTION, heads)
        program.add(Kind.LINEAR, layers.proj.step(narrow, x, n, residual=x))
        program.add(Kind.LINEAR, layers.fc1.step(x, hidden, n, Activation.GELU, eps=layers.eps[1]))
        program.add(Kind.LINEAR, layers.fc2.step(hidden, x, n, residual=x))

    def _fuse(self, weights: list[tuple[Any, ...]], heads: list[int], eps: float) -> None:
        nothing = torch.empty(0, dtype=torch.float32, device="cpu")
        directions = []
        for b in range(2):
            own, other = self.tokens[b], self.tokens[1 - b]
            direction = Direction(own[:, :1], other[:, 1:], weights[b], heads[b], stream=b)
            # The CLS rows are read before they are written, and no direction reads the other's.
            directions.append((direction, ForwardOutputs(own[:, :1], None, None, nothing)))
        self.program.keep.append(directions)
        self.program.batch()
        self.program.add(Kind.FUSION, fusion_step(directions, eps))

    def _classify(self, model: CrossViT) -> None:
        classes = self.weights.classes
        logits = Place(Base.OUTPUT, 0, torch.float32, 4 * classes, of_image=4 * classes)
        self.program.batch()
        for b, (head, (_, _, eps)) in enumerate(zip(self.weights.heads, self.weights.norms, strict=True)):
            residual = logits if b else None
            step = head.step(rows_of(self.tokens[b]), logits, 1, eps=eps, residual=residual)
            self.program.add(Kind.LINEAR, step)

    def run(self, weights: _Weights, x: Tensor, out: Tensor) -> None:
        module, images = native.load(), x.shape[0]
        _, threads, _ = module.program_plan(self.words, images, self.threads)  # one after a fork
        scratch = self.scratch.data_ptr() + -self.scratch.data_ptr() % 64
        module.run_program(self.words, images, x.data_ptr(), out.data_ptr(), scratch, self.isa, threads)
        if not weights.classes:
            rows = (y[:images, 0] for y in self.tokens)
            normalised = (
                F.layer_norm(row, row.shape[1:], weight.float(), bias.float(), eps)
                for row, (weight, bias, eps) in zip(rows, weights.norms, strict=True)
            )
            torch.cat(tuple(normalised), dim=1, out=out)


def _windows(convolution: nn.Conv2d, seen: tuple[int, int]) -> Windows:
    (kernel, _), (stride, _) = convolution.kernel_size, convolution.stride
    padding = cast(tuple[int, int], convolution.padding)[0]
    rows, columns = ((size + 2 * padding - kernel) // stride + 1 for size in seen)
    return Windows(kernel, stride, padding, rows, columns)


def _stem_elements(stem: list[tuple[PackedLinear, nn.Conv2d]], seen: tuple[int, int]) -> Iterator[int]:
    """The most that a convolution of the stem has as windows, and as results."""
    for packed, convolution in stem:
        windows = _windows(convolution, seen)
        seen = (windows.rows, windows.columns)
        yield windows.rows * windows.columns * max(packed.channels, packed.outputs)
