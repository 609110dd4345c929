"""The masks and the methods of `vessels.py`; as a command it measures one method on one mask.

    python benchmarks/vessels_cases.py mask.npz method repeats      # prints one JSON line

CPU seconds are user + system of the process, all threads, the least of the repeats. Peak memory is the
high-water mark of the resident set above what was resident with the mask loaded and all libraries warm.
"""

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from nets_measure import resident
from scipy import ndimage

from aneurysm.data.scan import Grid
from aneurysm.vessels import graph as vessel_graph
from aneurysm.vessels.repair import VesselRules, repair

EVERYWHERE = np.ones((3, 3, 3))
SMALLEST_MM3 = 20.0
Figures = dict[str, Any]


def grid_of(mask: np.ndarray, spacing: np.ndarray) -> Grid:
    """Axis-aligned grid with (d, h, w) along (z, y, x)."""
    affine = np.zeros((4, 4))
    affine[[0, 1, 2], [2, 1, 0]] = spacing[::-1]
    affine[3, 3] = 1
    return Grid((mask.shape[0], mask.shape[1], mask.shape[2]), affine)


def ours(mask: np.ndarray, spacing: np.ndarray) -> Figures:
    """Mask -> clean pieces -> depth -> thinning -> graph -> node and edge features."""
    return _ours(mask, spacing, VesselRules(SMALLEST_MM3, gap_mm=0, sac_mm=0))


def ours_mended(mask: np.ndarray, spacing: np.ndarray) -> Figures:
    """As `ours`, with gaps bridged and sacs joined before, as the pipeline does it."""
    return _ours(mask, spacing, VesselRules(SMALLEST_MM3))


def _ours(mask: np.ndarray, spacing: np.ndarray, rules: VesselRules) -> Figures:
    grid = grid_of(mask, spacing)
    spent = 0.0
    plain = vessel_graph.describe_nodes

    def timed(*given: Any) -> Any:
        nonlocal spent
        start = time.process_time()
        found = plain(*given)
        spent += time.process_time() - start
        return found

    vessel_graph.describe_nodes = timed
    try:
        built = vessel_graph.build_graph(repair(mask, grid, rules).voxels, grid)
    finally:
        vessel_graph.describe_nodes = plain
    kinds = np.bincount(built.kind, minlength=4)
    return {
        "junctions": int(kinds[vessel_graph.JUNCTION]),
        "ends": int(kinds[vessel_graph.END]),
        "length_mm": float(built.edge_length[: len(built.edges)].sum()),
        "features_s": spent,
    }


def scipy_sknw(mask: np.ndarray, spacing: np.ndarray) -> Figures:
    """(a) scipy label and distance, skimage thinning, sknw: length and radius per edge."""
    import sknw
    from skimage.morphology import skeletonize

    label, _ = ndimage.label(mask, EVERYWHERE)
    size = np.bincount(label.ravel()) * np.prod(spacing)
    size[0] = 0
    kept = (size >= SMALLEST_MM3)[label]
    distance = ndimage.distance_transform_edt(kept, sampling=spacing)
    skeleton = skeletonize(kept) > 0
    found = sknw.build_sknw(skeleton.astype(np.uint16), multi=True, ring=True)
    lengths, radii = [], []
    for _, _, edge in found.edges(data=True):
        points = edge["pts"]
        lengths.append(float(np.linalg.norm(np.diff(points * spacing, axis=0), axis=1).sum()))
        radii.append(float(distance[tuple(points.T)].mean()) if len(points) else 0.0)
    degree = np.array([d for _, d in found.degree()], int)
    return {
        "junctions": int((degree > 2).sum()),
        "ends": int((degree == 1).sum()),
        "length_mm": float(np.sum(lengths)),
        "radius_mm": float(np.mean(radii)) if radii else 0.0,
    }


def cc3d_skan(mask: np.ndarray, spacing: np.ndarray) -> Figures:
    """(b) cc3d, edt, skimage thinning, skan: length and radius per branch."""
    import cc3d
    import edt
    from skan import Skeleton, summarize
    from skimage.morphology import skeletonize

    label = cc3d.connected_components(mask, connectivity=26)
    size = np.bincount(label.ravel()) * np.prod(spacing)
    size[0] = 0
    kept = (size >= SMALLEST_MM3)[label]
    distance = edt.edt(kept, anisotropy=tuple(float(s) for s in spacing), parallel=1)
    skeleton = skeletonize(kept) > 0
    table = summarize(Skeleton(skeleton * distance, spacing=list(spacing)), separator="_")
    ends = table[["node_id_src", "node_id_dst"]].to_numpy().ravel()
    degree = np.unique(ends, return_counts=True)[1]
    return {
        "junctions": int((degree > 2).sum()),
        "ends": int((degree == 1).sum()),
        "length_mm": float(table["branch_distance"].sum()),
        "radius_mm": float(table["mean_pixel_value"].mean()),
    }


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], Figures]] = {
    "ours": ours,
    "ours, mended": ours_mended,
    "scipy+sknw": scipy_sknw,
    "cc3d+skan": cc3d_skan,
}
NEEDS = {"ours": (), "ours, mended": (), "scipy+sknw": ("sknw",), "cc3d+skan": ("cc3d", "edt", "skan")}


def absent(method: str) -> list[str]:
    """Modules that the method needs and that are not installed."""
    return [name for name in NEEDS[method] if importlib.util.find_spec(name) is None]


def measured(path: Path, method: str, repeats: int) -> Figures:
    """Figures of one method on one mask, in this process."""
    with np.load(path) as stored:
        mask, spacing = np.ascontiguousarray(stored["mask"], bool), stored["spacing"].astype(float)
    small = np.zeros((24, 24, 24), bool)  # a cross: libraries and compiled code are loaded now
    small[10:14, 10:14, 2:22] = small[10:14, 2:22, 10:14] = True
    METHODS[method](small, np.ones(3))
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = resident("VmRSS")
    seconds, found = [], {}
    for k in range(repeats):
        start = time.process_time()
        one = METHODS[method](mask, spacing)
        seconds.append(time.process_time() - start)
        if seconds[-1] == min(seconds):
            found = one
        if k == 0:
            found["peak_mb"] = (resident("VmHWM") - before) / 2**20
            peak = found["peak_mb"]
    return {**found, "peak_mb": peak, "cpu_s": min(seconds), "all_s": seconds}


if __name__ == "__main__":
    print(json.dumps(measured(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
