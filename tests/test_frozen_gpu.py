"""Frozen models on a GPU: graphs and streams against a stand-in for torch.cuda, kernels interpreted."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from crossvit import CrossViT, frozen_gpu
from crossvit_kernels import triton_runtime, use_backend
from tests.contract import check_values, without_a_gpu
from tests.fake_cuda import Event, FakeCuda, Hazard, Stream, fake_cuda
from tests.models import exact, small

pytestmark = pytest.mark.skipif(
    triton_runtime.load_error() is not None, reason=f"Triton cannot be used: {triton_runtime.load_error()}"
)


@contextmanager
def on_gpu(backend: str = "torch", target: str = "sm_80") -> Iterator[FakeCuda]:
    """By PyTorch's operators, or by Triton's kernels in the interpreter."""
    with use_backend(backend), without_a_gpu(target), fake_cuda() as cuda:
        yield cuda


def model_of(**options: Any) -> CrossViT:
    """With heads that Triton's kernels take, two encoders, and branches of unequal depth."""
    return small(**{"embed_dim": (32, 48), "num_heads": (2, 3), "depth": ((1, 2, 0),) * 2, **options})


def names_of(cuda: FakeCuda) -> list[str]:
    return [launch.name for launch in cuda.log]


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("sm_80", torch.float32),
        ("sm_90", torch.bfloat16),
        pytest.param("sm_90", torch.float16, marks=pytest.mark.sweep),
        pytest.param("sm_80", torch.bfloat16, marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_logits_and_order(target, dtype):
    """Three calls: launched, recorded, replayed; all three right, and on two streams."""
    model = model_of(depth=((1, 2, 0), (0, 1, 0))).to(dtype)
    x = torch.randn(2, 3, 48, 48).to(dtype)
    want = exact(model, x)
    with torch.no_grad(), use_backend("reference"):
        eager = model(x)
    with on_gpu("triton", target) as cuda:
        model.freeze()
        found = []
        for _ in range(3):
            cuda.log.clear()
            found.append(model(x))
            products = [launch for launch in cuda.log if launch.name == "product"]
            streams = {launch.stream for launch in products if launch.replayed == products[-1].replayed}
            assert len(streams) == 2
        assert all(launch.replayed for launch in cuda.log if launch.name == "product")
        names = names_of(cuda)
    # Of three blocks of L and one of S: four products each, and the two heads; an attention each, and one for
    # each fusion. Statistics are taken anew only at the start, behind a fusion and before a head.
    assert (names.count("product"), names.count("attend")) == (18, 6)
    norms = (5, 0) if dtype == torch.bfloat16 else (0, 10)
    assert (names.count("statistics"), names.count("normalise")) == norms
    assert all(torch.equal(y, found[0]) for y in found)
    assert found[0].dtype == dtype
    check_values(found[0], eager, want)


OPTIONS: dict[str, dict[str, Any]] = {
    "other sizes": {"dynamic_img_size": True},
    "cropped": {"crop_scale": True, "img_scale": (1.0, 2 / 3)},
    "dagger": {"multi_conv": True, "embed_dim": (32, 64), "num_heads": (2, 4)},
    "features": {"num_classes": 0},
    "no bias": {"qkv_bias": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_kind_of_model(options):
    model = model_of(depth=((1, 1, 0),), **options)
    x = torch.randn(3, 3, 60, 48) if options.get("dynamic_img_size") else torch.randn(3, 3, 48, 48)
    want = exact(model, x)
    for backend in ("torch", "triton"):
        with on_gpu(backend):
            model.freeze()
            first, second = model(x), model(x)
            assert torch.equal(first, second)
            torch.testing.assert_close(first.double(), want, rtol=1e-4, atol=1e-5)
            model.unfreeze()


@pytest.mark.parametrize("multi_conv", [False, True])
def test_pixels_as_bytes(multi_conv):
    means, stds = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    model = model_of(depth=((1, 1, 0),), multi_conv=multi_conv, embed_dim=(32, 64), num_heads=(2, 4))
    x = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    by_channel = [torch.tensor(values)[:, None, None] for values in (means, stds)]
    want = exact(model, (x / 255 - by_channel[0]) / by_channel[1])
    for backend in ("torch", "triton"):
        with on_gpu(backend):
            model.freeze(mean=means, std=stds, batch_sizes=[2])
            torch.testing.assert_close(model(x).double(), want, rtol=1e-4, atol=1e-5)
            model.unfreeze()


def test_a_batch_in_slices():
    """Five images, two at once: the same memory three times over, the last time for one image."""
    model, x = model_of(), torch.randn(5, 3, 48, 48)
    for backend in ("torch", "triton"):
        with on_gpu(backend) as cuda:
            model.freeze()
            want = model(x)
            model.freeze(images_at_once=2)
            cuda.log.clear()
            first = model(x)
            torch.testing.assert_close(first, want)
            assert torch.equal(model(x), first)
            model.unfreeze()


def test_graphs_for_sizes_that_are_told():
    model = model_of()
    with on_gpu() as cuda:
        model.freeze(batch_sizes=[1, 3])
        cuda.log.clear()
        for batch, replays in ((1, True), (3, True), (2, False), (2, True)):
            cuda.log.clear()
            model(torch.randn(batch, 3, 48, 48))
            assert any(launch.replayed for launch in cuda.log) is replays, batch


def test_so_many_graphs_and_their_memory():
    """Eight sizes are kept, those that were used last; all memory is counted."""
    model = model_of()
    with on_gpu() as cuda:
        model.freeze()
        weights = model.packed_nbytes
        sizes = []
        for batch in range(1, 12):
            model(torch.zeros(batch, 3, 48, 48))
            sizes.append(model.packed_nbytes)
        packed = model._frozen._weights
        assert [key[1][0] for key in packed._instances] == list(range(4, 12))
        assert sizes[0] > weights
        assert sizes[0] - weights >= packed._instances[next(iter(packed._instances))].nbytes // 4
        assert cuda.synchronized == 3  # before the memory of the others was given back
        assert sum(i.nbytes for i in packed._instances.values()) + weights == sizes[-1]
        model(torch.zeros(4, 3, 48, 48))
        assert next(iter(packed._instances))[1][0] == 5


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_graph_where_it_cannot_be_recorded(backend, caplog):
    """No memory, or another capture: the model works, and says it once."""
    model, x = model_of(depth=((1, 1, 0),)), torch.randn(2, 3, 48, 48)
    want = exact(model, x)
    with on_gpu(backend) as cuda, caplog.at_level(logging.WARNING, logger="crossvit"):
        model.freeze()
        cuda.fails_to_record = "CUDA out of memory"
        for _ in range(4):
            torch.testing.assert_close(model(x).double(), want, rtol=1e-4, atol=1e-5)
        assert not any(launch.replayed for launch in cuda.log)
    assert [r.message for r in caplog.records if "without a CUDA graph" in r.message] == [
        "the frozen model runs without a CUDA graph for images of [2, 3, 48, 48], which takes longer where "
        "they are few: OutOfMemoryError: CUDA out of memory"
    ]


def test_a_capture_that_fails_at_its_end():
    """It leaves its stream as the current one, and work that was not recorded."""
    model, x = model_of(depth=((1, 1, 0),)), torch.randn(2, 3, 48, 48)
    want = exact(model, x)
    with on_gpu() as cuda:
        model.freeze()
        model(x)
        main = cuda.current
        cuda.fails_at_the_end = "operation failed due to a previous error during capture"
        for _ in range(2):
            torch.testing.assert_close(model(x).double(), want, rtol=1e-4, atol=1e-5)
            assert cuda.current is main
        assert not any(launch.replayed for launch in cuda.log)


def test_changed_weights_are_not_packed_within_a_capture():
    model, x = model_of(depth=((1, 1, 0),)), torch.randn(2, 3, 48, 48)
    with on_gpu() as cuda:
        model.freeze()
        model(x)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            y = model(x)
        want = y.clone()
        with torch.no_grad():
            model.head[0].weight.mul_(2)
        refused = pytest.raises(RuntimeError, match="whose weights have to be packed: call it once before")
        with refused, cuda.graph(cuda.CUDAGraph()):
            model(x)
        assert not torch.equal(model(x), want)
        graph.replay()  # reads the weights that it was recorded with, which are still there
        assert torch.equal(y, want)
        assert len(model._frozen._recorded) == 1


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_within_a_graph_of_the_caller(backend):
    """Refused for images that are new; else recorded into it, on memory of its own."""
    model, x = model_of(depth=((1, 1, 0),)), torch.randn(2, 3, 48, 48)
    with on_gpu(backend) as cuda:
        model.freeze()
        graph = cuda.CUDAGraph()
        refused = pytest.raises(RuntimeError, match=r"has seen no images of \[2, 3, 48, 48\]: call it once")
        with refused, cuda.graph(graph):
            model(x)
        want = model(x)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            y = model(x)
        y.zero_()
        another = cuda.Stream()
        another.clock.update(cuda.current.clock)
        model(torch.randn_like(x))
        with cuda.stream(another):  # nothing orders the two, so that they must not meet in memory
            graph.replay()
            assert torch.equal(y, want)
        cuda.current.clock.update(another.clock)
        x.mul_(2)
        graph.replay()
        assert torch.equal(y, model(x))


def test_streams_of_the_caller():
    """Calls on several streams share memory, and wait for each other; a stream that does not is noticed."""
    model, x = model_of(depth=((1, 1, 0),)), torch.randn(2, 3, 48, 48)
    with on_gpu() as cuda:
        model.freeze()
        with cuda.stream(cuda.Stream()):  # which knows nothing of the one that packed
            model(x)
        for _ in range(3):
            stream = cuda.Stream()
            stream.clock.update(cuda.current.clock)  # the images are there
            with cuda.stream(stream):
                model(x)
        with mock.patch.object(Stream, "wait_event"), pytest.raises(Hazard):
            model(x)


@pytest.mark.parametrize("lost", range(8))
def test_a_missing_event_is_noticed(lost):
    """Without any one of the waits for the other stream, the account does not add up."""
    model, x = model_of(), torch.randn(2, 3, 48, 48)
    wait, count = Stream.wait_event, 0

    def forgetful(self: Stream, event: Event) -> None:
        nonlocal count
        count += 1
        if count != lost + 1:
            wait(self, event)

    with on_gpu():
        model.freeze()
        model(x)
        packed = model._frozen._weights
        instance = next(iter(packed._instances.values()))
        with torch.no_grad(), mock.patch.object(Stream, "wait_event", forgetful):
            if lost < 4:  # of two encoders: S waits, L waits
                with pytest.raises(Hazard, match="nothing orders"):
                    instance._launch()
            else:
                instance._launch()
                assert count == 4


def test_threads():
    """Callers from several threads, of several sizes: each gets its own logits."""
    model = model_of(depth=((1, 1, 0),))
    images = [torch.randn(batch, 3, 48, 48) for batch in (1, 2, 1, 2, 3)] * 3
    with on_gpu():
        model.freeze()
        want = [model(x) for x in images]
        packed = model._frozen._weights
        with ThreadPoolExecutor(1) as pool:  # the stand-in knows one current stream
            found = list(pool.map(lambda x: packed.run(model, x), images))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_several_models_at_once():
    models = [model_of(depth=((1, 1, 0),)) for _ in range(2)]
    x = torch.randn(2, 3, 48, 48)
    with on_gpu():
        for model in models:
            model.freeze()
        found = [[model(x) for model in models] for _ in range(3)]
    for logits in found:
        for y, model in zip(logits, models, strict=True):
            torch.testing.assert_close(y.double(), exact(model, x), rtol=1e-4, atol=1e-5)


def test_changed_weights_are_packed_again():
    model, x = model_of(depth=((1, 1, 0),)), torch.randn(2, 3, 48, 48)
    with on_gpu() as cuda:
        model.freeze()
        for _ in range(2):
            model(x)
        with torch.no_grad():
            model.blocks[0].blocks[1][0].mlp.fc1.weight.mul_(1.5)
        want = exact(model, x)
        cuda.log.clear()
        torch.testing.assert_close(model(x).double(), want, rtol=1e-4, atol=1e-5)
        assert not any(launch.replayed for launch in cuda.log)
        model.freeze(check=False)
        before = model(x)
        with torch.no_grad():
            model.head[0].weight.mul_(2)
        assert torch.equal(model(x), before)


def test_inference_mode_and_out_of_it():
    """What the first call makes can be used by the next one, in the other mode."""
    model, x = model_of(depth=((1, 1, 0),)), torch.randn(2, 3, 48, 48)
    with on_gpu():
        for first in (True, False):
            with torch.inference_mode(first):
                model.freeze()
                want = model(x)
            with torch.inference_mode(not first):
                assert torch.equal(model(x), want)
                assert torch.equal(model(x.clone()), want)


def test_copies_pack_for_themselves():
    model, x = model_of(depth=((1, 1, 0),)), torch.randn(2, 3, 48, 48)
    with on_gpu():
        model.freeze(images_at_once=1)
        want = model(x)
        other = copy.deepcopy(model)
        assert torch.equal(other(x), want)
        assert other._frozen._weights.images_at_once == 1


def test_the_backend_that_was_named_stays():
    model, x = model_of(depth=((0, 1, 0),)), torch.randn(1, 3, 48, 48)
    with on_gpu("triton") as cuda:
        model.freeze()
        with use_backend("auto"):
            model(x)
        assert "product" in names_of(cuda)


def test_which_layers_are_taken():
    """Those of PyTorch where Triton's are not known to be ahead, or were found to be wrong."""
    model, x = model_of(depth=((1, 1, 0),)), torch.randn(2, 3, 48, 48)
    want = exact(model, x)
    with on_gpu("auto") as cuda:
        for wrong, ahead, kind in ((None, True, "triton"), (None, False, "torch"), ("wrong", True, "torch")):
            with (
                mock.patch.object(frozen_gpu, "reason_against_triton", return_value=wrong) as tried,
                mock.patch.object(frozen_gpu.kernel_preference, "ahead", return_value=ahead),
                mock.patch("crossvit.frozen_layers.chosen", return_value="triton"),
                mock.patch("crossvit_kernels.cross_fusion.op._chosen", return_value="torch"),
            ):
                model.freeze()
                assert tried.called is ahead  # where they are not ahead, nothing is compiled and tried
                cuda.log.clear()
                torch.testing.assert_close(model(x).double(), want, rtol=1e-4, atol=1e-5)
                assert ("product" in names_of(cuda)) is (kind == "triton")
    narrow = small()  # with heads of 8 channels
    with (
        on_gpu("triton"),
        pytest.raises(RuntimeError, match="the backend triton cannot run this frozen model"),
    ):
        narrow.freeze()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_sizes": [0]}, "batch_sizes must be at least 1, got 0"),
        ({"images_at_once": 0}, "images_at_once must be at least 1, got 0"),
        ({"dtype": torch.float64}, "dtype must be torch.float32 or torch.bfloat16 or torch.float16, got"),
    ],
)
def test_what_freeze_refuses(options, words):
    model = model_of().train()
    with on_gpu(), pytest.raises(ValueError, match=words):
        model.freeze(**options)
    assert model.training
    with pytest.raises(ValueError, match="are for models on a GPU"):
        model.freeze(batch_sizes=[1])


def test_wrong_images_are_refused():
    model = model_of()
    with on_gpu():
        model.freeze()
        with pytest.raises(ValueError, match="must be on cpu, as the model is, got meta"):
            model(torch.zeros(2, 3, 48, 48, device="meta"))
        with pytest.raises(ValueError, match="built for images of 48x48"):
            model(torch.zeros(2, 3, 50, 48))
        assert model(torch.zeros(0, 3, 48, 48)).shape == (0, 5)


def test_autocast_and_gradients_do_not_matter():
    model, x = model_of(depth=((1, 1, 0),)), torch.randn(2, 3, 48, 48)
    with on_gpu():
        model.freeze()
        want = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x), want)
        y = model(x.requires_grad_())
        assert not y.requires_grad
        with torch.inference_mode():
            assert torch.equal(model(x), want)


@pytest.mark.filterwarnings("ignore:Dynamo d")
def test_compiling_leaves_it_alone(monkeypatch):
    """Nothing within a frozen model is compiled; without the account, in whose presence nothing would be."""
    model, x = model_of(depth=((1, 1, 0),)), torch.randn(2, 3, 48, 48)
    monkeypatch.setattr(frozen_gpu, "is_on_gpu", lambda model: True)
    monkeypatch.setattr(frozen_gpu, "cuda", FakeCuda(fails_to_record="it sees nothing"))
    counter = CompileCounter()
    with use_backend("torch"):
        model.freeze()
        want = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=counter)
        assert torch.equal(compiled(x), want)
        with torch.no_grad():
            model.head[0].weight.mul_(2)
        assert torch.equal(compiled(x), model(x))
    assert counter.op_count == 0
