"""From a command to its answer or to its first optimiser step: wall and CPU seconds of whole processes.

    OMP_NUM_THREADS=1 python benchmarks/training_start.py [outputs] [--repeats 3]

`outputs` is a folder where `python train.py` has prepared the demo's scans; the runs go to a temporary one.
CPU seconds are the figure that counts: on a free machine wall time is about the same.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGET = 8.0  # seconds to the first step, at most
# Ends the process right after the first step of any optimiser.
TO_FIRST_STEP = """
import os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit(0))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
sys.exit("no optimiser took a step")
"""


def main() -> None:
    """Time every command in turns and print one row each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("outputs", nargs="?", type=Path, default=Path("outputs"))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("data", "prepared"):
            (Path(folder) / name).symlink_to((arguments.outputs / name).resolve())
        here = f"paths.outputs={folder}"
        commands = {
            "train.py, to the first step": ["-c", TO_FIRST_STEP, "train.py", here],
            "train.py stage=vessel, to the first step": [
                "-c",
                TO_FIRST_STEP,
                "train.py",
                here,
                "stage=vessel",
            ],
            "train.py --help": ["train.py", "--help"],
            "train.py oscilator_dim=8 (wrong key)": ["train.py", "oscilator_dim=8"],
            "predict.py --help": ["predict.py", "--help"],
            "import torch, lightning, monai": ["-c", "import torch, lightning.pytorch, monai"],
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(arguments.repeats):
            for name, command in commands.items():
                seconds[name].append(timed(command))
    print("| command | CPU s, median (min) | wall s, median (min) |")
    print("|---|---|---|")
    for name, runs in seconds.items():
        cpu, wall = zip(*runs, strict=True)
        print(
            f"| {name} | {statistics.median(cpu):.2f} ({min(cpu):.2f}) "
            f"| {statistics.median(wall):.2f} ({min(wall):.2f}) |"
        )


def timed(command: list[str]) -> tuple[float, float]:
    """CPU and wall seconds of one Python process and its children."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before, started = os.times(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 2):  # 2: the command line is wrong, as it should be
        raise SystemExit(f"{command[1:]} failed: {done.stdout[-500:]}{done.stderr[-500:]}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu, time.perf_counter() - started


if __name__ == "__main__":
    main()
