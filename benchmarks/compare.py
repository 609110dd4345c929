"""How long a comparison takes: command to page, for 40 and for 1000 runs of a synthetic sweep.

    OMP_NUM_THREADS=1 python benchmarks/compare.py [--repeats 5] [--runs 40 1000]

Wall and CPU seconds of the whole command in its own process, imports included; the fastest of the repeats.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "compare"))
from synthetic_runs import EXPERT, changed, sweep

DIMS, FOLDS, SEEDS = (2, 4, 8, 16, 32), 4, 2


def main() -> None:
    """Make the sweeps and time the command on them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--runs", type=int, nargs="+", default=[40, 1000])
    arguments = parser.parse_args()
    print(f"{'runs':>6} {'variants':>9} {'wall s':>8} {'CPU s':>7} {'page kB':>8}")
    for runs in arguments.runs:
        with tempfile.TemporaryDirectory() as folder:
            experiment = Path(folder) / "sweep"
            each = len(DIMS) * FOLDS * SEEDS
            for k in range(max(1, runs // each)):
                base = changed(EXPERT, expert__lr=0.001 * (k + 1))
                sweep(experiment, {d: 0.01 * i for i, d in enumerate(DIMS)}, FOLDS, SEEDS, base=base)
            found = [timed(experiment) for _ in range(arguments.repeats)]
            size = (experiment / "compare" / "compare.html").stat().st_size
            variants = len(DIMS) * max(1, runs // each)
            wall, cpu = min(w for w, _ in found), min(c for _, c in found)
            print(f"{variants * FOLDS * SEEDS:>6} {variants:>9} {wall:>8.2f} {cpu:>7.2f} {size / 1000:>8.0f}")


def timed(experiment: Path) -> tuple[float, float]:
    """(wall, CPU) seconds of one command."""
    began, before = time.monotonic(), os.times()
    subprocess.run(
        [sys.executable, "-m", "aneurysm.compare", str(experiment)], check=True, stdout=subprocess.DEVNULL
    )
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - began, cpu


if __name__ == "__main__":
    main()
