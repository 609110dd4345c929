"""Random and Bayesian search over training.

python -m aneurysm.search stage=expert 'oscillator_dim=choice(2,4,8,16)' \\
    'expert.lr=tag(log,interval(1e-4,1e-2))' 'balance.temperature=range(5,50,5)' --trials 40
python -m aneurysm.search experiment=sweep_oscillator --trials 8      # over the grid of a recipe

The same command again goes on with the study, and any number of them may work on it at once. Overrides are
those of train.py; the ones with several values are searched.
"""

import argparse
import logging
import sys
from pathlib import Path

from aneurysm.command_line import log_to_terminal
from aneurysm.data.errors import UserError
from aneurysm.runs.preemption import leave_when_asked

log = logging.getLogger("aneurysm")


def main(arguments: list[str] | None = None) -> None:
    """Command line of `python -m aneurysm.search`.

    Exit codes: 0 the study has its trials (or time is up), 1 it stopped, 2 the command line is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m aneurysm.search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="as for train.py")
    parser.add_argument("--trials", type=int, default=20, help="complete trials of all workers together")
    parser.add_argument("--sampler", default="tpe", choices=("tpe", "gp", "random", "qmc"))
    parser.add_argument("--sampler-seed", type=int, default=0, help="of the proposals, not of the training")
    parser.add_argument("--timeout", type=float, help="seconds after which no new trial begins")
    parser.add_argument("--study", help="name; by default one that belongs to the overrides")
    parser.add_argument(
        "--storage",
        help="journal file or database URL (sqlite:///study.db, postgresql://...); "
        "default: <outputs>/<experiment>/search/<study>.journal",
    )
    parser.add_argument(
        "--prune", action="store_true", help="give a trial up between two folds when below the median"
    )
    parser.add_argument("--show", action="store_true", help="only print what the study has found")
    given = parser.parse_intermixed_args(arguments)
    log_to_terminal()
    leave_when_asked()
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError:
        print("error: a search needs optuna: pip install 'aneurysm[sweep]'.", file=sys.stderr)
        sys.exit(2)
    if given.trials < 1:
        parser.error("--trials must be at least 1.")
    from aneurysm.search.objective import Search

    try:
        search = Search(given.overrides, given.prune)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        _run(search, given)
    except UserError as error:
        log.error("%s", error)
        sys.exit(1)
    except KeyboardInterrupt:
        log.error("Interrupted. Run the same command again to go on from here.")
        sys.exit(1)


def _run(search, given: argparse.Namespace) -> None:
    import optuna

    from aneurysm.search.objective import score_of
    from aneurysm.search.show import show
    from aneurysm.search.study import open_study, work

    folder = Path(search.cfg.paths.outputs) / search.cfg.experiment_name / "search"
    name = given.study or search.name()
    storage = given.storage if given.storage and "://" in given.storage else None
    journal = Path(given.storage) if given.storage and storage is None else folder / f"{name}.journal"
    if given.show and storage is None and not journal.is_file():
        raise UserError(f"There is no study in {journal}.")
    study, watch = open_study(name, storage or journal, folder, score_of(search.stage)[1], search.identity())
    if not given.show:
        log.info("Study %s in %s: %s", name, storage or journal, "; ".join(str(p) for p in search.space))
        if search.prune:
            study.pruner = optuna.pruners.MedianPruner(n_startup_trials=5)
        work(
            study, watch, search.space, search, given.trials, given.sampler, given.sampler_seed, given.timeout
        )
    show(study, search)


if __name__ == "__main__":
    main()
