"""Vessel mask -> graph tensors: ours against (a) scipy + skimage + sknw and (b) cc3d + edt + skimage + skan.

    OMP_NUM_THREADS=1 python benchmarks/vessels.py                      # everything: half an hour
    OMP_NUM_THREADS=1 python benchmarks/vessels.py --only brain tree512
    OMP_NUM_THREADS=1 python benchmarks/vessels.py --part growth --methods ours
    OMP_NUM_THREADS=1 python benchmarks/vessels.py --json figures.json

Parts: `peers`, whole heads: the mask of a real TOF-MRA (`brain`), two IntrA trees rendered on 512x512x300 at
0.4x0.4x0.6 and 0.25x0.25x0.35 mm, drawn trees; `growth`, one tree in ever larger volumes, and ever more trees
in one volume. Every method runs in a process of its own; all run in turns on a mask, because a shared machine
changes. CPU seconds (user + system) are the least of the repeats; peak memory is above the loaded mask. What
a method needs and is not installed (`pip install aneurysm[bench]`) or data that is not there is named.
Ours ends with node and edge features, the others with a length and a radius per branch: `features` is the
part of our time that goes into what they do not measure.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from vessels_cases import METHODS, absent, grid_of

DATA = Path(__file__).parents[2] / "shared" / "data"
TARGET_A, TARGET_B, TARGET_MB = 30.0, 8.0, 150.0
Mask = tuple[np.ndarray, tuple[float, float, float]]
HEAD = (300, 512, 512)


def brain() -> Mask:
    """The whole-brain vessel mask of a real TOF-MRA."""
    import nibabel as nib

    image = nib.load(DATA / "vessel_masks" / "hqa_Subject0001_MRA_vesselmask.nii.gz")
    mask = np.asarray(image.dataobj) > 0  # pyright: ignore[reportAttributeAccessIssue]
    z, y, x = (float(s) for s in image.header.get_zooms()[::-1])  # pyright: ignore
    return np.ascontiguousarray(mask.transpose(2, 1, 0)), (z, y, x)


def intra(number: int, spacing: tuple[float, float, float]) -> Mask:
    """An IntrA tree in the middle of a whole head."""
    from aneurysm.data.scan import Grid
    from aneurysm.data.sources.intra_meshes import read_trees
    from aneurysm.data.voxelise import voxelise

    tree = read_trees(DATA / "intra")[number]
    grid = grid_of(np.zeros(HEAD, bool), np.array(spacing))
    affine = grid.affine.copy()
    affine[:3, 3] = (tree.vertices.min(0) + tree.vertices.max(0)) / 2 - grid.centre_mm
    return voxelise(tree.vertices, tree.faces, Grid(HEAD, affine), 1), spacing


def drawn(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    trees: int,
    extent_mm: float,
    seed: int = 0,
) -> Mask:
    """Branching trees that obey Murray's law, each in a cube of `extent_mm`, side by side from the corner."""
    mask = np.zeros(shape, bool)
    size = np.array(shape[::-1]) * np.array(spacing[::-1])
    many = np.maximum((size // extent_mm).astype(int), 1)
    rng = np.random.default_rng(seed)
    for k in range(trees):
        corner = np.array(np.unravel_index(k % int(many.prod()), tuple(many))) * extent_mm
        _grow(mask, np.array(spacing[::-1]), corner, extent_mm, rng)
    return mask, spacing


def _grow(mask: np.ndarray, spacing: np.ndarray, corner: np.ndarray, extent: float, rng: np.random.Generator):
    low, high = corner + 4, corner + extent - 4
    middle = (low + high) / 2
    open_ = [(np.array([middle[0], middle[1], low[2]]), np.array([0, 0, 1.0]), 2.0)]
    while open_:
        at, heading, radius = open_.pop()
        if radius < 0.7:
            continue
        for _ in range(int(rng.integers(10, 16))):  # a winding branch, 1 mm at a time
            heading = heading + 0.25 * rng.normal(size=3) + 0.15 * (middle - at) / extent
            heading /= np.linalg.norm(heading)
            _ball(mask, spacing, np.clip(at, low, high), radius)
            at = at + heading
        side = np.cross(heading, rng.normal(size=3))
        side /= np.linalg.norm(side)
        share = rng.uniform(0.35, 0.65)
        for sign, part in ((1, share), (-1, 1 - share)):
            open_.append((at, heading + 0.8 * sign * side, radius * part ** (1 / 3)))


def _ball(mask: np.ndarray, spacing: np.ndarray, centre: np.ndarray, radius: float) -> None:
    low = np.maximum(np.floor((centre - radius) / spacing), 0).astype(int)
    high = np.minimum(np.ceil((centre + radius) / spacing) + 1, mask.shape[::-1]).astype(int)
    x, y, z = (np.arange(a, b) * s - c for a, b, s, c in zip(low, high, spacing, centre, strict=True))
    near = z[:, None, None] ** 2 + y[:, None] ** 2 + x**2 < radius**2
    mask[low[2] : high[2], low[1] : high[1], low[0] : high[0]] |= near


FINE, USUAL = (0.35, 0.25, 0.25), (0.6, 0.4, 0.4)
PEERS: dict[str, Callable[[], Mask]] = {
    "brain": brain,
    "intra 0.4 mm": lambda: intra(7, USUAL),
    "intra 0.25 mm": lambda: intra(7, FINE),
    "tree256": lambda: drawn((256, 256, 256), (0.4, 0.4, 0.4), 2, 75.0),
    "tree512": lambda: drawn(HEAD, USUAL, 4, 75.0),
}
GROWTH: dict[str, Callable[[], Mask]] = {
    "1 tree in 128^3": lambda: drawn((128, 128, 128), (0.6, 0.6, 0.6), 1, 75.0),
    "1 tree in 256^3": lambda: drawn((256, 256, 256), (0.6, 0.6, 0.6), 1, 75.0),
    "1 tree in 512x512x300": lambda: drawn(HEAD, (0.6, 0.6, 0.6), 1, 75.0),
    **{
        f"{k} trees in 512x512x300": lambda k=k: drawn(HEAD, (0.6, 0.6, 0.6), k, 75.0)
        for k in (2, 4, 8, 16, 32)
    },
}


def masks(chosen: dict[str, Callable[[], Mask]], only: list[str], folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of every mask that can be made here; says what cannot."""
    for name, make in chosen.items():
        if only and not any(word in name for word in only):
            continue
        try:
            mask, spacing = make()
        except (FileNotFoundError, ImportError) as error:
            print(f"left out: {name}: {error}", flush=True)
            continue
        path = folder / f"{name.replace(' ', '_')}.npz"
        np.savez(path, mask=mask, spacing=np.array(spacing))
        print(
            f"\n### {name}: {'x'.join(map(str, mask.shape))}, {' x '.join(map(str, spacing))} mm, "
            f"{int(mask.sum())} voxels ({mask.mean():.2%})\n"
        )
        yield name, path
        path.unlink()


def case(path: Path, method: str, repeats: int) -> dict[str, Any]:
    """Figures of one method on one mask, from a process of its own."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("vessels_cases.py")),
        str(path),
        method,
        str(repeats),
    ]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"{method} could not be measured:\n{child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print one table per mask."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=("peers", "growth"), default=["peers", "growth"])
    parser.add_argument("--only", nargs="+", default=[], help="masks whose names hold one of these words")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=3, help="of ours; the others run once")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    given = parser.parse_args()
    methods = []
    for method in given.methods:
        if absent(method):
            print(f"left out: {method}: not installed: {', '.join(absent(method))}")
        else:
            methods.append(method)
    print(f"numpy {np.__version__}; load {os.getloadavg()[0]:.1f} at the start", flush=True)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for part in given.part:
            for name, path in masks(PEERS if part == "peers" else GROWTH, given.only, Path(folder)):
                print("| method | CPU s | / ours | features s | peak MB | junctions | ends | length mm |")
                print("|---|---|---|---|---|---|---|---|")
                first = 0.0
                for method in methods:
                    found = case(path, method, given.repeats if method.startswith("ours") else 1)
                    results.append({"mask": name, "method": method, **found})
                    first = first or found["cpu_s"]
                    extra = f"{found['features_s']:.2f}" if "features_s" in found else ""
                    print(
                        f"| {method} | {found['cpu_s']:.2f} | {found['cpu_s'] / first:.1f} | {extra} "
                        f"| {found['peak_mb']:.0f} | {found['junctions']} | {found['ends']} "
                        f"| {found['length_mm']:.0f} |",
                        flush=True,
                    )
    print(f"\nAsked for: {TARGET_A:.0f} (a), {TARGET_B:.0f} (b), at most {TARGET_MB:.0f} MB.")
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
