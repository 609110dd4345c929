"""Preparation and cache against MONAI and gzip NIfTI: CPU seconds, peak memory, disk, ratios within one run.

python benchmarks/data_cache.py [result.json]

A CT-like series of 300 slices of 512 x 512 is prepared from the array in memory by MONAI's transforms and by
ours; random patches of 96^3 are read from a prepared volume of 410 x 410 x 360 (with and without its masks).
gzip NIfTI holds the resampled scan in whole Hounsfield units, as it is and clipped to the window of the
preparation, which makes air compress to nothing. One thread; about two minutes on one core.
"""

import gc
import json
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import torch
from monai.data.dataset import PersistentDataset
from monai.data.meta_tensor import MetaTensor
from monai.transforms.compose import Compose
from monai.transforms.croppad.dictionary import CropForegroundd
from monai.transforms.intensity.dictionary import ScaleIntensityRanged
from monai.transforms.spatial.dictionary import Orientationd, Spacingd
from monai.transforms.utility.array import Lambda
from monai.transforms.utility.dictionary import EnsureChannelFirstd

from aneurysm.data.preparation.prepare import Preparation, prepare_case
from aneurysm.data.preparation.prepared import PreparedCase, load_prepared_crop, open_prepared, save_prepared
from aneurysm.data.scan import Case, Grid, Scan

SERIES, SERIES_MM = (300, 512, 512), (0.6, 0.4, 0.4)  # slices, rows, columns
SPACING_MM = 0.5
VOLUME = (360, 410, 410)
PATCH = 96
TARGETS = {
    "preparation, MONAI / ours": 3.0,
    "patch, gzip NIfTI / ours": 80.0,
    "patch, PersistentDataset / ours": 30.0,
    "disk, ours / PersistentDataset": 0.3,  # at most
}


def cpu() -> float:
    """User and system seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measured(work: Callable[[], Any], repeats: int) -> tuple[float, float, float]:
    """Smallest CPU seconds, smallest wall seconds, and largest growth of memory in MB."""
    process, best_cpu, best_wall, peak = psutil.Process(), np.inf, np.inf, 0.0
    for _ in range(repeats):
        gc.collect()
        before, stop, seen = process.memory_info().rss, threading.Event(), [0]

        def watch(stop: threading.Event = stop, seen: list[int] = seen) -> None:
            while not stop.wait(0.005):
                seen[0] = max(seen[0], process.memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        started, began = time.perf_counter(), cpu()
        kept = work()
        best_cpu, best_wall = min(best_cpu, cpu() - began), min(best_wall, time.perf_counter() - started)
        stop.set()
        watcher.join()
        peak = max(peak, (seen[0] - before) / 1e6)
        del kept
    return best_cpu, best_wall, peak


def ct_like(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """A head with skull, texture and noise in air, whole Hounsfield units, (d, h, w) float32."""
    rng = np.random.default_rng(seed)
    z, y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    volume = np.empty(shape, np.float32)
    for d in range(shape[0]):
        r = (z[d] / 0.97) ** 2 + (y[:, None] / 0.9) ** 2 + (x[None] / 0.75) ** 2
        plane = np.select([r < 0.85, r < 0.95, r < 1], [35.0, 900.0, 20.0], -1000.0)
        texture = 10 * np.sin(20 * y[:, None] + 7 * z[d]) * np.sin(23 * x[None])
        volume[d] = np.rint(plane + texture + rng.normal(0, 12, shape[1:]))
    return volume


def grid_of(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Grid:
    """Axis-aligned, canonical."""
    affine = np.zeros((4, 4))
    affine[[2, 1, 0, 3], [0, 1, 2, 3]] = (*spacing, 1)
    return Grid(shape, affine)


def preparations() -> dict[str, Any]:
    """MONAI's pipeline and ours on the same array."""
    volume = ct_like(SERIES)
    grid = grid_of(SERIES, SERIES_MM)
    case = Case(Scan("series", "patient", "CTA", volume, grid, grid))
    settings = Preparation(spacing_mm=SPACING_MM, keep_within=0.0, height_mm=None)
    # As a reader hands it over: axes x, y, z towards left, posterior, superior.
    affine = np.diag([-SERIES_MM[2], -SERIES_MM[1], SERIES_MM[0], 1.0])
    stored = torch.from_numpy(np.ascontiguousarray(volume[:, ::-1, ::-1].transpose(2, 1, 0)))
    compose = Compose(
        [
            EnsureChannelFirstd("image", channel_dim="no_channel"),
            Orientationd("image", axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            Spacingd("image", pixdim=(SPACING_MM,) * 3, mode="bilinear"),
            ScaleIntensityRanged("image", -100, 800, -0.4667, 2.5333, clip=True),
            CropForegroundd("image", source_key="image", select_fn=lambda x: x > -0.4, margin=12),
        ]
    )
    ours = measured(lambda: prepare_case(case, settings), 3)
    monai = measured(lambda: compose({"image": MetaTensor(stored.clone(), affine=torch.tensor(affine))}), 3)
    shapes = (prepare_case(case, settings).image.shape,)
    shapes += (tuple(compose({"image": MetaTensor(stored, affine=torch.tensor(affine))})["image"].shape[1:]),)
    return {"ours": ours, "MONAI Compose": monai, "shapes": shapes}


def patches(folder: Path) -> dict[str, Any]:
    """CPU milliseconds per random patch, opened anew each time, and megabytes on disk."""
    grid = grid_of(VOLUME, (SPACING_MM,) * 3)
    scan = ct_like(VOLUME, 1)
    image = np.clip((scan - 40) / 300, -140 / 300, 760 / 300).astype(np.float32)
    z, y, x = np.ogrid[tuple(slice(n) for n in VOLUME)]
    tubes = ((y - 205 - 60 * np.sin(z / 40)) ** 2 + (x - 205 - 60 * np.cos(z / 30)) ** 2 < 36).astype(
        np.uint8
    )
    unknown = np.full(13, np.nan, np.float32)

    def case(mask: np.ndarray | None) -> PreparedCase:
        return PreparedCase(
            "s", "p", "CTA", image, grid, mask, mask, (), None, None, None, unknown, grid, -140 / 300
        )  # fmt: skip

    plain, labelled = folder / "plain.blosc2", folder / "labelled.blosc2"
    written = measured(lambda: save_prepared(case(None), plain), 2)[0]
    save_prepared(case(tubes), labelled)
    rng = np.random.default_rng(0)

    def start() -> tuple[int, int, int]:
        d, h, w = (int(rng.integers(n - PATCH + 1)) for n in VOLUME)
        return d, h, w

    size = (PATCH, PATCH, PATCH)
    opened = open_prepared(plain)
    gzip, clipped, gzip_written = folder / "scan.nii.gz", folder / "clipped.nii.gz", []
    for file, hounsfield in ((gzip, scan), (clipped, np.clip(scan, -100, 800))):
        began = cpu()
        stored = hounsfield.astype(np.int16).transpose(2, 1, 0)
        nib.save(nib.Nifti1Image(stored, np.diag([0.5, 0.5, 0.5, 1])), file)
        gzip_written.append(cpu() - began)

    def from_gzip(file: Path) -> np.ndarray:
        d, h, w = start()
        proxy: Any = nib.load(file).dataobj  # type: ignore[attr-defined]
        box = proxy[w : w + PATCH, h : h + PATCH, d : d + PATCH]
        return (box.astype(np.float32) - np.float32(40)) / np.float32(300)

    tensors = folder / "monai"
    # As its documentation uses it: deterministic transforms are cached, what the item is made from is a path.
    data = PersistentDataset(
        [{"image": 0}], Compose([Lambda(lambda _: {"image": torch.from_numpy(image)})]), tensors
    )
    began = cpu()
    data[0]
    monai_written = cpu() - began

    def from_monai() -> torch.Tensor:
        d, h, w = start()
        return data[0]["image"][d : d + PATCH, h : h + PATCH, w : w + PATCH].clone()  # type: ignore[index]

    def each(read: Callable[[], Any], count: int) -> float:
        read()
        times = []
        for _ in range(count):
            began = cpu()
            read()
            times.append(cpu() - began)
        return float(np.mean(times) * 1e3)

    return {
        "ours": (each(lambda: load_prepared_crop(plain, start(), size), 60), megabytes(plain), written),
        "ours, opened once": (each(lambda: opened.crop(start(), size), 60), megabytes(plain), written),
        "ours, image and two masks": (
            each(lambda: load_prepared_crop(labelled, start(), size), 60), megabytes(labelled), written,
        ),
        "PersistentDataset": (each(from_monai, 12), megabytes(*tensors.glob("*.pt")), monai_written),
        "gzip NIfTI": (each(lambda: from_gzip(gzip), 6), megabytes(gzip), gzip_written[0]),
        "gzip NIfTI, clipped": (each(lambda: from_gzip(clipped), 6), megabytes(clipped), gzip_written[1]),
    }  # fmt: skip


def megabytes(*files: Path) -> float:
    """Size on disk."""
    return sum(file.stat().st_size for file in files) / 1e6


def main() -> None:
    """Measure, print, and write the figures where asked."""
    torch.set_num_threads(1)
    prepared = preparations()
    print(f"{'preparation':28s} {'CPU s':>8s} {'wall s':>8s} {'peak MB':>8s}")
    for name in ("ours", "MONAI Compose"):
        print(f"{name:28s} {prepared[name][0]:8.2f} {prepared[name][1]:8.2f} {prepared[name][2]:8.0f}")
    print("shapes (d, h, w) and (x, y, z):", *prepared["shapes"])
    with tempfile.TemporaryDirectory() as folder:
        read = patches(Path(folder))
    print(f"\n{'random 96^3 patch':28s} {'CPU ms':>8s} {'MB':>8s} {'write s':>8s}")
    for name, (ms, size, seconds) in read.items():
        print(f"{name:28s} {ms:8.2f} {size:8.1f} {seconds:8.2f}")
    ratios = {
        "preparation, MONAI / ours": prepared["MONAI Compose"][0] / prepared["ours"][0],
        "patch, gzip NIfTI / ours": read["gzip NIfTI"][0] / read["ours"][0],
        "patch, clipped gzip NIfTI / ours": read["gzip NIfTI, clipped"][0] / read["ours"][0],
        "patch, PersistentDataset / ours": read["PersistentDataset"][0] / read["ours"][0],
        "disk, ours / PersistentDataset": read["ours"][1] / read["PersistentDataset"][1],
    }
    print()
    for name, ratio in ratios.items():
        bound = "at most" if name.startswith("disk") else "at least"
        target = f"  ({bound} {TARGETS[name]})" if name in TARGETS else ""
        print(f"{name:36s} {ratio:8.2f}{target}")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(
            json.dumps({"preparation": prepared, "patches": read, "ratios": ratios}, indent=1)
        )


if __name__ == "__main__":
    main()
