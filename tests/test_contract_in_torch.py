"""The contract of every backend as a part of PyTorch: derivatives, vmap, compiling, exporting, processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import onnxruntime
import pytest
import torch
from torch import Tensor

from tests import layouts
from tests.contract import (
    DEFAULT,
    LOW,
    Subject,
    all_subjects,
    gradients,
    native_subjects,
    needs_module,
    subjects,
)
from tests.operations import OPERATIONS, Size, leaves, relative_error

# Autocast


@all_subjects
@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autocast_keeps_the_dtype_of_the_tokens(subject, tokens, dtype):
    """Outputs have it, each gradient its own tensor's; the error is that of timm's modules under autocast."""
    size = Size(2, 40, 96, 3, 30, 64, 4)
    tensors = leaves(subject.operation.inputs(size, torch.float32))
    for i in subject.operation.tokens:
        tensors[i] = tensors[i].detach().to(tokens).requires_grad_()
    count = len(subject.operation.outputs)
    with torch.autocast(subject.device, dtype=dtype):
        outputs = subject.run(tensors, size, return_attention=True)
        grads = gradients(outputs, tensors)  # inside on purpose: the backward must not be cast
        # PyTorch does not mix bfloat16 and float16 in one operator: timm's modules get float32 tokens.
        eager = subject.operation.eager([x.detach().float() for x in tensors], size)
    assert [y.dtype for y in outputs] == [tokens] * count + [torch.float32] * count
    assert all(g.dtype == x.dtype for g, x in zip(grads, tensors, strict=True))
    truth = subject.operation.oracle([x.detach().double() for x in tensors], size)
    for mine, other, exact in zip(outputs, eager, truth, strict=False):
        step = max(torch.finfo(dtype).eps, torch.finfo(tokens).eps)
        assert relative_error(mine, exact) <= 2 * relative_error(other, exact) + step


@all_subjects
def test_autocast_takes_weights_of_any_dtype(subject):
    """Norms become the tokens' dtype and matrices autocast's; each gradient is its own tensor's."""
    size = Size(2, 40, 96, 3, 30, 64, 4)
    count = len(subject.operation.tokens)
    exact = subject.operation.inputs(size, torch.float64)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        tensors = [x.to(torch.float32 if i < count else dtype) for i, x in enumerate(exact)]
        tensors = [x.requires_grad_() for x in tensors]
        with torch.autocast(subject.device, dtype=torch.bfloat16):
            outputs = subject.run(tensors, size)
        truth = subject.operation.oracle([x.detach().double() for x in tensors], size)
        for mine, want in zip(outputs, truth, strict=False):
            assert mine.dtype == torch.float32
            assert relative_error(mine, want) < 0.05
        assert [g.dtype for g in gradients(outputs, tensors)] == [x.dtype for x in tensors]


@subjects(lambda subject: subject.exact == torch.float64)
def test_autocast_leaves_float64_alone(subject):
    tensors = subject.operation.inputs(DEFAULT, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = subject.run(tensors, DEFAULT)
    for mine, exact in zip(outputs, subject.operation.oracle(tensors, DEFAULT), strict=False):
        assert relative_error(mine, exact) < 1e-13


# Differentiating once and twice


@subjects(lambda subject: subject.exact == torch.float64)
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.4, "proj_dropout_p": 0.3}], ids=["", "dropout"])
def test_gradient_and_second_gradient(subject, options):
    size = Size(2, 3, 4, 2, 2, 3, 3)
    tensors = leaves(subject.operation.inputs(size, torch.float64))

    def function(*x: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        return subject.run(x, size, return_attention=True, **options)

    assert torch.autograd.gradcheck(function, tensors)
    # The key's bias has gradient zero everywhere, so its second derivative is zero too.
    assert torch.autograd.gradgradcheck(function, tensors)


@subjects(lambda subject: subject.exact == torch.float32)
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.4, "proj_dropout_p": 0.3}], ids=["", "dropout"])
def test_the_second_gradient_is_that_of_the_definition(subject, options):
    """A gradient penalty on every tensor; the kernels take float32, so numerical differences say nothing."""
    tensors = subject.operation.inputs(DEFAULT, torch.float32)
    second = []
    for of, dtype in ((subject, torch.float32), (Subject(subject.operation, "reference"), torch.float64)):
        ins = leaves(tensors, dtype)
        torch.manual_seed(5)
        outputs = of.run(ins, DEFAULT, return_attention=True, **options)
        loss = sum(y.square().sum() for y in outputs)
        first = torch.autograd.grad(loss, ins, create_graph=True)
        penalty = sum((g * torch.linspace(-1, 1, g.numel(), dtype=dtype).view_as(g)).sum() for g in first)
        second.append(torch.autograd.grad(penalty, ins))
    for i, (mine, exact) in enumerate(zip(*second, strict=True)):
        if i not in subject.operation.zero_gradients:
            assert relative_error(mine, exact) < 1e-4, subject.operation.names[i]


@native_subjects
def test_the_second_gradient_inside_autocast(subject):
    """Forward outside, create_graph inside: the gradient is not cast."""
    tensors = leaves(subject.operation.inputs(DEFAULT, torch.float32))
    outputs = subject.run(tensors, DEFAULT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads = torch.autograd.grad(
            outputs, tensors, [torch.ones_like(y) for y in outputs], create_graph=True
        )
    assert all(g.dtype == torch.float32 for g in grads)
    for mine, other in zip(grads, gradients(outputs, tensors), strict=True):
        assert torch.allclose(mine, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode(operation, backend, requires_grad):
    """torch.func.jvp in the direction of every tensor, against the oracle's."""
    tensors = [x.requires_grad_(requires_grad) for x in operation.inputs(DEFAULT, torch.float32)]
    tangents = [torch.randn_like(x) for x in tensors]
    subject = Subject(operation, backend)
    _, got = torch.func.jvp(lambda *x: subject.run(x, DEFAULT), tuple(tensors), tuple(tangents))
    count = len(operation.outputs)
    _, want = torch.func.jvp(
        lambda *x: operation.oracle(x, DEFAULT)[:count],
        tuple(x.detach().double() for x in tensors),
        tuple(x.double() for x in tangents),
    )
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(got, want, strict=True))


@native_subjects
def test_forward_mode_is_refused_by_name_and_by_the_operator(subject):
    tensors = subject.operation.inputs(DEFAULT, torch.float32)

    def jvp(function: Callable) -> None:
        torch.func.jvp(lambda x: function([x, *tensors[1:]]), (tensors[0],), (tensors[0],))

    with pytest.raises(RuntimeError, match="forward-mode differentiation need PyTorch's own operators"):
        jvp(lambda x: subject.run(x, DEFAULT))
    (operator, arguments), *_ = operator_calls(subject.operation, False, layouts.contiguous)
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        torch.func.jvp(lambda x: operator(x, *arguments[1:])[0], (tensors[0],), (tensors[0],))


@all_subjects
def test_gradients_of_each_image_by_vmap(subject):
    """torch.func: the gradient of one weight for each image alone, all at once."""
    size, one = Size(batch=3), Size(batch=1)
    tensors = subject.operation.inputs(size, subject.exact)
    count = len(subject.operation.tokens)
    index = next(i for i, name in enumerate(subject.operation.names) if name.endswith("wq"))

    def loss(weight: Tensor, *tokens: Tensor) -> Tensor:
        arguments = [*(x[None] for x in tokens), *tensors[count:]]
        arguments[index] = weight
        return sum(y.square().sum() for y in subject.run(arguments, one))

    in_dims = (None, *(0 for _ in range(count)))
    got = torch.func.vmap(torch.func.grad(loss), in_dims=in_dims)(tensors[index], *tensors[:count])
    for i in range(3):
        ins = leaves([x[i : i + 1].double() for x in tensors[:count]] + [x.double() for x in tensors[count:]])
        outputs = subject.operation.oracle(ins, one)[: len(subject.operation.outputs)]
        (want,) = torch.autograd.grad(sum(y.square().sum() for y in outputs), ins[index])
        assert relative_error(got[i], want) < 1e-5


@all_subjects
def test_an_ensemble_by_vmap(subject):
    """Every tensor has a further dimension, in another place for tokens and weights."""
    tensors = [subject.operation.inputs(DEFAULT, subject.exact) for _ in range(3)]
    count = len(subject.operation.tokens)
    dims = tuple(1 if i < count else 0 for i in range(len(tensors[0])))
    stacked = [torch.stack(x, dim) for x, dim in zip(zip(*tensors, strict=True), dims, strict=True)]
    got = torch.func.vmap(lambda *x: subject.run(x, DEFAULT), in_dims=dims)(*stacked)
    for i, one in enumerate(tensors):
        for mine, other in zip(got, subject.run(one, DEFAULT), strict=True):
            assert relative_error(mine[i], other) < 1e-5


@all_subjects
def test_vmap_over_nothing(subject):
    tensors = subject.operation.inputs(DEFAULT, subject.exact)
    none = torch.empty(0, *tensors[0].shape, dtype=subject.exact)
    got = torch.func.vmap(lambda x: subject.run([x, *tensors[1:]], DEFAULT))(none)
    want = subject.run(tensors, DEFAULT)
    assert [y.shape for y in got] == [(0, *y.shape) for y in want]


# Compiling and exporting


@all_subjects
def test_compiles_as_one_graph_for_any_number_of_patches(subject):
    """Forward and backward in one graph; after the sizes turned dynamic, no further compilation."""

    def loss(size: Size, *x: Tensor) -> Tensor:
        return sum(y.square().sum() for y in subject.run(x, size))

    torch._dynamo.reset()
    compiled = torch.compile(partial(loss, DEFAULT), fullgraph=True, dynamic=True, backend="aot_eager")
    for i, (batch, patches, others) in enumerate(((2, 17, 9), (3, 18, 12), (4, 40, 7), (2, 5, 30))):
        size = Size(batch, patches, other_patches=others)
        tensors = leaves(subject.operation.inputs(size, subject.exact))
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            got = torch.autograd.grad(compiled(*tensors), tensors)
        want = torch.autograd.grad(loss(DEFAULT, *tensors), tensors)
        for a, b in zip(got, want, strict=True):
            assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max())


@all_subjects
def test_compiles_with_everything_on_under_autocast(subject):
    size = Size(2, 40, 96, 3, 30, 64, 4)
    tensors = leaves(subject.operation.inputs(size, torch.float32))

    def function(*x: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(subject.device, dtype=torch.bfloat16):
            return subject.run(x, size, dropout_p=0.2, proj_dropout_p=0.1, return_attention=True)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    outputs = compiled(*tensors)
    assert all(torch.isfinite(y).all() for y in outputs)
    assert all(torch.isfinite(g).all() for g in gradients(outputs, tensors))
    assert not torch.equal(compiled(*tensors)[0], outputs[0]), "the masks advance"


class _Module(torch.nn.Module):
    def __init__(self, subject: Subject, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.subject = subject
        self.count = len(subject.operation.tokens)
        self.weights = torch.nn.ParameterList(tensors[self.count :])

    def forward(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        return self.subject.run([*tokens, *self.weights], DEFAULT)


@all_subjects
def test_exports_with_dynamic_sizes(subject):
    tensors = subject.operation.inputs(DEFAULT, subject.exact)
    module = _Module(subject, tensors)
    tokens = tuple(tensors[: module.count])
    batch = torch.export.Dim("batch", min=2, max=64)
    # From 4 on: one patch is a case of its own to the operators of PyTorch, and row 0 is not a patch.
    patches, others = (torch.export.Dim(name, min=4, max=64) for name in ("patches", "others"))
    shapes = (
        ({0: batch}, {0: batch, 1: patches})
        if subject.operation.name == "cross_attention"
        else ({0: batch, 1: patches}, {0: batch, 1: others})
    )
    program = torch.export.export(module, tokens, dynamic_shapes={"tokens": shapes})
    more = subject.operation.inputs(Size(5, 33, other_patches=21), subject.exact)[: module.count]
    for mine, other in zip(program.module()(*more), module(*more), strict=True):
        assert relative_error(mine, other) < 1e-6


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_exports_to_onnx(operation, tmp_path):
    """In ONNX's own operators, whatever the backend of the eager call; run by ONNX Runtime."""
    tensors = operation.inputs(DEFAULT, torch.float32)
    module = _Module(Subject(operation, "auto"), tensors).eval()
    tokens = tuple(tensors[: module.count])
    with torch.no_grad():
        program = torch.onnx.export(module, tokens, dynamo=True, verbose=False)
        want = module(*tokens)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    feed = {x.name: value.numpy() for x, value in zip(session.get_inputs(), tokens, strict=True)}
    for mine, other in zip(session.run(None, feed), want, strict=True):
        assert relative_error(torch.from_numpy(mine), other) < 1e-5


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_traces_to_plain_operators(operation):
    tensors = leaves(operation.inputs(DEFAULT, torch.float32))
    subject = Subject(operation, "auto")
    traced = torch.jit.trace(lambda *x: subject.run(x, DEFAULT), tuple(tensors))
    assert "PythonOp" not in str(traced.graph)
    assert "crossvit_kernels::" not in str(traced.graph)
    others = operation.inputs(Size(3, 30, other_patches=11), torch.float32)
    for mine, other in zip(traced(*others), subject.run(others, DEFAULT), strict=True):
        assert relative_error(mine, other) < 1e-5


@subjects(lambda subject: subject.exact == torch.float64)
def test_meta_tensors_get_the_shapes(subject):
    tensors = subject.operation.inputs(DEFAULT, torch.float32)
    got = subject.run([x.to("meta") for x in tensors], DEFAULT, return_attention=True)
    want = subject.run(tensors, DEFAULT, return_attention=True)
    assert [(y.shape, y.dtype) for y in got] == [(y.shape, y.dtype) for y in want]


# The operators


def operator_calls(operation: object, requires_grad: bool, layout: Callable[[Tensor], Tensor]) -> list[tuple]:
    """(operator, arguments) of forward and backward, with dropout and a scale and without."""
    calls = []
    for random, dtype in ((False, torch.float32), (True, torch.float32), (False, torch.bfloat16)):
        tensors = [layout(x) for x in operation.inputs(DEFAULT, dtype)]
        tensors = [x.detach().requires_grad_(requires_grad) for x in tensors]
        seed = torch.tensor([12345]) if random else None
        rate = 0.25 if random else 0.0

        def scale(width: int, wanted: bool = random, dtype: torch.dtype = dtype) -> Tensor | None:
            return torch.rand(2, 1, width).to(dtype).requires_grad_(requires_grad) if wanted else None

        if operation.name == "cross_attention":
            arguments = (*tensors[:2], tensors[2:], scale(48), seed, 4, 1e-6, rate, random, "cpu")
        else:
            scales = (scale(24), scale(48))
            arguments = (*tensors[:2], tensors[2:], *scales, seed, [3, 4], 1e-6, rate, random, "cpu")
        calls.append((getattr(torch.ops.crossvit_kernels, operation.name).default, arguments))
    return calls


@needs_module
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "layout", [layouts.contiguous, layouts.backwards_in_memory], ids=["contiguous", "permuted"]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_opcheck(operation, requires_grad, layout):
    """Schema, fake tensors, autograd registration and dispatch under AOT, by torch's own checker."""
    for operator, arguments in operator_calls(operation, requires_grad, layout):
        torch.library.opcheck(operator, arguments)


@needs_module
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_opcheck_of_backward(operation):
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    wanted = ([True, True, True], [False, False, True], [True, False, False])
    calls = operator_calls(operation, False, layouts.contiguous)
    for (operator, arguments), (tokens, scales, weights) in product(calls, wanted):
        outputs = operator(*arguments)
        module = sys.modules[f"crossvit_kernels.{operation.name}.op"]
        if operation.name == "cross_attention":
            cls, patches, given, scale, seed, *options, random, backend = arguments
            y, attention, saved = outputs
            grads = torch.randn_like(y), torch.randn_like(attention) if random else None
            rest = (attention, saved, *options, backend, [tokens, scales and scale is not None, weights])
            call = (*grads, cls, patches, given, scale, seed, *rest)
        else:
            s, l, given, scale_s, scale_l, seed, *options, random, backend = arguments  # noqa: E741
            grads = [torch.randn_like(x) for x in outputs[:2]]
            attentions = [torch.randn_like(x) if random else None for x in outputs[2:4]]
            rest = (
                list(outputs[2:4]),
                list(outputs[4:]),
                *options,
                backend,
                [tokens, scales and scale_s is not None, weights],
            )
            call = (grads, attentions, s, l, given, scale_s, scale_l, seed, *rest)
        torch.library.opcheck(module.BACKWARD, call, test_utils=tests)


@needs_module
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_the_operator_itself_is_differentiable(operation):
    """As the public function is, for those who call torch.ops."""
    for operator, arguments in operator_calls(operation, True, layouts.contiguous)[:1]:
        tensors = [*arguments[:2], *arguments[2]]
        got = gradients(operator(*arguments)[:1], tensors)
        want = gradients(Subject(operation, "cpu").run(tensors, DEFAULT)[:1], tensors)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# Processes and threads


def run_code(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


CALL = """
import os, sys, torch
from crossvit_kernels import cross_attention
torch.manual_seed(0)
x = [torch.randn(8, 1, 96), torch.randn(8, 400, 96), torch.ones(96), torch.zeros(96)]
x += [torch.randn(96, 96) / 10 if i % 2 == 0 else torch.zeros(96) for i in range(8)]
x = [t.requires_grad_() for t in x]
def call():
    y = cross_attention(*x, num_heads=3, backend="cpu")
    return [y.detach(), *torch.autograd.grad(y, x, torch.ones_like(y))]
"""


@needs_module
@pytest.mark.skipif(not hasattr(os, "fork"), reason=f"{sys.platform} has no fork")
def test_a_forked_child_computes_the_same():
    """The threads of the parent's OpenMP pool do not survive a fork; waiting for them would never end."""
    code = """
torch.set_num_threads(4)
want = call()
child = os.fork()
if child == 0:
    # By their bytes: torch's own operators may not use threads here.
    same = all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(call(), want))
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    run_code(CALL + code)


@needs_module
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which is Linux's")
def test_no_more_threads_than_torch_has():
    code = """
torch.set_num_threads(3)
torch.randn(600, 600) @ torch.randn(600, 600)
(torch.randn(1 << 20) + 1).sum().item()
torch.ones(3, requires_grad=True).sum().backward()  # the thread of autograd
before = len(os.listdir("/proc/self/task"))
for _ in range(5):
    call()
print(len(os.listdir("/proc/self/task")) - before)
"""
    assert run_code(CALL + code).strip() == "0"


@needs_module
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which is Linux's")
def test_threads_of_python_keep_to_the_number_that_was_set():
    """OpenMP's own number is each thread's; the first call in a new thread must not take all cores."""
    code = """
import threading, time
torch.set_num_threads(1)
call()
before = len(os.listdir("/proc/self/task"))
thread = threading.Thread(target=call)
thread.start()
thread.join()
time.sleep(0.5)  # until the system has buried the thread
print(len(os.listdir("/proc/self/task")) - before)
"""
    assert run_code(CALL + code).strip() == "0"


def test_operators_check_what_would_be_read_wrongly():
    tensors = OPERATIONS[0].inputs(DEFAULT, torch.float32)
    weights = [*tensors[2:6], tensors[6].bfloat16(), *tensors[7:]]
    with pytest.raises(TypeError, match="the matrices must share one dtype"):
        torch.ops.crossvit_kernels.cross_attention(
            *tensors[:2], weights, None, None, 4, 1e-6, 0.0, False, "cpu"
        )
