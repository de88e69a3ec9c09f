"""linear, self_attention and patch_embed as parts of PyTorch: layouts, derivatives, compiling, autocast."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from crossvit_kernels import backends, native, use_backend
from tests import layouts
from tests.by_definition import OPERATIONS, Operation
from tests.contract import LOW, STORED, Guards, check_values, every_isa, needs_module
from tests.operations import leaves, relative_error

pytestmark = needs_module
operations = pytest.mark.parametrize("operation", OPERATIONS, ids=str)
here = pytest.mark.parametrize("backend", [b for b in backends() if b not in ("cuda", "triton")] + ["auto"])


def inputs(operation: Operation, dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype) for x in operation.inputs()]


def gradients(y: Tensor, tensors: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """For a loss in which each element has its own weight."""
    weight = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return list(torch.autograd.grad((y * weight).sum(), tensors, create_graph=create_graph))


# Values and gradients


@operations
@here
def test_values_and_gradients_on_every_backend(operation, backend):
    exact = leaves(operation.inputs())
    want = operation.oracle(exact)
    want_gradients = gradients(want, exact)
    for dtype in STORED if backend == "cpu" else (torch.float64, *STORED):
        tensors = leaves(exact, dtype)
        low = [x.detach().double().requires_grad_() for x in tensors]
        truth = operation.oracle(low)
        mine, eager = operation.run(tensors, backend), operation.oracle(tensors)
        if dtype == torch.float64:
            assert relative_error(mine, want) < 1e-13
            for got, other in zip(gradients(mine, tensors), want_gradients, strict=True):
                assert relative_error(got, other) < 1e-12
            continue
        check_values(mine, eager, truth, dtype)
        rows = zip(gradients(mine, tensors), gradients(eager, tensors), gradients(truth, low), strict=True)
        for name, row in zip(operation.names, rows, strict=True):
            check_values(*row, (dtype, name))


@operations
def test_gradient_and_second_gradient_of_the_definition(operation):
    tensors = leaves(operation.inputs())
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda *x: operation.run(x, "reference"), tensors, fast_mode=True)


@operations
def test_the_second_gradient_of_the_kernels_is_that_of_the_definition(operation):
    exact = leaves(operation.inputs())
    second = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        tensors = leaves(exact, dtype)
        first = gradients(operation.run(tensors, backend).square(), tensors, create_graph=True)
        loss = sum(g.square().sum() for g in first)
        second.append(torch.autograd.grad(loss, tensors))
    for name, mine, other in zip(operation.names, *second, strict=True):
        assert relative_error(mine, other) < 1e-4, name


@operations
def test_only_the_gradients_that_are_wanted(operation):
    tensors = inputs(operation, torch.float32)
    whole = leaves(tensors)
    want = gradients(operation.run(whole), whole)
    for i, other in enumerate(want):
        alone = [x.clone().requires_grad_(i == j) for j, x in enumerate(tensors)]
        (got,) = gradients(operation.run(alone), [alone[i]])
        assert torch.allclose(got, other, rtol=1e-5, atol=1e-5), operation.names[i]


@operations
def test_saves_its_inputs_and_nothing_else(operation):
    tensors = leaves(inputs(operation, torch.float32))
    given = {x.untyped_storage().data_ptr() for x in tensors}
    kept = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.untyped_storage().data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        operation.run(tensors)
    assert kept
    assert set(kept) <= given


@operations
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_forward_mode(operation, backend):
    tensors, tangents = inputs(operation, torch.float32), inputs(operation, torch.float32)
    _, got = torch.func.jvp(lambda *x: operation.run(x, backend), tuple(tensors), tuple(tangents))
    exact = (tuple(x.double() for x in y) for y in (tensors, tangents))
    with sdpa_kernel(SDPBackend.MATH):  # the others have no forward mode
        _, want = torch.func.jvp(lambda *x: operation.oracle(x), *exact)
    assert relative_error(got, want) < 1e-5
    with pytest.raises(RuntimeError, match="forward-mode differentiation need PyTorch's own operators"):
        torch.func.jvp(lambda *x: operation.run(x, "cpu"), tuple(tensors), tuple(tangents))


# Layouts and memory


@operations
@every_isa
@pytest.mark.parametrize("layout", layouts.ALL[1:])
def test_any_strides_and_offsets(operation, isa, layout):
    with native.use_isa(isa):
        for dtype in STORED:
            tensors = inputs(operation, dtype)
            want = operation.run(tensors)
            assert torch.equal(operation.run([layout(x) for x in tensors]), want), dtype


@operations
def test_views_that_stand_for_their_negative(operation):
    tensors = inputs(operation, torch.float32)
    want = operation.run([-x for x in tensors])
    assert torch.equal(operation.run([torch._neg_view(x) for x in tensors]), want)


@operations
@every_isa
def test_nothing_is_written_outside_and_nothing_unwritten_is_read(operation, isa, monkeypatch):
    with native.use_isa(isa):
        for dtype in STORED:
            tensors = inputs(operation, dtype)
            want = operation.run(tensors)
            with monkeypatch.context() as patch:
                guards = Guards(patch)
                got = operation.run(tensors)
            guards.check()
            assert torch.equal(got, want)


@operations
@every_isa
@pytest.mark.skipif(sys.platform != "linux", reason="fences pages as Linux does")
def test_nothing_is_read_behind_a_tensor(operation, isa):
    """Where it would end the process; larger odd sizes: see the tests of each operation."""
    with native.use_isa(isa):
        for dtype in STORED:
            tensors = inputs(operation, dtype)
            fenced = [layouts.before_a_fence(x) for x in tensors]
            assert torch.equal(operation.run(fenced), operation.run(tensors))


@operations
def test_an_empty_batch(operation):
    tensors = inputs(operation, torch.float32)
    names = ("x", "residual", "qkv", "image")
    none = [x[:0] if name in names else x for name, x in zip(operation.names, tensors, strict=True)]
    some = leaves(none)
    y = operation.run(some)
    assert y.shape == (0, *operation.run(tensors).shape[1:])
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), some))


# Autocast


@operations
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autocast_keeps_the_dtype_of_the_tokens(operation, backend, dtype):
    tensors = leaves(inputs(operation, torch.float32))
    with torch.autocast("cpu", dtype=dtype):
        y = operation.run(tensors, backend)
        grads = gradients(y, tensors)
    want = leaves(tensors, torch.float64)
    exact = operation.oracle(want)
    assert y.dtype == torch.float32
    assert relative_error(y, exact) < 8 * torch.finfo(dtype).eps
    for got, other in zip(grads, gradients(exact, want), strict=True):
        assert got.dtype == torch.float32
        assert relative_error(got, other) < 16 * torch.finfo(dtype).eps


# torch.func, compiling, exporting


@operations
@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_vmap_and_gradients_of_each_image(operation, backend):
    tensors = [inputs(operation, torch.float32) for _ in range(3)]
    stacked = [torch.stack(x) for x in zip(*tensors, strict=True)]
    got = torch.func.vmap(lambda *x: operation.run(x, backend))(*stacked)
    grads = torch.func.vmap(torch.func.grad(lambda *x: operation.run(x, backend).square().sum()))(*stacked)
    for i, one in enumerate(tensors):
        exact = leaves(one, torch.float64)
        want = operation.oracle(exact)
        assert relative_error(got[i], want) < 1e-5
        (gradient,) = torch.autograd.grad(want.square().sum(), exact[:1])
        assert relative_error(grads[i], gradient) < 1e-5


@operations
@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_compiles_as_one_graph(operation, backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: operation.run(x, backend).square().sum(), fullgraph=True, backend="aot_eager"
    )
    tensors = leaves(inputs(operation, torch.float32))
    got = torch.autograd.grad(compiled(*tensors), tensors)
    want = torch.autograd.grad(operation.run(tensors, backend).square().sum(), tensors)
    for mine, other in zip(got, want, strict=True):
        assert relative_error(mine, other) < 1e-5
    with torch.no_grad():
        assert relative_error(compiled(*tensors), operation.run(tensors, backend).square().sum()) < 1e-5


class _Module(torch.nn.Module):
    def __init__(self, operation: Operation, backend: str) -> None:
        super().__init__()
        self.operation, self.backend = operation, backend

    def forward(self, *x: Tensor) -> Tensor:
        return self.operation.run(x, self.backend)


@operations
def test_exports(operation):
    tensors = tuple(inputs(operation, torch.float32))
    program = torch.export.export(_Module(operation, "cpu"), tensors)
    assert torch.equal(program.module()(*tensors), operation.run(tensors))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
@operations
def test_traces_to_plain_operators(operation):
    tensors = inputs(operation, torch.float32)
    traced = torch.jit.trace(lambda *x: operation.run(x, "auto"), tuple(tensors))
    assert "crossvit_kernels::" not in str(traced.graph)
    assert relative_error(traced(*tensors), operation.run(tensors)) < 1e-5


@operations
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_opcheck(operation, requires_grad):
    operator = getattr(torch.ops.crossvit_kernels, operation.name).default
    tensors = [x.requires_grad_(requires_grad) for x in inputs(operation, torch.float32)]
    torch.library.opcheck(operator, operation.operator_arguments(tensors))


@operations
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_opcheck_of_backward(operation):
    operator = getattr(torch.ops.crossvit_kernels, f"{operation.name}_backward").default
    tensors = inputs(operation, torch.float32)
    arguments = operation.operator_arguments(tensors)
    grad = torch.randn_like(operation.run(tensors))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for wanted in ([True] * len(tensors), [i == 0 for i in range(len(tensors))], [False] * len(tensors)):
        torch.library.opcheck(operator, (grad, *arguments, wanted), test_utils=tests)


@operations
def test_the_operator_itself_is_differentiable(operation):
    operator = getattr(torch.ops.crossvit_kernels, operation.name)
    tensors = leaves(inputs(operation, torch.float32))
    got = gradients(operator(*operation.operator_arguments(tensors)), tensors)
    want = gradients(operation.run(tensors), tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        torch.func.jvp(
            lambda x: operator(*operation.operator_arguments([x, *tensors[1:]])),
            (tensors[0].detach(),),
            (tensors[0].detach(),),
        )


def test_operators_check_what_would_be_read_wrongly():
    calls = torch.ops.crossvit_kernels
    x, weight, residual = torch.zeros(2, 5), torch.zeros(3, 5), torch.zeros(2, 3)
    nothing = (None, None, None)
    with pytest.raises(ValueError, match="x must have 5 channels, as the weight has, got 4"):
        calls.linear(x[:, 1:], weight, *nothing, None, 1e-6, None)
    for bad in (residual[1:], residual.bfloat16()):
        with pytest.raises(ValueError, match="residual must be"):
            calls.linear(x, weight, *nothing, bad, 1e-6, None)
    for qkv, scale in ((torch.zeros(1, 2, 17), 1.0), (torch.zeros(1, 2, 18), 0.0)):
        with pytest.raises(ValueError, match="qkv must be"):
            calls.self_attention(qkv, 3, scale, torch.float32)
    image, patches, position = torch.zeros(1, 3, 8, 8), torch.zeros(5, 3, 4, 4), torch.zeros(5, 5)
    for bad in ((image[:, 1:], position), (image, position[1:])):
        with pytest.raises(ValueError, match="image, weight and position do not fit"):
            calls.patch_embed(bad[0], patches, None, bad[1], torch.zeros(5), None, None, None)
    pixels = image.to(torch.uint8)
    with pytest.raises(ValueError, match="a number for each of 3 channels, got 1 and 3"):
        calls.patch_embed(pixels, patches, None, position, torch.zeros(5), None, [0.5], [0.5] * 3)


# The choice


@operations
def test_the_backend_of_a_block_is_taken(operation):
    tensors = inputs(operation, torch.float32)
    for name in ("cpu", "torch", "reference"):
        with use_backend(name):
            assert torch.equal(operation.run(tensors, "auto"), operation.run(tensors, name))


@operations
def test_what_a_named_backend_cannot_take_is_refused_with_its_reason(operation):
    tensors = inputs(operation, torch.float64)
    with pytest.raises(RuntimeError, match=r"cpu: it does not take torch.float64 tokens"):
        operation.run(tensors, "cpu")
    with pytest.raises(RuntimeError, match=f"cuda: it does not implement {operation.name}"):
        operation.run(tensors, "cuda")
    on_meta = [x.float().to("meta") for x in tensors]
    with pytest.raises(RuntimeError, match="cpu: it runs on cpu, the tokens are on meta"):
        operation.run(on_meta, "cpu")
    assert operation.run(on_meta, "auto").shape == operation.oracle(tensors).shape
