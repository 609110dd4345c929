"""The baseline that a user names: key=value pairs that pick one variant."""

import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aneurysm.compare.settings import text
from aneurysm.data.errors import UserError

if TYPE_CHECKING:
    from aneurysm.compare.comparison import StageComparison


@dataclass(eq=False)
class Baseline:
    """Which variant of a stage the others are compared with."""

    wanted: dict[str, str]  # setting -> value as text
    stage: str | None = None  # None: every stage that has these settings among its differences
    used: bool = field(default=False)
    seen: set[str] = field(default_factory=set)

    @classmethod
    def parse(cls, words: list[str], stage: str | None = None) -> "Baseline":
        """From words like oscillator_dim=4.

        Raises:
            UserError: a word is not key=value.
        """
        wanted = {}
        for word in words:
            name, equals, value = word.partition("=")
            if not equals or not name or not value:
                raise UserError(
                    f"--baseline {word}: write key=value, for example --baseline oscillator_dim=4."
                )
            wanted[name] = value
        return cls(wanted, stage)

    def find(self, stage: "StageComparison") -> dict[str, int] | None:
        """The variant of each data set of a stage; None when these settings do not differ there.

        Raises:
            UserError: no variant, or more than one, has these values.
        """
        names = {short: full for full, short in stage.shown.items()} | {full: full for full in stage.keys}
        self.seen |= set(stage.shown.values())
        if (self.stage is not None and stage.stage != self.stage) or not set(self.wanted) <= set(names):
            return None
        found: dict[str, list[int]] = {}
        for i, variant in enumerate(stage.variants):
            if all(text(stage.value(i, names[n])) == value for n, value in self.wanted.items()):
                found.setdefault(variant.data, []).append(i)
        said = " ".join(f"{n}={v}" for n, v in self.wanted.items())
        if not found:
            there = {
                n: sorted({text(stage.value(i, names[n])) for i in range(len(stage.variants))})
                for n in self.wanted
            }
            listed = "; ".join(f"{n}: {', '.join(values)}" for n, values in there.items())
            raise UserError(f"No variant of stage {stage.stage} has {said}. There are: {listed}.")
        for members in found.values():
            if len(members) > 1:
                more = [f"{stage.shown[k]}=..." for k in stage.changes(members[0], members[1])]
                raise UserError(
                    f"{len(members)} variants of stage {stage.stage} have {said}. Add --baseline "
                    f"{' or --baseline '.join(more) or 'of something that differs'}."
                )
        self.used = True
        return {data: members[0] for data, members in found.items()}

    def must_be_used(self) -> None:
        """Refuse a baseline that picked nothing.

        Raises:
            UserError: its settings differ in no stage.
        """
        if self.used:
            return
        unknown = [name for name in self.wanted if name not in self.seen]
        near = difflib.get_close_matches(unknown[0], sorted(self.seen), 1, 0.5) if unknown else []
        hint = f" Did you mean {near[0]}?" if near else ""
        differ = ", ".join(sorted(self.seen)) or "nothing"
        raise UserError(
            f"--baseline {' '.join(f'{n}={v}' for n, v in self.wanted.items())}: no stage differs in that. "
            f"What differs: {differ}.{hint}"
        )
