"""What mask errors cost: python -m aneurysm.sensitivity outputs/<experiment>"""

import argparse
import logging
import sys
from pathlib import Path

from aneurysm.data.errors import UserError

_EPILOG = """\
Needs an experiment whose expert is finished in all folds; reads its run folders and changes none of them.
A study that is stopped goes on from its table when the same command is given again.
exit codes: 0 measured, 2 wrong usage"""


def main(arguments: list[str] | None = None) -> int:
    """Measure and return the exit code."""
    parser = argparse.ArgumentParser(
        "python -m aneurysm.sensitivity",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", type=Path, metavar="outputs/<experiment>")
    parser.add_argument("--run", help="name of the expert's run folder; by default the newest finished one")
    parser.add_argument("--prepared", type=Path, help="prepared scans (prepared/ beside the experiment)")
    parser.add_argument(
        "--base", default="predicted", help="masks that get the errors: predicted (default) or truth"
    )
    parser.add_argument("--kinds", help="of erode,drop,dilate,blobs; by default all")
    parser.add_argument("--scans", type=int, help="only so many scans, evenly taken")
    parser.add_argument("--seed", type=int, default=0, help="of the errors (0)")
    parser.add_argument(
        "--out", type=Path, help="folder of table, figure and page (<experiment>/sensitivity)"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("aneurysm.sensitivity").setLevel(logging.INFO)
    try:
        _study(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _study(options: argparse.Namespace) -> None:
    # Imported here: they take seconds, and --help needs none of them.
    import pandas as pd

    from aneurysm.sensitivity.errors import GRADES, MaskError
    from aneurysm.sensitivity.study import chosen_scans, study
    from aneurysm.sensitivity.table import CSV, has, ordered, read_rows, write_all
    from aneurysm.training.finished import read_finished

    kinds = list(GRADES) if options.kinds is None else options.kinds.split(",")
    if unknown := sorted(set(kinds) - set(GRADES)):
        raise UserError(f"--kinds {','.join(unknown)}: there are {', '.join(GRADES)}.")
    if options.scans is not None and options.scans < 1:
        raise UserError("--scans must be at least 1.")
    finished = read_finished(options.experiment, options.run, options.prepared)
    scans = chosen_scans(finished, options.base, options.scans)
    folder = options.out or options.experiment / "sensitivity"
    run = finished.expert.name
    table = read_rows(folder / CSV, run, options.seed)
    errors = [MaskError("none"), *(MaskError(kind, level) for kind in kinds for level in GRADES[kind])]
    waiting = [error for error in errors if not has(table, options.base, error, len(scans))]
    title = f"{options.experiment.name}, {run}"
    for row in study(finished, waiting, options.base, options.seed, scans):
        # Of another number of scans the row would not compare with the others.
        if len(table):
            table = pd.DataFrame(table[(table.base != options.base) | (table.scans == len(scans))])
        new = pd.DataFrame([{"run": run, "seed": options.seed, **row}])
        table = ordered(new if table.empty else pd.concat([table, new], ignore_index=True))
        write_all(table, folder, title)
    write_all(table, folder, title)
    print(f"Table, figure and page: {folder}")


if __name__ == "__main__":
    sys.exit(main())
