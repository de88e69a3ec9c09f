"""`crossvit demo`: one photograph through the stock model and through this package, compared and measured."""

from __future__ import annotations

import copy
import importlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crossvit_kernels import __version__
from crossvit_kernels.measure import Comparison, compare, interleaved, peak_bytes

from ._timm import import_timm
from .data import crop_for, imagenet_labels, normalise, open_image
from .fusion import upsample_attention
from .model import AttentionMaps, CrossViT
from .registry import create_model
from .variants import find_variant

if TYPE_CHECKING:
    from PIL.Image import Image

ROUNDS = 25
RANDOM = "random weights (seed 0)"


@dataclass(frozen=True)
class Measured:
    """Ours against the rival on one task; memory in bytes at the peak."""

    task: str
    time: Comparison
    ours_bytes: int
    rival_bytes: int


def run_demo(image_path: Path, model_name: str, weights: Path | None, out: Path, device: str) -> None:
    """Print the comparison and write out/attention.png and out/timing.png.

    Raises:
        ImportError: a package of the extra `demo` is missing.
        FileNotFoundError, ValueError: see `open_image` and `load_weights`.
    """
    console = _require("rich.console").Console()
    _require("matplotlib")
    variant = find_variant(model_name)
    photo = crop_for(open_image(image_path), variant.image_sizes[0], variant.crop)
    image = normalise(photo).to(device)

    torch.manual_seed(0)
    ours = create_model(variant.name, checkpoint_path=weights).eval().to(device)
    rival, rival_name = _rival(ours, variant.name, device)
    source = RANDOM if weights is None else f"weights {weights.name}"

    console.print(f"[bold]{variant.name}[/] on {image_path.name}, {source}")
    console.print(
        f"crossvit-kernels {__version__}, torch {torch.__version__}, {_device_name(device)}, float32, batch 1"
    )
    if weights is None:
        console.print(
            "[yellow]No weights are at hand, so they are random and the classes below mean nothing.[/] "
            "Give some with --weights (a file, timm or ibm)."
        )
    with torch.inference_mode():
        logits, rival_logits = ours(image), rival(image)
        difference = (logits - rival_logits).abs().max().item()
        relative = difference / rival_logits.abs().max().item()
        console.print(
            f"\nLargest difference of logits to {rival_name}: {difference:.1e} ({relative:.1e} relative)"
        )
        _print_top5(console, logits, rival_logits, rival_name, named=weights is not None)
        maps = ours.get_attention_maps(image)[-1]
        measured = _measure(console, ours, rival, image)
    _print_measured(console, measured, rival_name)

    out.mkdir(parents=True, exist_ok=True)
    _save(_attention_figure(photo, maps, source), out / "attention.png")
    _save(_timing_figure(measured, rival_name, _device_name(device)), out / "timing.png")
    console.print(f"\nPictures: {out / 'attention.png'}, {out / 'timing.png'}")


def _require(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise ImportError(f"the demo needs {package}: pip install 'crossvit-kernels[demo]'") from error


def _device_name(device: str) -> str:
    if device == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _rival(ours: CrossViT, name: str, device: str) -> tuple[nn.Module, str]:
    """timm's model with our weights; where timm is missing or lacks it, our own on the paper's definition."""
    try:
        timm = import_timm()
    except ImportError:
        timm = None
    if timm is not None and timm.is_model(name):
        rival, rival_name = timm.create_model(name), f"timm {timm.__version__}"
    else:
        rival = create_model(name, backend="reference")
        rival_name = "the reference path of this package (timm is not installed or lacks the model)"
    rival.load_state_dict(ours.state_dict())
    return rival.eval().to(device), rival_name


def _print_top5(console: Any, ours: Tensor, rival: Tensor, rival_name: str, named: bool) -> None:
    labels = imagenet_labels() if named else None
    table = _require("rich.table").Table(title="Top 5")
    for column in ("rank", "this package", "probability", rival_name.split(" (")[0], "probability"):
        table.add_column(column, justify="right" if column in ("rank", "probability") else "left")
    columns = [logits[0].softmax(-1).topk(5) for logits in (ours, rival)]
    for rank in range(5):
        row = [str(rank + 1)]
        for top in columns:
            index = int(top.indices[rank])
            row += [labels[index] if labels else f"class {index}", f"{top.values[rank].item():.2%}"]
        table.add_row(*row)
    console.print(table)


def _measure(console: Any, ours: CrossViT, rival: Any, image: Tensor) -> list[Measured]:
    tokens = ours._embed(image)
    encoder: Any = ours.blocks[-1]
    rival_encoder = rival.blocks[-1]

    tasks: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        (
            "fusion of one encoder",
            lambda: encoder.fuse(tokens),
            lambda: _fuse(rival_encoder, tokens),
        ),
        ("whole model", lambda: ours(image), lambda: rival(image)),
    ]
    if image.is_cuda:
        frozen = copy.deepcopy(ours).freeze(batch_sizes=[1])
        tasks.append(("whole model, frozen", lambda: frozen(image), lambda: rival(image)))
    measured = []
    with _require("rich.progress").Progress(console=console, transient=True) as progress:
        bar = progress.add_task("Measuring", total=ROUNDS * len(tasks))
        for name, run_ours, run_rival in tasks:
            samples = interleaved(
                {"ours": run_ours, "rival": run_rival},
                ROUNDS,
                image.device,
                on_round=lambda: progress.advance(bar),
            )
            measured.append(
                Measured(
                    name,
                    compare(samples["ours"], samples["rival"]),
                    peak_bytes(run_ours, image.device),
                    peak_bytes(run_rival, image.device),
                )
            )
    return measured


def _fuse(encoder: Any, tokens: Sequence[Tensor]) -> list[Tensor]:
    """The fusion alone of either implementation: timm's encoder runs its blocks and fusion in one forward,
    so its steps after the blocks are taken here one by one."""
    if hasattr(encoder, "fuse"):
        return encoder.fuse(tokens)
    projected = [project(x[:, :1]) for project, x in zip(encoder.projs, tokens, strict=True)]
    fused = []
    for b, (fusion, back) in enumerate(zip(encoder.fusion, encoder.revert_projs, strict=True)):
        both = fusion(torch.cat((projected[b], tokens[1 - b][:, 1:]), dim=1))
        fused.append(torch.cat((back(both[:, :1]), tokens[b][:, 1:]), dim=1))
    return fused


def _milliseconds(comparison: Comparison, which: str) -> str:
    interval = getattr(comparison, which)
    return f"{interval.median * 1e3:.2f} ms\n({interval.low * 1e3:.2f}-{interval.high * 1e3:.2f})"


def _memory_words(measured: Measured) -> str:
    ratio = measured.rival_bytes / max(measured.ours_bytes, 1)
    if abs(ratio - 1) < 0.005:
        return "the same"
    return f"{ratio:.2f} times less" if ratio > 1 else f"{1 / ratio:.2f} times more"


def _print_measured(console: Any, measured: list[Measured], rival_name: str) -> None:
    table = _require("rich.table").Table(title=f"Median of {ROUNDS} interleaved rounds, 95 % intervals")
    for column in ("", "this package", rival_name.split(" (")[0], "this package is"):
        table.add_column(column)
    for row in measured:
        times = (_milliseconds(row.time, "ours"), _milliseconds(row.time, "rival"))
        table.add_row(f"{row.task},\ntime", *times, row.time.words().replace(" (", "\n("))
        sizes = (f"{row.ours_bytes / 1e6:.2f} MB", f"{row.rival_bytes / 1e6:.2f} MB")
        table.add_row("peak memory", *sizes, _memory_words(row), end_section=True)
    console.print(table)


def _figure(width: float, height: float) -> Any:
    return _require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def _attention_figure(photo: Image, maps: AttentionMaps, source: str) -> Any:
    figure = _figure(11, 4.6)
    panels = figure.subplots(1, 3)
    size = (photo.height, photo.width)
    titles = (
        "what the model sees",
        f"S: CLS over {maps.small.shape[2]}x{maps.small.shape[3]} patches of L",
        f"L: CLS over {maps.large.shape[2]}x{maps.large.shape[3]} patches of S",
    )
    for axis, title, attention in zip(panels, titles, (None, *maps), strict=True):
        axis.imshow(photo)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
        if attention is not None:
            share = attention.mean(dim=1, keepdim=True).cpu() * attention[0, 0].numel()
            heat = upsample_attention(share, size)[0, 0]
            shown = axis.imshow(heat.numpy(), cmap="inferno", alpha=0.6)
            figure.colorbar(shown, ax=axis, location="bottom", shrink=0.9, label="attention over its mean")
    meaning = ": they mean nothing" if source == RANDOM else ""
    figure.suptitle(
        f"Attention of the CLS tokens, last encoder, mean of heads; {source}{meaning}", fontsize=11
    )
    return figure


def _timing_figure(measured: list[Measured], rival_name: str, machine: str) -> Any:
    figure = _figure(4.5 * len(measured), 2.6)
    names = ("this package", rival_name.split(" (")[0])
    for axis, row in zip(figure.subplots(1, len(measured)), measured, strict=True):
        for position, (interval, colour) in enumerate(
            ((row.time.ours, "#0b6e4f"), (row.time.rival, "#8d99ae"))
        ):
            low, median, high = (x * 1e3 for x in (interval.low, interval.median, interval.high))
            axis.barh(position, median, height=0.6, color=colour)
            axis.plot([low, high], [position, position], color="black", linewidth=2)
        axis.set_yticks(range(2), names)
        axis.invert_yaxis()
        axis.set_xlabel("milliseconds, less is better")
        axis.set_title(f"{row.task}: {row.time.words()}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"One image, {machine}; bars are medians, lines their 95 % intervals", fontsize=11)
    return figure


def _save(figure: Any, path: Path) -> None:
    """Written beside and renamed: an interrupted run leaves the old picture or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".png")
    os.close(handle)
    try:
        figure.savefig(temporary, dpi=110)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
