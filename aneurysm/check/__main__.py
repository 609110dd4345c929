"""Check a data set before training on it: python -m aneurysm.check <folder> [--out report]"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from aneurysm.check.items import KINDS
from aneurysm.check.layout import find_layout
from aneurysm.check.report import KIND_NAMES, print_result, write_html, write_json
from aneurysm.check.runner import check_data
from aneurysm.data.errors import UserError

_EPILOG = """exit codes: 0 nothing fatal, 1 something fatal was found, 2 wrong usage"""


def main(arguments: list[str] | None = None) -> int:
    """Check a folder and return the exit code."""
    parser = argparse.ArgumentParser("python -m aneurysm.check", description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "root", type=Path, help="RSNA or BIDS data set, DICOM folders, or NIfTI/NRRD/MHA files"
    )
    parser.add_argument("--kind", choices=KINDS, help="what the folder is; detected by default")
    parser.add_argument("--folds", type=Path, help="fold file (.csv, .parquet) to check for leakage")
    parser.add_argument("--out", type=Path, help="folder for check.html and check.json")
    parser.add_argument(
        "--jobs", type=int, default=2, help="processes; each needs memory for about one scan (2)"
    )
    parser.add_argument("--limit", type=int, help="check only the first cases")
    parser.add_argument("--most", type=int, default=40, help="findings shown on the terminal (40)")
    options = parser.parse_args(arguments)
    if options.jobs < 1 or (options.limit is not None and options.limit < 1):
        parser.error("--jobs and --limit must be at least 1")
    if options.folds is not None and not options.folds.is_file():
        parser.error(f"--folds {options.folds}: no such file")
    console, errors = Console(), Console(stderr=True)
    try:
        layout = find_layout(options.root, options.kind)
    except UserError as error:
        errors.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    console.print(
        f"{layout.root}: {len(layout.items)} case(s), {KIND_NAMES[layout.kind]}",
        highlight=False,
        markup=False,
    )
    try:
        result = check_data(layout, options.folds, options.jobs, options.limit, errors)
    except KeyboardInterrupt:
        errors.print("Interrupted; nothing was written.")
        return 130
    print_result(result, console, options.most)
    if options.out is not None:
        write_json(result, options.out / "check.json")
        console.print(
            f"Report: {write_html(result, options.out / 'check.html')}", highlight=False, markup=False
        )
    return int(result.fatal)


if __name__ == "__main__":
    sys.exit(main())
