"""Acceptance: every planted defect is found in its series, and nothing in a clean data set."""

import json
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

import pytest
from phantom_copy import ALSO, CODES
from planted_defects import plant

from aneurysm.check.__main__ import main
from aneurysm.data.phantom.dataset import PhantomSource

# One or more of every family; the slow test plants all of them.
QUICK = (
    "missing-slices", "conflicting-slices", "one-position", "mixed-geometry", "missing-geometry",
    "truncated-file", "unreadable-file", "foreign-files", "implausible-spacing", "not-hounsfield",
    "constant-image", "unknown-modality", "bad-label", "impossible-age", "location-without-present",
    "positive-without-localizer", "localizer-unknown-image", "localizer-outside", "localizer-unparsable",
    "localizer-wrong-side", "mask-wrong-side", "mask-shape", "mask-misplaced", "duplicate-images",
    "patient-in-two-folds", "row-without-folder",
)  # fmt: skip
DOUBLES = {"duplicate-images", "duplicate-across-folds"}
SIZE = 44  # voxels per side: about the smallest that shows the circle of Willis


def check_planted(tmp_path: Path, patients: int, codes: Collection[str], jobs: int) -> None:
    clean = PhantomSource(tmp_path, patients, 11, size=SIZE, jobs=jobs).root
    assert main([str(clean), "--jobs", str(jobs), "--out", str(tmp_path / "clean")]) == 0
    assert json.loads((tmp_path / "clean" / "check.json").read_text())["findings"] == []

    root = tmp_path / "spoiled"
    planted = plant(clean, root, codes)
    assert len(planted) == len(codes)
    folds = ["--folds", str(root / "folds.csv")]
    assert main([str(root), *folds, "--jobs", str(jobs), "--out", str(tmp_path / "report")]) == 1
    findings = json.loads((tmp_path / "report" / "check.json").read_text())["findings"]
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for finding in findings:
        found[finding["series_uid"]][finding["code"]] = finding["severity"]
        assert finding["message"] and finding["advice"]
    missed = {uid: code for uid, code in planted.items() if code not in found[uid]}
    assert not missed, f"not found: {missed}"
    repaired = [uid for uid, code in planted.items() if code == "not-hounsfield"]
    assert {found[uid]["not-hounsfield"] for uid in repaired} == {"warning"}  # the reader finds the intercept
    for uid, codes_of_series in found.items():
        # The clean original of the copied images is accused together with its copy.
        true = {planted[uid], *ALSO[planted[uid]]} if uid in planted else DOUBLES
        loud = {code for code, severity in codes_of_series.items() if severity != "note"}
        assert loud <= true, f"{planted.get(uid, 'clean')} {uid}: {loud - true}"
    page = (tmp_path / "report" / "check.html").read_text()
    assert all(uid in page for uid in planted)


def test_planted_defects_are_found_and_nothing_else(tmp_path: Path) -> None:
    check_planted(tmp_path, 38, QUICK, jobs=1)


@pytest.mark.slow
def test_all_planted_defects_are_found_and_nothing_else(tmp_path: Path) -> None:
    check_planted(tmp_path, 80, CODES, jobs=2)
