"""Every figure of the data floor in one command: reading DICOM, preparing, patches from the cache.

    OMP_NUM_THREADS=1 python benchmarks/data.py [--repeats 5] [result.json]

About six minutes on one core. CPU seconds are the figure that counts: wall time on a shared machine is noise.
"""

import argparse
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Run both benchmarks in processes of their own, so that neither sees the other's memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", nargs="?", type=Path, help="JSON of the preparation and cache figures")
    parser.add_argument("--repeats", type=int, default=5, help="of every DICOM reader")
    arguments = parser.parse_args()
    here = Path(__file__).parent
    reading = [sys.executable, str(here / "data_dicom.py"), "--repeats", str(arguments.repeats)]
    keeping = [sys.executable, str(here / "data_cache.py")]
    keeping += [str(arguments.result)] if arguments.result else []
    sys.exit(max(subprocess.run(command, check=False).returncode for command in (reading, keeping)))


if __name__ == "__main__":
    main()
