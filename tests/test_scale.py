"""Scale on paper, against figures by hand and simulations that pass every chunk on."""

from __future__ import annotations

import math
import multiprocessing
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks import scale_check
from benchmarks.scale import (
    Cluster,
    Gradients,
    Recipe,
    Step,
    all_reduce_seconds,
    communication,
    inference,
    main,
    ring_seconds,
    training,
)
from benchmarks.scale_check import compared
from crossvit import find_variant

ROOT = Path(__file__).parents[1]
Parts = list[list[np.ndarray]]  # of each device, its chunks


def passed_on(parts: Parts, first: int, adds: bool, bandwidth: float, latency: float) -> float:
    """n - 1 rounds in which device i sends chunk i + first - round to the next; seconds."""
    count, seconds = len(parts), 0.0
    for index in range(count - 1):
        sent = [((i + first - index) % count, i) for i in range(count)]
        chunks = [parts[i][chunk].copy() for chunk, i in sent]
        for (chunk, i), values in zip(sent, chunks, strict=True):
            target = parts[(i + 1) % count][chunk]
            target[...] = target + values if adds else values
        seconds += max(latency + values.nbytes / bandwidth for values in chunks)
    return seconds


def ring(devices: Sequence[np.ndarray], bandwidth: float, latency: float) -> float:
    """All-reduces in place; seconds."""
    parts = [np.split(values, len(devices)) for values in devices]
    reduced = passed_on(parts, 0, True, bandwidth, latency)
    return reduced + passed_on(parts, 1, False, bandwidth, latency)


def on_nodes(nodes: Sequence[Sequence[np.ndarray]], cluster: Cluster) -> float:
    """All-reduces in place: in each node, between nodes, in each node; seconds."""
    count = len(nodes[0])
    parts = [[np.split(values, count) for values in node] for node in nodes]
    reduced = max(passed_on(node, 0, True, cluster.link, cluster.latency) for node in parts)
    between = max(
        ring([node[i][(i + 1) % count] for node in parts], cluster.network / count, cluster.latency)
        for i in range(count)
    )
    return reduced + between + max(passed_on(node, 1, False, cluster.link, cluster.latency) for node in parts)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize("latency", [0.0, 0.3])
def test_ring_is_what_passing_chunks_on_takes(devices, latency):
    values = np.random.default_rng(0).integers(9, size=(devices, 48)).astype(float)
    total = values.sum(0)
    size = values[0].nbytes
    seconds = ring(list(values), 100.0, latency)
    assert (values == total).all()
    assert ring_seconds(devices, size, 100.0, latency) == pytest.approx(seconds)


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 4), (2, 4), (3, 2), (4, 1)])
def test_nodes_are_what_passing_chunks_on_takes(nodes, per_node):
    cluster = Cluster(per_node, link=1000.0, network=300.0, latency=0.1)
    values = np.random.default_rng(0).integers(9, size=(nodes, per_node, 96)).astype(float)
    total = values.sum((0, 1))
    size = values[0, 0].nbytes
    seconds = on_nodes([list(node) for node in values], cluster)
    assert (values == total).all()
    assert all_reduce_seconds(nodes * per_node, size, cluster) == pytest.approx(seconds)


def test_two_devices_send_all_bytes_once():
    assert ring_seconds(2, 500.0, 100.0, 0.0) == 5.0
    assert ring_seconds(2, 500.0, 100.0, 0.25) == 5.5


def test_sixteen_devices_by_hand():
    """In the node 2 * 7/8 * 800 / 100 = 14 s, between 2 nodes 800 / 8 at 40 / 8 = 20 s, 16 messages."""
    cluster = Cluster(8, link=100.0, network=40.0, latency=0.5)
    assert all_reduce_seconds(16, 800.0, cluster) == pytest.approx(14 + 20 + 16 * 0.5)
    assert all_reduce_seconds(9, 800.0, cluster) == all_reduce_seconds(16, 800.0, cluster)


@pytest.mark.parametrize("backward", [0.0, 1.0, 20.0, 100.0])
@pytest.mark.parametrize("buckets", [1, 2, 5])
def test_exposed_is_what_buckets_in_a_queue_leave(buckets, backward):
    cluster = Cluster(link=100.0)
    each = 1000.0 / buckets / 100.0  # seconds between two devices
    end = 0.0
    for index in range(buckets):
        end = max(end, backward * (index + 1) / buckets) + each
    gradients = Gradients(1000.0, bucket=1000.0 / buckets)
    assert communication(2, gradients, backward, cluster) == pytest.approx((10.0, end - backward))


def test_overlap_bounds_what_is_exposed():
    cluster, parts = Cluster(link=100.0), {"size": 1000.0, "bucket": 250.0}
    found = [communication(2, Gradients(**parts, overlap=o), 6.0, cluster)[1] for o in (0.0, 0.5, 1.0)]
    assert found == pytest.approx([10.0, 7.0, 4.0])
    assert communication(2, Gradients(**parts, overlap=1.0), 60.0, cluster)[1] == 2.5


def test_a_billion_images_on_one_device():
    job = inference(1, 1000.0, Cluster(price=3.0), batch=1)
    assert (job.images_per_second, job.binds) == (1000.0, "device")
    assert job.hours == pytest.approx(1e6 / 3600)
    assert job.device_hours == pytest.approx(1e6 / 3600)
    assert job.cost == pytest.approx(1e6 / 1200)
    assert inference(1, 1000.0, Cluster()).cost is None


def test_parts_are_whole_batches():
    """Of 10 batches of 100, the slowest of 3 devices has 4: 40 s at 10 images/s; with 20 devices it has 1."""
    assert inference(3, 10.0, Cluster(), images=1000, batch=100).hours == pytest.approx(40 / 3600)
    assert inference(3, 10.0, Cluster(), images=901, batch=100).hours == pytest.approx(40 / 3600)
    assert inference(20, 10.0, Cluster(), images=1000, batch=100).hours == pytest.approx(10 / 3600)


def test_the_limit_that_binds():
    cluster = Cluster(devices_per_node=4, input=20.0)
    few, many = (inference(n, 10.0, cluster, images=1600, batch=1, startup=1.0) for n in (2, 8))
    assert (few.binds, few.images_per_second, few.hours * 3600) == ("device", 20.0, pytest.approx(81.0))
    assert (many.binds, many.images_per_second, many.hours * 3600) == ("input", 40.0, pytest.approx(41.0))
    late = inference(8, 10.0, cluster, images=1600, batch=1, startup=60.0)
    assert (late.binds, late.hours * 3600) == ("startup", pytest.approx(100.0))


def test_more_devices_are_faster_and_never_cheaper():
    cluster = Cluster(price=2.0, input=5000.0)
    jobs = [inference(n, 900.0, cluster, startup=30.0) for n in (1, 10, 100, 1000, 10_000)]
    assert [j.hours for j in jobs] == sorted((j.hours for j in jobs), reverse=True)
    assert [j.cost for j in jobs] == sorted(j.cost for j in jobs)


def test_one_device_trains_without_communication():
    """64 micro-batches of half a second, 313 steps an epoch."""
    job = training(1, Step(0.5, 64), Gradients(1e9), Cluster(price=2.0, latency=1.0), Recipe())
    assert (job.batch, job.micro_batches, job.all_reduce, job.exposed) == (4096, 64, 0.0, 0.0)
    assert (job.step, job.efficiency) == (32.0, 1.0)
    assert job.hours == pytest.approx(300 * 313 * 32 / 3600)
    assert job.cost == pytest.approx(2 * 300 * 313 * 32 / 3600)


def test_training_on_two_nodes_by_hand():
    """4 buckets of 2 + 2 s beside 0.75 of 8 s: exposed 4 + 12 - 6; 5 images are 3 micro-batches of 12 s."""
    cluster = Cluster(2, link=100.0, network=100.0)
    step, gradients = Step(12.0, 2, backward=2 / 3), Gradients(800.0, bucket=200.0)
    job = training(4, step, gradients, cluster, Recipe(images=41, epochs=2, batch=20))
    assert (job.batch, job.micro_batches) == (5, 3)
    assert (job.all_reduce, job.exposed, job.step) == pytest.approx((16.0, 10.0, 46.0))
    assert job.efficiency == pytest.approx(10 * 12 / (4 * 46))
    assert job.device_hours == pytest.approx(4 * 2 * 3 * 46 / 3600)


def test_training_scales_until_communication_binds():
    cluster = Cluster(link=1e10, network=1e9, latency=1e-5)
    gradients = Gradients(4.0 * find_variant("crossvit_18").parameters)
    jobs = [training(n, Step(0.1, 64), gradients, cluster, Recipe()) for n in (1, 2, 4, 8, 16, 32, 64)]
    assert [j.efficiency for j in jobs] == sorted((j.efficiency for j in jobs), reverse=True)
    assert [j.hours for j in jobs] == sorted((j.hours for j in jobs), reverse=True)
    assert all(0 < j.efficiency <= 1 and j.exposed <= j.all_reduce for j in jobs)


INFERENCE = ["--images-per-second", "1000", "--inference-batch", "1"]
TRAINING = ["--step-seconds", "0.5", "--step-batch", "64"]
LINKS = ["--link-bytes-per-second", "1e9", "--network-bytes-per-second", "1e9"]


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]


def test_the_inference_table(capsys):
    assert main([*INFERENCE, "--price-per-hour", "3.6", "--input-bytes-per-second", "5.772e8"]) == 0
    header, _, *lines = rows(capsys.readouterr().out)
    assert header == ["devices", "images/s", "hours", "device-hours", "cost", "binds"]
    assert [line[0] for line in lines] == ["1", "10", "100", "1,000", "10,000"]
    assert lines[0] == ["1", "1,000", "278", "278", "1,000", "device"]
    assert lines[2] == ["100", "62,500", "4.44", "444", "1,600", "input"]


def test_the_training_table(capsys):
    assert main([*TRAINING, *LINKS, "--gradient-bytes", "2", "--model", "crossvit_9"]) == 0
    text = capsys.readouterr().out
    assert "crossvit_9_240, 300 epochs of 1,281,167 images, predicted; 17.1 MB of gradients" in text
    header, _, *lines = rows(text)
    assert header[-3:] == ["efficiency", "days", "device-hours"]
    assert [line[0] for line in lines] == ["1", "2", "4", "8", "16", "32", "64"]
    assert lines[0] == ["1", "4,096", "64", "32,000", "0", "0", "100.0%", "34.8", "835"]
    assert lines[1][:6] == ["2", "2,048", "32", "16,017", "17.1", "17.1"]


def test_links_are_needed_only_where_they_are_used(capsys):
    assert main([*TRAINING, "--training-devices", "1"]) == 0
    assert main([*TRAINING, "--training-devices", "1", "8", *LINKS[:2]]) == 0
    assert main([*TRAINING, "--devices-per-node", "1", *LINKS[2:]]) == 0
    assert len(rows(capsys.readouterr().out)) == 3 + 4 + 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --images-per-second, --step-seconds and --step-batch, or --check, got none"),
        (["--images-per-second", "-3"], "--images-per-second: expected a number above 0, got '-3'"),
        (["--images-per-second", "nan"], "--images-per-second: expected a number above 0, got 'nan'"),
        (["--images-per-second", "fast"], "--images-per-second: expected a number above 0, got 'fast'"),
        ([*INFERENCE, "--price-per-hour", "inf"], "--price-per-hour: expected a number above 0, got 'inf'"),
        ([*INFERENCE, "--devices", "1", "0"], "--devices: expected a whole number of at least 1, got '0'"),
        ([*INFERENCE, "--devices", "2.5"], "--devices: expected a whole number of at least 1, got '2.5'"),
        (
            [*INFERENCE, "--startup-seconds", "-1"],
            "--startup-seconds: expected a number of at least 0, got '-1'",
        ),
        (TRAINING[:2], "expected --step-batch for training, got none"),
        (TRAINING[2:], "expected --step-seconds for training, got none"),
        (TRAINING, "expected --link-bytes-per-second for training on 64 devices, got none"),
        (
            [*TRAINING, *LINKS[:2]],
            "expected --network-bytes-per-second for training on 64 devices, 8 a node, got none",
        ),
        ([*TRAINING, *LINKS, "--overlap", "1.5"], "--overlap: expected a share from 0 to 1, got '1.5'"),
        (
            [*TRAINING, *LINKS, "--batch", "32"],
            "expected at most 32 devices, one an image of a batch, got 64",
        ),
        ([*INFERENCE, "--model", "resnet"], "there is no model 'resnet'; known are crossvit_tiny_240"),
    ],
)
def test_bad_input_is_named_before_anything_runs(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(scale_check, "check", lambda rounds: pytest.fail("ran"))
    with pytest.raises(SystemExit) as error:
        main([*arguments, "--check"] if arguments else [])
    assert error.value.code == 2
    out, err = capsys.readouterr()
    assert message in err
    assert not out


def test_the_check_says_where_it_differs(capsys, monkeypatch):
    """40 images/s predicted of 32; 0.2 s and half of 0.02 s predicted of 0.2 s."""
    seconds = {"alone": 0.1, "together": 0.125, "all-reduce": 0.02, "compute": 0.2, "step": 0.2}
    monkeypatch.setattr(scale_check, "check", lambda rounds: compared([seconds] * rounds))
    assert main(["--check"]) == 0
    _, _, images, step = rows(capsys.readouterr().out)
    assert images[:3] == ["inference, images/s", "40", "32"]
    assert images[3:5] == ["+25% (+25% to +25%)", "DIFFERS by more than 20 %"]
    assert step[:3] == ["training step, s", "0.21", "0.2"]
    assert step[3:5] == ["+5% (+5% to +5%)", "within 20 %"]


def test_the_check_measures_here(capsys, monkeypatch):
    monkeypatch.setattr(scale_check, "ROUNDS", 2)
    assert main(["--check"]) == 0
    _, _, *lines = rows(capsys.readouterr().out)
    assert [line[0] for line in lines] == ["inference, images/s", "training step, s"]
    assert all(math.isfinite(float(figure)) and float(figure) > 0 for line in lines for figure in line[1:3])
    assert not multiprocessing.active_children()


def test_an_interrupted_check_leaves_no_process():
    command = [sys.executable, "-m", "benchmarks.scale", "--check"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        process.stderr.read(len("measuring."))
        children = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (130, 0)  # Python loses an interrupt that falls into a finaliser
        assert len(children) >= 2
        assert not psutil.wait_procs(children, 10)[1]
