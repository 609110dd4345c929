"""The findings for people (terminal, HTML page) and for programs (JSON)."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from aneurysm.check.findings import Finding, Severity
from aneurysm.check.runner import Result
from aneurysm.data.files import replacing
from aneurysm.report.html import write_page

KIND_NAMES = {
    "rsna": "RSNA 2025 layout (train.csv, series/)",
    "bids": "BIDS data set",
    "dicom": "folders of DICOM files",
    "volumes": "NIfTI, NRRD or MHA volumes",
}
_STYLE = {"fatal": "bold red", "error": "red", "warning": "yellow", "note": "dim"}
_MEANING = {
    "fatal": "cannot be used, or spoils every result",
    "error": "can be used, but something is wrong",
    "warning": "suspicious: look at it",
    "note": "handled by the reader, or harmless",
}


def print_result(result: Result, console: Console, most: int = 40) -> None:
    """The worst findings as a table, then a line that sums up.

    Args:
        most: rows; the files hold all.
    """
    shown = [finding for finding in result.findings if finding.severity != Severity.NOTE][:most]
    if shown:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("severity", "series", "what was found"):
            table.add_column(
                name, overflow="fold", ratio={"severity": 0, "series": 3, "what was found": 7}[name]
            )
        for finding in shown:
            table.add_row(
                f"[{_STYLE[finding.severity]}]{finding.severity}[/]",
                _short(finding.series_uid) or "whole data set",
                _text(finding),
            )
        console.print(table)
    hidden = len(result.findings) - len(shown)
    if hidden:
        console.print(
            f"{hidden} more finding(s), {result.count(Severity.NOTE)} of them notes: see --out.", style="dim"
        )
    console.print(summary(result), style="bold", highlight=False)


def summary(result: Result) -> str:
    """One sentence about the data set."""
    counted = ", ".join(f"{result.count(s)} {s}" for s in Severity)
    part = f" of {result.cases_in_all}" if result.cases_in_all > len(result.cases) else ""
    verdict = "Not ready: fatal findings." if result.fatal else "Usable."
    return f"{len(result.cases)}{part} case(s) in {result.seconds:.1f} s: {counted}. {verdict}"


def write_json(result: Result, path: Path) -> Path:
    """All findings and what is known of every case."""
    content = {
        "root": str(result.root),
        "kind": result.kind,
        "seconds": round(result.seconds, 2),
        "counts": {severity.value: result.count(severity) for severity in Severity},
        "findings": [finding.as_dict() for finding in result.findings],
        "cases": [asdict(case) for case in result.cases],
    }
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def write_html(result: Result, path: Path) -> Path:
    """A page of its own: a summary on top, the findings by problem, every case at the end."""
    worst: dict[str, Severity] = {}
    for finding in result.findings:  # worst first
        worst.setdefault(finding.series_uid, finding.severity)
    of_case = Counter(finding.series_uid for finding in result.findings)
    problems: dict[tuple[Severity, str], list[Finding]] = {}  # a repaired fault is less severe
    for finding in result.findings:
        problems.setdefault((finding.severity, finding.code), []).append(finding)
    clean = sum(
        case.series_uid not in worst or worst[case.series_uid] == Severity.NOTE for case in result.cases
    )
    content = {
        "title": "Data check",
        "root": str(result.root),
        "kind": KIND_NAMES[result.kind],
        "summary": summary(result),
        "fatal": result.fatal,
        "cases": result.cases,
        "cases_in_all": result.cases_in_all,
        "clean": clean,
        "counts": [(s.value, result.count(s), _MEANING[s.value]) for s in Severity],
        "problems": list(problems.values()),
        "findings": result.findings,
        "worst": worst,
        "of_case": of_case,
        "modalities": Counter(case.modality or "unknown" for case in result.cases).most_common(),
        "patients": len({case.patient_id for case in result.cases if case.patient_id}),
        "seconds": result.seconds,
    }
    return write_page(path, "check", content)


def _short(uid: str) -> str:
    """The end of a long UID, where series differ."""
    return uid if len(uid) <= 34 else f"...{uid[-31:]}"


def _text(finding: Finding) -> str:
    title = f"[bold]{finding.title}[/]"
    message = finding.message.replace("[", "\\[")
    return f"{title}: {message} [cyan]{finding.advice}[/]"
