"""The command line as a user meets it, on a small model with a weights file of this test's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

import crossvit.cli
import crossvit.demo
from crossvit import create_model
from crossvit.cli import main
from crossvit.data import open_image, preprocess
from crossvit.variants import VARIANTS

PHOTO = Path(__file__).parent.parent / "examples" / "cat.png"
MODEL = "crossvit_tiny"


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(crossvit.cli, "find_cached", lambda variant: None)
    monkeypatch.setattr(crossvit.demo, "ROUNDS", 6)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "tiny.pth"
    torch.save(create_model(MODEL).state_dict(), path)
    return path


def test_demo_with_random_weights(capsys, tmp_path):
    assert main(["demo", str(PHOTO), "--model", MODEL]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "No weights are at hand, so they are random and the classes below mean nothing." in text
    assert "Largest difference of logits to timm" in text
    assert "class " in text
    assert text.count("peak memory") == 2
    assert text.count(" ms") >= 4
    for name in ("attention.png", "timing.png"):
        picture = matplotlib.image.imread(tmp_path / "out" / name)
        assert picture.shape[0] > 200
        assert picture.std() > 0.05
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["attention.png", "timing.png"]


def test_demo_with_weights_shows_labels(capsys, weights, tmp_path):
    out = tmp_path / "elsewhere"
    assert main(["demo", str(PHOTO), "--model", MODEL, "--weights", str(weights), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "tiny.pth" in text
    assert "random" not in text
    assert "class " not in text
    assert (out / "attention.png").exists()


def test_demo_without_timm_says_so(capsys, monkeypatch):
    def missing():
        raise ImportError("timm is not installed")

    monkeypatch.setattr(crossvit.demo, "import_timm", missing)
    assert main(["demo", str(PHOTO), "--model", MODEL]) == 0
    assert "the reference path of this package" in capsys.readouterr().out


def test_demo_of_the_model_that_timm_lacks(capsys):
    rival, name = crossvit.demo._rival(
        create_model("crossvit_18_dagger_504"), "crossvit_18_dagger_504", "cpu"
    )
    assert "reference path" in name
    assert rival.blocks[0].fusion[0].backend == "reference"


def test_classify(capsys, weights):
    assert (
        main(["classify", str(PHOTO), "--model", MODEL, "--weights", str(weights), "--json", "--top", "3"])
        == 0
    )
    (result,) = json.loads(capsys.readouterr().out)
    model = create_model(MODEL, checkpoint_path=weights).eval()
    with torch.no_grad():
        want = model(preprocess(open_image(PHOTO), VARIANTS["crossvit_tiny_240"]))[0].softmax(-1).topk(3)
    assert [guess["class"] for guess in result["predictions"]] == want.indices.tolist()
    assert [guess["probability"] for guess in result["predictions"]] == pytest.approx(
        want.values.tolist(), rel=1e-4
    )
    assert all(guess["label"] for guess in result["predictions"])
    assert main(["classify", str(PHOTO), str(PHOTO), "--model", MODEL, "--weights", str(weights)]) == 0
    assert capsys.readouterr().out.count("%") == 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["classify", str(PHOTO), "--model", MODEL], "no weights of crossvit_tiny_240 are at hand"),
        (["classify", str(PHOTO), "--weights", "none.pth"], "there is no weights file none.pth"),
        (["demo", "none.png"], "none.png"),
        (["demo", str(PHOTO), "--model", "resnet"], "there is no model 'resnet'"),
        (["demo", str(PHOTO), "--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["classify", str(PHOTO), "--top", "0"], "--top must lie in 1"),
    ],
)
def test_mistakes_are_explained_in_one_line(arguments, words, capsys):
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.startswith("crossvit: ")
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("command", ["demo", "classify"])
@pytest.mark.parametrize(("classes", "words"), [(10, "has heads for 10 classes"), (0, "has no heads")])
def test_weights_for_other_classes_are_not_given_imagenets_names(command, classes, words, capsys, tmp_path):
    path = tmp_path / "other.pth"
    torch.save(create_model(MODEL, num_classes=classes).state_dict(), path)
    assert main([command, str(PHOTO), "--model", MODEL, "--weights", str(path)]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "classify"])
def test_cached_weights_are_used_without_being_named(command, capsys, monkeypatch, weights):
    monkeypatch.setattr(crossvit.cli, "find_cached", lambda variant: weights)
    assert main([command, str(PHOTO), "--model", MODEL]) == 0
    text = capsys.readouterr().out
    assert "random" not in text
    assert "%" in text


def test_models_lists_every_variant(capsys):
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for row in VARIANTS.values() for name in row.names)


def test_the_installed_command():
    command = Path(sys.executable).with_name("crossvit")
    assert subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout.startswith(
        "usage"
    )
