"""What the checks say: one finding names a problem, where it is, its numbers and what to do."""

from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum

from aneurysm.check.catalogue import FATAL, PROBLEMS, SEVERITIES

__all__ = ["Collector", "Facts", "Finding", "Severity"]


class Severity(StrEnum):
    """How bad a finding is, worst first."""

    FATAL = "fatal"  # the case cannot be used, or it would spoil every result
    ERROR = "error"  # it can be used, but something about it is wrong
    WARNING = "warning"  # suspicious: look at it
    NOTE = "note"  # handled by the reader, or harmless

    @property
    def rank(self) -> int:
        """0 for the worst."""
        return SEVERITIES.index(self.value)


@dataclass(frozen=True)
class Finding:
    """One thing that was found, with the case it was found in."""

    code: str  # key of `catalogue.PROBLEMS`
    series_uid: str  # "" when the finding is about the whole data set
    patient_id: str
    message: str  # what was found, with numbers and file names
    severity: Severity

    @property
    def title(self) -> str:
        """The problem in a few words."""
        return PROBLEMS[self.code].title

    @property
    def advice(self) -> str:
        """What to do about it."""
        return PROBLEMS[self.code].advice

    def as_dict(self) -> dict[str, str]:
        """For JSON: everything a reader of the report sees."""
        return asdict(self) | {"severity": self.severity.value, "title": self.title, "advice": self.advice}


@dataclass(frozen=True)
class Facts:
    """What the comparison of cases with each other needs to know about one case, and the report shows."""

    series_uid: str
    patient_id: str = ""
    study_uid: str = ""
    modality: str = ""  # CTA, MRA, T1, T2 or "" when unknown
    sexes: tuple[str, ...] = ()  # M, F: what header and table say
    shape: tuple[int, ...] = ()  # (d, h, w) as read
    spacing: tuple[float, ...] = ()  # (d, h, w) mm
    pixels: str = ""  # hash of the voxels, "" when they could not be read
    seconds: float = 0.0  # spent on the case


@dataclass
class Collector:
    """Gathers the findings of one case."""

    series_uid: str
    patient_id: str = ""
    findings: list[Finding] = field(default_factory=list)

    def add(self, code: str, message: str, severity: Severity | None = None) -> None:
        """Record a finding under a code of the catalogue, with its severity unless another one is given."""
        severity = severity or Severity(PROBLEMS[code].severity)
        message = message if message.endswith((".", ")")) else f"{message}."
        self.findings.append(Finding(code, self.series_uid, self.patient_id, message, severity))

    @property
    def has_fatal(self) -> bool:
        """Whether something so far makes the case unusable."""
        return any(finding.severity == FATAL for finding in self.findings)

    def survived(self, notes: tuple[str, ...]) -> None:
        """The reader made a volume all the same: what looked fatal was repaired, which is worth an error.

        Two images at one place can be read only when they are copies of each other.
        """
        repair = f" The reader made a volume of it ({'; '.join(notes)})." if notes else ""
        for i, finding in enumerate(self.findings):
            if finding.severity != FATAL:
                continue
            code, severity = finding.code, Severity.ERROR
            if code == "conflicting-slices":
                code, severity = "duplicate-slices", Severity.WARNING
            message = finding.message + repair
            self.findings[i] = replace(finding, code=code, severity=severity, message=message)
