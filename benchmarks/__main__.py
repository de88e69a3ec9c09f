"""`python -m benchmarks report`, `compare` and `scale`; each has --help."""

from __future__ import annotations

import sys

from benchmarks import compare, report, scale

COMMANDS = {"report": report.main, "compare": compare.main, "scale": scale.main}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"usage: python -m benchmarks {{{','.join(COMMANDS)}}} ...", file=sys.stderr)
        return 2
    return COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
