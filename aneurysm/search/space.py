"""What a search varies, written in Hydra's own syntax of sweeps.

`oscillator_dim=2,4,8` and `fusion=choice(early,mean)` choose, `balance.temperature=range(5,50,5)` counts,
`expert.lr=tag(log,interval(1e-4,1e-2))` is continuous, here on a logarithmic scale; `int(interval(1,64))` is
whole numbers. Every other override is the same in all trials.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from aneurysm.data.errors import UserError

# Scores under different values of these do not compare.
_NOT_SEARCHED = {
    "seed": "the luckiest seed is no better setting; `python train.py -m experiment=seeds` shows the spread",
    "fold_seed": "scores on other folds do not compare",
    "fold": "scores on other folds do not compare; give one fold, or none for the mean over all",
    "folds": "scores on other folds do not compare",
    "stage": "stages have scores of their own; search one of them",
    "data": "scores on other data do not compare",
    "experiment": "give one, or several as experiment=[a,b]",
    "experiment_name": "a study belongs to one experiment",
}


class Suggests(Protocol):
    """What is needed of an Optuna trial."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...
    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...


@dataclass(frozen=True)
class Choice:
    """One of some values, as they stand on a command line."""

    key: str
    values: tuple[str, ...]

    @property
    def ends(self) -> tuple[str, str]:
        """Two overrides with values as far apart as there are."""
        return f"{self.key}={self.values[0]}", f"{self.key}={self.values[-1]}"

    def suggest(self, trial: Suggests) -> str:
        """The override that a trial uses."""
        return f"{self.key}={trial.suggest_categorical(self.key, self.values)}"

    def __str__(self) -> str:
        return f"{self.key}=choice({','.join(self.values)})"


@dataclass(frozen=True)
class Number:
    """A number between two bounds, both included."""

    key: str
    low: float  # int when whole
    high: float
    whole: bool
    step: float | None = None
    log: bool = False

    @property
    def ends(self) -> tuple[str, str]:
        """The overrides with the bounds."""
        return f"{self.key}={self.low!r}", f"{self.key}={self.high!r}"

    def suggest(self, trial: Suggests) -> str:
        """The override that a trial uses; a float has all its digits, to name the same run again."""
        if self.whole:
            step = int(self.step or 1)
            value: float = trial.suggest_int(self.key, int(self.low), int(self.high), step=step, log=self.log)
        else:
            value = trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log)
        return f"{self.key}={value!r}"

    def __str__(self) -> str:
        kind = "whole numbers" if self.whole else "numbers"
        step = f" in steps of {self.step:g}" if self.step else ""
        return f"{self.key}={kind} from {self.low:g} to {self.high:g}{step}{', logarithmic' * self.log}"


Parameter = Choice | Number


def parse_space(overrides: Sequence[str]) -> tuple[list[str], list[Parameter]]:
    """Split overrides into those of every trial and the parameters of the search; of a key the last counts.

    Raises:
        UserError: an override cannot be read, or a search over it would compare what does not compare.
    """
    fixed: dict[str, str] = {}
    space: dict[str, Parameter] = {}
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise UserError(f"cannot read the override {text!r}: {str(error).splitlines()[0]}") from error
        key = override.get_key_element()
        if key.startswith("hydra"):
            raise UserError(f"{text}: a search has no launcher; start its command as often as you like.")
        fixed.pop(key, None)
        space.pop(key, None)
        if override.is_sweep_override():
            space[key] = _parameter(override)
        else:
            fixed[key] = override.input_line or text
    return list(fixed.values()), list(space.values())


def _parameter(override: Override) -> Parameter:
    key: str = override.get_key_element()
    value: Any = override.value()
    reason = _NOT_SEARCHED.get(key.split(".")[0].lstrip("+"))
    if reason:
        raise UserError(f"a search over {key} makes no sense: {reason}.")
    tags = set(getattr(value, "tags", ()))
    if getattr(value, "shuffle", False) or tags - {"log"}:
        raise UserError(
            f"{override.input_line}: a search knows choice, range, interval, int(...) and tag(log, ...), "
            "neither shuffle nor other tags."
        )
    log = "log" in tags
    if override.is_interval_sweep():
        return _number(key, value.start, value.end, None, log)
    if override.is_range_sweep():
        # As in a grid: the end is not among the values.
        values = [float(v) for v in override.sweep_string_iterator()]
        if not values:
            raise UserError(f"{override.input_line} holds no value.")
        whole = all(isinstance(v, int) for v in (value.start, value.stop, value.step))
        ends = (min(values), max(values))
        low, high = (int(ends[0]), int(ends[1])) if whole else ends
        if log and abs(value.step) != 1:
            raise UserError(f"{override.input_line}: a range on a logarithmic scale cannot have a step.")
        return _number(key, low, high, None if log else abs(value.step), log, whole=whole)
    if log:
        raise UserError(f"{override.input_line}: only numbers can be on a logarithmic scale.")
    if override.is_discrete_sweep() and hasattr(value, "list"):
        return Choice(key, tuple(dict.fromkeys(str(v) for v in override.sweep_string_iterator())))
    raise UserError(f"{override.input_line}: name the options one by one; a search does not expand patterns.")


def _number(
    key: str, low: float, high: float, step: float | None, log: bool, whole: bool | None = None
) -> Number:
    if whole is None:
        whole = isinstance(low, int) and isinstance(high, int)
    if not low <= high or (log and low <= 0):
        raise UserError(
            f"{key}: {low:g} to {high:g} is no interval" + (" on a logarithmic scale." if log else ".")
        )
    return Number(key, low, high, whole, step, log)
