"""Runs pytest in copies of the project, again and again, without importing torch, timm and Triton each time.

A process that has imported them, and nothing of the project, waits for requests, a line of JSON each, and
forks: the child is as fresh as a process of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

SECONDS = 1800  # after which a run is stopped
_TIMM = Path(__file__).parent.parent / "crossvit" / "_timm.py"


def run(
    root: Path, arguments: Sequence[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """pytest in the copy of the project at `root`; what it printed is in `stdout`."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        request = {"root": str(root), "arguments": list(arguments), "output": str(output)}
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        print(json.dumps({**request, "environment": dict(environment)}), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(list(arguments), status, output.read_text(errors="replace"), "")


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.terminate)
    return server


def _import_all() -> None:
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401

    specification = importlib.util.spec_from_file_location("_timm_of_tests", _TIMM)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.import_timm()
    with contextlib.suppress(ImportError):  # the tests that need it say so
        import triton.language  # noqa: F401


def _run_and_leave(request: Mapping) -> None:
    """In the child."""
    import faulthandler

    import pytest

    file = os.open(request["output"], os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["root"])
    sys.path[:1] = [request["root"]]
    status = int(pytest.main(request["arguments"]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve() -> None:
    _import_all()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run_and_leave(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
