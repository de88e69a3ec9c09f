"""The paper's five fusions as the number of tokens grows: one fusion, one encoder, the model, of CrossViT-S.

Cross-attention is linear in time and memory, all-attention quadratic in time, and in memory where its matrix
is stored; the report fits the exponents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from benchmarks.conftest import Race, assert_close, large
from benchmarks.race import BEYOND_MEMORY, is_out_of_memory
from benchmarks.report import SCHEMES
from crossvit import create_model
from crossvit.encoder import FUSIONS
from crossvit_kernels import use_backend

MODEL = "crossvit_small"
# All-attention whose matrix of scores and softmax is stored, as before fused attention.
STORED = "all, matrix stored"
SMALL, LARGE = (112, 240, 480), (720, 1024)
CASES: list[Any] = [("fusion", mode, size) for mode in ("forward", "training") for size in SMALL]
CASES += [("encoder", "forward", 240), ("encoder", "forward", 480), ("model", "forward", 240)]
CASES += [large("fusion", mode, size) for mode in ("forward", "training") for size in LARGE]
CASES += [
    large(what, mode, size)
    for what in ("encoder", "model")
    for mode in ("forward", "training")
    for size in (*SMALL, *LARGE)
    if (what, mode, size) not in CASES
]


def names_of(what: str) -> list[str]:
    return [name for name in FUSIONS if name != "none" or what != "fusion"] + [STORED]


def build(name: str, size: int, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(MODEL, fusion=name.partition(",")[0], img_size=size)
    if name == STORED:
        for encoder in model.blocks:
            encoder.fusion.attn = StoredMatrix(encoder.fusion.attn)
    return model.eval().to(device)


class StoredMatrix(nn.Module):
    """Eq. 1's attention by its definition, [B, N, C] -> [B, N, C]."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        a: Any = self.attention
        q, k, v = a.qkv(x).unflatten(-1, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q * a.scale @ k.mT).softmax(-1)
        return a.proj((attention @ v).transpose(1, 2).flatten(2))


def stored_bytes(tokens: int, training: bool) -> int:
    """Of CrossViT-S's six heads in float32: scores and their softmax, and the gradient of both."""
    return (4 if training else 2) * 6 * tokens**2 * 4


@pytest.mark.parametrize(("what", "mode", "size"), CASES, ids=lambda value: str(value))
@pytest.mark.benchmark(group=SCHEMES)
def test_schemes(what, mode, size, device, race: Race, benchmark):
    """Rivals of cross-attention; each is compared with another way to compute it first."""
    names = names_of(what)
    info: dict[str, Any] = benchmark.extra_info
    grids = create_model(MODEL, device="meta").grid_sizes((size, size))
    count = sum(1 + rows * columns for rows, columns in grids)
    info |= {"what": what, "mode": mode, "tokens": count, "pixels": size}
    # A CPU's system ends a process that takes more memory than there is, so it is not tried.
    free = psutil.virtual_memory().available if device.type == "cpu" else float("inf")
    if stored_bytes(count, mode == "training") > 0.7 * free:
        names.remove(STORED)
        info[f"not run {STORED}"] = BEYOND_MEMORY
    models = {name: build(name, size, device) for name in names}
    torch.manual_seed(1)
    if what == "model":
        given = [torch.randn(1, 3, size, size, device=device)]
    else:
        widths = zip(grids, (192, 384), strict=True)
        given = [torch.randn(1, 1 + rows * columns, c, device=device) for (rows, columns), c in widths]
    training = mode == "training"

    def call(model: Any, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        if what == "model":
            return [model(inputs[0])]
        encoder = model.blocks[0]
        return (encoder.fuse if what == "fusion" else encoder)(list(inputs), grids=grids)

    def run(name: str) -> Sequence[Tensor]:
        if not training:
            with torch.inference_mode():
                return call(models[name], given)
        outputs = call(models[name], given)
        leaves = [*given, *(p for p in models[name].parameters() if p.requires_grad)]
        total = torch.stack([y.square().sum() for y in outputs]).sum()
        return [
            *outputs,
            *(g for g in torch.autograd.grad(total, leaves, allow_unused=True) if g is not None),
        ]

    for x in given:
        x.requires_grad_(training)
    # On a GPU the convolutions of a model may be computed in tf32.
    bound = 1e-4 if device.type == "cpu" else 1e-2
    for name in list(names):
        try:
            with torch.no_grad():
                assert_close(call(models[name], given), another_way(name, models[name], call, given), bound)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            names.remove(name)
            info[f"not run {name}"] = BEYOND_MEMORY
    parameters = [p for model in models.values() for p in model.parameters()]
    race(
        lambda: run("cross"),
        {name: (lambda n=name: run(n)) for name in names if name != "cross"},
        [*given, *parameters] if training else None,
        held=lambda name: models["cross" if name == "ours" else name].packed_nbytes,
    )
    if "peak_bytes" not in info:
        return
    ran = [name for name in names if name == "cross" or f"against {name}" in info]
    races = {name: info[f"against {name}"] for name in ran if name != "cross"}
    info["seconds"] = {"cross": info["ours_seconds"]}
    info["seconds"] |= {name: row["rival_seconds"] for name, row in races.items()}
    info["bytes"] = {name: info["peak_bytes"]["ours" if name == "cross" else name] for name in ran}


def another_way(
    name: str, model: nn.Module, call: Callable[..., Any], given: Sequence[Tensor]
) -> list[Tensor]:
    """The same from torch's operators alone; for fusions that have no others, in float64."""
    if name in ("cross", "none"):
        with use_backend("reference" if name == "cross" else "torch"):
            return list(call(model, given))
    if name.startswith("all"):
        usual = copy.deepcopy(model)
        for encoder in usual.blocks:
            attn = encoder.fusion.attn
            encoder.fusion.attn = getattr(attn, "attention", attn)
        with use_backend("torch"):
            return list(call(usual, given))
    return list(call(copy.deepcopy(model).double(), [x.double() for x in given]))
