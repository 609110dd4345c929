"""How far the flow features follow from assumptions: python -m aneurysm.robustness"""

import argparse
import logging
import sys
from pathlib import Path

from aneurysm.data.errors import UserError

_EPILOG = """\
Shapes are tube, bend, fork, small_sac and sac; tube and sac are always computed once, their difference is the
unit. Kinds are viscosity, density, wall shear, mask, split, caps, seed, points, precision and steps.
Some ten minutes in all. exit codes: 0 measured, 2 wrong usage"""


def main(arguments: list[str] | None = None) -> int:
    """Measure and return the exit code."""
    parser = argparse.ArgumentParser(
        "python -m aneurysm.robustness",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", help="by default all, with commas between")
    parser.add_argument("--kinds", help="of assumptions to change; by default all")
    parser.add_argument("--steps", type=int, default=150, help="of every fit (150)")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/robustness"), help="folder of CSV and PNG (%(default)s)"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("aneurysm.robustness").setLevel(logging.INFO)
    try:
        _study(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _study(options: argparse.Namespace) -> None:
    # Imported here: they take seconds, and --help needs none of them.
    import pandas as pd
    from rich.console import Console

    from aneurysm.robustness.shapes import SHAPES
    from aneurysm.robustness.study import BASE, KINDS, study, with_base
    from aneurysm.robustness.table import HEALTHY, SICK, shown, write_all

    shapes = _chosen("--shapes", options.shapes, tuple(SHAPES))
    kinds = _chosen("--kinds", options.kinds, KINDS)
    if options.steps < 1:
        raise UserError(f"--steps must be at least 1, got {options.steps}.")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is a file: give a folder.")
    unasked = [name for name in (HEALTHY, SICK) if name not in shapes]
    rows = [*study(unasked, [BASE], options.steps), *study(shapes, with_base(kinds), options.steps)]
    table = pd.DataFrame(rows)
    write_all(table, options.out)
    Console(width=None if Console().is_terminal else 180).print(shown(table))
    print("Mean size of the change over shapes, in units of the last row.")
    print(f"Table and figure: {options.out}")


def _chosen(option: str, given: str | None, known: tuple[str, ...]) -> list[str]:
    """Names in the order of `known`.

    Raises:
        UserError: a name that does not exist.
    """
    if given is None:
        return list(known)
    asked = [name.strip() for name in given.split(",")]
    if unknown := sorted(set(asked) - set(known)):
        raise UserError(f"{option} {','.join(unknown)}: there are {', '.join(known)}.")
    return [name for name in known if name in asked]


if __name__ == "__main__":
    sys.exit(main())
