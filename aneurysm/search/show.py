"""What a study has found: its trials, which parameters mattered, and how to run the best one again."""

import optuna
from optuna.importance import get_param_importances
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aneurysm.search.objective import Search, command, parameters_of, score_of

SHOWN = 25  # trials, the best ones
_STATE = {
    "COMPLETE": "done",
    "FAIL": "failed",
    "RUNNING": "running",
    "WAITING": "to do",
    "PRUNED": "given up",
}


def show(study: optuna.Study, search: Search) -> None:
    """Print trials, importances and the command of the best trial."""
    console = Console(width=None if Console().is_terminal else 160)
    trials = study.get_trials(deepcopy=False)
    name, direction = score_of(search.stage)
    best_first = -1 if direction == "maximize" else 1
    ranked = sorted(
        (t for t in trials if t.state == TrialState.COMPLETE),
        key=lambda t: best_first * float(t.value or 0.0),
    )
    others = [t for t in trials if t.state != TrialState.COMPLETE and not _taken_over(t)]
    console.print(f"Study {study.study_name}: {name} of stage={search.stage}, {direction}d", markup=False)
    table = Table()
    for column in ("trial", name, *(p.key for p in search.space), "state"):
        table.add_column(column, overflow="fold")
    for trial in [*ranked[:SHOWN], *others]:
        table.add_row(*(escape(cell) for cell in _row(trial, search)))
    console.print(table)
    if len(ranked) > SHOWN:
        console.print(f"  and {len(ranked) - SHOWN} more")
    again = sum(_taken_over(t) for t in trials)
    if again:
        console.print(f"  {again} trials lost their worker and were taken over by another trial")
    if not ranked:
        console.print("No trial is complete yet.")
        return
    _importances(study, ranked, console)
    best = ranked[0]
    console.print(f"Best: trial {best.number}, {name} {best.value:.4f}. Again, or over other data:")
    overrides = search.overrides(parameters_of(search.space, best.params))
    console.print(command(overrides), markup=False, highlight=False, soft_wrap=True)


def _row(trial: FrozenTrial, search: Search) -> list[str]:
    value = "" if trial.value is None or trial.state != TrialState.COMPLETE else f"{trial.value:.4f}"
    params = [
        f"{v:.4g}" if isinstance(v := trial.params.get(p.key, ""), float) else str(v) for p in search.space
    ]
    state = _STATE[trial.state.name]
    if "error" in trial.user_attrs:
        state = f"{state}: {trial.user_attrs['error']}"
    return [str(trial.number), value, *params, state]


def _taken_over(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and "error" not in trial.user_attrs


def _importances(study: optuna.Study, ranked: list[FrozenTrial], console: Console) -> None:
    scores, varied = {t.value for t in ranked}, {p for t in ranked for p in t.params}
    if len(ranked) < 8 or len(varied) < 2 or len(scores) < 2:
        return  # of a handful of trials it would be noise
    shares = get_param_importances(study)
    console.print("Importance (PED-ANOVA): " + "  ".join(f"{k} {v:.2f}" for k, v in shares.items()))
