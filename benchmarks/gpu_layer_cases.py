"""What the hardware command measures of the layers of a block, those of crossvit_18, on Triton and PyTorch.

Eager PyTorch is what a library's products and separate passes cost, in a whole block around SDPA; SDPA is
asked for each of its engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu_timing
from benchmarks.compiled_layers import linear_layers
from benchmarks.gpu_cases import BOUNDS, DTYPES, ROUNDS, Result, error, failing
from crossvit_kernels import (
    BlockWeights,
    add_position,
    linear,
    patch_embed,
    self_attention,
    transformer_block,
)
from crossvit_kernels.measure import Interval, compare

OURS = "triton"
SDPA_ENGINES = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
Run = Callable[[Sequence[Tensor], str], Tensor]


@dataclass(frozen=True)
class LayerCase:
    """One measurement: a layer in one mode, on a batch of bfloat16.

    Attributes:
        draw: its tensors for so many images, in float64 on the CPU; the first are the tokens or the image.
        run: the operation of them and a backend.
        shape: as crossvit_kernels/kernel_preference.py has it.
        number: of what that file counts, for one image.
    """

    layer: str
    operation: str
    draw: Callable[[int], list[Tensor]]
    run: Run
    shape: tuple[int | str | bool, ...]
    number: int
    mode: str
    batch: int
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        return f"{self.layer}, {self.mode}, B={self.batch}, {self.dtype}"

    @property
    def trains(self) -> bool:
        return self.mode != "forward"


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32).double()


def _linear(
    tokens: int, channels: int, outputs: int, norm: bool, activation: str | None, residual: bool
) -> tuple[Callable[[int], list[Tensor]], Run]:
    def draw(batch: int) -> list[Tensor]:
        tensors = [
            _normal(batch, tokens, channels),
            _normal(outputs, channels) / channels**0.5,
            _normal(outputs),
        ]
        tensors += [1 + _normal(channels) / 10, _normal(channels) / 10] if norm else []
        return tensors + ([_normal(batch, tokens, outputs)] if residual else [])

    def run(x: Sequence[Tensor], backend: str) -> Tensor:
        norms = {"norm_weight": x[3], "norm_bias": x[4]} if norm else {}
        added = {"residual": x[-1]} if residual else {}
        return linear(*x[:3], **norms, **added, activation=activation, backend=backend)

    return draw, run


def _attention(tokens: int, heads: int, channels: int) -> tuple[Callable[[int], list[Tensor]], Run]:
    def draw(batch: int) -> list[Tensor]:
        return [_normal(batch, tokens, 3 * heads * channels)]

    return draw, lambda x, backend: self_attention(x[0], heads, backend=backend)


def _patches(
    side: int, channels: int, size: tuple[int, int] | None
) -> tuple[Callable[[int], list[Tensor]], Run]:
    def draw(batch: int) -> list[Tensor]:
        tokens = 1 + ((size or (240, 240))[0] // side) ** 2
        weight = _normal(channels, 3, side, side) / (3 * side * side) ** 0.5
        return [
            _normal(batch, 3, 240, 240),
            weight,
            _normal(channels),
            _normal(tokens, channels),
            _normal(channels),
        ]

    return draw, lambda x, backend: patch_embed(*x, size=size, backend=backend)


def _block(tokens: int, heads: int, channels: int) -> tuple[Callable[[int], list[Tensor]], Run]:
    width, hidden = heads * channels, 3 * heads * channels

    def draw(batch: int) -> list[Tensor]:
        def layer(outputs: int, inputs: int) -> list[Tensor]:
            return [_normal(outputs, inputs) / inputs**0.5, _normal(outputs) / 10]

        def norm() -> list[Tensor]:
            return [1 + _normal(width) / 10, _normal(width) / 10]

        tensors = [_normal(batch, tokens, width), *norm(), *layer(3 * width, width), *layer(width, width)]
        return [*tensors, *norm(), *layer(hidden, width), *layer(width, hidden)]

    def run(x: Sequence[Tensor], backend: str) -> Tensor:
        return transformer_block(x[0], BlockWeights(*x[1:]), num_heads=heads, backend=backend)

    return draw, run


def _position(count: int, channels: int) -> tuple[Callable[[int], list[Tensor]], Run]:
    def draw(batch: int) -> list[Tensor]:
        return [_normal(batch, channels, count).mT, _normal(1 + count, channels), _normal(channels)]

    return draw, lambda x, backend: add_position(*x, backend=backend)


def _layers() -> Iterator[tuple[str, str, tuple[Callable, Run], tuple, int]]:
    for branch, tokens, channels in (("L", 197, 448), ("S", 401, 224)):
        for name, (k, n, norm, activation, residual) in linear_layers(channels, 3 * channels):
            around = ", ".join(
                x for x in ("norm" if norm else "", activation, "residual" if residual else "") if x
            )
            operation = _linear(tokens, k, n, norm, activation, residual)
            yield f"{branch} {name} {k} to {n}", "linear", operation, (k, n, around), tokens
        of_head = channels // 7
        yield (
            *(f"{branch} attention {tokens} of {of_head}", "self_attention", _attention(tokens, 7, of_head)),
            *((tokens, of_head), 7),
        )
        yield (
            *(f"{branch} block", "transformer_block", _block(tokens, 7, of_head)),
            *((tokens, channels, 3 * channels), 1),
        )
    yield "L patches, resized", "patch_embed", _patches(16, 448, (224, 224)), (16, 448, True), 1
    yield "L position, dagger", "add_position", _position(196, 448), (196, 448), 1
    yield "S patches", "patch_embed", _patches(12, 224, None), (12, 224, False), 1


# The most important first: time may run out.
LAYER_CASES = tuple(
    LayerCase(layer, operation, *functions, shape, number, mode, batch)
    for batch in (256, 1)
    for mode in ("forward", "forward + backward")
    for layer, operation, functions, shape, number in _layers()
)


def rivals(case: LayerCase) -> dict[str, Callable[[Sequence[Tensor]], list[Tensor]]]:
    """Eager PyTorch, SDPA's engines, torch.compile at a batch of 256."""

    def by(backend: str) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        return lambda x: [case.run(x, backend)]

    def by_engine(engine: Any) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        def run(x: Sequence[Tensor]) -> list[Tensor]:
            with sdpa_kernel(engine):
                return [case.run(x, "torch")]

        return run

    found = {"eager": by("torch" if case.operation == "transformer_block" else "reference")}
    if case.operation == "self_attention":
        found |= {name: by_engine(engine) for name, engine in SDPA_ENGINES.items()}
    if case.batch == 256 and not case.trains:
        torch.compiler.reset()  # it gives up on a function that it has compiled too often
        found["compiled"] = torch.compile(found["eager"], dynamic=False)
    return found


def tensors_of(case: LayerCase, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of a case and, to train, the incoming gradient; an image has no gradient."""
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    tensors = [x.to(device, dtype) for x in case.draw(case.batch)]
    if not case.trains:
        return tensors, []
    for x in tensors[case.operation == "patch_embed" :]:
        x.requires_grad_()
    with torch.no_grad():
        return tensors, [torch.randn_like(case.run(tensors, "torch"))]


def measure_layer(
    case: LayerCase, bandwidth: float, cold: Callable[[], object], device: str = "cuda"
) -> Result:
    """Times in seconds with their ratios, as gpu_cases.measure; a wrong result is not timed."""
    tensors, grads = tensors_of(case, device)
    wanted = [x for x in tensors if x.requires_grad]
    passes = [*tensors, case.run([x.detach() for x in tensors], "torch")]
    passes += [*tensors, *wanted, *grads] if case.trains else []
    bytes_once = sum(x.nbytes for x in passes)
    result: Result = {"bytes": bytes_once, "floor_seconds": bytes_once / bandwidth, "rivals": {}}

    def of(function: Callable[[Sequence[Tensor]], list[Tensor]], x: Sequence[Tensor]) -> list[Tensor]:
        leaves = [t for t in x if t.requires_grad]
        outputs = function(x)
        return outputs + (list(torch.autograd.grad(outputs, leaves, grads_of(x))) if grads else [])

    def grads_of(x: Sequence[Tensor]) -> list[Tensor]:
        return [g.to(x[-1].dtype) for g in grads]

    with failing(result):
        exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
        want = of(lambda x: [case.run(x, "reference")], exact)
        result["error"] = error(of(lambda x: [case.run(x, OURS)], tensors), want)
        del exact, want
    if not result.get("error", float("nan")) < BOUNDS[case.dtype]:
        return result
    replays: dict[str, Callable[[], object]] = {}
    functions = {OURS: lambda x: [case.run(x, OURS)], **rivals(case)}
    for name, function in functions.items():
        reason: Result = {}
        with failing(reason if name != OURS else result):
            replays[name] = gpu_timing.capture(partial(of, function, tensors))
        if reason:
            result["rivals"][name] = reason
    samples = gpu_timing.in_turn(replays, ROUNDS, lambda replay: gpu_timing.seconds(replay, cold))
    if OURS in samples:
        result["seconds"] = asdict(Interval.of(samples[OURS]))
        result["of_floor"] = result["seconds"]["median"] / result["floor_seconds"]
        for name in samples.keys() - {OURS}:
            found = compare(samples[OURS], samples[name])
            result["rivals"][name] = {"seconds": asdict(found.rival), "ratio": asdict(found.ratio)}
    return result
