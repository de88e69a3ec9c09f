"""Whole models on the backend triton, against timm's; kernels compiled for a GPU and executed without one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("triton", reason="Triton is not installed")

from crossvit import CrossViT
from crossvit._timm import import_timm
from crossvit.variants import VARIANTS, Variant
from crossvit_kernels import use_backend
from tests.contract import check_values, without_a_gpu
from tests.models import small

RELEASED = [variant for variant in VARIANTS.values() if variant.released]
# What every run takes; `make test-drawn` takes some of the rest.
FAST = (("crossvit_tiny_240", "sm_90", torch.bfloat16), ("crossvit_9_dagger_240", "sm_80", torch.bfloat16))
CASES = [
    pytest.param(
        *(variant, target, dtype),
        id=f"{variant.name}-{target}-{dtype}",
        marks=[] if (variant.name, target, dtype) in FAST else pytest.mark.sweep,
    )
    for variant in RELEASED
    for target in ("sm_80", "sm_90")
    for dtype in (torch.float32, torch.bfloat16)
]


@contextmanager
def on(target: str) -> Iterator[Any]:
    with use_backend("triton"), without_a_gpu(target) as recorder:
        yield recorder


def pair(variant: Variant, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """(ours, timm's) of full width, but one encoder with a block a branch, for images of 60 or 72 pixels."""
    size, seen = (60, 48) if variant.image_sizes[0] == 240 else (72, 64)
    shared: dict[str, Any] = {
        "img_scale": (1.0, seen / size),
        "patch_size": variant.patch_sizes,
        "embed_dim": variant.widths,
        "depth": ((1, 1, 0),),
        "num_heads": (variant.heads,) * 2,
        "mlp_ratio": (variant.mlp_ratio, variant.mlp_ratio, 1),
        "multi_conv": variant.three_conv_stem,
        "num_classes": 10,
    }
    theirs = import_timm().models.crossvit.CrossVit(img_size=(size, size), **shared).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    ours = CrossViT(img_size=size, **shared).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.to(dtype), theirs.to(dtype)


def logits_and_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    logits = model(x)
    names, parameters = zip(*model.named_parameters(), strict=True)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(logits.dtype)
    grads = torch.autograd.grad(logits, parameters, weights)
    return {"logits": logits.detach(), **dict(zip(names, grads, strict=True))}


@pytest.mark.parametrize(("variant", "target", "dtype"), CASES)
def test_forward_and_backward_are_timms(variant, target, dtype):
    ours, theirs = pair(variant, dtype)
    x = torch.randn(2, 3, *ours.img_size).to(dtype)
    with on(target) as recorder:
        mine = logits_and_gradients(ours, x)
    launched = {launch.name for launch in recorder.launches}
    # Of every part of the model: embedding, blocks, attention, fusion, and all of them backward.
    embeds = {"place"} if variant.three_conv_stem else {"embed", "cut"}
    assert launched >= {*embeds, "product", "attend", "weight_gradient", "to_keys", "project", "absorb"}
    eager = logits_and_gradients(theirs, x)
    exact = logits_and_gradients(theirs.double(), x.double())
    assert mine.keys() == eager.keys()
    for name, want in exact.items():
        if name.endswith("wk.bias"):
            assert not mine[name].any(), f"{name}: exact gradient is zero"
            continue
        found = [g[name] for g in (mine, eager, exact)]
        if name.endswith("qkv.bias"):  # the third of the keys cancels
            width = len(want) // 3
            found = [torch.cat((g[:width], g[2 * width :])) for g in found]
        check_values(*found, name)


def trainable(**options: Any) -> CrossViT:
    """Small, with heads that Triton's kernels take."""
    return small(embed_dim=(32, 48), num_heads=(2, 3), depth=((1, 1, 0),), **options)


def test_training_takes_the_kernels():
    """With drop-path, whose masks are those of PyTorch's operators under the same seed."""
    model = trainable(drop_path_rate=0.4).train()
    x = torch.randn(4, 3, 48, 48)
    torch.manual_seed(1)
    want = logits_and_gradients(model, x)
    torch.manual_seed(1)
    with on("sm_80") as recorder:
        mine = logits_and_gradients(model, x)
    names = [launch.name for launch in recorder.launches]
    assert names.count("to_keys") == 2
    for name, exact in want.items():
        torch.testing.assert_close(mine[name], exact, rtol=1e-4, atol=1e-4, msg=name)


def test_dropout_hooks_and_other_modules_take_pytorchs_operators():
    x = torch.randn(1, 3, 48, 48)

    def hooked(model: CrossViT) -> None:
        model.blocks[0].blocks[0][0].mlp.fc1.register_forward_hook(lambda *_: None)

    def replaced(model: CrossViT) -> None:
        model.blocks[0].blocks[0][0].mlp.act = nn.SiLU()

    def in_another_dtype(model: CrossViT) -> None:
        model.blocks[0].blocks[0][0].attn.qkv.double()

    for change, fails in ((hooked, False), (replaced, False), (in_another_dtype, True)):
        model = trainable()
        change(model)
        with on("sm_80") as recorder:
            if fails:  # as PyTorch says it
                with pytest.raises(RuntimeError, match="same dtype"):
                    model(x)
                continue
            model(x)
        assert [launch.name for launch in recorder.launches].count("attend") == 2  # of L, and the fusion's
    model = trainable(proj_drop_rate=0.5).train()
    with on("sm_80") as recorder:
        model(x)
    assert [launch.name for launch in recorder.launches].count("product") == 0


def test_autocast_with_a_scaler():
    """A step of float16 under GradScaler: gradients are float32 and right, an overflow skips the step."""
    model = trainable().train()
    x = torch.randn(2, 3, 48, 48)
    want = logits_and_gradients(model, x)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with on("sm_80"):
        for scale, skipped in ((256.0, False), (1e30, True)):
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                logits = model(x)
            weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
            scaler.scale((logits.float() * weights).sum()).backward()
            scaler.unscale_(optimizer)
            if not skipped:
                for name, exact in want.items():
                    if name != "logits" and not name.endswith(("wk.bias", "qkv.bias")):
                        found = parameters[name].grad
                        assert found.dtype == torch.float32
                        assert (found - exact).norm() <= 0.02 * exact.norm(), name
            before = [p.detach().clone() for p in model.parameters()]
            scaler.step(optimizer)
            same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert same is skipped


def test_compiling_the_whole_model():
    """One graph without breaks, forward and backward."""
    model = trainable().train()
    x = torch.randn(2, 3, 48, 48)
    with on("sm_80"):
        want = logits_and_gradients(model, x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        logits = compiled(x)
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
        grads = torch.autograd.grad(logits, list(model.parameters()), weights)
    torch.testing.assert_close(logits, want.pop("logits"))
    for mine, (name, exact) in zip(grads, want.items(), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5, msg=name)


def test_checkpoints_and_deterministic_algorithms():
    """The same bits, whether encoders are run again in backward or not, also where PyTorch demands that."""
    model = trainable().train()
    x = torch.randn(2, 3, 48, 48)
    with on("sm_80"):
        want = logits_and_gradients(model, x)
        model.set_grad_checkpointing()
        torch.use_deterministic_algorithms(True)
        try:
            mine = logits_and_gradients(model, x)
        finally:
            torch.use_deterministic_algorithms(False)
    for name, exact in want.items():
        assert torch.equal(mine[name], exact), name


def _distributed(rank: int, store: str, found: Path) -> None:
    """Gradients under DistributedDataParallel with a static graph, and under fully_shard, in one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=1)
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    results: dict[str, dict[str, Tensor]] = {}

    def step(name: str, model: nn.Module, wrapped: nn.Module, times: int) -> None:
        with on("sm_80") as recorder:
            for _ in range(times):
                model.zero_grad()
                wrapped(x).square().sum().backward()
        assert any(launch.name == "to_keys" for launch in recorder.launches), name
        grads = {n: p.grad for n, p in model.named_parameters()}
        results[name] = {n: getattr(g, "full_tensor", lambda g=g: g)() for n, g in grads.items()}

    torch.manual_seed(0)
    model = trainable().train()
    step("alone", model, model, 1)
    model.set_grad_checkpointing()
    wrapped = DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True)
    step("static graph", model, wrapped, 2)
    torch.manual_seed(0)
    model = trainable().train()
    mesh = init_device_mesh("cpu", (1,))
    for encoder in model.blocks:
        fully_shard(encoder, mesh=mesh)
    step("sharded", model, fully_shard(model, mesh=mesh), 1)
    torch.save(results, found)
    # The threads of gloo now and then outlive the interpreter, which then aborts: leave without its exit.
    os._exit(0)


def test_distributed_training(tmp_path):
    mp.spawn(_distributed, (str(tmp_path / "store"), tmp_path / "found"), nprocs=1)
    results = torch.load(tmp_path / "found")
    alone = results.pop("alone")
    assert results.keys() == {"static graph", "sharded"}
    for how, grads in results.items():
        assert grads.keys() == alone.keys()
        for name, exact in alone.items():
            torch.testing.assert_close(grads[name], exact, rtol=1e-4, atol=1e-6, msg=f"{how}: {name}")
