"""Plants known defects into a copy of a phantom RSNA data set, each in a series of its own.

    python tests/check/planted_defects.py <clean data set> <copy>

The copy gets `planted.json` (series uid -> code that the check must find there) and `folds.csv`.
"""

import argparse
import csv
import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import defects_of_images  # noqa: F401 (registers its defects)
import defects_of_labels  # noqa: F401
from phantom_copy import CODES, NEEDS, Copy, Series

from aneurysm.data.labels import PRESENT


def plant(clean: Path, root: Path, codes: Collection[str] | None = None) -> dict[str, str]:
    """Copy a phantom data set and spoil one series per defect.

    Args:
        codes: which defects; all when None.

    Returns:
        series uid -> code. All other series stay clean.

    Raises:
        ValueError: too few series of the kinds that the defects need.
    """
    shutil.copytree(clean, root)
    copy = Copy(root, _read(root / "train.csv"), _read(root / "train_localizers.csv"), [])
    free = [Series(copy, row["SeriesInstanceUID"]) for row in copy.train]
    copy.folds = [(series.patient, i % 2) for i, series in enumerate(free)]
    chosen: dict[str, Series] = {}
    # The most demanding defects choose first.
    for code in sorted(
        CODES if codes is None else codes, key=lambda c: -len(NEEDS[c]) - 2 * ("sided" in NEEDS[c])
    ):
        series = next((s for s in free if _suits(s, **NEEDS[code])), None)
        if series is None:
            raise ValueError(f"No series is left for {code} ({NEEDS[code]}). Use more patients.")
        free.remove(series)
        chosen[code] = series
    copy.spare = [series for series in free if series.row[PRESENT] == "0"]
    if len(copy.spare) < 3:
        raise ValueError("Three negative series must stay clean. Use more patients.")
    # Folds last, as defects of images deal the folds of their patients anew.
    for code in sorted(chosen, key=lambda code: "-fold" in code and not code.startswith("duplicate")):
        CODES[code](chosen[code])
    _write(root / "train.csv", copy.train, list(copy.train[0]))
    _write(root / "train_localizers.csv", copy.points, list(copy.points[0]))
    with (root / "folds.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("patient_id", "fold"), *copy.folds])
    planted = {series.uid: code for code, series in chosen.items()}
    (root / "planted.json").write_text(json.dumps(planted, indent=1))
    return planted


def _suits(
    series: Series, modality: str | None = None, positive: bool | None = None, sided: bool = False
) -> bool:
    row = series.row
    if modality is not None and row["Modality"] != modality:
        return False
    if positive is not None and (row[PRESENT] == "1") != positive:
        return False
    if not sided:
        return True
    names = [point["location"] for point in series.points]
    return len(names) == 1 and "Middle" in names[0]


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: list[dict[str, str]], columns: list[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def lines(planted: dict[str, str]) -> Iterator[str]:
    """One line per planted defect."""
    for uid, code in sorted(planted.items(), key=lambda pair: pair[1]):
        yield f"{code:30} {uid}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clean", type=Path)
    parser.add_argument("copy", type=Path)
    given = parser.parse_args()
    print("\n".join(lines(plant(given.clean, given.copy))))
