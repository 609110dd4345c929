"""Compare the runs of experiments: python -m aneurysm.compare outputs/<experiment> [...]"""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from aneurysm.compare.comparison import StageComparison, compare
from aneurysm.compare.metrics import chosen_metric
from aneurysm.compare.page import write_comparison
from aneurysm.compare.read import read_experiments
from aneurysm.compare.reference import Baseline
from aneurysm.compare.tables import write_runs, write_variants
from aneurysm.compare.terminal import print_stage
from aneurysm.data.errors import UserError

_EPILOG = """\
Works on sweeps that are still running: it reads what is there and locks nothing.
exit codes: 0 compared, 2 wrong usage"""


def main(arguments: list[str] | None = None) -> int:
    """Compare and return the exit code."""
    parser = argparse.ArgumentParser(
        "python -m aneurysm.compare",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiments", nargs="+", type=Path, metavar="outputs/<experiment>")
    parser.add_argument("--stage", help="which stage to show first; by default the one with most variants")
    parser.add_argument("--metric", help="figure to rank by; by default the stage's headline")
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="compare with this variant instead of the best; may be repeated. A reference named beforehand "
        "needs fewer repeats to tell a difference than one picked because it looks best",
    )
    parser.add_argument("--out", type=Path, help="folder of the page and tables (<experiment>/compare)")
    parser.add_argument("--csv", type=Path, help="also write the table of variants to this file")
    parser.add_argument("--most", type=int, default=40, help="variants shown on the terminal (40)")
    options = parser.parse_args(arguments)
    if options.most < 1:
        parser.error("--most must be at least 1")
    console = Console(width=None if Console().is_terminal else 200)
    errors = Console(stderr=True)
    try:
        _compare(options, console)
    except UserError as error:
        errors.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    except BrokenPipeError:  # piped into head: everything is written, nobody reads the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _compare(options: argparse.Namespace, console: Console) -> None:
    baseline = Baseline.parse(options.baseline, options.stage) if options.baseline else None
    stages = compare(read_experiments(options.experiments), baseline)
    shown = _shown(stages, options.stage)
    if options.metric is not None and not shown.rankings:
        raise UserError(f"No finished run of stage {shown.stage} has a figure yet; leave out --metric.")
    metric = (
        chosen_metric([r.metric for r in shown.rankings], shown.stage, options.metric)
        if shown.rankings
        else None
    )
    console.rule(f"[bold]{shown.stage}", align="left", style="dim")
    print_stage(shown, metric, console, options.most)
    others = [f"{s.stage} ({len(s.variants)})" for s in stages if s is not shown]
    if others:
        console.print(f"Other stages (variants): {', '.join(others)}.", style="dim", highlight=False)
    out = options.out or options.experiments[0] / "compare"
    try:
        page = write_comparison(stages, shown, metric, out / "compare.html")
        write_variants(shown, metric, out / "variants.csv")
        write_runs(stages, out / "runs.csv")
        if options.csv is not None:
            write_variants(shown, metric, options.csv)
    except OSError as error:
        raise UserError(f"Cannot write the comparison: {error}. Choose another folder with --out.") from error
    console.print(f"Page: {page}", highlight=False, markup=False, soft_wrap=True)


def _shown(stages: list[StageComparison], asked: str | None) -> StageComparison:
    """The stage asked for, or the one with most variants (the later one of equals).

    Raises:
        UserError: no run of that stage.
    """
    if asked is None:
        return max(reversed(stages), key=lambda s: len(s.variants))
    for stage in stages:
        if stage.stage == asked:
            return stage
    raise UserError(f"No run of stage {asked!r}. There are runs of: {', '.join(s.stage for s in stages)}.")


if __name__ == "__main__":
    sys.exit(main())
