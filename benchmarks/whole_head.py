"""Looking at a whole head: stitching against MONAI's, and what the region of interest saves and leaves out.

    OMP_NUM_THREADS=1 python benchmarks/whole_head.py stitching                 # two minutes
    OMP_NUM_THREADS=1 python benchmarks/whole_head.py windows                   # a minute
    python benchmarks/whole_head_scans.py HEADS && python benchmarks/whole_head.py region HEADS
    OMP_NUM_THREADS=1 python benchmarks/whole_head.py scan HEAD BUNDLE          # one prepared head

stitching: an identity network, so what is left is cutting windows and putting them together; every
measurement in a process of its own, peak memory above what the input takes. windows: how many the fine pass
visits, and how far its result is from that of the whole volume. region: coarse nets trained on half of the
heads (by patient), tried on the other half, both ways; they are kept in HEADS. scan: CPU seconds of the
segmentation networks of a bundle on one head with and without a region, which is taken around the annotated
arteries.
"""

import argparse
import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from monai.inferers.utils import sliding_window_inference
from safetensors.torch import load_file, save_file
from torch import nn

from aneurysm.data.preparation.prepared import SUFFIX, load_prepared
from aneurysm.nets.unet import UNet3D
from aneurysm.stages.coarse import coarse_net, train_coarse
from aneurysm.stages.roi import (
    RoiSettings,
    coarse_image,
    coarse_probability,
    coarse_target,
    locate,
    share_of_lesions,
)
from aneurysm.stages.sliding import slide
from aneurysm.stages.windows import Box, View, lattice, place

SHAPES = {"large": (512, 512, 300), "small": (192, 192, 160)}
METHODS = ("monai", "ours", "ours float16", "ours uint8")
SETTINGS = RoiSettings(3.0, (84.0, 84.0, 120.0), 0.5, 0.6, "whole", exact=False)
STEPS = 100
# Grid and windows of a fine pass: shape (d, h, w), spacing in mm, view.
PASSES = {
    "512 x 512 x 300 as scanned, 96, half": ((300, 512, 512), (0.6, 0.4, 0.4), View(96, 0.5)),
    "the same at 0.75 mm, demo windows": ((240, 273, 273), (0.75, 0.75, 0.75), View(64, 0.25)),
    "adult head 220 x 230 x 170 mm, demo windows": ((293, 307, 227), (0.75, 0.75, 0.75), View(64, 0.25)),
    "adult head, windows of rsna_full": ((440, 460, 340), (0.5, 0.5, 0.5), View(128, 0.25)),
}


def main() -> None:
    """One of the four tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", choices=("stitching", "windows", "region", "scan"))
    parser.add_argument("paths", type=Path, nargs="*")
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "SHAPE", "OVERLAP"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        method, shape, overlap = arguments.one
        print(json.dumps(stitched(method, SHAPES[shape], float(overlap))))
    elif arguments.table == "stitching":
        stitching()
    elif arguments.table == "windows":
        windows()
    elif arguments.table == "region":
        region(arguments.paths[0])
    else:
        scan(*arguments.paths)


def stitching() -> None:
    """Peak memory and CPU of stitching, each in its own process."""
    print("| volume | overlap | method | CPU s | peak MB | of MONAI's memory |\n|---|---|---|---|---|---|")
    for shape, overlap in (("large", 0.5), ("large", 0.25), ("small", 0.5)):
        base = 0.0
        for method in METHODS:
            command = [sys.executable, __file__, "stitching", "--one", method, shape, str(overlap)]
            runs = [
                json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                for _ in range(2)
            ]
            cpu, peak = min(r["cpu"] for r in runs), min(r["peak_mb"] for r in runs)
            base = base or peak
            size = " x ".join(map(str, SHAPES[shape]))
            print(
                f"| {size} | {overlap} | {method} | {cpu:.2f} | {peak:.0f} | {peak / base:.2f} |", flush=True
            )


def stitched(method: str, shape: tuple[int, int, int], overlap: float) -> dict[str, float]:
    """One pass of an identity network with windows of 96, one channel."""
    volume = np.random.default_rng(0).random((1, *shape), dtype=np.float32)
    net = nn.Identity()
    small = volume[:, :96, :96, :96]
    slide(net, small, View(96, 0.0))  # what libraries allocate once
    with torch.no_grad():
        sliding_window_inference(torch.from_numpy(small.copy())[None], 96, 2, net, mode="gaussian")
    process, stop, seen = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def watch() -> None:
        while not stop.wait(0.002):
            seen[0] = max(seen[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = _cpu()
    if method == "monai":
        with torch.no_grad():
            result = sliding_window_inference(
                torch.from_numpy(volume)[None], 96, 2, net, overlap=overlap, mode="gaussian"
            )[0].numpy()  # pyright: ignore
    else:
        kind = {"ours": np.float32, "ours float16": np.float16, "ours uint8": np.uint8}[method]
        result = slide(net, volume, View(96, overlap), activate=lambda x: x, dtype=kind)
    cpu = _cpu() - began
    stop.set()
    watcher.join()
    scale = 255 if result.dtype == np.uint8 else 1
    error = max(
        float(np.abs(a.astype(np.float32) / scale - b).max())
        for a, b in zip(result[0], volume[0], strict=True)
    )
    assert error < 0.01, error
    return {"cpu": cpu, "peak_mb": (seen[0] - before) / 1e6}


def windows() -> None:
    """Windows of the fine pass for a region near the middle, and its difference from the whole."""
    print("| volume and windows | whole | region | fewer | region, exact | fewer | exact of region |")
    print("|---|---|---|---|---|---|---|")
    for name, (shape, spacing, view) in PASSES.items():
        size = np.minimum(np.rint(np.array(SETTINGS.size_mm) / spacing).astype(int), shape)
        # Not the middle itself, where a lattice might happen to fit.
        start = np.minimum((np.array(shape) - size) // 2 + 7, np.array(shape) - size)
        box = Box(tuple(start), tuple(start + size))
        whole = int(np.prod([len(s) for s in lattice(shape, view)]))
        quick, exact = place(box, shape, view, exact=False), place(box, shape, view, exact=True)
        core = 0.0 if quick.exact is None else np.prod(quick.exact.size) / np.prod(quick.box.size)
        print(
            f"| {name} | {whole} | {quick.count} | {whole / quick.count:.1f} | {exact.count} "
            f"| {whole / exact.count:.1f} | {core:.0%} |"
        )
    torch.manual_seed(0)
    net, rng = UNet3D(), np.random.default_rng(0)
    volume = rng.normal(size=(1, 150, 160, 140)).astype(np.float32)
    view, box = View(32, 0.25, ("w",)), Box((40, 40, 30), (96, 96, 110))
    for exact in (False, True):
        placed = place(box, volume.shape[1:], view, exact)
        whole = slide(net, volume, view, starts=lattice(volume.shape[1:], view, placed.anchor))
        part = slide(net, volume, view, placed.box, placed.starts)
        assert placed.exact is not None
        inside = (slice(None), *placed.exact.slices)
        difference = np.abs(whole[inside] - part[inside]).max()
        print(f"U-Net, exact={exact}: {placed.count} windows, largest difference where exact: {difference}")


def region(folder: Path) -> None:
    """Aneurysms in the region, out of fold, by source; windows on the prepared grid of 0.75 mm."""
    heads = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        case = load_prepared(path)
        image, grid = coarse_image(case, SETTINGS)
        heads.append((case, image, coarse_target(case, grid), grid))
    rows = []
    for fold in (0, 1):
        training = [head[1:3] for i, head in enumerate(heads) if i // 4 % 2 != fold]
        began, kept = _cpu(), folder / f"coarse_fold{fold}.safetensors"
        if kept.is_file():
            net = coarse_net()
            net.load_state_dict(load_file(kept))
        else:
            net = train_coarse(training, STEPS, fold)
            save_file({k: v.contiguous() for k, v in net.state_dict().items()}, kept)
            print(f"fold {fold}: {len(training)} heads, {STEPS} steps, {_cpu() - began:.0f} CPU s")
        for i, (case, image, _, grid) in enumerate(heads):
            if i // 4 % 2 != fold:
                continue
            began = _cpu()
            probability = coarse_probability(net, image)
            roi = locate(probability, grid, case.grid, SETTINGS)
            seconds = _cpu() - began
            shape = tuple(int(n) for n in np.rint(np.array(case.grid.shape) * case.grid.spacing / 0.75))
            fewer, exactly = np.nan, np.nan
            if roi.box is not None:
                scale = case.grid.spacing / 0.75
                box = Box(
                    tuple(np.floor(np.array(roi.box.start) * scale)),
                    tuple(np.minimum(np.floor(np.array(roi.box.stop) * scale), shape)),
                )
                view = View(64, 0.25)
                whole = np.prod([len(s) for s in lattice(shape, view)])
                fewer = whole / place(box, shape, view, exact=False).count
                exactly = whole / place(box, shape, view, exact=True).count
            share = share_of_lesions(case, roi.box)
            rows.append((case.series_uid.split("-")[0], len(case.lesions), share, fewer, exactly, seconds))
            if share < 1 or roi.box is None:
                print(f"  {case.series_uid} {case.modality}: {share:.2f} of the aneurysms; {roi.note}")
    print("| source | scans | aneurysms | in region | fell back | fewer windows | least | exact | CPU s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for source in sorted({row[0] for row in rows}):
        mine = [row[1:] for row in rows if row[0] == source]
        count, share, fewer, exactly, seconds = (
            np.array(column, float) for column in zip(*mine, strict=True)
        )
        print(
            f"| {source} | {len(mine)} | {count.sum():.0f} | {(count * share).sum() / count.sum():.4f} "
            f"| {np.isnan(fewer).sum()} | {np.nanmean(fewer):.1f} | {np.nanmin(fewer):.1f} "
            f"| {np.nanmean(exactly):.1f} | {seconds.mean():.2f} |"
        )


def scan(path: Path, bundle: Path) -> None:
    """The vessel and the segmentation network of fold 0 on one head."""
    from aneurysm.build import view_settings
    from aneurysm.pipeline import Detector
    from aneurysm.stages import smart_net, vessel
    from aneurysm.stages.volumes import Region

    case, detector = load_prepared(path), Detector.load(bundle)
    _, grid = coarse_image(case, SETTINGS)
    target = coarse_target(case, grid).astype(np.float32)
    roi = locate(target, grid, case.grid, SETTINGS)
    assert roi.box is not None, roi.note
    print(case.series_uid, case.modality, case.grid.shape, roi.note)
    looks = view_settings(detector.cfg.vessel), view_settings(detector.cfg.smart_net)
    kept = {}
    for name, where in {
        "whole": None,
        "region": Region(roi.box, exact=False),
        "region, exact": Region(roi.box, exact=True),
    }.items():
        began, started = _cpu(), time.monotonic()
        lumen = vessel.vessel_probability(detector.vessel[0], case, looks[0], where)
        smart_net.segment(detector.segmenter[0], case, lumen, looks[1], where)
        kept[name] = lumen[roi.box.slices]
        print(f"{name}: {_cpu() - began:.1f} CPU s, {time.monotonic() - started:.1f} s")
    threshold = detector.lumen_rules.of(case.modality).threshold
    marked = {name: volume >= threshold for name, volume in kept.items()}
    for name in ("region", "region, exact"):
        both = (marked["whole"] & marked[name]).sum()
        dice = 2 * both / (marked["whole"].sum() + marked[name].sum())
        print(f"lumen in the region, {name} against whole: Dice {dice:.4f}")
        lumen = case.vessel[roi.box.slices] > 0  # pyright: ignore[reportOptionalSubscript]
        mine, theirs = (marked[k][lumen].mean() for k in (name, "whole"))
        print(f"  recall of annotated lumen: {mine:.4f}, whole {theirs:.4f}")


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
