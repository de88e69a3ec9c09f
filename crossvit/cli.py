"""The command `crossvit`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .data import imagenet_labels, open_image, preprocess
from .demo import run_demo
from .registry import create_model
from .variants import VARIANTS, Variant, find_variant
from .weights import SOURCES, check_classes, fetch, find_cached


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 1 with a message on stderr where something was wrong."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        print(f"crossvit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="crossvit", description="CrossViT models with custom kernels.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    weights: dict[str, Any] = {
        "metavar": "FILE|timm|ibm",
        "help": "a file, or a release to download; by default what an earlier download left here",
    }

    device: dict[str, Any] = {
        "default": "cuda" if torch.cuda.is_available() else "cpu",
        "help": "cpu, cuda, cuda:1, … (a GPU where there is one)",
    }

    demo = commands.add_parser("demo", help="compare and measure this package against timm on a photograph")
    demo.add_argument("image", type=Path)
    demo.add_argument("--model", default="crossvit_18")
    demo.add_argument("--weights", **weights)
    demo.add_argument("--out", type=Path, default=Path("out"), help="folder of the two pictures (out)")
    demo.add_argument("--device", **device)
    demo.set_defaults(run=_demo)

    classify = commands.add_parser("classify", help="name what photographs show")
    classify.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    classify.add_argument("--model", default="crossvit_18")
    classify.add_argument("--weights", **weights)
    classify.add_argument("--device", **device)
    classify.add_argument("--top", type=int, default=5, help="classes an image (5)")
    classify.add_argument("--json", action="store_true", help="print JSON")
    classify.set_defaults(run=_classify)

    models = commands.add_parser("models", help="list the models")
    models.add_argument(
        "--paper", action="store_true", help="all models of the paper's tables, recounted (half a minute)"
    )
    models.set_defaults(run=_models)
    return parser


def _weights_file(option: str | None, variant: Variant) -> Path | None:
    """The file that --weights means, or what is cached; for ImageNet's classes, whose names are shown."""
    if option is None:
        path = find_cached(variant)
    else:
        path = fetch(variant, option) if option in SOURCES else Path(option)
    if path is not None:
        check_classes(path, 1000)
    return path


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise RuntimeError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None


def _demo(options: argparse.Namespace) -> None:
    _check_device(options.device)
    variant = find_variant(options.model)
    weights = _weights_file(options.weights, variant)
    run_demo(options.image, variant.name, weights, options.out, options.device)


def _classify(options: argparse.Namespace) -> None:
    _check_device(options.device)
    if not 1 <= options.top <= 1000:
        raise ValueError(f"--top must lie in 1 … 1000, got {options.top}")
    variant = find_variant(options.model)
    weights = _weights_file(options.weights, variant)
    if weights is None:
        raise RuntimeError(f"no weights of {variant.name} are at hand: give --weights FILE, timm or ibm")
    images = [preprocess(open_image(path), variant) for path in options.images]
    model = create_model(variant.name, checkpoint_path=weights).eval().to(options.device)
    labels = imagenet_labels()
    results: list[dict[str, Any]] = []
    for path, image in zip(options.images, images, strict=True):
        with torch.inference_mode():
            top = model(image.to(options.device))[0].softmax(-1).topk(options.top)
        predictions = [
            {"class": int(index), "label": labels[index] if labels else None, "probability": float(value)}
            for index, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        results.append({"image": str(path), "model": variant.name, "predictions": predictions})
    if options.json:
        print(json.dumps(results, indent=2))
        return
    if labels is None:
        print("The class names come with timm: pip install 'crossvit-kernels[demo]'")
    for result in results:
        print(result["image"])
        for guess in result["predictions"]:
            print(f"  {guess['probability']:7.2%}  {guess['label'] or 'class ' + str(guess['class'])}")


def _paper() -> None:
    from .paper import PAPER, comparison, count

    form = "{:6s} {:34s} {:>8s} {:>8s} {:>7s} {:>7s} {:>6s}  {}"
    header = ("table", "model", "params M", "recount", "GMACs", "recount", "top-1", "")
    print(form.format(*header))
    for row in PAPER:
        found = comparison(row, count(row.make(device="meta").eval()))
        differs = [what for what, (_, _, equal) in found.items() if not equal]
        notes = "; ".join(row.exceptions.get(what, f"{what} differ") for what in differs)
        figures = [text for printed, recounted, _ in found.values() for text in (printed, recounted)]
        print(form.format(row.table, row.name, *figures, f"{row.top1:.1f}", notes).rstrip(), flush=True)
    print("\nTop-1 on ImageNet-1k is the paper's. Table 7 and some of Tables 2-4 and 6 leave positions out.")


def _models(options: argparse.Namespace) -> None:
    if options.paper:
        _paper()
        return
    header = ("model", "also named", "S/L px", "widths", "heads", "params M", "GMACs", "top-1", "weights")
    rows = [header]
    for row in VARIANTS.values():
        rows.append(
            (
                row.name,
                " ".join(row.aliases),
                f"{row.image_sizes[0]}/{row.image_sizes[1]}",
                f"{row.widths[0]}/{row.widths[1]}",
                str(row.heads),
                f"{row.parameters / 1e6:.1f}",
                f"{row.gmacs:.2f}",
                f"{row.top1[0]:.1f}",
                "released" if row.released else "none",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for line in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print("\nParameters include position embeddings; top-1 on ImageNet-1k is the paper's (Tables 2-4).")
