"""`python -m benchmarks scale`: images and training beyond one machine, on paper, from figures of one device.

Inference is data-parallel: devices share nothing but the input of their node, and take equal parts of a
billion images. Training is DistributedDataParallel (DDP): a device computes its part of a batch in
micro-batches, and while the last backward runs, gradients are all-reduced in buckets.

Left out: stragglers and failures, reading and augmenting training images, evaluation, and what communication
takes from the compute beside it. The optimizer is in the step's time, and so in every micro-batch.

`--check` holds the model against two processes on this machine.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crossvit import find_variant

BILLION = 1_000_000_000


@dataclass(frozen=True)
class Cluster:
    """How devices are connected and fed, and what they cost.

    Attributes:
        link: bytes/s of a device inside a node.
        network: bytes/s of a node to others.
        latency: seconds of a message.
        input: images/s that a node can read.
        price: of a device and hour.
    """

    devices_per_node: int = 8
    link: float = math.inf
    network: float = math.inf
    latency: float = 0.0
    input: float = math.inf
    price: float | None = None


@dataclass(frozen=True)
class Gradients:
    """Bytes of all gradients and of a bucket; the share of backward in which buckets travel.

    By default that is all but the time until the first bucket is ready.
    """

    size: float
    bucket: float = 25 << 20
    overlap: float | None = None


@dataclass(frozen=True)
class Step:
    """A training step of one device: seconds, images, and backward's share of the seconds."""

    seconds: float
    batch: int
    backward: float = 2 / 3


@dataclass(frozen=True)
class Recipe:
    """A training; the defaults are the paper's, on ImageNet-1k."""

    images: int = 1_281_167
    epochs: int = 300
    batch: int = 4096


@dataclass(frozen=True)
class Job:
    """Devices, all held until the slowest has ended."""

    devices: int
    hours: float
    price: float | None

    @property
    def device_hours(self) -> float:
        return self.devices * self.hours

    @property
    def cost(self) -> float | None:
        return None if self.price is None else self.device_hours * self.price


@dataclass(frozen=True)
class Inference(Job):
    """`images_per_second` are those of all devices once they have started."""

    images_per_second: float
    binds: str


@dataclass(frozen=True)
class Training(Job):
    """Of a step: seconds, those of its all-reduce, and those of it that backward does not hide.

    `batch` is a device's; `efficiency` the speed over one device's, divided by the number of devices.
    """

    batch: int
    micro_batches: int
    step: float
    all_reduce: float
    exposed: float
    efficiency: float


def inference(
    devices: int,
    rate: float,
    cluster: Cluster,
    images: int = BILLION,
    batch: int = 256,
    startup: float = 0.0,
) -> Inference:
    """`images` in equal parts of whole batches, the last rounded up.

    rate: images/s of a device. startup: seconds before a device's first image.
    """
    share = math.ceil(math.ceil(images / batch) / devices) * batch
    read = cluster.input / min(devices, cluster.devices_per_node)
    limits = {"device": share / rate, "input": share / read, "startup": startup}
    hours = (startup + max(limits["device"], limits["input"])) / 3600
    binds = max(limits, key=lambda name: limits[name])
    return Inference(devices, hours, cluster.price, devices * min(rate, read), binds)


def ring_seconds(devices: int, size: float, bandwidth: float, latency: float) -> float:
    """Of a ring all-reduce of `size` bytes: 2 (n - 1) messages of size / n bytes, one after another.

    Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009.
    """
    return 2 * (devices - 1) * (size / devices / bandwidth + latency)


def all_reduce_seconds(devices: int, size: float, cluster: Cluster) -> float:
    """Of `size` bytes on m nodes of d devices: ring(d, size) in a node and ring(m, size / d) between nodes.

    Reduce-scatter in each node, d rings between nodes, each with a d-th of the data and of the network, and
    all-gather in each node (Mikami et al., arXiv:1811.05233), one after another; NCCL may overlap them. A
    node that is not full counts as a full one.
    """
    inside = min(devices, cluster.devices_per_node)
    nodes = math.ceil(devices / inside)
    between = ring_seconds(nodes, size / inside, cluster.network / inside, cluster.latency)
    return ring_seconds(inside, size, cluster.link, cluster.latency) + between


def communication(
    devices: int, gradients: Gradients, backward: float, cluster: Cluster
) -> tuple[float, float]:
    """Seconds of a step's all-reduce, and those that are exposed beside `backward` seconds.

    Buckets are equal, and as few as their size allows. The last waits for the end of backward, the others
    travel while it runs: exposed = last + max(0, others - overlap * backward).
    """
    buckets = math.ceil(gradients.size / gradients.bucket)
    last = all_reduce_seconds(devices, gradients.size / buckets, cluster)
    overlap = 1 - 1 / buckets if gradients.overlap is None else gradients.overlap
    return buckets * last, last + max(0.0, (buckets - 1) * last - overlap * backward)


def training(devices: int, step: Step, gradients: Gradients, cluster: Cluster, recipe: Recipe) -> Training:
    """The recipe on `devices`: ceil(batch / (devices * step.batch)) micro-batches and an all-reduce a step.

    A micro-batch of fewer than `step.batch` images is taken to need as long as a full one.

    Raises:
        ValueError: there are more devices than images in a batch.
    """
    if devices > recipe.batch:
        raise ValueError(f"expected at most {recipe.batch} devices, one an image of a batch, got {devices}")
    alone, count = (math.ceil(recipe.batch / (n * step.batch)) for n in (1, devices))
    all_reduce, exposed = communication(devices, gradients, step.backward * step.seconds, cluster)
    seconds = count * step.seconds + exposed
    hours = recipe.epochs * math.ceil(recipe.images / recipe.batch) * seconds / 3600
    efficiency = alone * step.seconds / (devices * seconds)
    batch = math.ceil(recipe.batch / devices)
    return Training(devices, hours, cluster.price, batch, count, seconds, all_reduce, exposed, efficiency)


def _number(expected: str, holds: Callable[[float], bool], kind: type = float) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


_positive = _number("a number above 0", lambda x: 0 < x < math.inf)
_not_negative = _number("a number of at least 0", lambda x: 0 <= x < math.inf)
_share = _number("a share from 0 to 1", lambda x: 0 <= x <= 1)
_count = _number("a whole number of at least 1", lambda x: x >= 1, int)


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks scale", description=__doc__, formatter_class=form)

    def add(name: str, kind: Callable[[str], Any], words: str, default: Any = None, **more: Any) -> None:
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        words += "" if default is None else f" ({shown})"
        group.add_argument(name, type=kind, help=words, default=default, metavar="N", **more)

    group = parser.add_argument_group("all")
    group.add_argument("--check", action="store_true", help="measure with two processes, half a minute")
    add("--devices-per-node", _count, "devices", Cluster.devices_per_node)
    add("--price-per-hour", _positive, "of a device, in any currency; without it there is no cost")

    group = parser.add_argument_group(f"inference of {BILLION:,} images")
    add("--images-per-second", _positive, "images/s of one device; asks for this table")
    add("--devices", _count, "numbers of devices", (1, 10, 100, 1000, 10_000), nargs="+")
    add("--inference-batch", _count, "images that a device takes at once", 256)
    add("--startup-seconds", _not_negative, "s before a device's first image", 0.0)
    add("--input-bytes", _positive, "bytes of an image as it is read, ImageNet's mean", 115_440)
    add("--input-bytes-per-second", _positive, "bytes/s that a node can read; no limit without it")

    group = parser.add_argument_group("training")
    group.add_argument("--model", default="crossvit_18", help="whose gradients travel (%(default)s)")
    add("--step-seconds", _positive, "s of a step of one device; asks for this table")
    add("--step-batch", _count, "images of that step; best as many as a device has where there are most")
    add("--training-devices", _count, "numbers of devices", (1, 2, 4, 8, 16, 32, 64), nargs="+")
    add("--backward", _share, "backward's share of a step", round(Step.backward, 3))
    add("--overlap", _share, "share of backward in which gradients travel; by default after one bucket")
    add("--gradient-bytes", _positive, "bytes a parameter that travel", 4.0)
    add("--bucket-bytes", _count, "bytes that travel at once, DDP's bucket_cap_mb", Gradients.bucket)
    add("--link-bytes-per-second", _positive, "bytes/s of a device inside a node (bus bandwidth)")
    add("--network-bytes-per-second", _positive, "bytes/s of a node to others")
    add("--latency-seconds", _not_negative, "s of a message", Cluster.latency)
    add("--images", _count, "images of an epoch", Recipe.images)
    add("--epochs", _count, "epochs", Recipe.epochs)
    add("--batch", _count, "images of a step on all devices", Recipe.batch)
    return parser


def _need(options: argparse.Namespace, name: str, purpose: str) -> None:
    if getattr(options, name) is None:
        raise ValueError(f"expected --{name.replace('_', '-')} for {purpose}, got none")


def _cluster(options: argparse.Namespace) -> Cluster:
    return Cluster(
        options.devices_per_node,
        options.link_bytes_per_second or math.inf,
        options.network_bytes_per_second or math.inf,
        options.latency_seconds,
        (options.input_bytes_per_second or math.inf) / options.input_bytes,
        options.price_per_hour,
    )


def figure(value: float) -> str:
    """Three digits, or whole and with commas."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _held(job: Job) -> dict[str, str]:
    figures = {"device-hours": job.device_hours, "cost": job.cost}
    return {name: figure(value) for name, value in figures.items() if value is not None}


def table(title: str, rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown; keys are the header."""
    columns = [[name, *(row[name] for row in rows)] for name in rows[0]]
    widths = [max(map(len, column)) for column in columns]
    header, *lines = (" | ".join(map(str.rjust, cells, widths)) for cells in zip(*columns, strict=True))
    rule = " | ".join(f"{'-' * (width - 1)}:" for width in widths)
    return "\n".join([title, "", *(f"| {line} |" for line in (header, rule, *lines)), ""])


def _inference_table(options: argparse.Namespace) -> str:
    rows, settings = [], (options.inference_batch, options.startup_seconds)
    for devices in options.devices:
        job = inference(devices, options.images_per_second, _cluster(options), BILLION, *settings)
        row = {"devices": f"{devices:,}", "images/s": figure(job.images_per_second)}
        rows.append(row | {"hours": figure(job.hours)} | _held(job) | {"binds": job.binds})
    return table(f"Inference of {BILLION:,} images, predicted", rows)


def _training_table(options: argparse.Namespace) -> str:
    most, per_node = max(options.training_devices), options.devices_per_node
    _need(options, "step_seconds", "training")
    _need(options, "step_batch", "training")
    if min(most, per_node) > 1:
        _need(options, "link_bytes_per_second", f"training on {most} devices")
    if most > per_node:
        _need(options, "network_bytes_per_second", f"training on {most} devices, {per_node} a node")
    size = options.gradient_bytes * options.model.parameters
    gradients = Gradients(size, options.bucket_bytes, options.overlap)
    step = Step(options.step_seconds, options.step_batch, options.backward)
    recipe = Recipe(options.images, options.epochs, options.batch)
    rows = []
    for devices in options.training_devices:
        job = training(devices, step, gradients, _cluster(options), recipe)
        counts = {"devices": devices, "batch a device": job.batch, "micro-batches": job.micro_batches}
        seconds = {"step": job.step, "all-reduce": job.all_reduce, "exposed": job.exposed}
        row = {name: f"{count:,}" for name, count in counts.items()}
        row |= {f"{name} ms": figure(1e3 * value) for name, value in seconds.items()}
        row |= {"efficiency": f"{job.efficiency:.1%}", "days": figure(job.hours / 24)}
        rows.append(row | _held(job))
    title = f"Training of {options.model.name}, {recipe.epochs} epochs of {recipe.images:,} images, predicted"
    return table(f"{title}; {size / 1e6:,.1f} MB of gradients", rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, 1 if the check failed, or 130 if it was interrupted; exits with 2 on bad input."""
    parser = _parser()
    options = parser.parse_args(arguments)
    tables = []
    try:
        options.model = find_variant(options.model)
        if options.images_per_second:
            tables.append(_inference_table(options))
        if options.step_seconds or options.step_batch:
            tables.append(_training_table(options))
    except (ValueError, OverflowError) as error:
        parser.error(str(error))
    if not (tables or options.check):
        parser.error("expected --images-per-second, --step-seconds and --step-batch, or --check, got none")
    print(*tables, sep="\n", end="\n" * bool(tables), flush=True)
    if not options.check:
        return 0
    from benchmarks import scale_check

    return scale_check.run()


if __name__ == "__main__":
    sys.exit(main())
