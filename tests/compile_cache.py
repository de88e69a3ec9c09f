"""What compilers made for the tests, kept in the user's cache folder until an input changes.

Keys are made of contents, never of places: copies of the project share what they have in common, and a
changed header recompiles the sources that include it. Processes that want the same file wait for the first
of them. Run as a program it is a launcher as ccache is one: CXX="python compile_cache.py c++".
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path

from filelock import FileLock

# The most bytes that are kept, the time after which nobody asks again, and that in which somebody may read.
LIMIT, KEEP, IN_USE = 2 * 2**30, 14 * 24 * 3600, 3600
_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"\n]+)[>"]', re.MULTILINE)


def folder(name: str = "") -> Path:
    """The folder of what is kept, made where it is missing; `name` is a part of it."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    found = caches / "crossvit-kernels-tests" / name
    found.mkdir(parents=True, exist_ok=True)
    return found


def key(parts: Iterable[bytes | str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def contents(source: Path, folders: Sequence[Path] = ()) -> list[bytes]:
    """The source and all files that it includes, from beside the includer or from `folders`.

    Conditions are not evaluated, so that there may be too many; what is found nowhere is the compiler's own,
    for whose version the key has to stand.
    """
    seen, todo, found = {source.resolve()}, [source.resolve()], []
    while todo:
        path = todo.pop()
        data, names = _read(path)
        found.append(data)
        for name in names:
            place = next((p for p in (Path(f, name) for f in (path.parent, *folders)) if p.is_file()), None)
            if place is not None and (place := place.resolve()) not in seen:
                seen.add(place)
                todo.append(place)
    return found


def _read(path: Path) -> tuple[bytes, list[str]]:
    data = path.read_bytes()
    return data, [os.fsdecode(name) for name in _INCLUDE.findall(data)]


def make(targets: Sequence[Path], build: Callable[[Path], None]) -> None:
    """Let `build` write files of the targets' names into a scratch folder, unless the targets are there."""
    with FileLock(targets[0].with_name(f"{targets[0].name}.lock")):
        if all(target.exists() for target in targets):
            for target in targets:
                os.utime(target)  # it is in use
            return
        with tempfile.TemporaryDirectory(dir=targets[0].parent) as scratch:
            build(Path(scratch))
            for target in targets:
                os.replace(Path(scratch) / target.name, target)


def prune(limit: int = LIMIT) -> None:
    """Delete what is too old, then the longest unused until the rest is within the limit."""
    now, entries = time.time(), []
    for place in (folder(), folder("triton")):
        for path in place.iterdir():
            if path != folder("triton"):
                try:
                    entries.append((path.stat().st_mtime, _bytes(path), path))
                except FileNotFoundError:
                    continue  # another process was faster
    total = sum(size for _, size, _ in entries)
    for used, size, path in sorted(entries):
        if now - used > KEEP or (total > limit and now - used > IN_USE):
            total -= size
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _bytes(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.iterdir())


def run(command: Sequence[str]) -> str:
    """What the command prints; its errors are raised as RuntimeError."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}")
    return done.stdout


@cache
def version(*compiler: str) -> str:
    return run([*compiler, "--version"])


def launch(command: Sequence[str]) -> int:
    """Run a C++ compiler, or take the object that it made of the same input before; the exit status."""
    words = list(command)
    sources = [word for word in words if word.endswith(".cpp")]
    if "-c" not in words or "-o" not in words or len(sources) != 1:
        return subprocess.run(words).returncode
    output = words.index("-o") + 1
    source, target = Path(sources[0]), Path(words[output])
    folders = [Path(word[2:]) for word in words if word.startswith("-I")]
    options = [word for word in words if word not in (sources[0], words[output])]
    compiler = takewhile(lambda word: not word.startswith("-"), words)
    kept = folder() / f"{source.stem}-{key([version(*compiler), *options, *contents(source, folders)])}.o"

    def build(scratch: Path) -> None:
        run([*words[:output], str(scratch / kept.name), *words[output + 1 :]])

    try:
        make([kept], build)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    shutil.copyfile(kept, target)
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
