"""Every kernel of this machine against its definition in float64, on small odd shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from . import native
from .backends import BACKENDS
from .cross_attention import cross_attention, cuda_launch
from .cross_attention.gpu import gpu_of
from .cross_fusion import FusionWeights, cross_fusion
from .linear import linear
from .modes import without_autocast
from .patch_embed import add_position, patch_embed
from .self_attention import self_attention
from .transformer_block import BlockWeights, transformer_block
from .validation import OF_BLOCKS, precision_of_float32


def check_all() -> Iterator[tuple[str, bool]]:
    """What was compared, and whether it agreed, one after the other: on the CPU, then on a GPU if any."""
    isas = native.load().isas() if native.load_error() is None else []
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    no_cuda = "cuda" not in devices or cuda_launch.unusable(torch.empty(0, device="cuda").device) is not None
    for operation in _CASES:
        for device in devices:
            for backend, known in BACKENDS.items():
                if known.missing() is not None or device not in (known.devices or devices):
                    continue
                if (backend == "cuda" and no_cuda) or operation in _NOT_IMPLEMENTED.get(backend, ()):
                    continue
                for isa in isas if backend == "cpu" else [None]:
                    where = f"{backend} on {device}" if isa is None else f"{backend} with {isa}"
                    with nullcontext() if isa is None else native.use_isa(isa):
                        yield _check(f"{operation}, {where}", operation, backend, device)
    for isa in isas:
        with native.use_isa(isa):
            yield _check_layer_norm_statistics(f"native {isa}", "cpu")
    if not no_cuda:
        yield _check_layer_norm_statistics("native CUDA", "cuda")


# Largest relative error of a kernel that is right, against the definition in float64 on the same inputs.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}
_TF32_TOLERANCE = 0.02
_PATCHES = 97  # enough for GPU kernels to read an image in parts


def _relative_error(got: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp_min(1e-30)
    return ((got.double() - expected).abs().max() / scale).item()


class _Inputs:
    """Normal numbers from a generator of their own, in float64 on the CPU."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.generator, device="cpu")

    def norm(self, width: int) -> list[Tensor]:
        return [1 + self.normal(width) / 10, self.normal(width)]

    def linear(self, rows: int, columns: int) -> list[Tensor]:
        return [self.normal(rows, columns) / columns**0.5, self.normal(rows)]

    def attention_weights(self, width: int) -> list[Tensor]:
        return [*self.norm(width), *(x for _ in range(4) for x in self.linear(width, width))]


Case = tuple[list[Tensor], Callable]


def _attention_case(widths: tuple[int, ...], heads: tuple[int, ...], device: torch.device) -> Case:
    """Tensors, of which the first two are tokens, and the operation of them and a backend."""
    draw = _Inputs()
    tensors = [draw.normal(3, 1, widths[0]), draw.normal(3, _PATCHES, widths[0])]
    tensors += draw.attention_weights(widths[0])

    def run(x: list[Tensor], backend: str) -> list[Tensor]:
        return [cross_attention(*x, num_heads=heads[0], backend=backend)]

    return tensors, run


def _fusion_case(widths: tuple[int, ...], heads: tuple[int, ...], device: torch.device) -> Case:
    draw = _Inputs()
    tensors = [draw.normal(3, 1 + _PATCHES, widths[0]), draw.normal(3, 18, widths[1])]
    for own, other in (widths, widths[::-1]):
        tensors += [*draw.norm(own), *draw.linear(other, own), *draw.attention_weights(other)]
        tensors += [*draw.norm(other), *draw.linear(own, other)]

    def run(x: list[Tensor], backend: str) -> list[Tensor]:
        weights = FusionWeights(*x[2:20]), FusionWeights(*x[20:])
        return list(cross_fusion(x[0], x[1], *weights, num_heads=(heads[0], heads[1]), backend=backend))

    return tensors, run


def _rows_for(device: torch.device, columns: int, tokens: int) -> int:
    """Images of so many tokens: on a GPU enough for the large tiles, which are 128 x 128, else three."""
    if device.type != "cuda":
        return 3
    return -(-128 * -(-gpu_of(device).multiprocessors // -(-columns // 128)) // tokens) + 1


def _linear_case(widths: tuple[int, ...], heads: tuple[int, ...], device: torch.device) -> Case:
    draw, (width, outputs) = _Inputs(), widths
    batch = _rows_for(device, min(widths), _PATCHES)
    tensors = [draw.normal(batch, _PATCHES, width), draw.normal(batch, _PATCHES, outputs)]
    tensors += [*draw.linear(outputs, width), *draw.norm(width)]

    def run(x: list[Tensor], backend: str) -> list[Tensor]:
        tokens, residual, weight, bias, norm_weight, norm_bias = x
        y = linear(
            *(tokens, weight, bias),
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            activation="gelu",
            residual=residual,
            backend=backend,
        )
        return [y]

    return tensors, run


def _self_attention_case(widths: tuple[int, ...], heads: tuple[int, ...], device: torch.device) -> Case:
    def run(x: list[Tensor], backend: str) -> list[Tensor]:
        return [self_attention(x[0], heads[0], backend=backend)]

    return [_Inputs().normal(3, _PATCHES, 3 * widths[0])], run


def _patch_embed_case(widths: tuple[int, ...], heads: tuple[int, ...], device: torch.device) -> Case:
    """Resized, with a remainder: 7 x 9 patches."""
    draw, (width, side) = _Inputs(), widths
    size, batch = (7 * side + 2, 9 * side + 1), _rows_for(device, width, 64)
    tensors = [draw.normal(batch, 3, size[0] + 3, size[1] + 4), draw.normal(64, width)]
    tensors += [draw.normal(width, 3, side, side) / (3 * side * side) ** 0.5]
    tensors += [draw.normal(width), draw.normal(width)]

    def run(x: list[Tensor], backend: str) -> list[Tensor]:
        image, position, weight, bias, cls_token = x
        return [patch_embed(image, weight, bias, position, cls_token, size=size, backend=backend)]

    return tensors, run


def _add_position_case(widths: tuple[int, ...], heads: tuple[int, ...], device: torch.device) -> Case:
    """Patches as a convolution leaves them."""
    draw, (width,) = _Inputs(), widths
    tensors = [draw.normal(3, width, _PATCHES).mT, draw.normal(1 + _PATCHES, width), draw.normal(width)]

    def run(x: list[Tensor], backend: str) -> list[Tensor]:
        return [add_position(*x, backend=backend)]

    return tensors, run


def _transformer_block_case(widths: tuple[int, ...], heads: tuple[int, ...], device: torch.device) -> Case:
    draw, (width, hidden) = _Inputs(), widths
    batch = _rows_for(device, min(widths), _PATCHES)
    tensors = [draw.normal(batch, _PATCHES, width), *draw.norm(width), *draw.linear(3 * width, width)]
    tensors += [*draw.linear(width, width), *draw.norm(width)]
    tensors += [*draw.linear(hidden, width), *draw.linear(width, hidden)]

    def run(x: list[Tensor], backend: str) -> list[Tensor]:
        return [transformer_block(x[0], BlockWeights(*x[1:]), num_heads=heads[0], backend=backend)]

    return tensors, run


_CASES = {
    "cross_attention": _attention_case,
    "cross_fusion": _fusion_case,
    "linear": _linear_case,
    "self_attention": _self_attention_case,
    "patch_embed": _patch_embed_case,
    "add_position": _add_position_case,
    "transformer_block": _transformer_block_case,
}
_NOT_IMPLEMENTED = {"cuda": OF_BLOCKS, "cpu": ("add_position", "transformer_block")}
# Odd ones, which leave every tile of every kernel unfilled.
_WIDTHS = {
    "cross_attention": ((96,), (3,)),
    "cross_fusion": ((40, 96), (3, 4)),
    "linear": ((65, 130), ()),
    "self_attention": ((144,), (3,)),
    "patch_embed": ((35, 4), ()),
    "add_position": ((35,), ()),
    "transformer_block": ((48, 130), (3,)),
}


def what_is_wrong(
    operation: str,
    backend: str,
    device: torch.device | str,
    *,
    widths: tuple[int, ...],
    heads: tuple[int, ...],
    tokens: torch.dtype = torch.float32,
    weights: torch.dtype = torch.float32,
    gradients: bool = True,
) -> tuple[float, str | None]:
    """The worst relative error of results and gradients on a few images, and, if it is too large, in words.

    `widths` and `heads` are those of the operation's directions; tokens and weights of different dtypes are
    what autocast gives.
    """
    device = torch.device(device)
    tensors, run = _CASES[operation](widths, heads, device)
    dtypes = [tokens if i < 2 or x.ndim < 2 else weights for i, x in enumerate(tensors)]
    given = [x.to(dtype).to(device) for x, dtype in zip(tensors, dtypes, strict=True)]

    def results(leaves: list[Tensor], name: str) -> list[Tensor]:
        leaves = [x.detach().requires_grad_(gradients) for x in leaves]
        mixed = tokens != weights and name != "reference"
        with torch.autocast(device.type, dtype=weights) if mixed else without_autocast(device.type):
            outputs = run(leaves, name)
        if not gradients:
            return outputs
        # Squared, so that the incoming gradient is not constant.
        loss = torch.stack([y.double().square().sum() for y in outputs]).sum()
        return [*(y.detach() for y in outputs), *torch.autograd.grad(loss, leaves)]

    truth = results([x.double() for x in given], "reference")
    found = results(given, backend)
    count = len(truth) - len(given) if gradients else len(truth)
    # Gradients that all but cancel, as that of k's bias does, have only the rounding of what cancels in them.
    floor = 0.1 * max((want.abs().max().item() for want in truth[count:]), default=0.0)
    worst = 0.0
    for i, (got, want) in enumerate(zip(found, truth, strict=True)):
        scale = max(want.abs().max().item(), floor if i >= count else 0.0)
        worst = max(worst, (got.double() - want).abs().max().item() / max(scale, 1e-30))
    allowed = _TOLERANCES[weights]
    if weights == torch.float32 and precision_of_float32() == "tf32":
        allowed = _TF32_TOLERANCE
    finite = all(bool(torch.isfinite(got).all()) for got in found)
    if finite and worst < allowed:
        return worst, None
    return worst, f"a relative error of {worst:.1e} against the definition, where {allowed:.0e} is allowed"


def _check(what: str, operation: str, backend: str, device: str) -> tuple[str, bool]:
    widths, heads = _WIDTHS[operation]
    worst, wrong = what_is_wrong(operation, backend, device, widths=widths, heads=heads)
    return f"{what}: forward and gradients {worst:.1e} relative", wrong is None


def _check_layer_norm_statistics(where: str, device: str) -> tuple[str, bool]:
    x = torch.randn(37, 231, generator=torch.Generator().manual_seed(0)) * 3 + 30
    mean, rstd = (y.cpu() for y in native.layer_norm_statistics(x.to(device)))
    wide = x.double()
    want = wide.mean(1), (wide.var(1, correction=0) + 1e-6).rsqrt()
    error = max(_relative_error(mean, want[0]), _relative_error(rstd, want[1]))
    return f"layer_norm_statistics, {where}: {error:.1e} relative", error < 1e-5
