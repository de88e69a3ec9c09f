"""The launches of triton_kernels.py: allocation, grids, configurations."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..validation import precision_of_float32
from . import triton_kernels as kernels
from .directions import Direction, ForwardOutputs, Gradients
from .operands import Weights
from .triton_table import Configuration, configuration

_ATTENTION = ("gamma", "beta", "wq", "bq", "wk", "bk", "wv", "bv", "wo", "bo")  # bk cancels in the softmax
_PROJECT = ("project_gamma", "project_beta", "project_weight", "project_bias")
_BACK = ("back_gamma", "back_beta", "back_weight", "back_bias")
_JOBS = 9  # of parameters_backward without f and g, and with them
_JOBS_OF_FUSION = 17


_WEIGHTS = (*_ATTENTION, *_PROJECT, *_BACK)
_CONSTANTS = ("width", "own_width", "heads", "head_tile", "widths", "exact", "stream", "score_scale")
# Tensors with their strides: [B, 1, channels] and [B, P, channels].
_ROWS = ("own", "scale", "new", "d_new", "d_cls")
_TOKENS = ("patches", "copy", "d_copy", "d_patches")
_FIELDS = (
    *_CONSTANTS,
    *(f"{name}{part}" for name in _ROWS for part in ("", "_batch", "_channel")),
    *(f"{name}{part}" for name in _TOKENS for part in ("", "_batch", "_token", "_channel")),
    *_WEIGHTS,
    *("wq_stride", "wk_stride", "wv_stride", "wo_stride", "project_stride", "back_stride"),
    *("seed", "attention", "d_attention", "saved", "scratch", "parts", "d_scale"),
    *(f"d_{name}" for name in _WEIGHTS),
)
Arguments: Any = namedtuple("Arguments", _FIELDS, defaults=(None,) * len(_FIELDS))  # type: ignore[misc]
Arguments.__doc__ = """What the kernels get of one direction and read by name; None for what is absent.

Constants of the compilation are tl.constexpr, strides count elements, `d_` stands before a gradient. `own` is
the CLS token of the branch itself, `new` what it becomes, `copy` a copy of the patches. `parts` is what the
programs of one image leave for the kernel that merges them.
"""


def saved_floats(width: int, heads: int) -> int:
    """What forward leaves for backward, an image."""
    return kernels.saved_columns(width, heads)


@cache
def pieces(width: int) -> tuple[int, ...]:
    """Powers of two, three at most and 16 at least, that cover the width with the least waste."""
    unit = 16
    while True:
        units = -(-width // unit)
        if units.bit_count() <= 3:
            return tuple(unit << bit for bit in reversed(range(units.bit_length())) if units >> bit & 1)
        unit *= 2


def _named(names: tuple[str, ...], weights: Weights) -> dict[str, Any]:
    found = dict(zip(names, weights, strict=True))
    for name, x in found.items():
        if x is not None and x.ndim == 1 and x.stride(0) != 1:
            found[name] = x.contiguous()
    return found


def _all_named(weights: Weights) -> dict[str, Any]:
    if len(weights) == len(_ATTENTION):
        return _named(_ATTENTION, weights)
    return {
        **_named(_PROJECT, weights[:4]),
        **_named(_ATTENTION, weights[4:14]),
        **_named(_BACK, weights[14:]),
    }


def _strided(name: str, x: Tensor | None) -> dict[str, Any]:
    """A field of `Arguments` with its strides."""
    if x is None:
        return {}
    fields: dict[str, Any] = {name: x, f"{name}_batch": x.stride(0), f"{name}_channel": x.stride(2)}
    if name in _TOKENS:
        fields[f"{name}_token"] = x.stride(1)
    return fields


def _direction(task: Direction, saved: Tensor, head_tile: int) -> Any:
    width = task.patches.shape[2]
    widths = pieces(width)
    weights = _all_named(task.weights)
    matrices = {"project_stride": "project_weight", "back_stride": "back_weight"}
    matrices |= {f"{name}_stride": name for name in ("wq", "wk", "wv", "wo")}
    strides = {name: weights[of].stride(0) for name, of in matrices.items() if of in weights}
    return Arguments(  # type: ignore[call-arg]
        width=tl.constexpr(width),
        own_width=tl.constexpr(task.cls.shape[2]),
        heads=tl.constexpr(task.num_heads),
        head_tile=tl.constexpr(head_tile),
        widths=tl.constexpr(widths),
        exact=tl.constexpr(sum(widths) == width),
        stream=tl.constexpr(task.stream),
        score_scale=tl.constexpr((width // task.num_heads) ** -0.5),
        seed=task.seed,
        saved=saved,
        **_strided("own", task.cls),
        **_strided("patches", task.patches),
        **_strided("scale", task.scale),
        **weights,
        **strides,
    )


# What each kind of kernel gets: one that is given less is compiled again less often, because the strides, the
# alignment and the absence of anything that it is given are constants of its compilation.
_D_WEIGHTS = frozenset(f"d_{name}" for name in _WEIGHTS)
_ONLY_TOKENS = frozenset(x for x in _FIELDS if x.startswith(_TOKENS)) | {"attention", "d_attention"}
_OF_CHAIN = frozenset(_FIELDS) - _ONLY_TOKENS - _D_WEIGHTS
_OF_TOKENS = _ONLY_TOKENS | {*_CONSTANTS, "gamma", "wq", "seed", "saved", "scratch", "parts"}
_OF_PARAMETERS = _D_WEIGHTS | {*_CONSTANTS, "wq", "project_weight", "saved", "scratch"}


def _only(fields: frozenset[str], direction: Any) -> Any:
    return direction._replace(**{name: None for name in _FIELDS if name not in fields})


class _Launcher:
    """Launches kernels for one or two directions; each grid is that of the direction that needs more."""

    def __init__(self, directions: list[Any], config: Configuration) -> None:
        self.directions = directions
        self.config = config
        self.pairs: dict[frozenset[str], tuple[Any, Any]] = {}
        first = directions[0].patches
        self.batch = first.shape[0]
        self.precision = precision_of_float32()

    def rows(self, kernel: Any, programs: Callable[[Any], int], *args: Any) -> None:
        """A kernel of the chain, `programs` of a direction for each `kernels.ROWS` images."""
        blocks = -(-self.batch // kernels.ROWS.value) * max(programs(d) for d in self.directions)
        self._launch(
            kernel, blocks, _OF_CHAIN, args, BLOCK=self.config.block, num_warps=self.config.block_warps
        )

    def tokens(self, kernel: Any, programs: int, *args: Any) -> None:
        """A kernel of the attention over the tokens."""
        config = self.config
        options = {"TOKENS": config.tokens, "num_warps": config.warps, "num_stages": config.stages}
        self._launch(kernel, programs, _OF_TOKENS, args, **options)

    def parameters(self, kernel: Any, jobs: int) -> None:
        """The gradients of the parameters, `jobs` a direction; a program is a tile of the largest."""
        count = len(self.directions)
        tiles = max(self._largest_parameter(d) for d in self.directions)
        pair = self._pair(_OF_PARAMETERS)
        options = {"BLOCK": self.config.block, "num_warps": self.config.block_warps}
        kernel[tiles, jobs * count](
            *pair, self.batch, JOBS=jobs, BOTH=count == 2, PRECISION=self.precision, **options
        )

    def columns(self, width: int) -> int:
        """Programs that cover a width."""
        return -(-width // self.config.block)

    def _largest_parameter(self, d: Any) -> int:
        width, own, heads = d.width.value, d.own_width.value, d.heads.value
        rows = kernels.ROWS.value
        return max(
            heads * -(-(width // heads) // rows) * self.columns(width),
            -(-width // rows) * self.columns(max(width, own)),
            -(-own // rows) * self.columns(width),
        )

    def _pair(self, fields: frozenset[str]) -> tuple[Any, Any]:
        if fields not in self.pairs:
            first, *second = [_only(fields, d) for d in self.directions]
            self.pairs[fields] = first, second[0] if second else None
        return self.pairs[fields]

    def _launch(self, kernel: Any, blocks: int, fields: frozenset[str], args: tuple, **options: Any) -> None:
        count = len(self.directions)
        kernel[blocks, count](
            *self._pair(fields), self.batch, *args, BOTH=count == 2, PRECISION=self.precision, **options
        )


def _device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # compiled kernels executed without a GPU
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def splits(programs: int, patches: int, tokens: int, multiprocessors: int) -> int:
    """In how many parts the tokens of an image are read: two programs a multiprocessor if there are enough.

    A part has two steps of `tokens` at least, and no part is empty.
    """
    wanted = max(1, min(2 * multiprocessors // max(programs, 1), -(-patches // (2 * tokens))))
    part = -(-max(patches, 1) // (wanted * tokens)) * tokens
    return max(1, -(-patches // part))


def _dropout(directions: list[tuple[Direction, Any]], dropout_p: float) -> tuple[int, float]:
    """The threshold and the scale of `dropout.dropout_mask`."""
    if directions[0][0].seed is None:
        return 0, 1.0
    return int(dropout_p * 2**32), 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def _first_and_last(values: list[int]) -> tuple[int, int]:
    return values[0], values[-1]


def forward(directions: list[tuple[Direction, ForwardOutputs]], eps: float, dropout_p: float) -> None:
    """One or two directions, into their outputs. An empty batch has nothing to compute."""
    batch = directions[0][0].patches.shape[0]
    if batch == 0:
        return
    with _device_of(directions[0][0].patches):
        _forward(directions, eps, dropout_p)


def _forward(directions: list[tuple[Direction, ForwardOutputs]], eps: float, dropout_p: float) -> None:
    tasks = [task for task, _ in directions]
    config = configuration(tasks, backward=False)
    batch, fuses = tasks[0].patches.shape[0], tasks[0].fuses
    device = tasks[0].patches.device
    programs = [batch * -(-t.num_heads // config.head_tile) for t in tasks]
    counts = [t.patches.shape[1] for t in tasks]
    parts = [splits(sum(programs), count, config.tokens, _multiprocessors(device)) for count in counts]
    given = []
    for (task, out), part in zip(directions, parts, strict=True):
        direction = _direction(task, out.saved, config.head_tile)
        if not fuses:
            out.saved[:, : task.cls.shape[2]].copy_(task.cls[:, 0])
        shape = (batch, part, task.num_heads, kernels.padded(task.patches.shape[2]) + 16)
        given.append(
            direction._replace(
                **_strided("new", out.cls),
                **_strided("copy", out.patches),
                attention=out.attention,
                parts=torch.empty(shape, dtype=torch.float32, device=device) if part > 1 else None,
            )
        )
    launcher = _Launcher(given, config)
    if fuses:
        launcher.rows(kernels.project, lambda d: launcher.columns(d.width.value), eps)
    launcher.rows(kernels.absorb, lambda d: d.heads.value, eps)
    launcher.tokens(
        kernels.attend,
        max(p * s for p, s in zip(programs, parts, strict=True)),
        *_first_and_last(counts),
        *_first_and_last(parts),
        eps,
        *_dropout(directions, dropout_p),
    )
    launcher.rows(kernels.values, lambda d: d.heads.value, *_first_and_last(parts))
    launcher.rows(kernels.output, lambda d: launcher.columns(d.width.value))
    if fuses:
        launcher.rows(kernels.back, lambda d: launcher.columns(d.own_width.value), eps)
    for task, out in directions:
        if out.attention is not None:
            # The kernel leaves scores in base 2; what turns them into weights is known only now.
            out.attention.sub_(_log_sum_exp(out.saved, task)[..., None]).exp2_()


def _log_sum_exp(saved: Tensor, task: Direction) -> Tensor:
    """The part of `saved` that holds log2 of the sums of the exponentials, [B, H]."""
    start = saved.shape[1] - 2 * kernels.padded(task.num_heads)
    return saved[:, start : start + task.num_heads]


def backward(directions: list[tuple[Direction, Gradients]], eps: float, dropout_p: float) -> None:
    """One or two directions, into their gradients."""
    batch = directions[0][0].patches.shape[0]
    if batch == 0:
        return
    with _device_of(directions[0][0].patches):
        _backward(directions, eps, dropout_p)


def _backward(directions: list[tuple[Direction, Gradients]], eps: float, dropout_p: float) -> None:
    tasks = [task for task, _ in directions]
    config = configuration(tasks, backward=True)
    batch, fuses = tasks[0].patches.shape[0], tasks[0].fuses
    device = tasks[0].patches.device
    counts = [t.patches.shape[1] for t in tasks]
    parts = [splits(batch * len(tasks), count, config.tokens, _multiprocessors(device)) for count in counts]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    given = []
    for (task, gradients), part in zip(directions, parts, strict=True):
        width, own_width, heads = task.patches.shape[2], task.cls.shape[2], task.num_heads
        weights = {} if gradients.to_weights is None else _all_named(gradients.to_weights)
        given.append(
            _direction(task, gradients.saved, config.head_tile)._replace(
                scratch=empty(batch, kernels.scratch_columns(width, own_width, heads)),
                parts=empty(batch, part, heads, kernels.padded(width)),
                **_strided("d_new", gradients.cls),
                **_strided("d_copy", gradients.patches),
                **_strided("d_patches", gradients.to_patches),
                **_strided("d_cls", gradients.to_cls),
                d_attention=None if gradients.attention is None else gradients.attention[1],
                d_scale=gradients.to_scale,
                **{f"d_{name}": x for name, x in weights.items()},
            )
        )
    launcher = _Launcher(given, config)
    if fuses:
        launcher.rows(kernels.back_backward, lambda d: launcher.columns(d.width.value), eps)
    launcher.rows(kernels.output_backward, lambda d: launcher.columns(d.width.value), eps)
    launcher.rows(kernels.values_backward, lambda d: d.heads.value)
    for (task, gradients), direction in zip(directions, given, strict=True):
        if gradients.attention is not None:
            attention, incoming = gradients.attention
            _softmax_sums(direction, task).add_((attention * incoming).sum(-1))
    launcher.tokens(
        kernels.attend_backward,
        batch * max(parts),
        *_first_and_last(counts),
        *_first_and_last(parts),
        eps,
        *_dropout(directions, dropout_p),
    )
    launcher.rows(kernels.absorb_backward, lambda d: d.heads.value, *_first_and_last(parts))
    launcher.rows(kernels.query_backward, lambda d: launcher.columns(d.width.value), eps)
    if fuses:
        launcher.rows(kernels.project_backward, lambda d: launcher.columns(d.own_width.value), eps)
    if given[0].d_cls is not None:
        launcher.rows(kernels.cls_backward, lambda d: 1, eps)
    if given[0].d_wq is not None:
        launcher.parameters(kernels.parameters_backward, _JOBS_OF_FUSION if fuses else _JOBS)


def _softmax_sums(direction: Any, task: Direction) -> Tensor:
    """The part of `scratch` that holds sum_n p_n dp_n, [B, H]."""
    scratch, heads = direction.scratch, task.num_heads
    assert scratch is not None
    own = kernels.OWN_COLUMNS.value * kernels.padded(task.cls.shape[2])
    start = scratch.shape[1] - own - 2 * kernels.padded(heads)
    return scratch[:, start : start + heads]
