"""Packed weights of models that are not frozen: always those of the model, and only where nobody looks."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from crossvit import native_block
from crossvit.layers import Block
from crossvit_kernels import native, use_backend
from crossvit_kernels.linear.packed import PackedCache, PackedLinear
from tests import layouts
from tests.contract import Guards, check_values, every_isa, needs_module
from tests.models import small_model, through_modules
from tests.operations import relative_error

pytestmark = needs_module
LayerNorm = nn.LayerNorm


def block(width: int = 24, heads: int = 3, ratio: float = 2.0, bias: bool = True, rate: float = 0.0) -> Block:
    made = Block(width, heads, ratio, bias, rate, rate, rate, LayerNorm)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return made.eval()


@pytest.fixture
def runs(monkeypatch) -> list[Block]:
    """Blocks that were run as a program."""
    seen = []
    run = native_block.run
    monkeypatch.setattr(native_block, "run", lambda *args: [seen.append(args[0]), run(*args)][1])
    return seen


# The cache alone


class Counted:
    """Packs, and counts how often."""

    def __init__(self) -> None:
        self.weight, self.bias = torch.randn(70, 40), torch.randn(70)
        self.cache, self.count = PackedCache(), 0

    def get(self) -> PackedLinear:
        def pack() -> PackedLinear:
            self.count += 1
            return PackedLinear(self.weight, self.bias)

        return self.cache.get(self.tensors(), pack)

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.weight, None, self.bias


CHANGES: dict[str, Callable[[Counted], object]] = {
    "in place": lambda c: c.weight.mul_(2),
    "one element in place": lambda c: c.weight[3, 4].fill_(7),
    "of the bias": lambda c: c.bias.add_(1),
    "another tensor": lambda c: setattr(c, "weight", c.weight.clone()),
    "other data": lambda c: setattr(c.weight, "data", c.weight * 2),
    "written through data": lambda c: c.weight.data.mul_(2),
    "written through NumPy": lambda c: c.weight.numpy().fill(3),
    "the last element through data": lambda c: c.weight.data[-1, -1].fill_(9),
    "moved to another place": lambda c: setattr(c, "tensors", lambda: (c.weight, c.bias, None)),
    "another dtype": lambda c: setattr(c.weight, "data", c.weight.double()),
    "transposed in memory": lambda c: setattr(c.weight, "data", c.weight.t().contiguous().t()),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_change_is_noticed(how):
    counted = Counted()
    first = counted.get()
    assert counted.get() is first
    CHANGES[how](counted)
    assert counted.get() is not first
    assert counted.get() is counted.get()
    assert counted.count == 2


def test_what_is_not_there_and_what_is_dropped():
    counted = Counted()
    assert counted.cache.nbytes == 0
    assert counted.get().nbytes == counted.cache.nbytes > counted.weight.nbytes
    for other in (copy.deepcopy(counted.cache), pickle.loads(pickle.dumps(counted.cache))):
        assert other.nbytes == 0
    counted.cache.clear()
    assert counted.cache.nbytes == 0
    counted.get()
    assert counted.count == 2


def test_another_instruction_set_packs_again():
    counted = Counted()
    for i, isa in enumerate(native.load().isas()):
        with native.use_isa(isa):
            assert counted.get().isa == isa
            counted.get()
        assert counted.count == i + 1


def test_tensors_without_a_count_of_writes_are_never_kept():
    counted = Counted()
    with torch.inference_mode():
        counted.weight = counted.weight * 1
    counted.get()
    counted.get()
    assert counted.count == 2
    assert counted.cache.nbytes == 0


def test_the_parameters_do_not_live_on():
    counted = Counted()
    counted.get()
    gone = weakref.ref(counted.weight)
    counted.weight = torch.randn(70, 40)
    assert gone() is None


# A block


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_of_a_block(isa, dtype, runs):
    cases = (
        (24, 3, 2.0, True),
        (33, 1, 3.0, True),
        (7, 7, 1.0, False),
        (64, 2, 4.0, True),
        (448, 7, 3.0, True),
    )
    for (width, heads, ratio, bias), (batch, tokens) in zip(
        cases, ((2, 17), (1, 1), (3, 14), (1, 65), (1, 13)), strict=True
    ):
        of = block(width, heads, ratio, bias).to(dtype)
        x = torch.randn(batch, tokens, width).to(dtype) * 2 + 1
        exact = copy.deepcopy(of).double()
        with native.use_isa(isa), torch.no_grad():
            got = of(x)
        truth = through_modules(exact, x.double())
        check_values(got, through_modules(of, x), truth, (width, heads, batch, tokens))
    assert len(runs) == len(cases)


def test_a_block_of_timm(runs):
    from timm.models.vision_transformer import Block as Theirs

    theirs, mine = Theirs(48, 3, 3.0, qkv_bias=True, norm_layer=LayerNorm).eval(), block(48, 3, 3.0)
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(2, 29, 48)
    with torch.inference_mode():
        assert relative_error(mine(x), theirs(x)) < 1e-5
    assert len(runs) == 1


@pytest.mark.parametrize("layout", layouts.ALL)
def test_tokens_in_any_layout_are_left_alone(layout, runs, monkeypatch):
    of, x = block(), torch.randn(3, 14, 24)
    given = layout(x)
    with torch.no_grad():
        want = of(x)
        with monkeypatch.context() as patch:
            guards = Guards(patch)
            got = of(given)
        guards.check()
    assert torch.equal(got, want)
    assert torch.equal(given, x)
    assert got.is_contiguous()
    assert len(runs) == 2


def test_any_number_of_threads_gives_the_same_bits():
    of, x = block(96), torch.randn(5, 65, 96)
    before, want = torch.get_num_threads(), None
    try:
        for threads in range(1, 9):
            torch.set_num_threads(threads)
            with torch.no_grad():
                got = of(x)
            want = got if want is None else want
            assert torch.equal(got, want), threads
    finally:
        torch.set_num_threads(before)


def test_nan_stays_in_its_image():
    of, x = block(), torch.randn(3, 14, 24)
    with torch.no_grad():
        want = of(x)
        x[1, 5, 3] = float("nan")
        got = of(x)
    assert got[1].isnan().all()
    assert torch.equal(got[::2], want[::2])


# When it is not run as a program


def double_attention(of: Block) -> None:
    of.attn.proj.register_forward_hook(lambda module, args, output: output * 2)


def replaced_activation(of: Block) -> None:
    of.mlp.act = nn.ReLU()


def negative_scale(of: Block) -> None:
    of.attn.scale = -1.0


def pruned(of: Block) -> None:
    prune.random_unstructured(of.mlp.fc1, "weight", 0.5)


def without_affine_norm(of: Block) -> None:
    of.norm1 = nn.LayerNorm(24, elementwise_affine=False)


def dropout_on(of: Block) -> None:
    of.mlp.drop1.p = 0.5
    of.mlp.drop1.train()


def own_forward(of: Block) -> None:
    forward = of.attn.forward
    of.attn.forward = lambda x: forward(x) + 1


@pytest.mark.parametrize(
    "change",
    [
        double_attention, replaced_activation, negative_scale, pruned, without_affine_norm, dropout_on,
        own_forward,
    ],
)  # fmt: skip
def test_a_changed_block_calls_its_modules(change, runs):
    of, x = block(), torch.randn(2, 9, 24)
    with torch.no_grad():
        before = of(x)
    assert len(runs) == 1
    change(of)
    with torch.no_grad():
        torch.manual_seed(1)
        got = of(x)
    torch.manual_seed(1)
    assert torch.equal(got, through_modules(of, x))
    assert not torch.equal(got, before)
    assert len(runs) == 1


def test_where_more_than_values_is_wanted_the_modules_are_called(runs):
    of, x = block(), torch.randn(2, 9, 24)
    want = through_modules(of, x)
    y = of(x)
    assert y.requires_grad
    assert torch.equal(y, want)
    assert of(x.requires_grad_()).requires_grad
    x = x.detach()
    with torch.no_grad():
        for backend in ("torch", "reference"):
            with use_backend(backend):
                assert torch.equal(of(x), want)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            of(x)
        with FlopCounterMode(display=False) as counter:
            of(x)
        assert counter.get_total_flops() > 0
        assert torch.allclose(torch.func.vmap(of)(x[:, None])[:, 0], want, atol=1e-6)
        with sdpa_kernel(SDPBackend.MATH):  # the others have no forward mode
            torch.func.jvp(of, (x,), (x,))
        assert torch.equal(torch.compile(of, fullgraph=True, backend="eager")(x), want)
        assert torch.allclose(torch.export.export(of, (x,)).module()(x), want, atol=1e-6)
        assert torch.allclose(torch.fx.symbolic_trace(of)(x), want, atol=1e-6)
        assert of.double()(x.double()).dtype == torch.float64
        of.float()
        assert of.half()(x.half()).dtype == torch.float16
        of.float()
        assert of(x[:0]).shape == (0, 9, 24)
        with pytest.raises(RuntimeError):
            of(x.bfloat16())
        with pytest.raises(RuntimeError):
            of(x[..., 1:])
        of.to("meta")(x.to("meta"))
    assert not runs


def test_hooks_on_all_modules_are_called(runs):
    of, seen = block(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(type(m)))
    try:
        with torch.no_grad():
            of(torch.randn(1, 3, 24))
    finally:
        handle.remove()
    assert nn.GELU in seen
    assert not runs


def test_without_parameters_that_want_a_gradient_grad_mode_does_not_matter(runs):
    of, x = block(), torch.randn(2, 9, 24)
    of.requires_grad_(False)
    assert not of(x).requires_grad
    assert len(runs) == 1


# Never stale


@pytest.mark.parametrize("name", [name for name, _ in block().named_parameters()])
def test_a_write_to_any_parameter_is_seen(name, runs):
    of, x = block(), torch.randn(2, 9, 24)
    with torch.no_grad():
        before = of(x)
        for write in (
            lambda p: p.add_(0.5),
            lambda p: p.data.mul_(-1.5),
            lambda p: setattr(p, "data", p.data + 1),
        ):
            write(of.get_parameter(name))
            got = of(x)
            assert relative_error(got, through_modules(of, x)) < 1e-5
            if name != "attn.qkv.bias":  # parts of it cancel
                assert not torch.equal(got, before)
            before = got
    assert len(runs) == 4


def test_training_between_two_evaluations(runs):
    of, x = block(), torch.randn(2, 9, 24)
    optimizer = torch.optim.AdamW(of.parameters(), lr=0.1)
    for _ in range(3):
        of.train()
        of(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        of.eval()
        with torch.no_grad():
            assert relative_error(of(x), through_modules(of, x)) < 1e-5
    assert len(runs) == 3


def test_other_parameters_by_every_way_they_are_given(runs):
    of, other, x = block(), block(), torch.randn(2, 9, 24)
    want = through_modules(other, x)
    with torch.no_grad():
        first = of(x)
        got = torch.func.functional_call(of, dict(other.named_parameters()), (x,))
        assert relative_error(got, want) < 1e-5
        assert torch.equal(of(x), first)
        copied = copy.deepcopy(of)
        assert torch.equal(copied(x), first)
        for assign in (False, True):
            copied = copy.deepcopy(of)
            copied(x)
            copied.load_state_dict(other.state_dict(), assign=assign)
            assert relative_error(copied(x), want) < 1e-5
        of.mlp.fc2 = other.mlp.fc2
        assert relative_error(of(x), through_modules(of, x)) < 1e-5
    assert len(runs) == 9


def test_dropped_by_train_and_to_and_not_copied(runs):
    of, x = block(), torch.randn(2, 9, 24)

    def fill() -> None:
        with torch.no_grad():
            of(x)
        assert of._packed.nbytes > sum(p.nbytes for p in of.parameters() if p.ndim == 2)

    fill()
    of.eval()
    assert of._packed.nbytes > 0
    for drop in (lambda: of.train().eval(), lambda: of.to(torch.bfloat16).float(), of.float):
        fill()
        drop()
        assert of._packed.nbytes == 0
    fill()
    file = io.BytesIO()
    torch.save(of, file)
    file.seek(0)
    for other in (copy.deepcopy(of), torch.load(file, weights_only=False), pickle.loads(pickle.dumps(of))):
        assert other._packed.nbytes == 0
        with torch.no_grad():
            assert torch.equal(other(x), of(x))
    assert list(of.state_dict()) == list(block().state_dict())


# A model


def test_features_of_a_model_come_by_blocks(runs):
    model = small_model()
    x = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        got = model.forward_features(x)
    with use_backend("reference"), torch.no_grad():
        want = model.forward_features(x)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-5
    assert len(runs) == sum(isinstance(m, Block) for m in model.modules())
    assert model.forward_features(x)[0].requires_grad


def test_concurrent_callers():
    model = small_model()
    xs = [torch.randn(2, 3, 48, 48) for _ in range(4)]

    def call(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(x)

    want = [call(x) for x in xs]
    model.float()  # drops what is packed, so that all pack at once
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, other in zip(pool.map(call, xs), want, strict=True):
                assert relative_error(got, other) < 1e-5
