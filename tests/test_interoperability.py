"""What people do with models: copy, pickle, spawn, fork, compile, export, convert, checkpoint, distribute."""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from crossvit import create_model, crossvit_tiny
from crossvit_kernels import use_backend
from tests.models import small_model
from tests.operations import relative_error

SHAPE = (2, 3, 48, 48)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole_and_separate(how):
    model, x = small_model(), torch.randn(SHAPE)
    want = model(x)
    other = how(model)
    assert torch.equal(other(x), want)
    with torch.no_grad():
        other.cls_token_0.add_(1)
    assert torch.equal(model(x), want)


def test_saving_a_whole_model():
    model, x, file = small_model(), torch.randn(SHAPE), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), model(x))


def _work(model: nn.Module, x: Tensor, path: Path) -> None:
    torch.set_num_threads(1)
    with torch.inference_mode():
        torch.save(model(x), path)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_worker_processes(method, tmp_path):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"{sys.platform} has no start method {method}")
    torch.set_num_threads(1)  # a forked child cannot use the threads of its parent's OpenMP pool
    model, x = small_model(), torch.randn(SHAPE)
    worker = multiprocessing.get_context(method).Process(target=_work, args=(model, x, tmp_path / "result"))
    worker.start()
    worker.join(timeout=60)
    worker.kill()
    assert worker.exitcode == 0
    with torch.inference_mode():
        assert relative_error(torch.load(tmp_path / "result"), model(x)) < 1e-6


def test_meta_device():
    model = crossvit_tiny(device="meta")
    assert model(torch.zeros(2, 3, 240, 240, device="meta")).shape == (2, 1000)
    real = crossvit_tiny()
    model.to_empty(device="cpu").load_state_dict(real.state_dict())
    x = torch.randn(1, 3, 240, 240)
    assert torch.equal(model.eval()(x), real.eval()(x))


def test_channels_last_images():
    model, x = small_model(), torch.randn(SHAPE)
    want = model(x)
    last = x.to(memory_format=torch.channels_last)
    assert relative_error(model(last), want) < 1e-5
    assert relative_error(model.to(memory_format=torch.channels_last)(last), want) < 1e-5
    assert relative_error(model(x.flip(0).flip(0)[:, :, ::1]), want) < 1e-5


def test_compiles_forward_and_backward_as_one_graph():
    model, x = small_model(), torch.randn(SHAPE)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    for mine, want in zip(got, gradients(model, x), strict=True):
        assert relative_error(mine, want) < 1e-4 or want.abs().max() == 0
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < 1e-5


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler on PATH"
)
def test_compiles_with_inductor():
    model, x = small_model(), torch.randn(SHAPE)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < 1e-4


def test_exports_with_a_dynamic_batch():
    model, x = small_model(), torch.randn(SHAPE)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
    for size in (2, 5):
        y = torch.randn(size, *SHAPE[1:])
        assert relative_error(program.module()(y), model(y)) < 1e-5


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated", "ignore::torch.jit.TracerWarning")
def test_traces_and_reloads():
    model, x, file = small_model(), torch.randn(SHAPE), io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(model, x), file)
    file.seek(0)
    y = torch.randn(3, *SHAPE[1:])
    assert relative_error(torch.jit.load(file)(y), model(y)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion_of_all_weights(dtype):
    model, x = small_model(), torch.randn(SHAPE)
    want = model(x)
    got = model.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert relative_error(got, want) < 20 * max(torch.finfo(dtype).eps, 1e-7)


def test_gradient_checkpointing_changes_no_gradient_and_saves_memory():
    """With dropout on: the recomputation draws the same masks."""
    model = small_model(proj_drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.2).train()
    x = torch.randn(SHAPE)
    results, saved = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        sizes = {}

        def pack(t: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(x).square().sum()
        results.append(torch.autograd.grad(loss, list(model.parameters())))
        saved.append(sum(sizes.values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert saved[1] < 0.5 * saved[0]


def test_checkpointing_does_not_disturb_attention_maps():
    model, x = small_model(), torch.randn(SHAPE)
    want = model.get_attention_maps(x)
    model.set_grad_checkpointing()
    for mine, other in zip(model.get_attention_maps(x), want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_an_empty_batch_in_training():
    model = small_model(drop_path_rate=0.2, proj_drop_rate=0.2, attn_drop_rate=0.2).train()
    y = model(torch.zeros(0, *SHAPE[1:]))
    y.sum().backward()
    assert y.shape == (0, 5)


def test_nothing_that_a_hook_was_handed_is_changed_later():
    model = small_model()
    held: list[tuple[Tensor, Tensor]] = []

    def hold(*values: object) -> None:
        held.extend((x, x.clone()) for x in values if isinstance(x, Tensor))

    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: hold(*args))
        module.register_forward_hook(lambda module, args, output: hold(output))
    with torch.no_grad():
        model(torch.randn(SHAPE))
    assert len(held) > 50
    assert all(torch.equal(x, kept) for x, kept in held)


def test_an_ensemble_of_weights_by_vmap():
    model, x = small_model(), torch.randn(SHAPE)
    name = "blocks.0.fusion.0.attn.wq.weight"
    stacked = torch.randn(3, *model.get_parameter(name).shape)

    def run(weight: Tensor) -> Tensor:
        return torch.func.functional_call(model, {name: weight}, (x,))

    with torch.no_grad():
        got = torch.func.vmap(run)(stacked)
        for mine, weight in zip(got, stacked, strict=True):
            assert relative_error(mine, run(weight)) < 1e-5


def test_reset_classifier_keeps_device_and_dtype():
    model = small_model().to(torch.bfloat16)
    model.reset_classifier(3, global_pool="avg")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.randn(SHAPE).bfloat16()).shape == (2, 3)
    assert all(0.015 < head.weight.std() < 0.025 and not head.bias.any() for head in model.head)
    assert all(0.005 < token.std() < 0.04 for token in (model.cls_token_0, model.cls_token_1))
    meta = small_model(device="meta")
    meta.reset_classifier(7)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert not any(head.training for head in meta.head)
    model.reset_classifier(0)
    assert model(torch.randn(SHAPE).bfloat16()).shape == (2, 72)


def test_frozen_parts_get_no_gradient():
    model = small_model()
    heads = {name for name, _ in model.named_parameters() if "head" in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in heads)
    model(torch.randn(SHAPE)).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == heads


def test_gradient_penalty():
    """The gradient of the image, differentiated once more; PyTorch's fused attention on CPUs cannot be, so
    it is asked for the plain one, as with any model."""
    model, x = small_model().double(), torch.randn(SHAPE).double().requires_grad_()
    penalties = []
    for backend in ("torch", "reference"):
        with use_backend(backend), sdpa_kernel(SDPBackend.MATH):
            (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            penalties.append(
                torch.autograd.grad(
                    gradient.square().sum(),
                    list(model.parameters()),
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
    largest = max(g.abs().max() for g in penalties[1])
    for mine, want in zip(*penalties, strict=True):
        assert (mine - want).abs().max() < 1e-11 * largest


def test_gradient_scaler_in_float16():
    model, x = small_model(), torch.randn(SHAPE)
    want = gradients(model, x)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(x).square().sum()
    scaler.scale(loss).backward()
    scaler.unscale_(optimiser)
    for (name, parameter), exact in zip(model.named_parameters(), want, strict=True):
        assert parameter.grad.dtype == torch.float32
        if exact.abs().max() > 0:
            assert (parameter.grad - exact).norm() < 0.05 * exact.norm() + 1e-4, name
    scaler.step(optimiser)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _distributed(rank: int, port: int, model: nn.Module, x: Tensor, path: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    wrapped = DistributedDataParallel(model)
    wrapped(x.chunk(2)[rank]).square().sum(1).mean().backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters()}, path)
    dist.barrier()
    # The threads of gloo now and then outlive the interpreter, which then aborts: leave without its exit.
    os._exit(0)


def test_two_processes_give_the_gradients_of_one_at_twice_the_batch(tmp_path):
    model, x = small_model().train(), torch.randn(4, *SHAPE[1:])
    mp.spawn(_distributed, (_free_port(), model, x, tmp_path / "gradients"), nprocs=2)
    got = torch.load(tmp_path / "gradients")
    model(x).square().sum(1).mean().backward()
    for name, parameter in model.named_parameters():
        assert relative_error(got[name], parameter.grad) < 1e-4 or parameter.grad.abs().max() == 0, name


def test_threads_may_share_a_model():
    from concurrent.futures import ThreadPoolExecutor

    model = create_model("crossvit_tiny").eval()
    images = [torch.randn(1, 3, 240, 240) for _ in range(4)]

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(x)

    want = [run(x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(pool.map(run, images), want, strict=True))
