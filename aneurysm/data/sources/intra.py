"""Real arterial trees with real aneurysms (IntrA), rendered as scans in the layout of RSNA 2025.

What is real: the shapes of arteries and aneurysms and where the aneurysms are. What is simulated: everything
an image adds to them. What is unknown stays unknown: age, sex and the names of the arteries. Locations are
unknown for negative scans too; known zeros there and nothing else would teach a net that no location is ever
positive.
"""

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from joblib import Parallel, delayed

from aneurysm.data.files import replacing
from aneurysm.data.labels import MODALITIES, UNNAMED_VESSEL
from aneurysm.data.phantom.imaging import HeadGeometry, simulate_image
from aneurysm.data.scan import Grid
from aneurysm.data.sources.intra_crops import crop_with, crop_without, willis_centre
from aneurysm.data.sources.intra_meshes import Segment, Tree, read_trees
from aneurysm.data.sources.intra_sacs import (
    add_sac,
    distinct_lesions,
    drop_crumbs,
    fill_caves,
    pieces,
    without_sac,
)
from aneurysm.data.sources.rsna import RsnaSource, measure_lesions
from aneurysm.data.sources.rsna_writer import LesionRow, SeriesRows, finish, series_uid_for, write_series
from aneurysm.data.voxelise import VoxelisationError, partial_volume, subdivided, voxelise

log = logging.getLogger(__name__)

MARKER: Final = "complete.json"
_SUPERSAMPLE: Final = 2
_DEBRIS_MM3: Final = 3.0  # smaller pieces are left-overs of the surface reconstruction
_SMALLEST_SAC: Final = 12  # voxels
_GENERATION: Final = 3  # raise when the same parameters are to give other scans


@dataclass(frozen=True)
class IntraParameters:
    """What determines every byte of a rendered data set."""

    meshes: str  # hash of the names and sizes of the input files
    seed: int
    size: int  # voxels along each axis
    spacing_mm: float
    modalities: tuple[str, ...]
    negatives: float  # share of patients, 0..1
    max_patients: int | None
    renderings: int = 1  # of every tree, each in the next modality
    generation: int = _GENERATION

    def __post_init__(self) -> None:
        unknown = [name for name in self.modalities if name not in MODALITIES]
        if unknown or not self.modalities:
            raise ValueError(f"modalities must be some of {MODALITIES}, got {self.modalities}.")
        if self.seed < 0 or self.size < 16 or self.spacing_mm <= 0 or not 0 <= self.negatives <= 1:
            raise ValueError(
                "Expected seed >= 0, size >= 16, spacing_mm > 0 and negatives in 0..1, got "
                f"{self.seed}, {self.size}, {self.spacing_mm}, {self.negatives}."
            )
        if not 1 <= self.renderings <= len(self.modalities):
            raise ValueError(
                f"renderings={self.renderings}: a tree is rendered at least once and in every modality at "
                f"most once, 1 to {len(self.modalities)} here."
            )

    @property
    def folder(self) -> str:
        """Name of the data set's folder."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"intra-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


class IntraSource(RsnaSource):
    """IntrA patients as an RSNA data set: per aneurysm a scan around it, for some patients one without.

    The first construction writes `root/intra-<hash of the parameters>/`, later ones find it there; what was
    left out and why is in its `complete.json`. A scan without aneurysm is the scan with every sac cut off and
    the stump smoothed or, in turn, another box of the same tree; it has the same modality and patient. Trees
    whose aneurysm does not lie in their frame are left out, and trees that hide an unmarked aneurysm give no
    negative.

    Args:
        meshes: folder of the IntrA release, or the packed folder (see `intra_meshes`).
        root: folder that holds the data sets.
        seed: of all random choices, 0 or more.
        spacing_mm: voxel size.
        size: voxels along each axis; 96 at 0.6 mm shows 58 mm.
        modalities: which of CTA, MRA, T1, T2 to render, in equal parts.
        negatives: share of patients that also give a scan without aneurysm, 0..1.
        max_patients: use only the first so many.
        renderings: in how many modalities every tree is shown, each time in boxes and with noise of its own.
            There are few trees: what four of them teach about an anatomy holds for every contrast.
        jobs: processes that render.

    Raises:
        ReadError: `meshes` holds no IntrA data.
        ImportError: VTK is missing, with the way to install it.
    """

    dataset = "intra"

    def __init__(
        self,
        meshes: str | Path,
        root: str | Path,
        seed: int = 0,
        spacing_mm: float = 0.6,
        size: int = 96,
        modalities: Sequence[str] = MODALITIES,
        negatives: float = 0.5,
        max_patients: int | None = None,
        renderings: int = 1,
        jobs: int = 2,
    ) -> None:
        parameters = IntraParameters(
            _content(Path(meshes)),
            seed,
            size,
            float(spacing_mm),
            tuple(modalities),
            float(negatives),
            max_patients,
            renderings,
        )
        folder = Path(root) / parameters.folder
        if not (folder / MARKER).is_file():
            write_intra(Path(meshes), folder, parameters, jobs)
        super().__init__(folder, site="intra")

    def left_out(self) -> list[str]:
        """What of the meshes is not in the data set, one sentence each."""
        return json.loads((self.root / MARKER).read_text())["left_out"]


@dataclass(frozen=True)
class Rendered:
    """What one tree gave."""

    rows: tuple[SeriesRows, ...]
    left_out: tuple[str, ...]


def write_intra(meshes: Path, folder: Path, parameters: IntraParameters, jobs: int) -> None:
    """Render the whole data set; `folder` appears only when it is complete."""
    trees = read_trees(meshes, parameters.max_patients)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    log.info("Rendering %d IntrA trees to %s", len(trees), folder)
    try:
        work = (delayed(render_tree)(part, tree, parameters, i) for i, tree in enumerate(trees))
        rendered = [tree for tree in Parallel(n_jobs=jobs)(work) if tree is not None]
        rows = [row for tree in rendered for row in tree.rows]
        left_out = [reason for tree in rendered for reason in tree.left_out]
        for reason in left_out:
            log.warning("IntrA: %s", reason)
        if not rows:
            raise VoxelisationError(f"{meshes}: no tree gave a scan. Reasons: {left_out[:3]}")
        finish(part, rows)
        with replacing(part / MARKER) as marker:
            report = {"parameters": asdict(parameters), "series": len(rows), "left_out": left_out}
            marker.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
        if folder.exists() and not (folder / MARKER).is_file():
            shutil.rmtree(folder)
        try:
            part.rename(folder)
        except OSError:  # another process was first
            if not (folder / MARKER).is_file():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def render_tree(root: Path, tree: Tree, parameters: IntraParameters, number: int) -> Rendered:
    """Render and write all scans of tree `number`; depends on nothing but its arguments."""
    lesions = distinct_lesions(tree)
    left_out = [
        f"{s.name}: the annotated segment does not lie on its tree" for s in tree.segments if not s.aligned
    ]
    if not lesions:
        return Rendered((), (*left_out, f"{tree.name}: no aneurysm with a known place, tree not used"))
    # Roberts' R2 sequence: even shares of modalities and negatives among however few trees.
    start = np.random.default_rng(parameters.seed).random(2)
    turn, luck = (start + number * np.array([0.7548776662466927, 0.5698402909980532])) % 1.0
    first = int(turn * len(parameters.modalities))
    rows: list[SeriesRows] = []
    for k in range(parameters.renderings):
        modality = parameters.modalities[(first + k) % len(parameters.modalities)]
        rng = np.random.default_rng([parameters.seed, zlib.crc32(tree.name.encode()), *([k] if k else [])])
        studio = _Studio(root, tree, lesions, modality, parameters, rng)
        found, missing = _rendered(studio, luck < parameters.negatives, f"-{modality}" if k else "")
        rows += found
        left_out += missing if k == 0 else [f"{reason} ({modality})" for reason in missing]
    return Rendered(tuple(rows), tuple(left_out))


def _rendered(studio: "_Studio", wants_negative: bool, suffix: str) -> tuple[list[SeriesRows], list[str]]:
    """The scans of one tree in one modality, and what was left out."""
    tree, lesions, parameters, rng = studio.tree, studio.lesions, studio.parameters, studio.rng
    left_out: list[str] = []
    rows: list[SeriesRows] = []
    shown: set[str] = set()
    first: _View | None = None
    for lesion in lesions:
        if lesion.name in shown:
            continue
        try:
            grid = crop_with(lesion, lesions, tree, parameters.size, parameters.spacing_mm, rng)
            view = studio.view(grid)
            row, names = studio.positive(f"positive-{len(rows)}{suffix}", view)
        except ValueError as error:  # the box is too small, or the mesh cannot be voxelised
            left_out.append(f"{lesion.name}: {error}")
            continue
        if row is None or lesion.name not in names:
            left_out.append(f"{lesion.name}: the sac covers fewer than {_SMALLEST_SAC} voxels")
        if row is not None:
            rows.append(row)
            shown |= names
            first = first or view
    if wants_negative and first is not None:
        row = None
        if tree.fully_annotated:
            try:
                row = studio.negative(f"negative{suffix}", first, elsewhere=bool(rng.integers(2)))
            except VoxelisationError as error:
                left_out.append(f"{tree.name}: {error}")
        if row is None:
            left_out.append(f"{tree.name}: no scan without aneurysm could be made of this tree")
        else:
            rows.append(row)
    return rows, left_out


@dataclass(frozen=True, eq=False)
class _View:
    """A box of a tree in sub-voxels."""

    grid: Grid  # of voxels
    inside: np.ndarray  # bool (d * s, h * s, w * s), lumen, sacs included
    sacs: dict[str, np.ndarray]  # name of the segment -> the same for its sac


@dataclass(frozen=True, eq=False)
class _Studio:
    """Takes the scans of one tree."""

    root: Path
    tree: Tree
    lesions: list[Segment]
    modality: str
    parameters: IntraParameters
    rng: np.random.Generator

    def view(self, grid: Grid) -> _View:
        """Voxelise a box, fill its sacs and caves and leave crumbs out."""
        inside = voxelise(self.tree.vertices, self.tree.faces, grid, _SUPERSAMPLE)
        fine = subdivided(grid, _SUPERSAMPLE)
        sacs = {lesion.name: add_sac(inside, fine, lesion) for lesion in self.lesions}
        inside = drop_crumbs(fill_caves(inside), _DEBRIS_MM3 / fine.voxel_mm3)
        return _View(grid, inside, {name: sac & inside for name, sac in sacs.items() if sac.any()})

    def positive(self, name: str, view: _View) -> tuple[SeriesRows | None, set[str]]:
        """Write a scan with its aneurysms; None when no sac is large enough to be seen."""
        lumen = partial_volume(view.inside, _SUPERSAMPLE)
        aneurysm = np.zeros(view.grid.shape, np.uint8)
        names: set[str] = set()
        for segment, sac in view.sacs.items():
            share = partial_volume(sac, _SUPERSAMPLE)
            parts = pieces((lumen >= 0.5) & (share >= 0.5 * lumen) & (aneurysm == 0))
            # Two sacs side by side were marked in one segment (AN9-2): each is a lesion.
            for part in np.flatnonzero(np.bincount(parts.ravel())[1:] >= _SMALLEST_SAC) + 1:
                aneurysm[parts == part] = aneurysm.max() + 1
                names.add(segment)
        if not names:
            return None, names
        measured = measure_lesions(aneurysm, view.grid)
        lesions: list[LesionRow] = [(lesion.centre_mm, lesion.radius_mm, None) for lesion in measured]
        return self.write(name, view.grid, lumen, aneurysm, lesions), names

    def negative(self, name: str, view: _View, elsewhere: bool) -> SeriesRows | None:
        """Write a scan without aneurysm: another box of the tree, or this one with its sacs cut off."""
        p = self.parameters
        box = None
        if elsewhere:
            box = crop_without(self.lesions, self.tree, p.size, p.spacing_mm, self.rng, view.grid)
        if box is not None:
            view = self.view(box)
            healthy: np.ndarray | None = view.inside
        else:
            fine = subdivided(view.grid, _SUPERSAMPLE)
            healthy = view.inside
            for sac in view.sacs.values():
                healthy = None if healthy is None else without_sac(healthy, sac & healthy, fine)
            if healthy is None:
                return None if elsewhere else self.negative(name, view, elsewhere=True)
        lumen = partial_volume(healthy, _SUPERSAMPLE)
        return self.write(name, view.grid, lumen, np.zeros(view.grid.shape, np.uint8), [])

    def write(
        self, name: str, grid: Grid, lumen: np.ndarray, aneurysm: np.ndarray, lesions: list[LesionRow]
    ) -> SeriesRows:
        d, h, w = (float(i) for i in grid.to_index(willis_centre(self.tree)))
        head = HeadGeometry((d, h, w))
        volume = simulate_image(lumen, self.modality, grid.spacing, self.rng, head=head)
        vessel = np.where(lumen >= 0.5, UNNAMED_VESSEL, 0).astype(np.uint8)
        return write_series(
            self.root,
            series_uid=series_uid_for("intra", self.parameters.folder, self.tree.name, name),
            patient_id=f"intra-{self.tree.patient_id}",
            modality=self.modality,
            volume=volume,
            grid=grid,
            age=None,
            sex=None,
            locations=None,
            present=bool(lesions),
            lesions=lesions,
            vessel=vessel,
            aneurysm=aneurysm,
        )


def _content(meshes: Path) -> str:
    """A hash of the names and sizes of the input files: other meshes make another data set."""
    files = sorted(p for p in meshes.rglob("*") if p.suffix in (".npz", ".obj", ".ad"))
    text = "\n".join(f"{p.relative_to(meshes).as_posix()} {p.stat().st_size}" for p in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
