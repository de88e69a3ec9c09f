"""Models that nobody froze, in eval mode without a gradient: one program on packed weights, never stale."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from crossvit import CrossViT, create_model
from crossvit.frozen import PackedModel
from crossvit.layers import PatchEmbed
from crossvit.watch import Watch
from crossvit_kernels import native, use_backend
from tests.contract import needs_module
from tests.model_changes import IN_PLACE, OTHERWISE, REFUSED, a_block, a_hook, optimizer_step
from tests.models import distance, exact, image, small, small_model, through_modules
from tests.operations import relative_error

pytestmark = needs_module
BOUND = 1e-5  # of logits in float32, of those of float64


@pytest.fixture
def packings(monkeypatch) -> list[PackedModel]:
    """What was packed, in turn."""
    seen: list[PackedModel] = []
    init = PackedModel.__init__

    def counted(self: PackedModel, *args: Any, **options: Any) -> None:
        seen.append(self)
        init(self, *args, **options)

    monkeypatch.setattr(PackedModel, "__init__", counted)
    return seen


@pytest.fixture
def runs(monkeypatch) -> list[PackedModel]:
    """The packed models that gave logits."""
    seen: list[PackedModel] = []
    run = PackedModel.run
    monkeypatch.setattr(PackedModel, "run", lambda self, *args: [seen.append(self), run(self, *args)][1])
    return seen


@torch.no_grad()
def logits(model: CrossViT, x: Tensor) -> Tensor:
    return model(x)


# Values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"multi_conv": True}, {"num_classes": 0}, {"crop_scale": True}])
def test_logits_are_those_of_the_modules(options, dtype, runs):
    model = small(**options)
    x = image(model, 5)
    want = exact(model, x)
    model, x = model.to(dtype), x.to(dtype)
    torchs = through_modules(model, x)
    assert not runs
    got = logits(model, x)
    assert len(runs) == 1
    assert got.dtype == dtype
    if dtype == torch.float32:
        assert relative_error(got, want) < BOUND
    else:
        assert distance(got, want) < 1.25 * distance(torchs, want)


def test_bits_do_not_depend_on_the_batch_or_on_threads(packings):
    model = small()
    x, before = image(model, 33), torch.get_num_threads()
    want = torch.cat([logits(model, y[None]) for y in x])
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(logits(model, x), want)
    finally:
        torch.set_num_threads(before)
    assert logits(model, x[:0]).shape == (0, 5)
    assert len(packings) == 1


def test_images_of_any_size():
    model = small(dynamic_img_size=True)
    for size in ((48, 48), (60, 84), (49, 50)):
        x = torch.randn(2, 3, *size)
        assert relative_error(logits(model, x), exact(model, x)) < BOUND
    model.crop_scale = True
    assert relative_error(logits(model, x), exact(model, x)) < BOUND


@pytest.mark.parametrize("isa", native.load().isas() if native.load_error() is None else [])
def test_another_instruction_set_packs_again(isa, packings):
    model = small()
    x = image(model)
    first = logits(model, x)
    with native.use_isa(isa):
        assert relative_error(logits(model, x), first) < BOUND
        assert packings[-1].isa == isa


@pytest.mark.parametrize("shape", [(1, 1, 48, 48), (3, 48, 48), (1, 3, 48, 60)])
def test_wrong_images_are_refused_in_the_models_words(shape, runs):
    model, x = small(), torch.zeros(shape)
    with pytest.raises(ValueError, match=r"\[B, 3, height, width\]|48x48") as here:
        logits(model, x)
    with pytest.raises(ValueError, match=r"\[B, 3, height, width\]|48x48") as there:
        through_modules(model, x)
    assert str(here.value) == str(there.value)
    assert not runs


def test_images_of_another_dtype_are_the_modules_to_refuse(runs):
    with pytest.raises(RuntimeError):
        logits(small(), torch.zeros(1, 3, 48, 48, dtype=torch.bfloat16))
    assert not runs


# Where the modules are called


def _raises_no_flag(model: CrossViT) -> None:
    a_block(model).mlp.drop1.p = 0.9
    a_block(model).mlp.drop1.train()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: a_block(m).register_forward_hook(lambda module, args, y: 2 * y),
        lambda m: m.blocks[1].fusion[0].attn.wq.register_forward_hook(lambda module, args, y: 2 * y),
        lambda m: setattr(m.norm[0], "forward", lambda x: 3 * x),
        lambda m: setattr(a_block(m).mlp, "act", nn.ReLU()),
        _raises_no_flag,
    ],
    ids=["a hook", "a hook in the fusion", "its own forward", "another activation", "dropout"],
)
def test_a_changed_model_calls_its_modules(change, runs):
    model = small()
    x = image(model)
    before = logits(model, x)
    change(model)
    torch.manual_seed(3)
    got = logits(model, x)
    torch.manual_seed(3)
    assert relative_error(got, through_modules(model, x)) < BOUND
    assert distance(got, before) > 1e-4
    assert len(runs) == 1


def test_and_is_packed_again_when_it_is_as_built(packings):
    model = small()
    x = image(model)
    want = logits(model, x)
    handle = a_block(model).register_forward_hook(a_hook)
    logits(model, x)
    assert isinstance(model._evaluation._state, Watch)
    handle.remove()
    assert torch.equal(logits(model, x), want)
    assert len(packings) == 2


# Of those that cannot be frozen, what the modules refuse as well.
UNUSABLE = ("meta", "a dilated stem", "no norms", "no blocks", "mixed")


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in UNUSABLE])
def test_what_cannot_be_frozen_computes_as_ever(name, runs):
    model = REFUSED[name][0]().eval()
    x = image(model).to(next(model.parameters()).dtype)
    want = through_modules(model, x)
    for _ in range(2):
        assert relative_error(logits(model, x), want) < BOUND
    assert not runs


def test_where_more_than_values_is_wanted_the_modules_are_called(runs):
    model = small()
    x = image(model)
    want = through_modules(model, x)
    y = model(x)
    assert y.requires_grad
    with torch.no_grad():
        with use_backend("torch"):
            assert relative_error(model(x), want) < BOUND
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(x)
        with FlopCounterMode(display=False) as counter:
            model(x)
        assert counter.get_total_flops() > 0
        assert torch.allclose(torch.func.vmap(model)(x[:, None])[:, 0], want, atol=1e-5)
        torch._dynamo.reset()
        assert torch.allclose(torch.compile(model, fullgraph=True, backend="eager")(x), want, atol=1e-5)
        assert torch.allclose(torch.export.export(model, (x,)).module()(x), want, atol=1e-5)
        assert model.double()(x.double()).dtype == torch.float64
        assert model.half()(x.half()).dtype == torch.float16
    model.float()
    assert model(x.requires_grad_()).requires_grad
    assert small(backend="torch").eval().requires_grad_(False)(x.detach()).shape == (2, 5)
    assert not runs
    model.requires_grad_(False)
    assert not model(x.detach()).requires_grad
    assert len(runs) == 1


def test_a_class_of_ones_own_and_hooks_on_all_modules(runs):
    class Own(CrossViT):
        def _head(self, pooled: Any, pre_logits: bool = False) -> Tensor:
            return super()._head(pooled, pre_logits) + 1

    torch.manual_seed(1)
    options: dict[str, Any] = {"img_size": 48, "embed_dim": (24, 48), "num_heads": (3, 3)}
    options |= {"depth": ((1, 1, 0),), "mlp_ratio": (2, 2, 1), "num_classes": 5}
    own = Own(**options).eval()
    x = image(own)
    assert torch.allclose(logits(own, x), through_modules(own, x), atol=1e-5)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(type(m)))
    try:
        logits(small(), x)
    finally:
        handle.remove()
    assert nn.GELU in seen
    assert not runs


def test_parameters_without_counts_of_writes(runs):
    with torch.inference_mode():
        model = small()
        x = image(model)
        assert relative_error(model(x), through_modules(model, x)) < BOUND
    assert not runs


def test_weights_that_are_parameters_no_longer(runs):
    """As a wrapper leaves them that manages them itself."""
    model = small()
    x = image(model)
    want = exact(model, x)
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            del module._parameters[name]
            setattr(module, name, p.detach().clone())
    assert relative_error(logits(model, x), want) < BOUND
    assert not runs


def test_without_the_compiled_module(monkeypatch, runs):
    monkeypatch.setattr(native, "load_error", lambda: "it was left at home")
    model = small()
    x = image(model)
    assert relative_error(logits(model, x), exact(model, x)) < BOUND
    assert not runs


# Never stale


@pytest.mark.parametrize("change", [*IN_PLACE.values(), *OTHERWISE.values()], ids=[*IN_PLACE, *OTHERWISE])
def test_changes_are_noticed(change, packings):
    model = small()
    x = image(model)
    before = logits(model, x)
    change(model)
    x = x.to(next(model.parameters()).dtype)
    got = logits(model, x)
    assert relative_error(got, exact(model, x)) < (BOUND if got.dtype == torch.float32 else 5e-2)
    assert got.shape != before.shape or distance(got, before) > 1e-4
    assert torch.equal(logits(model, x), got)
    assert len(packings) == 2


def test_training_between_two_evaluations(packings):
    model = small()
    x = image(model)
    for _ in range(3):
        model.train()
        assert model.packed_nbytes == 0
        optimizer_step(model)
        model.eval()
        assert relative_error(logits(model, x), exact(model, x)) < BOUND
    assert len(packings) == 3


def test_dropped_by_train_and_to_and_not_copied():
    model = small()
    x = image(model)

    def fill() -> Tensor:
        want = logits(model, x)
        assert model.packed_nbytes > sum(p.nbytes for p in model.parameters() if p.ndim == 2)
        return want

    drops: list[Callable[[], object]] = [lambda: model.train().eval(), lambda: model.float()]
    for drop in drops:
        fill()
        drop()
        assert model.packed_nbytes == 0
    want = fill()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = copy.deepcopy(model), torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))
    for other in copies:
        assert other.packed_nbytes == 0
        assert torch.equal(logits(other, x), want)
        optimizer_step(other)
        assert relative_error(logits(other, x), exact(other, x)) < BOUND
    assert torch.equal(logits(model, x), want)
    assert len(pickle.dumps(model)) < 1.1 * len(pickle.dumps(model.to("cpu")))
    assert list(model.state_dict()) == list(small_model().state_dict())


def test_frozen_and_not_frozen_in_turn():
    model = small()
    x = image(model)
    want = logits(model, x)
    assert torch.equal(model.freeze()(x), want)
    assert torch.equal(logits(model.unfreeze(), x), want)


def test_concurrent_callers(packings):
    model = small()
    images = [torch.randn(1 + i % 3, 3, 48, 48) for i in range(12)]
    want = [through_modules(model, x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        for got, other in zip(pool.map(lambda x: logits(model, x), images), want, strict=True):
            assert relative_error(got, other) < BOUND
    assert len(packings) == 1


def test_a_whole_model_by_its_name(runs):
    with torch.device("meta"):
        model = create_model("crossvit_tiny_240", depth=((1, 1, 0),), img_size=60)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1)
    x = image(model.eval())
    assert relative_error(logits(model, x), exact(model, x)) < BOUND
    assert len(runs) == 1


# What is noticed of an ordinary model's life, beside parameters and modules


def _adapter(model: CrossViT) -> None:
    class Adapter(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.scale = inner, nn.Parameter(torch.full((96,), 1.5))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scale

    a_block(model).mlp.fc1 = Adapter(a_block(model).mlp.fc1)


def _own_fuse(model: CrossViT) -> None:
    model.blocks[0].fuse = lambda tokens, *more: [2 * x for x in tokens]


def _without_hooks(model: CrossViT) -> None:
    for module in model.modules():
        module._forward_hooks = OrderedDict()
    a_block(model).register_forward_hook(lambda module, args, y: 2 * y)


def _transpose(model: CrossViT) -> None:
    weight = a_block(model).attn.proj.weight
    weight.data = weight.data.t()


def _buffer(model: CrossViT) -> None:
    position = model.pos_embed_0.detach()
    del model.pos_embed_0
    model.register_buffer("pos_embed_0", position + torch.randn_like(position))


LIFE: dict[str, Callable[[CrossViT], object]] = {
    "an adapter with a scale": _adapter,
    "a scale that is a tensor": lambda m: setattr(a_block(m).attn, "scale", torch.tensor(0.9)),
    "a position that is a buffer": _buffer,
    "no classes": lambda m: setattr(m, "num_classes", 0),
    "padding": lambda m: setattr(m.patch_embed[0].proj, "padding", (1, 1)),
    "approximate GELU": lambda m: setattr(a_block(m).mlp.act, "approximate", "tanh"),
    "a stem that ends in ReLU": lambda m: setattr(
        m.patch_embed[0], "proj", nn.Sequential(m.patch_embed[0].proj, nn.ReLU())
    ),
    "a weight transposed in place": _transpose,
    "hooks after all were removed": _without_hooks,
    "a method of an instance": _own_fuse,
    "a head of an instance": lambda m: setattr(m, "_head", lambda pooled: pooled[0]),
}


@pytest.mark.parametrize("change", LIFE.values(), ids=LIFE)
def test_the_life_of_a_model_is_followed(change):
    model = small()
    x = image(model)
    before = logits(model, x)
    change(model)
    for _ in range(2):
        want, got = through_modules(model, x), logits(model, x)
        assert relative_error(got, want) < BOUND
        assert got.shape != before.shape or distance(got, before) > 1e-5


def test_a_list_for_a_tuple():
    model = small()
    x = image(model)
    before = logits(model, x)
    model.img_scale = list(model.img_scale)
    assert relative_error(logits(model, x), before) < BOUND


def test_dropout_that_is_given_a_rate_in_training_mode():
    model = small()
    x = image(model)
    model.head_drop.train()
    before = logits(model, x)
    model.head_drop.p = 0.9
    assert distance(logits(model, x), before) > 0.1


def test_plain_tensors_for_weights_keep_their_gradients(runs):
    model = small().requires_grad_(False)
    x = image(model)
    logits(model, x)
    weight = model.head[0].weight.detach().clone().requires_grad_()
    del model.head[0].weight
    model.head[0].weight = weight
    (gradient,) = torch.autograd.grad(model(x).sum(), weight)
    assert gradient.abs().max() > 0
    with torch.no_grad():
        weight.mul_(2)
    assert relative_error(logits(model, x), through_modules(model, x)) < BOUND
    assert len(runs) == 1


def test_other_channels_and_backends_are_refused_as_by_the_modules():
    model = small()
    x = image(model)
    logits(model, x)
    model.in_chans = 1
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        logits(model, x[:, :1])
    frozen = small().freeze(check=False)
    frozen.in_chans = 1
    with pytest.raises(ValueError, match="packed for images of 3 channels"):
        frozen(x[:, :1])
    model = small()
    logits(model, x)
    model.blocks[0].fusion[0].backend = "nonsense"
    with pytest.raises(ValueError, match="backend must be one of"):
        logits(model, x)


def test_a_method_of_a_class_that_is_replaced(monkeypatch, runs):
    model = small()
    x = image(model)
    before = logits(model, x)
    forward = PatchEmbed.forward
    monkeypatch.setattr(PatchEmbed, "forward", lambda self, x: forward(self, x) * 2)
    got = logits(model, x)
    assert relative_error(got, through_modules(model, x)) < BOUND
    assert distance(got, before) > 1e-3
    with pytest.raises(RuntimeError, match="a method of one of its classes was replaced"):
        model.freeze()
    assert len(runs) == 1


def test_nothing_keeps_a_model_alive():
    """Nor what was replaced in it."""
    model = small()
    x = image(model)
    gc.collect()
    gc.disable()
    try:
        logits(model, x)
        replaced = weakref.ref(model.head[1].weight)
        model.head[1] = nn.Linear(48, 5)
        assert replaced() is None
        logits(model, x)
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_shallow_copies_go_their_own_ways():
    model = small()
    x = image(model)
    before = logits(model, x)
    other = copy.copy(model)
    other._modules = dict(model._modules)
    other.head = nn.ModuleList([nn.Linear(24, 7), nn.Linear(48, 7)])
    assert relative_error(logits(other, x), through_modules(other, x)) < BOUND
    assert torch.equal(logits(model, x), before)


def test_freezing_drops_what_was_packed_before():
    model = small()
    x = image(model)
    logits(model, x)
    packed = model.packed_nbytes
    assert torch.equal(model.freeze()(x), logits(model, x))
    assert model.packed_nbytes <= packed


def test_scripted_parts_are_called(runs):
    model = small()
    model.norm[0] = torch.jit.trace(model.norm[0], torch.randn(2, 24))
    x = image(model)
    for _ in range(2):
        assert relative_error(logits(model, x), through_modules(model, x)) < BOUND
    assert not runs
