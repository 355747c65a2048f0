"""`python -m seqzoo ...`, `seqzoo ...` and `lightning ...` are one command."""

from __future__ import annotations

import sys


def main() -> None:
    from .pipelines.cli import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
