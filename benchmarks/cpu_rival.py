"""One rival of benchmarks/test_cpu.py, in a process of its own: `python -m benchmarks.cpu_rival RIVAL`.

It reads requests from stdin and writes answers to stdout, one line of JSON each: which model on which images,
then time after time a number of seconds for which to run. Between requests it sleeps.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crossvit import create_model
from crossvit._timm import import_timm
from crossvit_kernels import native, use_backend

Run = Callable[[], Any]
PEAK_SIZE = 2048


class Resized(nn.Module):
    """A model that is given what L sees as well, so that a rival's own resizing is not timed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, resized: Tensor) -> Tensor:
        model: Any = self.model
        tokens = []
        for b, seen in enumerate((image, resized)):
            cls = model._cls_token(b).expand(image.shape[0], -1, -1)
            tokens.append(torch.cat((cls, model.patch_embed[b](seen)), dim=1) + model._position(b))
        tokens = model._encode(tokens)
        return model._head([norm(y[:, 0]) for norm, y in zip(model.norm, tokens, strict=True)])


class Ours:
    """This package, frozen or as it is."""

    def __init__(self, dtype: torch.dtype, frozen: bool) -> None:
        self.dtype, self.frozen = dtype, frozen
        self.version = native.load().isa()

    def load(self, name: str, state: dict[str, Tensor]) -> None:
        self.model: Any = create_model(name).eval()
        self.model.load_state_dict(state)
        if self.frozen:
            self.model.freeze(self.dtype)
        else:
            self.model.to(self.dtype)

    def ready(self, images: Tensor, threads: int) -> Run:
        x = images if self.frozen else images.to(self.dtype)
        return lambda: self.model(x)


class Timm:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.version = import_timm().__version__

    def load(self, name: str, state: dict[str, Tensor]) -> None:
        self.model = import_timm().create_model(name).eval()
        self.model.load_state_dict(state)
        self.model.to(self.dtype)

    def ready(self, images: Tensor, threads: int) -> Run:
        x = images.to(self.dtype)
        return lambda: self.model(x)


class Compiled(Timm):
    """timm's model by torch.compile, which compiles for each batch and number of threads."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.version = torch.__version__

    def ready(self, images: Tensor, threads: int) -> Run:
        torch.compiler.reset()
        model, x = torch.compile(self.model, dynamic=False), images.to(self.dtype)
        return lambda: model(x)


class OpenVino:
    """timm's model as it converts; or ours without needless keys and values, the image resized outside."""

    def __init__(self, precision: str, helped: bool) -> None:
        import openvino

        self.openvino, self.precision, self.helped = openvino, precision, helped
        self.version = openvino.__version__.split("-")[0]

    def load(self, name: str, state: dict[str, Tensor]) -> None:
        ours: Any = create_model(name, backend="torch").eval()
        ours.load_state_dict(state)
        self.ours = ours
        image = torch.zeros(2, 3, *ours.img_size)
        with torch.no_grad(), use_backend("torch"):
            if self.helped:
                example = (image, ours._scale_image(image, ours.img_size_scaled[1]))
                batch = torch.export.Dim("batch", min=1, max=256)
                shapes = {"image": {0: batch}, "resized": {0: batch}}
                self.converted = self.openvino.convert_model(
                    torch.export.export(Resized(ours), example, dynamic_shapes=shapes)
                )
            else:
                theirs = import_timm().create_model(name).eval()
                theirs.load_state_dict(state)
                self.converted = self.openvino.convert_model(theirs, example_input=image)

    def ready(self, images: Tensor, threads: int) -> Run:
        inputs = [images]
        if self.helped:
            inputs.append(self.ours._scale_image(images, self.ours.img_size_scaled[1]).contiguous())
        model = self.converted.clone()
        model.reshape({model.inputs[i]: list(x.shape) for i, x in enumerate(inputs)})
        settings = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = self.openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
        arrays = [x.numpy() for x in inputs]
        return lambda: request.infer(arrays)[0]

    def forget(self) -> None:
        """PyTorch's model is not a part of this rival; the helped one's image has been resized by now."""
        if not self.helped:
            self.ours = None


class OnnxRuntime:
    def __init__(self) -> None:
        import onnxruntime

        self.runtime = onnxruntime
        self.version = onnxruntime.__version__

    def load(self, name: str, state: dict[str, Tensor]) -> None:
        theirs = import_timm().create_model(name).eval()
        theirs.load_state_dict(state)
        self.models: dict[int, bytes] = {}
        self.theirs = theirs

    def ready(self, images: Tensor, threads: int) -> Run:
        batch = len(images)
        if batch not in self.models:
            exported = torch.onnx.export(self.theirs, (images,), dynamo=True, verbose=False)
            self.models[batch] = exported.model_proto.SerializeToString()
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = threads
        # Else its threads spin while others are timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        providers = ["CPUExecutionProvider"]
        session = self.runtime.InferenceSession(self.models[batch], options, providers=providers)
        inputs = {session.get_inputs()[0].name: images.numpy()}
        return lambda: session.run(None, inputs)[0]


class Peak:
    """What is taken as the peak: the fastest that torch multiplies two square matrices of 2,048 rows, by its
    BLAS or by oneDNN. Its results are no logits."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.version = torch.__version__

    def load(self, name: str, state: dict[str, Tensor]) -> None:
        a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE).to(self.dtype) for _ in range(2))
        self.ways: list[Run] = [lambda: a @ b]
        if torch.backends.mkldnn.is_available():
            x, weight = a.to_mkldnn(), b.to_mkldnn()
            self.ways.append(lambda: torch._C._nn.mkldnn_linear(x, weight, None))

    def ready(self, images: Tensor, threads: int) -> Run:
        return min(self.ways, key=lambda way: statistics.mean(_calls(way, 0.2)))


RIVALS: dict[str, Callable[[], Any]] = {
    "frozen fp32": lambda: Ours(torch.float32, True),
    "frozen bf16": lambda: Ours(torch.bfloat16, True),
    "not frozen fp32": lambda: Ours(torch.float32, False),
    "not frozen bf16": lambda: Ours(torch.bfloat16, False),
    "timm fp32": lambda: Timm(torch.float32),
    "timm bf16": lambda: Timm(torch.bfloat16),
    "torch.compile fp32": lambda: Compiled(torch.float32),
    "torch.compile bf16": lambda: Compiled(torch.bfloat16),
    "OpenVINO fp32": lambda: OpenVino("f32", False),
    "OpenVINO bf16": lambda: OpenVino("bf16", False),
    "OpenVINO helped fp32": lambda: OpenVino("f32", True),
    "OpenVINO helped bf16": lambda: OpenVino("bf16", True),
    "ONNX Runtime fp32": OnnxRuntime,
    "peak fp32": lambda: Peak(torch.float32),
    "peak bf16": lambda: Peak(torch.bfloat16),
}


def _calls(run: Run, at_least: float) -> list[float]:
    """Seconds of each call, of as many as fill the time."""
    moments = [time.perf_counter()]
    while True:
        run()
        moments.append(time.perf_counter())
        if moments[-1] - moments[0] >= at_least:
            return [end - start for start, end in itertools.pairwise(moments)]


def _resident(peak: bool) -> int:
    """Bytes of memory that the process holds, or the most since `_forget_peak`."""
    key = "VmHWM" if peak else "VmRSS"
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _as_array(logits: Any) -> np.ndarray:
    return logits.float().numpy() if isinstance(logits, Tensor) else np.asarray(logits)


def _work(name: str, answer: Callable[[dict[str, Any]], None]) -> None:
    rival: Any = None
    loaded, run = "", None
    libraries = 0
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "model" in request:
                rival = rival or RIVALS[name]()
                libraries = libraries or _resident(peak=False)
                torch.set_num_threads(request["threads"])
                data = torch.load(request["data"])
                if loaded != request["model"]:
                    with torch.inference_mode(False):  # parameters as a user's, that have versions
                        rival.load(request["model"], data["state"])
                    loaded = request["model"]
                run = rival.ready(data["images"][: request["batch"]].contiguous(), request["threads"])
                del data
                result = run()
                if not isinstance(rival, Peak):
                    np.save(request["logits"], _as_array(result))
                if hasattr(rival, "forget"):
                    rival.forget()
                gc.collect()
                _forget_peak()
                run()
                answer({"version": rival.version, "resident_bytes": _resident(peak=True) - libraries})
            else:
                assert run is not None
                answer({"calls": _calls(run, request["seconds"])})
        except Exception as error:
            answer({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})


def main() -> None:
    # What libraries print to stdout is not an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    with torch.inference_mode(not sys.argv[1].startswith(("OpenVINO", "ONNX"))), torch.no_grad():
        _work(sys.argv[1], answer)


if __name__ == "__main__":
    main()
