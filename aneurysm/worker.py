"""`python -m aneurysm.worker <folder>`: one of the processes that train together, started by `train`."""

import sys
from pathlib import Path

from aneurysm.command_line import log_to_terminal
from aneurysm.runs.launch import work
from aneurysm.train import train


def main() -> int:
    """Train in this process as one of several; the exit code."""
    log_to_terminal()
    return work(Path(sys.argv[1]), train)


if __name__ == "__main__":
    sys.exit(main())
