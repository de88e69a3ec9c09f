"""The launches of the Triton kernels: allocation, grids, configurations."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dependent_launch
from ..validation import precision_of_float32
from . import triton_buffers as buffers
from . import triton_chain as chain
from . import triton_chain_backward as chain_backward
from . import triton_parameters as parameters
from . import triton_tokens as attention
from .directions import Direction, ForwardOutputs, Gradients
from .gpu import gpu_of, on_device_of, scores_to_attention
from .operands import Weights
from .triton_table import Configuration, allows_tf32, configuration, register_limit

_STEP_BYTES = 2**15  # of a weight that a program of a head reads in one step

# The tensors of `Direction.weights`; bk cancels in the softmax.
_ATTENTION = ("gamma", "beta", "wq", "bq", "wk", "bk", "wv", "bv", "wo", "bo")
_PROJECT = ("project_gamma", "project_beta", "project_weight", "project_bias")
_BACK = ("back_gamma", "back_beta", "back_weight", "back_bias")
_WEIGHTS = tuple(name for name in (*_ATTENTION, *_PROJECT, *_BACK) if name != "bk")
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _rows(*names: str) -> tuple[str, ...]:
    """Tensors [B, 1, channels] with their strides."""
    return tuple(f"{name}{part}" for name in names for part in ("", "_batch", "_channel"))


def _tokens(*names: str) -> tuple[str, ...]:
    """Tensors [B, P, channels] with their strides."""
    return tuple(f"{name}{part}" for name in names for part in ("", "_batch", "_token", "_channel"))


def _arguments(name: str, *fields: str) -> Any:
    return namedtuple(name, fields, defaults=(None,) * len(fields))


# What each kind of kernel gets of a direction and reads by name; None for what is absent. A kernel that is
# given less is compiled again less often, because the strides, the alignment and the absence of anything that
# it is given are constants of its compilation. Strides count elements, `d_` stands before a gradient, `own`
# is the CLS token of the branch itself, `new` what it becomes, `copy` a copy of the patches; `parts` is what
# the programs of one image leave for the kernel that merges them.
_CONSTANTS = (
    *("width", "own_width", "heads", "head_tile", "slices", "slice", "widths", "exact"),
    *("stream", "score_scale", "dtype"),
)
_BUFFERS = (*_CONSTANTS, "saved", "scratch", "parts")
_CHAIN = (
    *(*_BUFFERS, *_rows("own", "new", "d_new", "d_cls"), *_WEIGHTS, "seed"),
    *("wq_stride", "wk_stride", "wv_stride", "wo_stride", "project_stride", "back_stride"),
)
OfChain = _arguments("OfChain", *_CHAIN, *_rows("scale"), "d_scale")
OfTokens = _arguments(
    "OfTokens",
    *(*_BUFFERS, "gamma", "seed", "attention", "d_attention"),
    *_tokens("patches", "copy", "d_copy", "d_patches"),
)
OfParameters = _arguments("OfParameters", *_BUFFERS, *(f"d_{name}" for name in _WEIGHTS))


def saved_floats(width: int, heads: int) -> int:
    """What forward leaves for backward, an image."""
    return buffers.saved_columns(width, heads)


@cache
def pieces(width: int, largest: int) -> tuple[int, ...]:
    """Powers of two from `largest` down to the 16 channels of a product, which cover the width."""
    full, rest = divmod(-(-width // 16), largest // 16)
    smaller = (16 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1)
    return (largest,) * full + tuple(smaller)


def cut(width: int, warps: int) -> tuple[int, int]:
    """(slices, channels of one): one for each warp, as long as a slice has the 16 channels of a product."""
    slices = warps
    while slices > 1 and slices * 16 > width:
        slices //= 2
    return slices, -(-width // (8 * slices)) * 8


def _named(weights: Weights) -> dict[str, Any]:
    """Weights, or their gradients, by name; vectors contiguous."""
    fuses = len(weights) > len(_ATTENTION)
    names = (*_PROJECT, *_ATTENTION, *_BACK) if fuses else _ATTENTION
    found = dict(zip(names, weights, strict=True))
    for name, x in found.items():
        if x is not None and x.ndim == 1 and x.stride(0) != 1:
            found[name] = x.contiguous()
    return found


def _of_rows(name: str, x: Tensor | None) -> dict[str, Any]:
    """The fields of a tensor [B, 1, channels], whose channels are then less than 2^31 elements apart."""
    if x is None:
        return {}
    if x.stride(2) * x.shape[2] >= 2**31:
        x = x.contiguous()
    return {name: x, f"{name}_batch": x.stride(0), f"{name}_channel": x.stride(2)}


def _of_tokens(name: str, x: Tensor | None) -> dict[str, Any]:
    """The fields of a tensor [B, P, channels]."""
    if x is None:
        return {}
    return dict(zip(_tokens(name), (x, *x.stride()), strict=True))


def _direction(task: Direction, saved: Tensor, config: Configuration) -> dict[str, Any]:
    """What forward and backward have in common."""
    width = task.patches.shape[2]
    slices, channels = cut(width, config.warps)
    widths = pieces(channels, config.piece)
    weights = _named(task.weights)
    matrices = {"project_stride": "project_weight", "back_stride": "back_weight"}
    matrices |= {f"{name}_stride": name for name in ("wq", "wk", "wv", "wo")}
    strides = {name: weights[of].stride(0) for name, of in matrices.items() if of in weights}
    return {
        "width": tl.constexpr(width),
        "own_width": tl.constexpr(task.cls.shape[2]),
        "heads": tl.constexpr(task.num_heads),
        "head_tile": tl.constexpr(config.head_tile),
        "widths": tl.constexpr(widths),
        "slices": tl.constexpr(slices),
        "slice": tl.constexpr(channels),
        "exact": tl.constexpr(sum(widths) == channels and slices * channels == width),
        "stream": tl.constexpr(task.stream),
        "score_scale": tl.constexpr((width // task.num_heads) ** -0.5),
        "dtype": tl.constexpr(_DTYPES[weights["wq"].dtype]),
        "seed": task.seed,
        "saved": saved,
        **(_of_rows("own", task.cls) if task.fuses else {}),
        **_of_tokens("patches", task.patches),
        **_of_rows("scale", task.scale),
        **weights,
        **strides,
    }


class _Launcher:
    """Launches kernels for one or two directions; each grid is that of the direction that needs more."""

    def __init__(self, directions: list[dict[str, Any]], config: Configuration, architecture: str) -> None:
        self.directions = directions
        self.config = config
        self.pairs: dict[Any, tuple[Any, Any]] = {}
        self.batch = directions[0]["patches"].shape[0]
        self.precision = precision_of_float32() if allows_tf32(architecture) else "ieee"
        self.architecture = architecture

    def rows(self, kernel: Any, programs: Callable[[dict[str, Any]], int], *args: Any) -> None:
        """A kernel of the chain, `programs` of a direction for each `buffers.ROWS` images."""
        blocks = -(-self.batch // buffers.ROWS.value) * max(programs(d) for d in self.directions)
        self._launch(kernel, blocks, OfChain, args, **self._chain(self.config.block, self.config.block_warps))

    def heads(self, kernel: Any, *args: Any) -> None:
        """A kernel of the chain whose programs are a head each; wide heads take fewer channels a step."""
        block = self.config.block
        of_a_channel = max(
            buffers.head_block(d["width"].value // d["heads"].value) * d["wq"].element_size()
            for d in self.directions
        )
        while block > buffers.ROWS.value and block * of_a_channel > _STEP_BYTES:
            block //= 2
        blocks = -(-self.batch // buffers.ROWS.value) * max(d["heads"].value for d in self.directions)
        options = self._chain(block, self.config.head_warps)
        self._launch(kernel, blocks, OfChain, args, **options)

    def tokens(self, kernel: Any, programs: int, *args: Any, **constants: bool) -> None:
        """A kernel of the attention over the tokens."""
        config = self.config
        options = {"TOKENS": config.tokens, "num_warps": config.warps, "num_stages": config.stages}
        self._launch(kernel, programs, OfTokens, args, **options, **constants)

    def parameters(self, kernel: Any, jobs: int) -> None:
        """The gradients of the parameters, `jobs` a direction; a program is a tile of the largest."""
        count = len(self.directions)
        tiles = max(self._largest_parameter(d) for d in self.directions)
        options = self._chain(self.config.block, self.config.block_warps)
        kernel[tiles, jobs * count](
            *self._pair(OfParameters),
            self.batch,
            JOBS=jobs,
            BOTH=count == 2,
            PRECISION=self.precision,
            **options,
        )

    def _chain(self, block: int, warps: int) -> dict[str, int]:
        # Loads one step ahead: more does not fit beside wide heads on GPUs with 99 KB of shared memory.
        return {
            "BLOCK": block,
            "num_warps": warps,
            "num_stages": 2,
            **register_limit(self.architecture, warps),
        }

    def columns(self, width: int) -> int:
        """Programs that cover a width."""
        return -(-width // self.config.block)

    def _largest_parameter(self, d: dict[str, Any]) -> int:
        width, own, heads = (d[name].value for name in ("width", "own_width", "heads"))
        rows = buffers.ROWS.value
        return max(
            heads * -(-(width // heads) // rows) * self.columns(width),
            -(-width // rows) * self.columns(max(width, own)),
            -(-own // rows) * self.columns(width),
        )

    def _pair(self, kind: Any) -> tuple[Any, Any]:
        if kind not in self.pairs:
            given = [kind(**{x: d[x] for x in kind._fields if x in d}) for d in self.directions]
            self.pairs[kind] = given[0], given[1] if len(given) > 1 else None
        return self.pairs[kind]

    def _launch(self, kernel: Any, blocks: int, kind: Any, args: tuple, **options: Any) -> None:
        count = len(self.directions)
        kernel[blocks, count](
            *self._pair(kind), self.batch, *args, BOTH=count == 2, PRECISION=self.precision, **options,
            **dependent_launch.options(self.architecture),
        )  # fmt: skip


def architecture_of_device() -> str:
    """Of the current device, as triton_table.py names it."""
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


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
    with on_device_of(directions[0][0].patches):
        _forward(directions, eps, dropout_p)


def _forward(directions: list[tuple[Direction, ForwardOutputs]], eps: float, dropout_p: float) -> None:
    tasks = [task for task, _ in directions]
    architecture = architecture_of_device()
    config = configuration(tasks, False, architecture)
    batch, fuses = tasks[0].patches.shape[0], tasks[0].fuses
    device = tasks[0].patches.device
    programs = [batch * -(-t.num_heads // config.head_tile) for t in tasks]
    counts = [t.patches.shape[1] for t in tasks]
    parts = [splits(sum(programs), count, config.tokens, gpu_of(device).multiprocessors) for count in counts]
    given = []
    for (task, out), part in zip(directions, parts, strict=True):
        direction = _direction(task, out.saved, config)
        if not fuses:
            out.saved[:, : task.cls.shape[2]].copy_(task.cls[:, 0])
        shape = (batch, part, task.num_heads, buffers.part_columns(task.patches.shape[2]))
        given.append(
            {
                **direction,
                **_of_rows("new", out.cls),
                **_of_tokens("copy", out.patches),
                "attention": out.attention,
                "parts": torch.empty(shape, dtype=torch.float32, device=device) if part > 1 else None,
            }
        )
    launcher = _Launcher(given, config, architecture)
    if fuses:
        launcher.rows(chain.project, lambda d: launcher.columns(d["width"].value), eps)
    launcher.heads(chain.absorb, eps)
    launcher.tokens(
        attention.attend,
        max(p * s for p, s in zip(programs, parts, strict=True)),
        *_first_and_last(counts),
        *_first_and_last(parts),
        eps,
        *_dropout(directions, dropout_p),
    )
    launcher.heads(chain.values, *_first_and_last(parts))
    launcher.rows(chain.output, lambda d: launcher.columns(d["width"].value))
    if fuses:
        launcher.rows(chain.back, lambda d: launcher.columns(d["own_width"].value), eps)
    scores_to_attention(directions)


def backward(directions: list[tuple[Direction, Gradients]], eps: float, dropout_p: float) -> None:
    """One or two directions, into their gradients."""
    batch = directions[0][0].patches.shape[0]
    if batch == 0:
        return
    with on_device_of(directions[0][0].patches):
        _backward(directions, eps, dropout_p)


def _backward(directions: list[tuple[Direction, Gradients]], eps: float, dropout_p: float) -> None:
    tasks = [task for task, _ in directions]
    architecture = architecture_of_device()
    config = configuration(tasks, True, architecture)
    batch, fuses = tasks[0].patches.shape[0], tasks[0].fuses
    device = tasks[0].patches.device
    counts = [t.patches.shape[1] for t in tasks]
    parts = [
        splits(batch * len(tasks), count, config.tokens, gpu_of(device).multiprocessors) for count in counts
    ]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    given = []
    for (task, gradients), part in zip(directions, parts, strict=True):
        width, own_width, heads = task.patches.shape[2], task.cls.shape[2], task.num_heads
        weights = {} if gradients.to_weights is None else _named(gradients.to_weights)
        given.append(
            {
                **_direction(task, gradients.saved, config),
                "scratch": empty(batch, buffers.scratch_columns(width, own_width, heads)),
                "parts": empty(batch, part, heads, buffers.part_columns(width)),
                **_of_rows("d_new", gradients.cls),
                **_of_tokens("d_copy", gradients.patches),
                **_of_tokens("d_patches", gradients.to_patches),
                **_of_rows("d_cls", gradients.to_cls),
                "d_attention": None if gradients.attention is None else gradients.attention[1],
                "d_scale": gradients.to_scale,
                **{f"d_{name}": x for name, x in weights.items()},
            }
        )
    launcher = _Launcher(given, config, architecture)
    if fuses:
        launcher.rows(chain_backward.back_backward, lambda d: launcher.columns(d["width"].value), eps)
    launcher.rows(chain_backward.output_backward, lambda d: launcher.columns(d["width"].value), eps)
    launcher.heads(chain_backward.values_backward)
    for (task, gradients), direction in zip(directions, given, strict=True):
        if gradients.attention is not None:
            attended, incoming = gradients.attention
            _softmax_sums(direction["scratch"], task).add_((attended * incoming).sum(-1))
    for tile in range(-(-max(t.num_heads for t in tasks) // buffers.PAIRS.value)):
        launcher.tokens(
            attention.attend_backward,
            batch * max(parts),
            *_first_and_last(counts),
            *_first_and_last(parts),
            tile,
            eps,
            *_dropout(directions, dropout_p),
            ADDS=tile > 0,
        )
    launcher.heads(chain_backward.absorb_backward, *_first_and_last(parts))
    launcher.rows(chain_backward.query_backward, lambda d: launcher.columns(d["width"].value), eps)
    if fuses:
        launcher.rows(chain_backward.project_backward, lambda d: launcher.columns(d["own_width"].value), eps)
    if directions[0][1].to_cls is not None:
        launcher.rows(chain_backward.cls_backward, lambda d: 1, eps)
    if directions[0][1].to_weights is not None:
        jobs = parameters.JOBS_OF_FUSION if fuses else parameters.JOBS
        launcher.parameters(parameters.parameters_backward, jobs.value)


def _softmax_sums(scratch: Tensor, task: Direction) -> Tensor:
    """The part of `scratch` that holds sum_n p_n dp_n, [B, H]."""
    heads = task.num_heads
    own = buffers.OWN_COLUMNS.value * buffers.padded(task.cls.shape[2])
    start = scratch.shape[1] - own - 2 * buffers.padded(heads)
    return scratch[:, start : start + heads]
