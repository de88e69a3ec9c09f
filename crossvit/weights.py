"""Weights: reading files, converting between timm's and IBM's names, adapting, downloading.

Loading is strict, key for key. What is adapted on purpose (another number of classes or channels, another
image size) is logged as a warning; anything else that does not fit is an error and changes nothing.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import math
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .layers import resize_position_embedding
from .model import CrossViT
from .variants import Variant

logger = logging.getLogger(__name__)

Source = Literal["timm", "ibm"]
SOURCES: tuple[Source, ...] = ("timm", "ibm")
StateDict = dict[str, Tensor]

# Where IBM's release lies; a mirror can be named in the environment.
IBM_URL = "https://github.com/IBM/CrossViT/releases/download/weights-0.1"
IBM_URL_VARIABLE = "CROSSVIT_IBM_URL"

_TOKEN_KEYS = ("pos_embed", "cls_token")


# Names


def from_ibm(state_dict: Mapping[str, Tensor]) -> StateDict:
    """IBM's names -> timm's and this package's: pos_embed.0 -> pos_embed_0. Others pass unchanged."""
    return {re.sub(rf"^({'|'.join(_TOKEN_KEYS)})\.(\d)$", r"\1_\2", key): x for key, x in state_dict.items()}


def to_ibm(state_dict: Mapping[str, Tensor]) -> StateDict:
    """timm's and this package's names -> IBM's: pos_embed_0 -> pos_embed.0. Others pass unchanged."""
    return {re.sub(rf"^({'|'.join(_TOKEN_KEYS)})_(\d)$", r"\1.\2", key): x for key, x in state_dict.items()}


# Files


def read_checkpoint(path: str | os.PathLike[str]) -> StateDict:
    """The tensors of a .safetensors file or of a PyTorch checkpoint, which is never unpickled freely.

    A checkpoint that keeps the weights under "model" or "state_dict" is unwrapped, and what torch.compile and
    DistributedDataParallel put before every name ("_orig_mod.", "module.") is taken off.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated, a web page, or holds something else than named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"{path} is empty: download it again")
    # First of all: a safetensors file begins with the length of its header, which may look like anything.
    is_safetensors = start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size
    is_pickle = not is_safetensors and start.startswith((b"PK\x03\x04", b"\x80"))
    if not is_safetensors and start.lstrip().startswith(b"<"):
        raise ValueError(f"{path} is a web page (HTML or XML), not weights: download it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights: fetch them with git lfs pull")
    try:
        content: Any = _torch_load(path) if is_pickle else _safetensors_load(path)
    except ImportError:
        raise
    except Exception as error:
        kind = "PyTorch checkpoint" if is_pickle else ".safetensors file"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is not a whole {kind} of plain tensors ({reason}): download it again"
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds no state dict of named tensors, but {type(content).__name__}")
    strangers = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if strangers:
        raise ValueError(f"{path} holds no plain state dict: {_some(map(str, strangers))} are not tensors")
    for prefix in ("_orig_mod.", "module."):
        if all(key.startswith(prefix) for key in content):
            content = {key.removeprefix(prefix): value for key, value in content.items()}
    return dict(content)


def _torch_load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _safetensors_load(path: Path) -> StateDict:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            "reading .safetensors needs safetensors: pip install 'crossvit-kernels[hub]'"
        ) from error
    return load_file(path, device="cpu")


def check_classes(path: str | os.PathLike[str], num_classes: int) -> None:
    """Raise ValueError if the heads in a weights file are not for `num_classes` classes."""
    weight = read_checkpoint(path).get("head.0.weight")
    if weight is None or weight.shape[0] != num_classes:
        found = "no heads" if weight is None else f"heads for {weight.shape[0]} classes"
        raise ValueError(f"{path} has {found}, those for {num_classes} are needed: give other weights")


# Loading


def load_weights(model: CrossViT, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> list[str]:
    """Load a file or a state dict, of timm's or of IBM's names, into the model.

    Adapted where the model was built differently, and logged: heads of another number of classes keep their
    initial values, the first convolution is summed or repeated for another number of channels, position
    embeddings are resized (bicubic) for another image size.

    Returns:
        What was adapted, a sentence each.

    Raises:
        FileNotFoundError, ValueError: see `read_checkpoint`; or names or shapes do not fit the model, which
            is then as it was.
    """
    label = "the state dict" if isinstance(source, Mapping) else str(source)
    tensors = from_ibm(source if isinstance(source, Mapping) else read_checkpoint(source))
    expected = model.state_dict()
    changes: list[str] = []
    adapted = _adapt_heads(model, tensors, expected, changes)
    adapted = _adapt_channels(model, adapted, expected, changes)
    adapted = _adapt_positions(model, adapted, expected, changes, label)

    problems = []
    missing, foreign = expected.keys() - adapted.keys(), adapted.keys() - expected.keys()
    if missing:
        problems.append(f"it lacks {_some(_with_shapes(missing, expected))}")
    if foreign:
        problems.append(f"it has, and the model has not, {_some(_with_shapes(foreign, adapted))}")
    for key in sorted(expected.keys() & adapted.keys()):
        if expected[key].shape != adapted[key].shape:
            problems.append(
                f"{key} must have shape {list(expected[key].shape)}, got {list(adapted[key].shape)}"
            )
    if problems:
        shown = "\n  ".join(problems[:6] + ([f"and {len(problems) - 6} more"] if len(problems) > 6 else []))
        raise ValueError(
            f"{label} does not fit this model ({len(adapted)} tensors, {len(expected)} expected):\n  {shown}"
        )
    model.load_state_dict(adapted, strict=True)
    for change in changes:
        logger.warning("%s: %s", label, change)
    return changes


def _with_shapes(keys: set[str], tensors: Mapping[str, Tensor]) -> list[str]:
    return [f"{key} {list(tensors[key].shape)}" for key in sorted(keys)]


def _some(items: Any, count: int = 4) -> str:
    items = list(items)
    return ", ".join(items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")


def _adapt_heads(model: CrossViT, tensors: StateDict, expected: StateDict, changes: list[str]) -> StateDict:
    heads = {key for key in tensors if key.startswith("head.")}
    weight = tensors.get("head.0.weight")
    if weight is None or weight.ndim != 2 or weight.shape[0] == model.num_classes:
        return tensors
    kept = {key: value for key, value in expected.items() if key.startswith("head.")}
    changes.append(
        f"its heads for {weight.shape[0]} classes were left out; the model "
        + (f"keeps its own for {model.num_classes} classes" if kept else "has none")
    )
    return {key: value for key, value in tensors.items() if key not in heads} | kept


def _adapt_channels(
    model: CrossViT, tensors: StateDict, expected: StateDict, changes: list[str]
) -> StateDict:
    tensors = dict(tensors)
    for key, weight in tensors.items():
        if not re.fullmatch(r"patch_embed\.\d\.proj\.(0\.)?weight", key) or key not in expected:
            continue
        channels = model.in_chans
        if weight.ndim != 4 or weight.shape[1] == channels:
            continue
        if channels == 1:
            tensors[key] = weight.float().sum(1, keepdim=True).to(weight.dtype)
            how = "summed"
        else:
            repeats = math.ceil(channels / weight.shape[1])
            repeated = weight.float().repeat(1, repeats, 1, 1)[:, :channels]
            tensors[key] = (repeated * (weight.shape[1] / channels)).to(weight.dtype)
            how = "repeated and scaled"
        changes.append(f"{key} was {how} from {weight.shape[1]} to {channels} input channels")
    return tensors


def _adapt_positions(
    model: CrossViT, tensors: StateDict, expected: StateDict, changes: list[str], label: str
) -> StateDict:
    tensors = dict(tensors)
    if model.class_token != ("cls_token_0" in tensors):
        return tensors  # reported with the other names
    for b, grid in enumerate(model.grid_sizes(model.img_size)):
        key = f"pos_embed_{b}"
        position = tensors.get(key)
        if position is None or position.ndim != 3 or position.shape == expected[key].shape:
            continue
        if position.shape[2] != expected[key].shape[2]:
            continue  # another width: reported with the other shapes
        patches = position.shape[1] - int(model.class_token)
        side = math.isqrt(max(patches, 0))
        if side * side != patches or side == 0:
            raise ValueError(
                f"{label}: {key} holds {patches} patches, which is no square grid, and the model has "
                f"{grid[0]}x{grid[1]}: build the model for the weights' own image size, load, and then call "
                "set_input_size"
            )
        tensors[key] = resize_position_embedding(position, (side, side), grid)
        changes.append(f"{key} was resized from {side}x{side} to {grid[0]}x{grid[1]} patches (bicubic)")
    return tensors


# Downloads


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def _require_released(variant: Variant) -> None:
    if not variant.released:
        raise ValueError(f"no weights of {variant.name} were released")


def fetch(variant: Variant, source: Source = "timm") -> Path:
    """The weights file of a released model, from the cache or downloaded into it.

    Raises:
        ValueError: no weights were released, or there is no such source.
        ImportError: the hub's client is not installed.
        RuntimeError: the download failed or was refused offline, or the file is not the announced one.
    """
    if source not in SOURCES:
        raise ValueError(f"weights come from {' or '.join(SOURCES)}, got {source!r}")
    _require_released(variant)
    return _fetch_from_hub(variant) if source == "timm" else _fetch_from_ibm(variant)


def find_cached(variant: Variant) -> Path | None:
    """The weights file of a model if an earlier download left it here; nothing is downloaded."""
    if not variant.released:
        return None
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        pass
    else:
        cached = try_to_load_from_cache(str(variant.timm_hub_id), "model.safetensors")
        if isinstance(cached, str):
            return Path(cached)
    path = _ibm_cache_path(variant)
    return path if path.is_file() else None


def _fetch_from_hub(variant: Variant) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(
            "downloading from the hub needs huggingface_hub: pip install 'crossvit-kernels[hub]'"
        ) from error
    hub_id = str(variant.timm_hub_id)
    for name in ("model.safetensors", "pytorch_model.bin"):
        try:
            path = Path(hf_hub_download(hub_id, name))
        except LocalEntryNotFoundError as error:
            raise RuntimeError(
                f"{hub_id} is not in the hub's cache and cannot be downloaded ({_first_line(error)}): "
                "connect, or give a file"
            ) from error
        except EntryNotFoundError:
            continue
        except Exception as error:
            raise RuntimeError(f"downloading {hub_id} failed: {_first_line(error)}") from error
        # In the hub's cache a large file lies under the name of its SHA-256.
        blob = path.resolve()
        if re.fullmatch(r"[0-9a-f]{64}", blob.name):
            _check_sha256(blob, blob.name)
        return path
    raise RuntimeError(f"{hub_id} holds neither model.safetensors nor pytorch_model.bin")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_sha256(path: Path, expected: str) -> None:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    digest = sha.hexdigest()
    if digest != expected:
        raise RuntimeError(f"{path} has SHA-256 {digest}, expected {expected}: delete it and download again")


def _ibm_cache_path(variant: Variant) -> Path:
    return Path(torch.hub.get_dir(), "checkpoints", str(variant.ibm_file))


def _fetch_from_ibm(variant: Variant) -> Path:
    """IBM publishes no checksums, so the size that the server announces is what the file is held against."""
    target = _ibm_cache_path(variant)
    if target.is_file():
        return target
    url = f"{os.environ.get(IBM_URL_VARIABLE, IBM_URL).rstrip('/')}/{variant.ibm_file}"
    if _offline():
        raise RuntimeError(f"{target} is not there and HF_HUB_OFFLINE forbids downloading {url}")
    target.parent.mkdir(parents=True, exist_ok=True)
    logger.info("downloading %s to %s", url, target)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=60) as response:
            announced = response.headers.get("Content-Length")
            shutil.copyfileobj(response, file, 1 << 20)
            written = file.tell()
        if announced is not None and written != int(announced):
            raise RuntimeError(f"downloading {url} broke off after {written} of {announced} bytes: try again")
        read_checkpoint(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = _first_line(error).replace(temporary, "the file")
        raise RuntimeError(f"downloading {url} failed: {reason}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target
