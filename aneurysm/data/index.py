"""One index table for any data set, or for several together: one row per series, written as parquet.

    python -m aneurysm.data.index rsna=/data/rsna --out index.parquet
    python -m aneurysm.data.index bids=/data/ds003949 bids=/data/ds005096 folder=/data/own --out index.parquet

Columns, types and units are those of `tables.INDEX`; every field of the file carries its meaning.
"""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aneurysm.data.errors import ReadError, UserError
from aneurysm.data.preparation.prepare import CaseSource, Fingerprinted
from aneurysm.data.scan import Case
from aneurysm.data.sources.bids import BidsSource
from aneurysm.data.sources.folder import FolderSource
from aneurysm.data.sources.medmnist import MedMnistSource
from aneurysm.data.sources.rsna import RsnaSource
from aneurysm.data.tables import INDEX

log = logging.getLogger(__name__)

# Rendered data sets (intra, phantom) are RSNA data sets on disk.
SOURCES: Mapping[str, Any] = {
    "rsna": RsnaSource,
    "bids": BidsSource,
    "medmnist": MedMnistSource,
    "folder": FolderSource,
}


class JoinedSource:
    """Several data sets as one, to train on all of them.

    A patient name that two data sets share (`sub-001`) means two people unless `same_patients` is set: the
    name of the data set goes before it. Set it for data sets of the same people, such as IntrA and
    VesselMNIST3D, which is cut from it.

    Args:
        sources: name of the data set -> its source.

    The first use of the index raises ReadError when two data sets share a series.
    """

    def __init__(self, sources: Mapping[str, CaseSource], same_patients: bool = False) -> None:
        if not sources:
            raise ValueError("A joined source needs at least one data set.")
        self.sources = dict(sources)
        self.same_patients = same_patients
        self.root = Path(next(iter(self.sources.values())).root)

    def index(self) -> pd.DataFrame:
        """The rows of all data sets (`tables.INDEX`); `dataset` is the name given here."""
        return self._index.copy()

    def case(self, series_uid: str) -> Case:
        """One scan from the data set that has it."""
        name = self._where(series_uid)
        case = self.sources[name].case(series_uid)
        patient = self._patients[series_uid]
        return dataclasses.replace(case, scan=dataclasses.replace(case.scan, patient_id=patient))

    def fingerprint(self, series_uid: str) -> str:
        """That of the data set that has the series, with the data set's folder."""
        source = self.sources[self._where(series_uid)]
        own = source.fingerprint(series_uid) if isinstance(source, Fingerprinted) else ""
        return f"{Path(source.root).resolve()} {own}"

    @cached_property
    def _index(self) -> pd.DataFrame:
        tables = {name: source.index() for name, source in self.sources.items()}
        return join_indices(tables, self.same_patients)

    @cached_property
    def _patients(self) -> dict[str, str]:
        return dict(zip(self._index["series_uid"], self._index["patient_id"], strict=True))

    @cached_property
    def _dataset_of(self) -> dict[str, str]:
        return dict(zip(self._index["series_uid"], self._index["dataset"], strict=True))

    def _where(self, series_uid: str) -> str:
        if series_uid not in self._dataset_of:
            raise ReadError(f"{series_uid}: in none of the data sets {', '.join(self.sources)}.")
        return self._dataset_of[series_uid]


def join_indices(tables: Mapping[str, pd.DataFrame], same_patients: bool = False) -> pd.DataFrame:
    """One index of several; see `JoinedSource`.

    Raises:
        ReadError: a series is in two of them.
    """
    parts = [INDEX.conform(table).assign(dataset=name) for name, table in tables.items()]
    joined = pd.concat(parts, ignore_index=True)
    found: dict[str, list[str]] = {}
    people: dict[str, set[str]] = {}
    for row in joined.to_dict("records"):
        found.setdefault(row["series_uid"], []).append(row["dataset"])
        people.setdefault(row["patient_id"], set()).add(row["dataset"])
    if twice := {uid: names for uid, names in found.items() if len(names) > 1}:
        first, where = next(iter(twice.items()))
        raise ReadError(
            f"{len(twice)} series are in more than one data set, first {first} in {' and '.join(where)}. "
            "Leave one of the data sets out, or rename the files."
        )
    shared = sorted(patient for patient, names in people.items() if len(names) > 1)
    if shared and not same_patients:
        log.warning(
            "%d patient names are in several data sets, first %s: taken as different people",
            len(shared), shared[0],
        )  # fmt: skip
        both = joined["patient_id"].isin(shared)
        joined["patient_id"] = joined["patient_id"].where(
            ~both, joined["dataset"] + ":" + joined["patient_id"]
        )
    return INDEX.conform(joined)


def build_index(places: Sequence[str], same_patients: bool = False) -> pd.DataFrame:
    """The index of `kind=path` or `name:kind=path` places.

    Raises:
        UserError: a place is not of this form or its kind is unknown.
        ReadError: a data set cannot be read.
    """
    tables: dict[str, pd.DataFrame] = {}
    for place in places:
        label, _, root = place.partition("=")
        name, _, kind = label.rpartition(":")
        if not root or kind not in SOURCES:
            raise UserError(
                f"{place!r} is not kind=path with one of the kinds {', '.join(SOURCES)}; "
                "for example rsna=/data/rsna, or lausanne:bids=/data/ds003949."
            )
        source = SOURCES[kind](root)
        name = name or (kind if kind not in tables else Path(root).name)
        if name in tables:
            raise UserError(f"Two data sets are called {name!r}; name them: first:{kind}={root}.")
        tables[name] = source.index()
    return join_indices(tables, same_patients)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m aneurysm.data.index",
        description="Write the index of one or several data sets: one row per series.",
    )
    parser.add_argument("places", nargs="+", metavar="kind=path", help=f"kinds: {', '.join(SOURCES)}")
    parser.add_argument("--out", type=Path, required=True, help=".parquet or .csv")
    parser.add_argument(
        "--same-patients",
        action="store_true",
        help="one patient name in two data sets is one person (default: two)",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        if options.out.suffix not in (".parquet", ".csv"):
            raise UserError(f"{options.out}: the index is written as .parquet or .csv.")
        index = build_index(options.places, options.same_patients)
        INDEX.write(index, options.out)
    except UserError as error:
        log.error("%s", error)
        return 1
    present = index["present"].to_numpy()
    log.info(
        "%s: %d series of %d patients, %d with, %d without an aneurysm, %d unlabelled, %d with a note",
        options.out, len(index), len(set(index["patient_id"])), (present == 1).sum(), (present == 0).sum(),
        np.isnan(present).sum(), (index["note"] != "").to_numpy().sum(),
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
