"""Frozen models: their logits, what they refuse, what they notice of changes, and what they leave behind."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import crossvit.frozen as frozen_module
import crossvit.frozen_program as program_module
from crossvit import CrossViT, create_model, find_variant, list_models, native_block
from crossvit.watch import Watch
from crossvit_kernels import native
from crossvit_kernels.fingerprint import Fingerprint
from crossvit_kernels.linear.packed import PackedLinear
from crossvit_kernels.program import Activation, Kind, Program
from tests.contract import needs_module
from tests.layouts import embedded_in_nan, every_second, one_element_in
from tests.model_changes import IN_PLACE, OTHERWISE, REFUSED, a_block, a_hook, optimizer_step, replacing
from tests.models import distance, drawn, exact, image, small, small_model, through_modules
from tests.operations import relative_error
from tests.test_native import isas

pytestmark = needs_module
SHAPE = (3, 3, 48, 48)
# Of logits against float64's, where float32's own operators stay below 3e-6.
BOUND = 1e-5
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")


def assert_frozen_is_right(model: CrossViT, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Freezes a model in float32 and compares its logits; bfloat16 may be as far off as torch's own model."""
    want = exact(model, x)
    torchs = through_modules(copy.deepcopy(model).unfreeze().to(dtype), x.to(dtype))
    got = model.freeze(dtype)(x)
    assert got.dtype == next(model.parameters()).dtype
    if dtype == torch.float32:
        assert relative_error(got, want) < BOUND
    else:
        assert distance(got, want) < 1.25 * distance(torchs, want)
    return got


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# Logits


@pytest.mark.each(1)
@pytest.mark.parametrize("name", list_models(pretrained=True))
def test_every_variant_against_timm(name):
    """In float32 as timm's model; in bfloat16 as close to it as timm's model in bfloat16, from weights of
    either dtype. One encoder of each: the others are like it."""
    row = find_variant(name)
    size = 204 if "408" in name else 120
    options: dict[str, Any] = {"img_size": size}
    if name != "crossvit_18_240":  # whose depth timm does not let one choose
        options["depth"] = ((*row.depth, 0),)
    with torch.device("meta"):  # without the time that initial weights take
        ours, theirs = create_model(name, **options), timm.create_model(name, **options).eval()
    ours = drawn(ours)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    x = image(ours)
    with torch.no_grad():
        want = theirs(x)
        bound = 1.25 * distance(theirs.bfloat16()(x.bfloat16()), want)
    assert relative_error(ours.freeze()(x), want) < BOUND
    assert distance(ours.freeze(torch.bfloat16)(x), want) < bound
    got = ours.unfreeze().bfloat16().freeze()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert ours._frozen.dtype == torch.bfloat16
    assert distance(got, want) < bound


def test_the_whole_of_crossvit_18():
    with torch.device("meta"):
        model, theirs = create_model("crossvit_18"), timm.create_model("crossvit_18_240").eval()
    theirs.load_state_dict(drawn(model).state_dict(), assign=True)
    x = image(model)
    with torch.no_grad():
        want = theirs(x)
        bound = 1.25 * distance(theirs.bfloat16()(x.bfloat16()), want)
    assert relative_error(model.freeze()(x), want) < BOUND
    assert distance(model.freeze(torch.bfloat16)(x), want) < bound


# Widths, heads, patches and images that are no multiples of what kernels work in.
SHAPES: dict[str, dict[str, Any]] = {
    "small": {},
    "odd widths": {"embed_dim": (20, 33), "num_heads": (2, 3), "mlp_ratio": (1.5, 2.3, 1)},
    "wide heads": {"embed_dim": (96, 130), "num_heads": (1, 1)},
    "many heads": {"embed_dim": (24, 48), "num_heads": (12, 24)},
    "one class": {"num_classes": 1},
    "many classes": {"num_classes": 1003},
    "no classes": {"num_classes": 0},
    "one channel": {"in_chans": 1},
    "five channels": {"in_chans": 5},
    "other patches": {"patch_size": (8, 16)},
    "S is resized too": {"img_scale": (0.75, 1.0), "img_size": 64},
    "equal sizes": {"img_scale": (1.0, 1.0)},
    "no bias of q, k, v": {"qkv_bias": False},
    "no block in S": {"depth": ((0, 1, 0), (0, 2, 0))},
    "more blocks in S": {"depth": ((2, 1, 0),)},
    "large eps": {"norm_layer": partial(nn.LayerNorm, eps=0.1)},
    "dropout": {"drop_rate": 0.5, "pos_drop_rate": 0.5, "proj_drop_rate": 0.5, "attn_drop_rate": 0.5},
    "drop path": {"drop_path_rate": 0.5},
    "odd image": {"img_size": (49, 71)},
    "tall image": {"img_size": (97, 13)},
    "one patch": {"img_size": (12, 12)},
    "crop": {"crop_scale": True, "img_size": 240},
    "crop of an odd image": {"crop_scale": True, "img_size": (67, 101)},
    "stem of three": {"multi_conv": True, "img_size": 60},
    "stem of three, odd image": {"multi_conv": True, "img_size": (55, 77)},
    "stem of three, crop": {"multi_conv": True, "crop_scale": True, "img_size": (67, 101)},
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_every_shape(options):
    model = small(**options)
    assert_frozen_is_right(model, image(model, 3))


@DTYPES
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("shape", ["small", "odd widths", "stem of three, odd image", "no classes"])
def test_every_instruction_set(isa, shape, dtype):
    model = small(**SHAPES[shape])
    # Enough logits that the two errors of bfloat16 are averages.
    x = image(model, 16)
    with native.use_isa(isa):
        assert_frozen_is_right(model, x, dtype)


@DTYPES
def test_another_instruction_set_packs_again(dtype):
    model = small()
    x = image(model)
    first = model.freeze(dtype)(x)
    for isa in isas():
        with native.use_isa(isa):
            got = model(x)
            assert model._frozen._weights.isa == isa
            assert distance(got, first) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert torch.equal(model(x), first)


BATCHES = (1, 33, 2, 0, 7, 3, 32, 64, 1)


@DTYPES
def test_batches_of_every_size_in_turn(dtype):
    """Each image has the same logits, in whatever batch it is."""
    model = small().freeze(dtype)
    x = torch.randn(65, *SHAPE[1:])
    want = torch.cat([model(x[i : i + 1]) for i in range(len(x))])
    assert relative_error(want, exact(model, x)) < (BOUND if dtype == torch.float32 else 5e-2)
    for batch in BATCHES:
        got = model(x[:batch])
        assert got.shape == (batch, 5)
        assert torch.equal(got, want[:batch]), batch
    assert torch.equal(model(x[len(x) :]), want[:0])


@DTYPES
@pytest.mark.parametrize("batch", [1, 2, 5, 33])
def test_threads_do_not_change_a_bit(batch, dtype):
    model = small().freeze(dtype)
    x = torch.randn(batch, *SHAPE[1:])
    results = []
    for threads in (1, 2, 3, 4, 5, 6, 7, 8, 1):
        torch.set_num_threads(threads)
        results.append(model(x))
    assert relative_error(results[0], exact(model, x)) < (BOUND if dtype == torch.float32 else 5e-2)
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("threads", [1, 2])
def test_callers_from_several_threads(threads):
    model = small(dynamic_img_size=True).freeze()
    sizes = (48, 60, 48, 72, 48, 48, 51, 48)
    images = [torch.randn(1 + i % 3, 3, size, size) for i, size in enumerate(sizes)]
    want = [model(x) for x in images]

    def call_often(x: Tensor) -> list[Tensor]:
        torch.set_num_threads(threads)
        return [model(x) for _ in range(25)]

    with ThreadPoolExecutor(len(images)) as pool:
        for got, one in zip(pool.map(call_often, images), want, strict=True):
            assert all(torch.equal(y, one) for y in got)


def test_any_size_of_image():
    model = small(dynamic_img_size=True).freeze()
    for size in ((48, 48), (60, 84), (49, 50), (12, 96), (48, 48)):
        x = torch.randn(2, 3, *size)
        assert relative_error(model(x), exact(model, x)) < BOUND, size


def test_memory_for_many_sizes_of_image_is_given_back():
    model = small(dynamic_img_size=True).freeze()
    model(torch.randn(1, 3, 96, 96))
    first = model._frozen.nbytes
    for pixels in range(24, 72):
        model(torch.randn(1, 3, pixels, 96))
    assert model._frozen.nbytes < 12 * first
    x = torch.randn(2, 3, 96, 96)
    assert relative_error(model(x), exact(model, x)) < BOUND


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "in NaN": embedded_in_nan,
    "every second": every_second,
    "one element in": one_element_in,
    "one image, repeated": lambda x: x[:1].expand_as(x),
    "a slice of a batch of NaN": lambda x: torch.cat((x * float("nan"), x, x * float("nan")))[3:6],
    "a leaf with a gradient": lambda x: x.clone().requires_grad_(),
    "a parameter": nn.Parameter,
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_images_in_any_layout(layout):
    model = small(img_size=(49, 60)).freeze()
    x = torch.randn(3, 3, 49, 60)
    y = layout(x)
    got = model(y)
    assert torch.equal(got, model(y.detach().contiguous()))
    assert not got.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_in_any_dtype(dtype):
    model = small().freeze()
    x = torch.randn(SHAPE).to(dtype)
    got = model(x)
    assert got.dtype == torch.float32
    assert torch.equal(got, model(x.float()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits(dtype):
    """What they are multiplied in is another question; logits have the dtype of the weights."""
    model = small().to(dtype)
    x = torch.randn(SHAPE)
    want = exact(model, x)
    default = model.freeze()
    assert default._frozen.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    got = model.freeze(torch.float32)(x)
    assert got.dtype == dtype
    assert relative_error(got, want) < 2 * torch.finfo(dtype).eps
    assert relative_error(model.float()(x), want) < BOUND


@DTYPES
@pytest.mark.parametrize("shape", ["small", "stem of three, odd image", "crop of an odd image"])
def test_pixels_as_bytes(shape, dtype):
    """With padding, resizing and cropping; the same model takes standardised images as well."""
    model = small(**SHAPES[shape])
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = torch.randint(0, 256, (3, 3, *model.img_size), dtype=torch.uint8)
    middle, spread = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (mean, std))
    x = (pixels.double() / 255 - middle) / spread
    want = exact(model, x)
    model.freeze(dtype, mean=mean, std=std)
    bound = BOUND if dtype == torch.float32 else 5e-2
    for y in (pixels, pixels.contiguous(memory_format=torch.channels_last), x.float()):
        assert relative_error(model(y), want) < bound
    copied = copy.deepcopy(model)
    assert torch.equal(copied(pixels), model(pixels))
    with pytest.raises(TypeError, match="floating-point and normalised"):
        model.unfreeze()(pixels)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mean": (0.5,) * 3}, "mean and std must be given together"),
        ({"mean": (0.5,), "std": (0.5,)}, "a number for each of 3 channels, got 1 and 1"),
        ({"mean": (0.5,) * 3, "std": (0.5, 0, 0.5)}, "std must not be zero"),
    ],
)
def test_bad_means_are_refused(options, words):
    model = small()
    with pytest.raises(ValueError, match=words):
        model.freeze(**options)
    assert model._frozen is None


def test_no_gradient_and_no_autocast():
    model = small().freeze()
    x = torch.randn(SHAPE)
    got = model(x)
    assert got.grad_fn is None
    assert not got.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), got)


def test_inference_mode():
    model, x = small(), torch.randn(SHAPE)
    want = exact(model, x)
    with torch.inference_mode():
        assert relative_error(model.freeze()(x), want) < BOUND
        assert model(x).is_inference()
    assert relative_error(model(x), want) < BOUND
    assert relative_error(model(torch.randn(9, *SHAPE[1:]))[:0], want[:0]) == 0
    without_head = small(num_classes=0)
    want = exact(without_head, x)
    with torch.inference_mode():
        without_head.freeze()(x)
    assert relative_error(without_head(x), want) < BOUND


def test_a_model_that_was_built_in_inference_mode():
    with torch.inference_mode():
        model = small()
    x = torch.randn(SHAPE)
    with torch.inference_mode():
        want = model(x)
        assert relative_error(model.freeze()(x), want) < BOUND
        model.cls_token_0.add_(torch.randn_like(model.cls_token_0))
        assert relative_error(model(x), copy.deepcopy(model).unfreeze()(x)) < BOUND


OTHER_DEFAULTS = {
    "bfloat16": "torch.set_default_dtype(torch.bfloat16)",
    "meta": "torch.set_default_device('meta')",
}


@pytest.mark.parametrize("default", OTHER_DEFAULTS.values(), ids=OTHER_DEFAULTS)
def test_torchs_defaults_do_not_matter(default):
    """In a process of its own: memory of another dtype or device would be of another size, or none."""
    code = f"""
import torch
from tests.model_changes import IN_PLACE, OTHERWISE, REFUSED, a_block, a_hook, optimizer_step, replacing
from tests.models import distance, drawn, exact, image, small, small_model, spread
model, x = small_model(), torch.randn(3, 3, 48, 48)
want = model(x).detach()
{default}
assert (model.freeze()(x) - want).abs().max() < 1e-5
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-1000:]


# NaN


@DTYPES
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_bad_image_spoils_no_other(threads, dtype):
    torch.set_num_threads(threads)
    model = small().freeze(dtype)
    x = torch.randn(7, *SHAPE[1:])
    want = model(x)
    poisoned = x.clone()
    poisoned[2] = float("nan")
    poisoned[5, 1, 7, 7] = float("inf")
    got = model(poisoned)
    bad = torch.tensor([False, False, True, False, False, True, False])
    assert got[bad].isnan().all()
    assert torch.equal(got[~bad], want[~bad])
    assert torch.equal(model(x), want)


@DTYPES
@pytest.mark.parametrize("shape", ["small", "odd widths", "stem of three, odd image", "no classes"])
def test_what_lies_in_memory_before_a_call_is_not_read(shape, dtype):
    model = small(**SHAPES[shape]).freeze(dtype)
    x = image(model, 5)
    want = model(x)
    instances = [i for free in model._frozen._weights._free.values() for i in free]
    assert instances
    for batch in (5, 2):
        for instance in instances:
            instance.arena.fill_(float("nan"))
        assert torch.equal(model(x[:batch]), want[:batch])


# What a frozen model does not do


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals_say_why_and_change_nothing(make, words):
    model = make().train()
    model.head_drop.eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match=f"cannot be frozen: .*{words}"):
        model.freeze()
    assert model._frozen is None
    assert [module.training for module in model.modules()] == modes


def test_every_reason_is_given():
    model = small_model(fusion="all", global_pool="avg", dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"pools with.*; its parameters are.*; the fusion of blocks\.0"):
        model.freeze()


def test_parts_that_do_not_fit_together_are_refused_by_the_model_itself():
    model = small()
    a_block(model).mlp.fc1 = nn.Linear(48, 300)
    x = image(model)
    with pytest.raises(RuntimeError) as eager:
        model(x)
    with pytest.raises(RuntimeError) as frozen:
        model.freeze()
    assert "cannot be multiplied" in str(eager.value)
    assert "cannot be multiplied" in str(frozen.value)


def test_a_global_hook_is_refused():
    handle = nn.modules.module.register_module_forward_hook(a_hook)
    try:
        with pytest.raises(RuntimeError, match="cannot be frozen"):
            small_model().freeze()
    finally:
        handle.remove()


def test_without_the_compiled_module(monkeypatch):
    monkeypatch.setattr(native, "load_error", lambda: "it was left at home")
    with pytest.raises(RuntimeError, match="the compiled module is not here: it was left at home"):
        small_model().freeze()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=r"dtype must be torch\.float32 or torch\.bfloat16, got torch"):
        small_model().freeze(dtype)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 1, 48, 48),
        torch.zeros(3, 48, 48),
        torch.zeros(1, 3, 48, 60),
        torch.zeros(1, 3, 48, 48, dtype=torch.uint8),
    ],
    ids=lambda x: f"{list(x.shape)} {x.dtype}",
)
def test_wrong_images_are_refused_in_the_models_words(x):
    model = small()
    with pytest.raises((ValueError, TypeError)) as eager:
        model(x)
    with pytest.raises(type(eager.value)) as frozen:
        model.freeze()(x)
    assert str(frozen.value) == str(eager.value)


def test_images_elsewhere_are_refused():
    with pytest.raises(ValueError, match="must be on the CPU, got meta"):
        small().freeze()(torch.zeros(SHAPE, device="meta"))


def test_training_is_refused():
    model = small().freeze()
    with pytest.raises(RuntimeError, match=r"cannot be trained: call unfreeze\(\) first"):
        model.train()
    with pytest.raises(RuntimeError, match="cannot be trained"):
        nn.Sequential(model).train()
    assert not model.eval().training
    assert model.unfreeze().train().training


@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_tracing_and_exporting_are_refused():
    """A trace would hold none of the native call."""
    model, x = small().freeze(), torch.randn(SHAPE)
    with pytest.raises(RuntimeError, match=r"cannot be traced: call unfreeze\(\) first"):
        torch.jit.trace(model, x)
    with pytest.raises(RuntimeError):
        torch.export.export(model, (x,))


@pytest.mark.filterwarnings("ignore:Dynamo d")
def test_compiling_leaves_the_native_call_alone():
    model, x = small().freeze(), torch.randn(SHAPE)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for batch in (3, 2, 1):
        assert torch.equal(compiled(x[:batch]), model(x[:batch]))


# The parameters stay the model's


def test_the_state_is_untouched():
    model = small()
    model.pos_embed_1.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parameters, flags = list(model.parameters()), [p.requires_grad for p in model.parameters()]
    addresses = [p.data_ptr() for p in parameters]
    model.freeze()(torch.randn(SHAPE))
    for _ in range(2):
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
        assert [p.data_ptr() for p in parameters] == addresses
        assert [p.requires_grad for p in model.parameters()] == flags
        model.unfreeze()


def test_training_after_unfreezing():
    model, x = small(), torch.randn(SHAPE)
    other = copy.deepcopy(model)
    model.freeze()(x)
    model.unfreeze()
    for m in (model, other):
        optimiser = torch.optim.SGD(m.train().parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            m(x).square().sum().backward()
            optimiser.step()
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert_frozen_is_right(model, x)


def test_other_methods_run_as_before():
    model, x = small(), torch.randn(SHAPE)
    want = model.get_attention_maps(x), model.forward_features(x), model.forward_intermediates(x)
    model.freeze()
    got = model.get_attention_maps(x), model.forward_features(x), model.forward_intermediates(x)

    def tensors(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        else:
            for part in value:
                yield from tensors(part)

    for a, b in zip(tensors(got), tensors(want), strict=True):
        assert torch.equal(a, b)


# Changes of the model


@pytest.mark.parametrize("change", [*IN_PLACE.values(), *OTHERWISE.values()], ids=[*IN_PLACE, *OTHERWISE])
def test_changes_are_noticed(change):
    model, x = small().freeze(), torch.randn(SHAPE)
    before = model(x)
    change(model)
    got = model(x)
    bound = BOUND if got.dtype == torch.float32 else 5e-2
    assert relative_error(got, exact(model, x)) < bound
    assert got.shape != before.shape or distance(got, before) > 1e-4
    # And no more than once: nothing is packed again for the next call.
    packed = model._frozen._weights
    assert torch.equal(model(x), got)
    assert model._frozen._weights is packed


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
def test_without_checks_nothing_changes(change):
    """Nor in a batch or on a number of threads that was not met before."""
    model, x = small().freeze(check=False), torch.randn(9, *SHAPE[1:])
    want = model(x[:2])
    change(model)
    torch.set_num_threads(3)
    assert torch.equal(model(x)[:2], want)
    assert not torch.equal(model.freeze(check=False)(x[:2]), want)


def test_without_checks_what_was_frozen_stays_though_it_never_ran():
    model, x = small(), torch.randn(SHAPE)
    want = exact(model, x)
    model.freeze(check=False)
    optimizer_step(model)
    assert relative_error(model(x), want) < BOUND


def test_weights_that_are_not_contiguous():
    """Uncounted writes to them are seen as well."""
    model, x = small().to(memory_format=torch.channels_last), torch.randn(SHAPE)
    layer = a_block(model).attn.proj
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    assert_frozen_is_right(model, x)
    for p in (model.patch_embed[0].proj.weight, layer.weight):
        before = model(x)
        p.data.mul_(3)
        assert relative_error(model(x), exact(model, x)) < BOUND
        assert distance(model(x), before) > 1e-4


def test_weights_of_another_call():
    """functional_call puts other tensors in the place of the parameters, for one call."""
    model, x = small(), torch.randn(SHAPE)
    other = small()
    model.freeze()
    want = model(x)
    got = torch.func.functional_call(model, dict(other.named_parameters()), (x,))
    assert relative_error(got, exact(other, x)) < BOUND
    assert torch.equal(model(x), want)


def test_another_image_size():
    model = small().freeze()
    model(torch.randn(SHAPE))
    for size in (72, (49, 60)):
        model.set_input_size(size)
        x = image(model)
        assert relative_error(model(x), exact(model, x)) < BOUND
    with pytest.raises(ValueError, match="built for images of 49x60, got 48x48"):
        model(torch.randn(SHAPE))


def _train_dropout(model: CrossViT) -> None:
    a_block(model).mlp.drop1.p = 0.5
    a_block(model).mlp.drop1.train()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.to("meta"), "neither on the CPU nor on a CUDA device"),
        (lambda m: m.double(), "torch.float64"),
        (lambda m: m.norm.bfloat16(), "not all float32"),
        (lambda m: m.reset_classifier(4, global_pool="avg"), "global_pool='avg'"),
        (replacing("blocks.0.blocks.1.0.mlp.act", nn.ReLU), "mlp.act was replaced"),
        (lambda m: a_block(m).register_forward_hook(a_hook), "blocks.0.blocks.1.0 was replaced or has hooks"),
        (lambda m: setattr(m.norm[0], "forward", lambda x: x), "norm.0 was replaced"),
        (_train_dropout, "blocks.0.blocks.1.0.mlp.drop1 is in training mode"),
    ],
)
def test_changes_that_cannot_be_frozen_are_refused_at_the_next_call(change, words):
    model, x = small().freeze(), torch.randn(SHAPE)
    model(x)
    change(model)
    with pytest.raises(RuntimeError, match=f"cannot be frozen: .*{words}"):
        model(x)


def _saved_and_loaded(model: CrossViT) -> CrossViT:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved_and_loaded, copy.copy]
)
def test_copies_are_frozen_and_separate(how, called):
    model, x = small().freeze(torch.bfloat16), torch.randn(SHAPE)
    want = model(x) if called else None
    other = how(model)
    assert other._frozen is not None
    assert other._frozen.dtype == torch.bfloat16
    if want is None:
        want = model(x)
    assert torch.equal(other(x), want)
    if how is copy.copy:
        return  # shares the parameters, and all that was packed of them
    assert other._frozen is not model._frozen
    optimizer_step(other)
    assert relative_error(other(x), exact(other, x)) < 5e-2
    assert not torch.equal(other(x), want)
    assert torch.equal(model(x), want)
    other.unfreeze()
    assert torch.equal(model(x), want)
    assert len(pickle.dumps(model)) < 1.1 * len(pickle.dumps(model.unfreeze()))


# What stays behind


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _os_threads() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("Threads:"))


@needs_proc
@pytest.mark.parametrize("calls", [2_000, pytest.param(10_000, marks=pytest.mark.exhaustive)])
def test_memory_and_threads_stay_the_same(calls):
    """With all logits kept: what a call takes and gives back leaves no holes between them."""
    model = small(depth=((1, 1, 0),)).freeze()
    images = [torch.randn(batch, *SHAPE[1:]) for batch in (1, 2, 5)]
    for x in images * 50:
        model(x)
    memory, threads = _resident(), _os_threads()
    logits = [model(images[i % len(images)]) for i in range(calls)]
    assert _os_threads() == threads
    assert _resident() - memory < 2_000 * len(logits)


def test_what_was_packed_goes_with_its_last_user():
    """At once, without waiting for the collector of cycles."""
    model, x = small().freeze(), torch.randn(SHAPE)
    gc.collect()
    gc.disable()
    try:
        for drop in (optimizer_step, lambda m: m.freeze(), lambda m: m.unfreeze()):
            model(x)
            packed = weakref.ref(model._frozen._weights)
            instance = weakref.ref(next(iter(packed()._free.values()))[0])
            drop(model)
            model(x)
            assert packed() is None
            assert instance() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_gives_the_same():
    """The pool of threads that the parent has used does not exist in the child."""
    torch.set_num_threads(2)
    model, x = small().freeze(), torch.randn(SHAPE)
    want = model(x)
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        sender.send_bytes(pickle.dumps(model(x).tolist()))

    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    assert receiver.poll(60), "the child gave nothing in time"
    got = torch.tensor(pickle.loads(receiver.recv_bytes()))
    worker.join(timeout=60)
    worker.kill()
    assert worker.exitcode == 0
    assert torch.equal(got, want)
    assert torch.equal(model(x), want)


# Whether these tests can fail: faults in the program and in the watch


def _error() -> float:
    """The largest error over models that have every part."""
    worst = 0.0
    for shape in ("small", "large eps", "odd image", "crop of an odd image", "stem of three", "no classes"):
        model = small(**SHAPES[shape])
        x = image(model, 9)
        error = (model.freeze()(x).double() - exact(model, x)).abs().nan_to_num(float("inf")).max()
        worst = max(worst, error.item() / exact(model, x).abs().max().item())
    return worst


def _steps_with(**changes: object) -> Callable[[pytest.MonkeyPatch], None]:
    """Faults in what a linear step is told."""

    def put(monkeypatch: pytest.MonkeyPatch) -> None:
        step = PackedLinear.step

        def changed(self: PackedLinear, x: Any, out: Any, rows: int, *args: Any, **options: Any) -> list[int]:
            if args:
                options["activation"], args = args[0], args[1:]
            for name, value in changes.items():
                if options.get(name) is not None:
                    options[name] = value
            return step(self, x, out, rows, *args, **options)

        monkeypatch.setattr(PackedLinear, "step", changed)

    return put


def _reordered(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[pytest.MonkeyPatch], None]:
    """Faults in the order of the program."""

    def put(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Program, "packed", lambda self: b"".join(change(list(self.records))))

    return put


def _kinds(records: list[bytes]) -> list[int]:
    return [int.from_bytes(record[:8], sys.byteorder) for record in records]


def _swapped(kind: Kind) -> Callable[[list[bytes]], list[bytes]]:
    """The first record of a kind after the one behind it."""

    def change(records: list[bytes]) -> list[bytes]:
        i = _kinds(records).index(kind)
        records[i], records[i + 1] = records[i + 1], records[i]
        return records

    return change


def _without(kind: Kind, which: int) -> Callable[[list[bytes]], list[bytes]]:
    def change(records: list[bytes]) -> list[bytes]:
        places = [i for i, found in enumerate(_kinds(records)) if found == kind]
        del records[places[which]]
        return records

    return change


def _patched(owner: Any, name: str, make: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    def put(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(owner, name, make(getattr(owner, name)))

    return put


WRONG_PROGRAMS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "no residual": _steps_with(residual=None),
    "no GELU": _steps_with(activation=Activation.NONE),
    "another eps": _steps_with(eps=2e-6),
    "a block without its attention": _reordered(_without(Kind.SELF_ATTENTION, 0)),
    "no fusion in the last encoder": _reordered(_without(Kind.FUSION, -1)),
    "one head for two": _reordered(_without(Kind.LINEAR, -1)),
    "a linear layer before its attention": _reordered(_swapped(Kind.SELF_ATTENTION)),
    "no CLS token": _reordered(_without(Kind.COPY, 1)),
    "another scale of the scores": _patched(
        native_block, "attention_step", lambda step: lambda *args: step(*args[:-1], 1.001 * args[-1])
    ),
    "the sum of the heads": _patched(frozen_module, "_MEAN", lambda mean: 1.0),
    "no norm folded in": _patched(
        PackedLinear,
        "__init__",
        lambda init: (
            lambda self, weight, bias, norm_weight=None, norm_bias=None, **options: init(
                self, weight, bias, **options
            )
        ),
    ),
    "windows without padding": _patched(
        program_module, "_windows", lambda windows: lambda *args: replace(windows(*args), padding=0)
    ),
    "another kernel of the resizing": _patched(
        program_module,
        "Resizing",
        lambda resizing: lambda old, new, *more: resizing((old[0] + 1, old[1]), new, *more),
    ),
    "a crop from the corner": lambda m: m.setattr(program_module, "round", lambda x: 0, raising=False),
}


def test_the_programs_as_they_are_are_right():
    """Otherwise the faults below would be noticed by anything."""
    assert _error() < BOUND


@pytest.mark.parametrize("put", WRONG_PROGRAMS.values(), ids=WRONG_PROGRAMS)
def test_a_wrong_program_is_noticed(put, monkeypatch):
    put(monkeypatch)
    assert _error() > BOUND


BLIND: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "blind": lambda m: m.setattr(Watch, "outdated", lambda self, model: False),
    "no fingerprint": lambda m: m.setattr(Fingerprint, "_read", lambda self: 0),
}


@pytest.mark.parametrize(
    ("put", "change"), [("blind", "a step of an optimiser"), ("no fingerprint", "NumPy")]
)
def test_a_blind_watch_is_noticed(put, change, monkeypatch):
    BLIND[put](monkeypatch)
    with pytest.raises(AssertionError):
        test_changes_are_noticed(IN_PLACE[change])
