"""The cache of what tests compile: keys, processes that want the same, its bound; and pytest in copies."""

from __future__ import annotations

import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import compile_cache, pytest_server

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no c++ on PATH")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_contents_are_those_of_all_that_is_included(tmp_path):
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "a.h").write_text('#include "b.h"\n#include <vector>\n')
    (tmp_path / "common" / "b.h").write_text('#include "a.h"\nint b;\n')
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "other.h").write_text("int other;\n")
    source = tmp_path / "source.cpp"
    source.write_text('  #  include "common/a.h"\n#include <other.h>\n')
    found = compile_cache.contents(source)
    assert len(found) == 3
    assert b"int b;" in found[-1]
    assert b"int other;\n" in compile_cache.contents(source, [tmp_path / "elsewhere"])


def test_a_key_tells_parts_apart():
    keys = [compile_cache.key(parts) for parts in (["ab", "c"], ["a", "bc"], ["abc"], [b"abc", ""])]
    assert len(set(keys)) == 4


def test_what_several_want_is_made_once():
    target, made = compile_cache.folder() / "target", []

    def build(scratch: Path) -> None:
        made.append(scratch)
        time.sleep(0.1)
        (scratch / "target").write_text("made")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: compile_cache.make([target], build), range(4)))
    assert len(made) == 1
    assert target.read_text() == "made"
    assert not made[0].exists()


def test_nothing_is_left_of_what_fails():
    def build(scratch: Path) -> None:
        (scratch / "target").write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        compile_cache.make([compile_cache.folder() / "target"], build)
    assert {p.suffix for p in compile_cache.folder().iterdir()} <= {".lock"}


def test_the_longest_unused_go_first():
    now = time.time()
    ages = {"old": compile_cache.KEEP + 1, "unused": 7200, "used": 3700, "new": 10}
    for name, age in ages.items():
        for file in (compile_cache.folder() / name, compile_cache.folder("triton") / name / "kernel.ptx"):
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(bytes(1000))
            os.utime(file, (now - age, now - age))
        os.utime(compile_cache.folder("triton") / name, (now - age, now - age))
    compile_cache.prune(4500)
    for place in (compile_cache.folder(), compile_cache.folder("triton")):
        assert sorted(p.name for p in place.iterdir() if p.name != "triton") == ["new", "used"]
    compile_cache.prune(0)
    assert sorted(p.name for p in compile_cache.folder("triton").iterdir()) == ["new"], "somebody may read it"


@needs_compiler
def test_the_launcher_compiles_what_has_changed(tmp_path, capfd):
    source, header, output = tmp_path / "one.cpp", tmp_path / "one.h", tmp_path / "one.o"
    source.write_text('#include "one.h"\nint one() { return ONE; }\n')
    header.write_text("#define ONE 1\n")

    def kept() -> int:
        assert compile_cache.launch(["c++", "-O1", "-c", str(source), "-o", str(output)]) == 0
        assert output.stat().st_size > 0
        output.unlink()
        return len(list(compile_cache.folder().glob("*.o")))

    assert [kept(), kept()] == [1, 1]
    header.write_text("#define ONE 2\n")
    assert kept() == 2
    header.write_text("#define ONE 1\n")
    assert kept() == 2
    source.write_text("nonsense\n")
    assert compile_cache.launch(["c++", "-c", str(source), "-o", str(output)]) == 1
    assert "nonsense" in capfd.readouterr().err
    assert not output.exists()
    assert compile_cache.launch([sys.executable, "-c", "raise SystemExit(3)"]) == 3


def test_pytest_in_a_copy(tmp_path):
    """Each run is fresh, in its folder, with its environment alone."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "module.py").write_text(f"NAME = {name!r}\n")
        (tmp_path / name / "test_it.py").write_text(
            "import os, sys, module\n"
            "def test_it():\n"
            f"    assert (module.NAME, os.environ['WHERE']) == ({name!r}, {name!r})\n"
            "    assert 'crossvit_kernels' not in sys.modules\n    assert 'torch' in sys.modules\n"
        )

    def run(name: str, where: str) -> tuple[int, str]:
        environment = {"WHERE": where, "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        done = pytest_server.run(tmp_path / name, ["-q", "-p", "no:cacheprovider"], environment)
        return done.returncode, done.stdout

    assert run("first", "first")[0] == 0
    assert run("second", "second")[0] == 0
    status, output = run("second", "elsewhere")
    assert status == 1
    assert "1 failed" in output
