"""What only a GPU can show of its kernels: streams, graphs, devices, bits, large tensors.

Needs nothing of conftest.py, so that `pytest --noconftest tests/test_on_gpu.py` runs where timm is missing.
"""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_cases import error
from crossvit import CrossViT, create_model
from crossvit_kernels import use_backend
from crossvit_kernels.backends import BACKENDS
from crossvit_kernels.cross_attention import cuda_launch
from tests.operations import OPERATIONS, Size, leaves

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"
)

DEVICE = "cuda"
GPU_BACKENDS = [name for name, backend in BACKENDS.items() if backend.tried_first]
REPEATS = 50
SIZE = Size(16, 400, 224, 7, 196, 448, 7)  # of crossvit_18
operations = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    gc.collect()
    torch.cuda.empty_cache()


def why_not(backend: str) -> str | None:
    """Why a backend does not run here."""
    missing = BACKENDS[backend].missing()
    if missing is None and backend == "cuda":
        return cuda_launch.unusable(torch.device(DEVICE, torch.cuda.current_device()))
    return missing


@pytest.fixture(params=GPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param != "auto" and (reason := why_not(request.param)) is not None:
        pytest.skip(reason)
    return request.param


def draw(operation, size: Size, dtype: torch.dtype) -> list[Tensor]:
    with torch.device(DEVICE):
        return leaves(operation.inputs(size, dtype))


def compute(operation, tensors: Sequence[Tensor], size: Size, backend: str) -> list[Tensor]:
    """Outputs, and the gradients of all tensors for a loss of half the sum of their squares."""
    outputs = operation.run(tensors, size, backend)
    grads = torch.autograd.grad(outputs, tensors, [y.detach() for y in outputs])
    return [*(y.detach() for y in outputs), *grads]


def same_bits(got: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def assert_like_torch(operation, tensors: Sequence[Tensor], size: Size, backend: str) -> None:
    """Against PyTorch's operators in float64."""
    want = compute(operation, leaves(tensors, torch.float64), size, "torch")
    assert error(compute(operation, tensors, size, backend), want) < TOLERANCES[tensors[0].dtype]


@operations
@dtypes
def test_values_and_gradients(operation, dtype, backend):
    assert_like_torch(operation, draw(operation, SIZE, dtype), SIZE, backend)


@operations
@dtypes
@pytest.mark.parametrize("batch", [1, 16, 256])
def test_the_same_bits_every_time(operation, dtype, batch, backend):
    size = replace(SIZE, batch=batch)
    tensors = draw(operation, size, dtype)
    want = compute(operation, tensors, size, backend)
    for _ in range(REPEATS):
        assert same_bits(compute(operation, tensors, size, backend), want)


@operations
def test_on_a_side_stream(operation, backend):
    """Inputs are written late on that stream: kernels on another one would read what was there before."""
    tensors = draw(operation, SIZE, torch.float32)
    want = compute(operation, tensors, SIZE, backend)
    values = [x.detach().clone() for x in tensors]
    with torch.no_grad():
        for x in tensors:
            x.zero_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # clock cycles
        with torch.no_grad():
            for x, value in zip(tensors, values, strict=True):
                x.copy_(value)
        got = compute(operation, tensors, SIZE, backend)
    torch.cuda.current_stream().wait_stream(side)
    assert same_bits(got, want)


@operations
def test_auto_takes_the_kernels(operation):
    """It tries them first; named, they run untried."""
    tensors = draw(operation, SIZE, torch.float32)
    got = compute(operation, tensors, SIZE, "auto")
    named = [compute(operation, tensors, SIZE, name) for name in GPU_BACKENDS if why_not(name) is None]
    assert any(same_bits(got, want) for want in named)


@operations
@dtypes
def test_one_backend_goes_on_where_another_stopped(operation, dtype, backend, monkeypatch):
    (other,) = (name for name in GPU_BACKENDS if name != backend)
    if (reason := why_not(other)) is not None:
        pytest.skip(reason)
    op = sys.modules[f"crossvit_kernels.{operation.name}.op"]
    tensors = draw(operation, SIZE, dtype)
    want = compute(operation, tensors, SIZE, backend)
    outputs = operation.run(tensors, SIZE, backend)
    monkeypatch.setattr(op, "engine", {backend: op.engine(other)}.get)
    got = torch.autograd.grad(outputs, tensors, [y.detach() for y in outputs])
    assert error([*(y.detach() for y in outputs), *got], want) < TOLERANCES[dtype]


@operations
@dtypes
@pytest.mark.parametrize("backend", [*GPU_BACKENDS, "auto"], indirect=True)
def test_in_a_captured_graph(operation, dtype, backend):
    """One warm call, then a capture of forward and backward; replays follow their inputs."""
    tensors = draw(operation, SIZE, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        compute(operation, tensors, SIZE, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = compute(operation, tensors, SIZE, backend)
    for _ in range(3):
        with torch.no_grad():
            for x in tensors:
                x.copy_(x.flip(0))
        want = compute(operation, tensors, SIZE, backend)
        graph.replay()
        assert same_bits(results, want)


@operations
def test_on_a_device_that_is_not_the_current_one(operation, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU: a second one is needed")
    tensors = draw(operation, SIZE, torch.float32)
    want = compute(operation, tensors, SIZE, backend)
    there = [x.detach().to("cuda:1").requires_grad_() for x in tensors]
    assert torch.cuda.current_device() == 0
    got = compute(operation, there, SIZE, backend)
    assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in got)
    assert error([x.cpu() for x in got], [x.cpu() for x in want]) < 1e-4


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Names of the kernels that are compiled, or loaded from the cache on disk, during a test."""
    triton = pytest.importorskip("triton")
    names: list[str] = []

    def hook(*, fn: object, **_: object) -> None:
        names.append(getattr(fn, "name", str(fn)))

    previous = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = hook
    yield names
    triton.knobs.runtime.jit_post_compile_hook = previous


@operations
def test_another_number_of_patches_compiles_nothing(operation, compilations):
    """Widths are multiples of 16, as those of the models: all strides then are, whatever the patches."""
    size = Size(3, 196, 48, 3, 196, 64, 4)
    compute(operation, draw(operation, size, torch.float32), size, "triton")
    assert compilations, "the hook saw nothing"
    compilations.clear()
    longer = replace(size, batch=4, patches=197, other_patches=197)
    compute(operation, draw(operation, longer, torch.float32), longer, "triton")
    assert compilations == []


@operations
def test_more_heads_than_blocks_of_a_second_dimension(operation, backend):
    """B H beyond 65535, the most of y and z of a grid."""
    size = Size(9500, 3, 56, 7, 2, 56, 7)
    assert_like_torch(operation, draw(operation, size, torch.float32), size, backend)


@operations
def test_an_empty_batch(operation, backend):
    size = replace(SIZE, batch=0)
    tensors = draw(operation, size, torch.float32)
    found = compute(operation, tensors, size, backend)[len(operation.outputs) :]
    for got, x in zip(found, tensors, strict=True):
        assert got.shape == x.shape
        assert not got.any()


def last_images(operation, tensors: Sequence[Tensor], size: Size, backend: str, few: int) -> list[Tensor]:
    """Outputs and gradients of the tokens, of the last images alone."""
    outputs = operation.run(tensors, size, backend)
    tokens = tensors[: len(operation.tokens)]
    grads = torch.autograd.grad(outputs, tokens, [y.detach() for y in outputs])
    return [y.detach()[-few:].clone() for y in (*outputs, *grads)]


def test_tokens_beyond_two_billion_elements(backend):
    """Offsets of 64 bits: the last images of a batch whose tokens have more than 2^31 elements."""
    batch, few = 24_500, 4
    if torch.cuda.mem_get_info()[0] < 80e9:
        pytest.skip("80 GB of free memory are needed")
    # One test for both operations, so that they never run side by side.
    for operation in OPERATIONS:
        size = replace(SIZE, batch=few) if operation.name == "cross_fusion" else Size(few, 400, 224, 7)
        count = len(operation.tokens)
        tensors = draw(operation, size, torch.bfloat16)
        want = last_images(operation, tensors, size, backend, few)
        # The same few images over and over.
        tensors[:count] = [x.detach().repeat(batch // few, 1, 1).requires_grad_() for x in tensors[:count]]
        assert tensors[1].numel() > 2**31
        got = last_images(operation, tensors, replace(size, batch=batch), backend, few)
        assert error(got, want) < TOLERANCES[torch.bfloat16]
        del tensors
        torch.cuda.empty_cache()


@operations
@dtypes
def test_the_interpreter_agrees(operation, dtype, backend):
    """The PTX that is interpreted without a GPU, and the same kernels on this one."""
    contract = pytest.importorskip("tests.contract")
    size = Size(2, 9, 32, 2, 5, 24, 3)
    tensors = draw(operation, size, dtype)
    got = compute(operation, tensors, size, backend)
    with contract.without_a_gpu("sm_80", backend):
        want = compute(operation, [x.detach().cpu().requires_grad_() for x in tensors], size, backend)
    assert error([x.cpu() for x in got], want) < TOLERANCES[dtype]


# Whole models


@pytest.fixture(scope="module")
def crossvit_18() -> CrossViT:
    torch.manual_seed(0)
    return create_model("crossvit_18").to(DEVICE).eval()


def images_of(batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(batch)
    return torch.randn(batch, 3, 240, 240, generator=generator, device=DEVICE).to(dtype)


def exact(model: CrossViT, x: Tensor) -> Tensor:
    convolutions = torch.backends.cudnn.flags(allow_tf32=False)
    with torch.no_grad(), use_backend("reference"), convolutions:
        return copy.deepcopy(model).unfreeze().float()(x.float())


LAYERS = pytest.mark.parametrize("layers", ["torch", "triton"])


@dtypes
@LAYERS
def test_a_frozen_model(layers, dtype, crossvit_18):
    """Launched, recorded, replayed, on other streams, with other images in between: the same bits."""
    if (reason := BACKENDS[layers].missing()) is not None:
        pytest.skip(reason)
    model = copy.deepcopy(crossvit_18).to(dtype)
    x, other = images_of(5, dtype), images_of(5, dtype) * 2
    want = exact(model, x)
    with use_backend(layers):
        model.freeze()
        first = model(x)
        assert error([first.float()], [want]) < (1e-3 if dtype == torch.float32 else 0.1)
        for _ in range(3):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                replayed = model(x)
                assert not torch.equal(model(other), first)
            torch.cuda.current_stream().wait_stream(side)
            assert torch.equal(replayed, first)
        (instance,) = model._frozen._weights._instances.values()
        assert instance.graph is not None
        assert model.packed_nbytes > sum(p.nbytes for p in model.parameters()) // 2


@LAYERS
def test_a_frozen_model_in_a_graph_of_the_caller(layers, crossvit_18):
    if (reason := BACKENDS[layers].missing()) is not None:
        pytest.skip(reason)
    model, x = copy.deepcopy(crossvit_18).bfloat16(), images_of(3, torch.bfloat16)
    with use_backend(layers):
        model.freeze()
        want = model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        model(images_of(3, torch.bfloat16) * 3)
        graph.replay()
        assert torch.equal(y, want)


def test_changes_of_a_frozen_model_are_noticed(crossvit_18):
    """In place at once, past torch's count one call late."""
    model, x = copy.deepcopy(crossvit_18).bfloat16(), images_of(2, torch.bfloat16)
    model.freeze()
    before, *_ = (model(x) for _ in range(3))
    with torch.no_grad():
        model.head[0].weight.mul_(2)
    changed = model(x)
    assert not torch.equal(changed, before)
    model.head[1].weight.data.mul_(2)
    found = []
    for _ in range(3):
        found.append(model(x))
        torch.cuda.synchronize()
    assert not torch.equal(found[-1], changed)


def test_a_batch_in_slices_and_sizes_that_are_told(crossvit_18):
    model, x = copy.deepcopy(crossvit_18).bfloat16(), images_of(7, torch.bfloat16)
    whole = model.freeze()(x)
    model.freeze(batch_sizes=[7], images_at_once=3)
    assert error([model(x).float()], [whole.float()]) < 0.05


def test_a_training_step(crossvit_18):
    """Under autocast and a scaler, against PyTorch's operators; the same bits twice."""
    if (reason := BACKENDS["triton"].missing()) is not None:
        pytest.skip(reason)
    model, x = copy.deepcopy(crossvit_18).train(), images_of(4)
    found = []
    for backend in ("reference", "triton", "triton"):
        model.zero_grad()
        with use_backend(backend), torch.autocast("cuda", torch.bfloat16):
            loss = model(x).float().square().mean()
            loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    want, mine, again = found
    assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))
    for a, b in zip(mine, want, strict=True):
        assert (a - b).norm() <= 0.1 * b.norm() + 1e-4 * max(g.norm() for g in want)
