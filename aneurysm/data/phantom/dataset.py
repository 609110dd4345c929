"""A data set of simulated patients on disk in the layout of RSNA 2025, made when it is first asked for."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from joblib import Parallel, delayed

from aneurysm.data.files import replacing
from aneurysm.data.labels import MODALITIES
from aneurysm.data.phantom.anatomy import Patient, sample_patient
from aneurysm.data.phantom.imaging import HeadGeometry, simulate_image
from aneurysm.data.phantom.lumen import voxelise
from aneurysm.data.scan import Grid
from aneurysm.data.sources.rsna import RsnaSource
from aneurysm.data.sources.rsna_writer import SeriesRows, finish, series_uid_for, write_series

log = logging.getLogger(__name__)

MARKER: Final = "complete.json"
_SHARES: Final = {"CTA": 0.35, "MRA": 0.30, "T1": 0.20, "T2": 0.15}
_JITTER: Final = 0.066  # relative, of the voxel size of a scan: 0.75 mm becomes 0.70 to 0.80 mm
_GENERATION: Final = 3  # raise when the same parameters are to give other scans


@dataclass(frozen=True)
class PhantomParameters:
    """What determines every byte of a phantom data set."""

    patients: int
    seed: int
    size: int  # voxels along each axis
    spacing_mm: float
    modalities: tuple[str, ...]
    generation: int = _GENERATION

    def __post_init__(self) -> None:
        if self.patients < 1 or self.seed < 0:
            raise ValueError(
                f"patients must be at least 1 and seed at least 0, got {self.patients} and {self.seed}."
            )
        unknown = [name for name in self.modalities if name not in _SHARES]
        if unknown or not self.modalities:
            raise ValueError(f"modalities must be some of {MODALITIES}, got {self.modalities}.")
        if self.fov_mm < 30:
            raise ValueError(
                f"{self.size} voxels of {self.spacing_mm} mm show {self.fov_mm:.0f} mm; the circle of Willis "
                f"needs 30 mm. Raise size to {int(np.ceil(30 / (self.spacing_mm * (1 - _JITTER))))}."
            )

    @property
    def fov_mm(self) -> float:
        """Edge of the smallest cube that a scan shows."""
        return self.size * self.spacing_mm * (1 - _JITTER)

    @property
    def folder(self) -> str:
        """Name of the data set's folder."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"phantom-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def series_uid(self, number: int) -> str:
        """The UID of patient `number`'s series: other content has another UID."""
        content = (self.seed, number, self.size, self.spacing_mm, *self.modalities, self.generation)
        return series_uid_for("phantom", *content)


class PhantomSource(RsnaSource):
    """Simulated patients with a circle of Willis and exact labels, as an RSNA data set.

    The first construction writes `root/phantom-<hash of the parameters>/`, later ones find it there. Patient
    i is the same for any number of patients and jobs; half of the patients have an aneurysm.

    Args:
        root: folder that holds the data sets.
        patients: one series each.
        seed: of all random choices, 0 or more.
        size: voxels along each axis; 96 at 0.75 mm shows the whole circle.
        spacing_mm: mean voxel size; scans differ from it by up to 7 %, through the plane and in it.
        modalities: which of CTA, MRA, T1, T2 to draw from, at 35, 30, 20 and 15 parts.
        jobs: processes that write.
    """

    dataset = "phantom"

    def __init__(
        self,
        root: str | Path,
        patients: int,
        seed: int,
        size: int = 96,
        spacing_mm: float = 0.75,
        modalities: Sequence[str] = MODALITIES,
        jobs: int = 2,
    ) -> None:
        parameters = PhantomParameters(patients, seed, size, float(spacing_mm), tuple(modalities))
        folder = Path(root) / parameters.folder
        if not (folder / MARKER).is_file():
            write_phantoms(folder, parameters, jobs)
        super().__init__(folder, site="phantom")


def write_phantoms(folder: Path, parameters: PhantomParameters, jobs: int) -> None:
    """Write the whole data set; `folder` appears only when it is complete.

    Two processes that write at the same time do not disturb each other: each has a folder of its own, and the
    first to end gives its folder the name.
    """
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    log.info("Writing %d phantom patients to %s", parameters.patients, folder)
    try:
        work = (delayed(write_patient)(part, parameters, i) for i in range(parameters.patients))
        finish(part, [rows for rows in Parallel(n_jobs=jobs)(work) if rows is not None])
        with replacing(part / MARKER) as marker:
            marker.write_text(json.dumps(asdict(parameters), indent=1, sort_keys=True) + "\n")
        if folder.exists() and not (folder / MARKER).is_file():
            shutil.rmtree(folder)  # cut off while it was copied, or a marker removed by hand
        try:
            part.rename(folder)
        except OSError:
            if not (folder / MARKER).is_file():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_patient(root: Path, parameters: PhantomParameters, number: int) -> SeriesRows:
    """Simulate patient `number` and write the series; a pure function of its arguments."""
    body, place, image = (
        np.random.default_rng(child) for child in np.random.SeedSequence([parameters.seed, number]).spawn(3)
    )
    luck, turn = _balanced(parameters.seed, number)
    patient = sample_patient(body, fov_mm=parameters.fov_mm, luck=luck)
    shares = np.array([_SHARES[name] for name in parameters.modalities])
    # The clip guards against a turn of 0.9999 and shares that sum to slightly less than 1.
    drawn = np.searchsorted(np.cumsum(shares / shares.sum()), turn, side="right").clip(0, len(shares) - 1)
    modality = parameters.modalities[int(drawn)]

    grid = _field_of_view(patient, parameters, place)
    maps = voxelise(patient, grid)
    middle = grid.to_index(patient.tree.centre_mm)
    head = HeadGeometry((float(middle[0]), float(middle[1]), float(middle[2])), patient.tree.scale)
    volume = simulate_image(maps.lumen, modality, grid.spacing, image, head=head)

    # The patient lies somewhere on the table, so world zero is not the middle of the head.
    table = np.round(np.array([0.0, place.uniform(-25, 25), place.uniform(-60, 60)]), 2)
    affine = grid.affine.copy()
    affine[:3, 3] += table
    return write_series(
        root,
        series_uid=parameters.series_uid(number),
        patient_id=f"phantom-{parameters.seed}-{number:05d}",
        modality=modality,
        volume=volume,
        grid=Grid(grid.shape, affine),
        age=patient.age,
        sex=patient.sex,
        locations=patient.locations,
        present=patient.present,
        lesions=[(lesion.centre_mm + table, lesion.radius_mm, lesion.location) for lesion in maps.lesions],
        vessel=maps.vessel,
        aneurysm=maps.aneurysm,
    )


def _balanced(seed: int, number: int) -> np.ndarray:
    """Two numbers in 0..1 that fill the square evenly as `number` counts up, however few there are.

    A rank-1 lattice by powers of the plastic number (Roberts' R2 sequence): among 12 patients there are
    positive and negative ones of nearly every modality, which independent draws would not promise.
    """
    start = np.random.default_rng(np.random.SeedSequence([seed])).random(2)
    return (start + number * np.array([0.7548776662466927, 0.5698402909980532])) % 1.0


def _field_of_view(patient: Patient, parameters: PhantomParameters, rng: np.random.Generator) -> Grid:
    """A canonical grid around the circle of Willis that shows every sac whole."""
    through, within = np.round(parameters.spacing_mm * rng.uniform(1 - _JITTER, 1 + _JITTER, size=2), 4)
    spacing = np.array([within, within, through])  # along x, y, z
    centre = rng.uniform(-1, 1, 3) * (1.5, 2, 2)
    half = (parameters.size - 1) / 2 * spacing
    if patient.sacs:
        low = np.min([sac.centre_mm - sac.reach_mm for sac in patient.sacs], axis=0)
        high = np.max([sac.centre_mm + sac.reach_mm for sac in patient.sacs], axis=0)
        centre = np.clip(centre, high - half + 1, low + half - 1)
    affine = np.eye(4)
    affine[:3, :3] = np.diag(spacing)[:, ::-1]
    affine[:3, 3] = np.round(centre - half, 3)
    return Grid((parameters.size, parameters.size, parameters.size), affine)
