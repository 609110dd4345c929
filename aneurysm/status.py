"""Status: what is done, running, failed and to do in an experiment, from any other process or host.

    python -m aneurysm.status [outputs/<experiment>] [--failed] [--json] [--watch SECONDS]

Exit codes: 0 nothing failed, 1 something failed, 2 there is nothing to look at.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aneurysm.data.errors import UserError
from aneurysm.sweeps.overview import ExperimentStatus, experiment_status, experiments
from aneurysm.sweeps.tables import print_status


def main(arguments: list[str] | None = None) -> int:
    """Command line of `python -m aneurysm.status`."""
    parser = argparse.ArgumentParser(
        prog="python -m aneurysm.status",
        description="What is done, running, failed and to do in an experiment, and how long it takes yet.",
    )
    parser.add_argument("path", nargs="?", type=Path, default=Path("outputs"), help="outputs/<experiment>")
    parser.add_argument("--failed", action="store_true", help="only what failed, with tracebacks")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="look again and again; Ctrl-C ends it")
    asked = parser.parse_args(arguments)
    if asked.watch is not None and asked.watch <= 0:
        parser.error(f"--watch {asked.watch}: give a positive number of seconds.")
    try:
        while True:
            failed = _show(asked.path, asked.failed, asked.json, clear=asked.watch is not None)
            if asked.watch is None:
                return int(failed)
            time.sleep(asked.watch)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


def _show(path: Path, failed_only: bool, as_json: bool, clear: bool) -> bool:
    """Print every experiment at a path; whether something failed."""
    found = [experiment_status(folder) for folder in experiments(path)]
    if clear and sys.stdout.isatty():
        print("\033[2J\033[H", end="")
    if as_json:
        print(json.dumps([plain(one) for one in found], indent=1, default=str), flush=True)
    else:
        for one in found:
            print_status(one, failed_only)
        sys.stdout.flush()
    return any(one.failed for one in found)


def plain(status: ExperimentStatus) -> dict[str, Any]:
    """An experiment as JSON shows it."""
    groups: dict[str, Any] = {}
    for kind in ("sweeps", "runs"):
        groups[kind] = [
            {**asdict(group), "states": dict(group.states), "seconds_left": group.seconds_left}
            for group in getattr(status, kind)
        ]
    return {"experiment": str(status.folder), "failed": len(status.failed), **groups}


if __name__ == "__main__":
    sys.exit(main())
