"""Data sets for tests of the preparation that need no files: some cases fail, some kill their process."""

import dataclasses
import logging
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from aneurysm.data.preparation.prepare import Preparation, prepare_all
from aneurysm.data.preparation.workload import Extent
from aneurysm.data.scan import Case, Grid, Lesion, Scan
from aneurysm.data.tables import INDEX, LOCATION_KEYS


class SmallSource:
    """Heads of a few thousand voxels with a labelled ball, a function of the series alone.

    Args:
        root: any folder.
        cases: series `s000`, `s001`, ...; those of `exits` end their process, those of `kills` are killed
            as by the kernel when memory runs out.
        side: voxels along each axis.
    """

    def __init__(
        self,
        root: Path,
        cases: int,
        exits: tuple[str, ...] = (),
        kills: tuple[str, ...] = (),
        side: int = 40,
        extent: Extent | None = None,
    ) -> None:
        self.root, self.exits, self.kills, self.side = root, exits, kills, side
        self.uids = [f"s{i:03d}" for i in range(cases)]
        self._extent = extent

    def index(self) -> pd.DataFrame:
        rows = [
            {"series_uid": uid, "patient_id": uid, "modality": "MRA", "age": 50, "sex": "M", "site": "x",
             "present": 1.0, **dict.fromkeys(LOCATION_KEYS, np.nan)}
            for uid in self.uids
        ]  # fmt: skip
        return INDEX.conform(pd.DataFrame(rows))

    def extent(self, series_uid: str) -> Extent | None:
        return self._extent

    def case(self, series_uid: str) -> Case:
        if series_uid in self.exits:
            os._exit(7)
        if series_uid in self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        rng = np.random.default_rng(int(series_uid[1:]))
        affine = np.zeros((4, 4))
        affine[[2, 1, 0, 3], [0, 1, 2, 3]] = (120 / self.side, 130 / self.side, 130 / self.side, 1)
        grid = Grid((self.side,) * 3, affine)
        mm = grid.to_mm(np.moveaxis(np.indices(grid.shape), 0, -1)) - grid.centre_mm
        head = (mm**2 / np.array([50, 48, 46]) ** 2).sum(-1) < 1
        at = rng.uniform(-20, 20, 3)
        ball = np.linalg.norm(mm - at, axis=-1) < 8
        volume = np.select([ball, head], [900.0, 300.0], 5.0) + rng.normal(0, 30, grid.shape)
        scan = Scan(series_uid, series_uid, "MRA", volume.astype(np.float32), grid, grid)
        labels = ball.astype(np.uint8)
        lesions = (Lesion(at + grid.centre_mm, 8.0, None),)
        return dataclasses.replace(Case(scan, labels, labels, lesions), present=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a cache, hidden ones too, but the lock that the operating system holds."""
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


if __name__ == "__main__":  # prepare_sources.py ROOT CACHE CASES SIDE JOBS, a process that tests can kill
    logging.basicConfig(level="INFO")
    root, cache, cases, side, jobs = sys.argv[1:]
    source = SmallSource(Path(root), int(cases), side=int(side))
    prepare_all(source, Preparation(spacing_mm=2.0), cache, int(jobs))
