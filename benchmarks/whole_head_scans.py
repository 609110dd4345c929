"""Whole heads with exact labels, as the networks see them: phantoms, and IntrA trees in a phantom's head.

    python benchmarks/whole_head_scans.py FOLDER [--phantoms 24] [--trees 76] [--meshes ../shared/data/intra]
                                          [--spacing 1.5]

The example data show a cube around the circle of Willis; a scanner shows the head. Here the same arteries
lie in a field of view of 190 x 220 x 195 mm. Every scan has an aneurysm. Voxels of 1.5 mm are enough for the
coarse pass, 3 to 5 s a head on one core; of 0.75 mm it takes 30.
"""

import argparse
import sys
import zlib
from pathlib import Path

import numpy as np

from aneurysm.data.labels import MODALITIES, UNNAMED_VESSEL
from aneurysm.data.phantom.anatomy import sample_patient
from aneurysm.data.phantom.imaging import HeadGeometry, simulate_image
from aneurysm.data.phantom.lumen import voxelise as draw
from aneurysm.data.preparation.prepare import Preparation, prepare_case
from aneurysm.data.preparation.prepared import SUFFIX, save_prepared
from aneurysm.data.scan import Case, Grid, Lesion, Scan
from aneurysm.data.sources.intra_crops import willis_centre
from aneurysm.data.sources.intra_meshes import Tree, read_trees
from aneurysm.data.sources.intra_sacs import add_sac, distinct_lesions, drop_crumbs, fill_caves
from aneurysm.data.sources.rsna import measure_lesions
from aneurysm.data.voxelise import partial_volume, subdivided, voxelise

# Around the suprasellar cistern, mm along d, h, w (superior, anterior, right).
LOW_MM, HIGH_MM = np.array([-80.0, -130.0, -95.0]), np.array([115.0, 90.0, 95.0])
SMALLEST_SAC = 2  # voxels


def head_grid(cistern_mm: np.ndarray, spacing_mm: float) -> Grid:
    """A canonical grid over the head around a point (RAS mm)."""
    affine = np.zeros((4, 4))
    affine[[0, 1, 2], [2, 1, 0]] = spacing_mm
    affine[:3, 3], affine[3, 3] = np.round(cistern_mm + LOW_MM[::-1], 3), 1
    d, h, w = np.rint((HIGH_MM - LOW_MM) / spacing_mm).astype(int)
    return Grid((int(d), int(h), int(w)), affine)


def phantom_head(number: int, spacing_mm: float, seed: int = 11) -> Case | None:
    """Patient `number` with an aneurysm, None where it has none."""
    rng = np.random.default_rng([seed, number])
    patient = sample_patient(rng, luck=0.0)
    if not patient.sacs:
        return None
    grid = head_grid(patient.tree.centre_mm, spacing_mm)
    maps = draw(patient, grid)
    return _case(f"phantom-{number:03d}", grid, maps.lumen, maps.vessel, maps.aneurysm, maps.lesions,
                 number, rng, patient.tree.centre_mm, patient.tree.scale)  # fmt: skip


def intra_head(tree: Tree, number: int, spacing_mm: float) -> Case | None:
    """A whole tree with all its aneurysms; None where none of them lies on the tree or in the head."""
    rng = np.random.default_rng([3, zlib.crc32(tree.name.encode())])
    lesions = distinct_lesions(tree)
    if not lesions:
        return None
    centre = willis_centre(tree)
    grid = head_grid(centre, spacing_mm)
    inside = voxelise(tree.vertices, tree.faces, grid, 2)
    fine = subdivided(grid, 2)
    sacs = [add_sac(inside, fine, lesion) for lesion in lesions]
    inside = drop_crumbs(fill_caves(inside), 3.0 / fine.voxel_mm3)
    lumen = partial_volume(inside, 2)
    aneurysm = np.zeros(grid.shape, np.uint8)
    for sac in sacs:
        share = partial_volume(sac & inside, 2)
        voxels = (lumen >= 0.5) & (share >= 0.5 * lumen) & (aneurysm == 0)
        if voxels.sum() >= SMALLEST_SAC:
            aneurysm[voxels] = aneurysm.max() + 1
    if not aneurysm.any():
        return None
    vessel = np.where(lumen >= 0.5, UNNAMED_VESSEL, 0).astype(np.uint8)
    found = tuple(measure_lesions(aneurysm, grid))
    return _case(f"intra-{tree.name}", grid, lumen, vessel, aneurysm, found, number, rng, centre, 1.0)


def _case(
    uid: str,
    grid: Grid,
    lumen: np.ndarray,
    vessel: np.ndarray,
    aneurysm: np.ndarray,
    lesions: tuple[Lesion, ...],
    number: int,
    rng: np.random.Generator,
    cistern_mm: np.ndarray,
    scale: float,
) -> Case:
    modality = MODALITIES[number % len(MODALITIES)]
    d, h, w = (float(i) for i in grid.to_index(cistern_mm))
    volume = simulate_image(lumen, modality, grid.spacing, rng, head=HeadGeometry((d, h, w), scale))
    scan = Scan(uid, uid, modality, volume, grid, grid)
    return Case(scan, vessel=vessel, aneurysm=aneurysm, lesions=tuple(lesions), present=True)


def write(case: Case | None, folder: Path, spacing_mm: float) -> None:
    """Prepare and store one head."""
    if case is None:
        return
    save_prepared(
        prepare_case(case, Preparation(spacing_mm=spacing_mm)), folder / f"{case.scan.series_uid}{SUFFIX}"
    )
    print(case.scan.series_uid, case.scan.modality, len(case.lesions), flush=True)


def main() -> None:
    """Write what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--phantoms", type=int, default=24)
    parser.add_argument("--trees", type=int, default=76)
    parser.add_argument("--meshes", type=Path, default=Path("../shared/data/intra"))
    parser.add_argument("--spacing", type=float, default=1.5, help="mm")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    there = {path.name.removesuffix(SUFFIX) for path in arguments.folder.glob(f"*{SUFFIX}")}
    for number in range(arguments.phantoms):
        if f"phantom-{number:03d}" not in there:
            write(phantom_head(number, arguments.spacing), arguments.folder, arguments.spacing)
    if not arguments.meshes.is_dir():
        sys.exit(f"{arguments.meshes} holds no IntrA meshes: phantoms only.")
    for number, tree in enumerate(read_trees(arguments.meshes, arguments.trees)):
        if f"intra-{tree.name}" not in there:
            write(intra_head(tree, number, arguments.spacing), arguments.folder, arguments.spacing)


if __name__ == "__main__":
    main()
