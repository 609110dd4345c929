"""Every figure of the training loop in one command: overhead per step, busy device, start-up.

    python train.py     # the demo, whose data and products are measured on
    OMP_NUM_THREADS=1 python benchmarks/training.py [outputs]

About fifteen minutes on two free cores; `training_overhead.py`, `training_loader.py` and `training_start.py`
measure one of them each, with options to shorten them.
"""

import argparse
import subprocess
import sys
from pathlib import Path

PARTS = ("training_overhead.py", "training_loader.py", "training_start.py")


def main() -> None:
    """Run the parts in processes of their own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("outputs", nargs="?", default="outputs")
    outputs = parser.parse_args().outputs
    here = Path(__file__).parent
    commands = [[sys.executable, "-W", "ignore", str(here / part), outputs] for part in PARTS]
    sys.exit(max(subprocess.run(command, check=False).returncode for command in commands))


if __name__ == "__main__":
    main()
