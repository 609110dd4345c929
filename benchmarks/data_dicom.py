"""Reading a DICOM series of 300 x 512 x 512: this reader, SimpleITK, MONAI and plain pydicom.

    python benchmarks/data_dicom.py [--slices 300] [--repeats 5] [--syntaxes raw rle jpegls j2k jpeg]

Every reader runs in its own process, the readers in turn, `repeats` times. CPU seconds (user + system, with
children) are the figure that counts; peak memory is what the process gained over its start. Ratios are of
medians of one run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/data"))

SYNTAXES = {
    "raw": None,
    "rle": "1.2.840.10008.1.2.5",
    "jpegls": "1.2.840.10008.1.2.4.80",
    "jpeg": "1.2.840.10008.1.2.4.70",
    "j2k": "1.2.840.10008.1.2.4.90",
}
READERS = ("aneurysm", "simpleitk", "monai", "pydicom")


def main() -> None:
    """Write the series, time every reader in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--syntaxes", nargs="+", choices=SYNTAXES, default=["raw", "rle"])
    parser.add_argument("--one", nargs=2, metavar=("READER", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    print("| syntax | reader | CPU s median (min) | wall s min | peak MB | CPU of it / ours |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.syntaxes:
            series = Path(folder) / name
            write(series, arguments.slices, SYNTAXES[name])
            compare(name, series, arguments.repeats)


def compare(name: str, series: Path, repeats: int) -> None:
    """One row per reader."""
    runs: dict[str, list[dict[str, float]]] = {reader: [] for reader in READERS}
    for _ in range(repeats):
        for reader in READERS:
            command = [sys.executable, __file__, "--one", reader, str(series)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                runs[reader].append(json.loads(done.stdout.splitlines()[-1]))
    checksums = {round(run["checksum"], 3) for values in runs.values() for run in values}
    assert len(checksums) == 1, f"the readers disagree: {checksums}"
    ours = statistics.median(run["cpu"] for run in runs["aneurysm"])
    for reader, values in runs.items():
        if not values:
            print(f"| {name} | {reader} | cannot read it | | | |")
            continue
        cpu = [run["cpu"] for run in values]
        print(
            f"| {name} | {reader} | {statistics.median(cpu):.2f} ({min(cpu):.2f}) "
            f"| {min(run['wall'] for run in values):.2f} | {max(run['peak_mb'] for run in values):.0f} "
            f"| {statistics.median(cpu) / ours:.1f} |",
            flush=True,
        )


def write(folder: Path, slices: int, syntax: str | None) -> None:
    """A head-like CT: 12 bits stored in 16, noise of 12 HU."""
    from pydicom.uid import UID
    from synthetic_series import transcode, write_series

    rng = np.random.default_rng(0)
    y, x = np.ogrid[:512, :512]
    planes = np.empty((slices, 512, 512), np.uint16)
    for i in range(slices):
        z = (i - slices / 2) / (0.47 * slices)
        head = ((y - 256) / 230.0) ** 2 + ((x - 256) / 200.0) ** 2 + z**2 < 1
        planes[i] = (24 + 1000 * head + rng.normal(0, 12, (512, 512))).clip(0, 4095)

    def twelve_bits(ds, i):
        ds.BitsStored, ds.HighBit = 12, 11

    paths = write_series(folder, planes, (0.6, 0.4, 0.4), change=twelve_bits, modality="CT", intercept=-1024)
    if syntax is not None:
        for path in paths:
            transcode(path, UID(syntax))


def measure(reader: str, folder: str) -> dict[str, float]:
    """CPU and wall seconds and peak memory of one reading, imports left out."""
    read = globals()[f"_{reader}"](Path(folder))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before, start = _status_mb("VmRSS"), os.times()
    volume = read()
    end, after = os.times(), _status_mb("VmHWM")
    cpu = sum(end[:4]) - sum(start[:4])
    return {
        "cpu": cpu,
        "wall": end.elapsed - start.elapsed,
        "peak_mb": after - before,
        "checksum": float(np.asarray(volume).sum(dtype=np.float64)),
    }


def _status_mb(name: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) / 1024


def _aneurysm(folder: Path):
    from aneurysm.data.dicom.series import read_series

    return lambda: read_series(sorted(folder.iterdir())).volume


def _simpleitk(folder: Path):
    import SimpleITK as sitk

    def read():
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
        return sitk.GetArrayViewFromImage(_kept(reader.Execute()))

    return read


_images = []


def _kept(image):
    _images.append(image)  # the view does not keep its image alive
    return image


def _monai(folder: Path):
    from monai.data.image_reader import PydicomReader

    def read():
        reader = PydicomReader()
        return reader.get_data(reader.read(str(folder)))[0]

    return read


def _pydicom(folder: Path):
    from pydicom import dcmread

    def read():
        slices = sorted((dcmread(p) for p in folder.iterdir()), key=lambda s: s.ImagePositionPatient[2])
        return np.stack([s.pixel_array * float(s.RescaleSlope) + float(s.RescaleIntercept) for s in slices])

    return read


if __name__ == "__main__":
    main()
