"""Weights: names, files good and bad, adaptation, downloads from servers of this test's own."""

from __future__ import annotations

import hashlib
import http.server
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from crossvit import create_model, load_weights
from crossvit.variants import VARIANTS
from crossvit.weights import IBM_URL_VARIABLE, fetch, find_cached, from_ibm, read_checkpoint, to_ibm
from tests.operations import relative_error

TINY = VARIANTS["crossvit_tiny_240"]


@pytest.fixture(scope="module")
def released():
    """A stand-in for the released weights of the smallest model."""
    torch.manual_seed(11)
    return create_model("crossvit_tiny")


@pytest.fixture
def state(released):
    return {key: value.clone() for key, value in released.state_dict().items()}


def assert_same(model, state) -> None:
    mine = model.state_dict()
    assert mine.keys() == state.keys()
    assert all(torch.equal(mine[key], value) for key, value in state.items())


def test_names_of_ibm_and_back(state):
    ibm = to_ibm(state)
    assert set(state) - set(ibm) == {"pos_embed_0", "pos_embed_1", "cls_token_0", "cls_token_1"}
    assert set(ibm) - set(state) == {"pos_embed.0", "pos_embed.1", "cls_token.0", "cls_token.1"}
    assert list(from_ibm(ibm)) == list(state)


@pytest.mark.parametrize("form", ["safetensors", "pth", "ibm", "wrapped", "ddp", "compiled", "legacy"])
def test_every_form_of_file(form, state, tmp_path):
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        save_file(state, path)
    else:
        content = {
            "pth": state,
            "ibm": to_ibm(state),
            "wrapped": {"model": to_ibm(state), "epoch": 3},
            "ddp": {"state_dict": {f"module.{key}": value for key, value in state.items()}},
            "compiled": {"model": {f"_orig_mod.{key}": value for key, value in state.items()}},
            "legacy": state,
        }[form]
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    model = create_model("crossvit_tiny", checkpoint_path=path)
    assert_same(model, state)


@pytest.mark.parametrize("low_byte", [0x20, 0x80])
def test_a_header_of_any_length_is_recognised(low_byte, state, tmp_path):
    """A safetensors file begins with a length, which may look like a space and a "<", or like a pickle."""
    path = tmp_path / "weights.safetensors"
    save_file(state, path, metadata={"note": ""})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    wanted = next(n for n in range(length, 1 << 20) if n % 256 == low_byte and (n >> 8) % 256 == 0x3C)
    save_file(state, path, metadata={"note": "x" * (wanted - length)})
    assert path.read_bytes()[:2] == bytes((low_byte, 0x3C))
    assert read_checkpoint(path).keys() == state.keys()


class Malicious:
    def __reduce__(self):
        return os.system, ("echo should never run",)


def bad_file(kind: str, state: dict, path: Path) -> None:
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "html":
        path.write_text("<!DOCTYPE html><html>Not found</html>")
    elif kind == "lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif kind == "noise":
        path.write_bytes(bytes(range(256)) * 8)
    elif kind == "truncated pth":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-5000])
    elif kind == "truncated safetensors":
        save_file(state, path)
        path.write_bytes(path.read_bytes()[:-5000])
    elif kind == "code":
        torch.save({"model": Malicious()}, path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "not tensors":
        torch.save({"epoch": 3, "lr": 0.1}, path)


BAD = {
    "empty": "is empty",
    "html": "web page",
    "lfs": "Git LFS pointer",
    "noise": "not a whole .safetensors file",
    "truncated pth": "not a whole PyTorch checkpoint",
    "truncated safetensors": "not a whole .safetensors file",
    "code": "not a whole PyTorch checkpoint of plain tensors",
    "list": "holds no state dict of named tensors, but list",
    "not tensors": "epoch, lr are not tensors",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_explained_and_change_nothing(kind, state, tmp_path, capfd):
    path = tmp_path / "weights.bin"
    bad_file(kind, state, path)
    model = create_model("crossvit_tiny")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=BAD[kind]) as caught:
        load_weights(model, path)
    assert str(path) in str(caught.value)
    assert_same(model, before)
    assert "should never run" not in capfd.readouterr().out


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no weights file .*nothing.pth"):
        read_checkpoint(tmp_path / "nothing.pth")


def test_foreign_weights_are_explained_and_change_nothing(state):
    model = create_model("crossvit_tiny")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrong_width = create_model("crossvit_9").state_dict()
    missing = {key: value for key, value in state.items() if not key.startswith("blocks.1.")}
    for bad, words in (
        (wrong_width, r"blocks.0.blocks.0.0.attn.proj.bias must have shape \[96\], got \[128\]"),
        (missing, r"it lacks blocks.1.blocks.0.0.attn.proj.bias \[96\]"),
        ({**state, "extra": torch.zeros(2)}, r"it has, and the model has not, extra \[2\]"),
    ):
        with pytest.raises(ValueError, match=words):
            load_weights(model, bad)
        assert_same(model, before)


def test_another_number_of_classes(state, caplog):
    model = create_model("crossvit_tiny", num_classes=10)
    heads = [head.weight.clone() for head in model.head]
    with caplog.at_level(logging.WARNING):
        changes = load_weights(model, state)
    assert changes == ["its heads for 1000 classes were left out; the model keeps its own for 10 classes"]
    assert changes[0] in caplog.text
    assert all(torch.equal(head.weight, old) for head, old in zip(model.head, heads, strict=True))
    assert torch.equal(model.norm[0].weight, state["norm.0.weight"])
    headless = create_model("crossvit_tiny", num_classes=0)
    assert load_weights(headless, state) == ["its heads for 1000 classes were left out; the model has none"]


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_another_number_of_channels(state, channels):
    from timm.models import adapt_input_conv

    model = create_model("crossvit_tiny", in_chans=channels)
    changes = load_weights(model, state)
    assert len(changes) == 2
    assert f"to {channels} input channels" in changes[0]
    want = adapt_input_conv(channels, state["patch_embed.0.proj.weight"])
    assert relative_error(model.patch_embed[0].proj.weight.detach(), want) < 1e-6


def test_another_image_size(state, released):
    model = create_model("crossvit_tiny", img_size=(256, 128))
    changes = load_weights(model, state)
    assert changes == [
        "pos_embed_0 was resized from 20x20 to 21x10 patches (bicubic)",
        "pos_embed_1 was resized from 14x14 to 15x7 patches (bicubic)",
    ]
    reference = create_model("crossvit_tiny")
    load_weights(reference, state)
    reference.set_input_size((256, 128))
    assert_same(model, reference.state_dict())
    # The way back: the grid of such weights cannot be guessed, and guessing is refused.
    with pytest.raises(ValueError, match="holds 210 patches, which is no square grid"):
        load_weights(create_model("crossvit_tiny"), model.state_dict())


def test_a_weights_file_and_pretrained_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="exclude each other"):
        create_model("crossvit_tiny", True, checkpoint_path=tmp_path)


def test_no_weights_for_the_unreleased_model():
    with pytest.raises(ValueError, match="no weights of crossvit_18_dagger_504 were released"):
        create_model("crossvit_18_dagger_480", pretrained=True)


# Downloads


class Server(http.server.BaseHTTPRequestHandler):
    """The part of the hub, and of a release page, that a download needs."""

    files: dict[str, bytes]
    fault: str = ""

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(send_body=False)

    def do_GET(self) -> None:
        self.answer(send_body=True)

    def answer(self, send_body: bool) -> None:
        body = self.files.get(self.path.split("?")[0])
        if body is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        sha = hashlib.sha256(body).hexdigest()
        if self.fault == "wrong content" and send_body:
            body = body[:-4] + b"\x00\x01\x02\x03"
        self.send_response(200)
        self.send_header("ETag", f'"{sha}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if send_body:
            self.wfile.write(body[: len(body) // 2] if self.fault == "cut off" else body)


@pytest.fixture
def server():
    handler = type("Handler", (Server,), {"files": {}, "fault": ""})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        handler.url = f"http://127.0.0.1:{running.server_port}"
        yield handler
        running.shutdown()


@pytest.fixture
def ibm(server, monkeypatch, tmp_path, state):
    torch.save(to_ibm(state), tmp_path / "served.pth")
    server.files[f"/{TINY.ibm_file}"] = (tmp_path / "served.pth").read_bytes()
    monkeypatch.setenv(IBM_URL_VARIABLE, server.url)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return server


def test_weights_of_ibm(ibm, state, monkeypatch):
    assert TINY.ibm_file == "crossvit_tiny_224.pth"
    assert_same(create_model("crossvit_tiny_224", pretrained="ibm"), state)
    ibm.files.clear()  # the second time nothing is downloaded
    assert_same(create_model("crossvit_tiny", pretrained="ibm"), state)
    assert find_cached(TINY) == fetch(TINY, "ibm")
    assert fetch(TINY, "ibm").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("fault", "words"),
    [("cut off", "broke off after .* of .* bytes"), ("html", "web page"), ("404", "404")],
)
def test_failed_downloads_leave_nothing(ibm, fault, words):
    name = f"/{TINY.ibm_file}"
    if fault == "html":
        ibm.files[name] = b"<html>moved</html>"
    elif fault == "404":
        ibm.files.clear()
    ibm.fault = fault
    with pytest.raises(RuntimeError, match=words):
        fetch(TINY, "ibm")
    assert list(Path(torch.hub.get_dir()).rglob("*.p*")) == []


def test_offline_is_honoured(ibm, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RuntimeError, match="HF_HUB_OFFLINE forbids downloading"):
        fetch(TINY, "ibm")


def run_with_hub(url: str, home: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's client reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **settings, **environment},
    )


HUB_CODE = """
import sys, torch
from crossvit import create_model, VARIANTS
from crossvit.weights import find_cached
model = create_model("crossvit_tiny", pretrained=True)
print(model.norm[0].weight.sum().item(), find_cached(VARIANTS["crossvit_tiny_240"]) is not None)
"""


def test_weights_from_the_hub(server, state, tmp_path):
    state["norm.0.weight"] = torch.full((96,), 0.5)
    save_file(state, tmp_path / "served.safetensors")
    path = "/timm/crossvit_tiny_240.in1k/resolve/main/model.safetensors"
    server.files[path] = (tmp_path / "served.safetensors").read_bytes()
    home = tmp_path / "hub"
    done = run_with_hub(server.url, home, HUB_CODE)
    assert done.stdout.split() == ["48.0", "True"], done.stderr

    server.files.clear()
    again = run_with_hub(server.url, home, HUB_CODE, HF_HUB_OFFLINE="1")
    assert again.stdout.split() == ["48.0", "True"], again.stderr

    for blob in home.rglob("blobs/*"):
        blob.chmod(0o644)
        blob.write_bytes(blob.read_bytes()[:-4] + b"\x00\x01\x02\x03")
    damaged = run_with_hub(server.url, home, HUB_CODE, HF_HUB_OFFLINE="1")
    assert damaged.returncode != 0
    assert "delete it and download again" in damaged.stderr


def test_the_hub_offline_and_empty(server, tmp_path):
    done = run_with_hub(server.url, tmp_path / "hub", HUB_CODE, HF_HUB_OFFLINE="1")
    assert "timm/crossvit_tiny_240.in1k is not in the hub's cache" in done.stderr
    missing = run_with_hub(server.url, tmp_path / "hub", HUB_CODE)
    assert "neither model.safetensors nor pytorch_model.bin" in missing.stderr
