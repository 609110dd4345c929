"""What the DICOM reader makes of every series and malformed file of the reference archives.

    python benchmarks/dicom_cases.py [--data ../shared/data/dicom] [--write docs/data.md]

Prints one table row per series: equal to its reference conversion, read with notes, or refused with which
message. `--write` puts the table between the markers of docs/data.md. Exit code 1 when a series with a
reference differs from it, or when anything but a ReadError comes out.
"""

import argparse
import logging
import re
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np

from aneurysm.data.dicom.headers import read_header
from aneurysm.data.dicom.pixels import PixelFormat, stored_images
from aneurysm.data.dicom.series import find_series, read_series
from aneurysm.data.errors import ReadError
from aneurysm.data.resample import canonicalise
from aneurysm.data.scan import Grid, Scan

BEGIN, END = "<!-- dicom cases: begin -->", "<!-- dicom cases: end -->"
SPECIAL = {
    "compressed/": "JPEG 2000", "compressed_j2k": "JPEG 2000", "compressed_jpegls": "JPEG-LS",
    "compressed_jpeg/": "JPEG lossless", "compressed_rle": "RLE", "_implicit": "implicit VR",
    "non_isotropic": "non-square matrix", "philips_enhanced": "enhanced multi-frame",
    "siemens_multiframe": "multi-frame", "siemens_xa30": "enhanced multi-frame, sagittal",
    "hyperfine": "low-field multi-frame", "gantrytilting": "tilted gantry", "notavolume": "one position",
    "slicecount": "two slices", "sliceincrement": "missing slice", "sliceorientation": "two orientations",
    "ge_head_ct": "tilt 18.5°, two slice distances", "vs_seg": "real contrast T1",
    "693_J2KI": "lossy JPEG 2000", "bigendian": "big endian", "expb": "big endian", "BigEnd": "big endian",
    "NoMeta": "no file meta information", "no_meta": "no 'DICM' marker",
    "pixelrep": "wrong sign in its header",
    "embedded-sequence": "delimiter within the pixels", "JPEG2000.dcm": "JPEG 2000, nuclear medicine",
    "RLE": "RLE", "jp2k": "JPEG 2000", "jpeg_ls": "JPEG-LS", "padded": "trailing padding",
    "truncated": "truncated", "badVR": "wrong value types", "liver": "segmentation", "zipMR": "gzip",
    "UN_sequence": "unknown value type", "priv_SQ": "private sequences", "charset": "empty character set",
    "tsyntax": "no transfer syntax", "DICOMDIR": "index file", "README": "text", "LICENSE": "text",
}  # fmt: skip


def main() -> int:
    """Run all cases; the number of the surprising ones decides the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared/data/dicom")
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows, bad = [], 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for archive in sorted(arguments.data.glob("*.zip")):
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(root / archive.stem)
        for name, files in _cases(root):
            outcome, detail = _outcome(files, root)
            bad += outcome.startswith(("DIFFERS", "CRASH"))
            detail = detail.replace(str(root) + "/", "").replace("|", "\\|")
            rows.append(f"| {name} | {_special(name)} | {outcome} | {_shortened(detail)} |")
    table = "\n".join(["| set | what is special | outcome | note or message |", "|---|---|---|---|", *rows])
    print(table)
    if arguments.write:
        text = arguments.write.read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        arguments.write.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
    return int(bad > 0)


def _cases(root: Path) -> list[tuple[str, list[Path]]]:
    cases = []
    folders = {p.parent for p in root.rglob("*") if p.is_file() and ".nii" not in p.name}
    for folder in sorted(folders):
        name = re.sub(r"(src/pydicom/data/test_files|tests/data|In)/?", "", str(folder.relative_to(root)))
        files = sorted(p for p in folder.iterdir() if p.is_file() and ".nii" not in p.name)
        if root / "pydicom" in (folder, *folder.parents):
            cases += [(f"{name}/{path.name}".replace("//", "/"), [path]) for path in files]
        elif folder.name != "Ref" and not any(p.is_dir() for p in folder.iterdir()):
            cases += [(name, group) for group in find_series(folder).values()]
    return cases


def _outcome(files: list[Path], root: Path) -> tuple[str, str]:
    reference = _reference(files[0])
    try:
        scan = read_series(files, "T1" if reference else None)
    except ReadError as error:
        return "refused" + _pixels(files), str(error)
    except BaseException as error:
        return f"CRASH {type(error).__name__}", str(error)
    notes = "; ".join(note for note in scan.notes if "guessed" not in note)
    if reference is None:
        return f"read, {' x '.join(map(str, scan.volume.shape))}", notes
    return _compared(scan, reference), notes


def _reference(path: Path) -> Path | None:
    folder = path.parent
    for candidate in (
        folder.with_name(folder.name + "_ground_truth.nii.gz"),
        folder.parents[1] / "Ref" / f"{folder.name}.nii",
    ):
        if candidate.exists() and "failing" not in folder.parts:
            return candidate
    return None


def _compared(scan: Scan, reference: Path) -> str:
    image = nib.load(reference)
    volume = np.asarray(image.dataobj, np.float32).reshape(image.shape[:3])
    volume, grid = canonicalise(volume, Grid(image.shape[:3], image.affine))
    if volume.shape != scan.volume.shape:
        return f"DIFFERS in shape: {scan.volume.shape}, reference {volume.shape}"
    values = float(np.abs(volume - scan.volume).max())
    places = float(np.abs(grid.affine - scan.grid.affine).max())
    if values > 0 or places > 1e-3:
        return f"DIFFERS by {values:g} in values, {places:.2g} mm in the affine"
    return f"equals its reference (values exactly, affine to {max(places, 1e-9):.0e} mm)"


def _pixels(files: list[Path]) -> str:
    """Single slices are no volume, but their pixels can be compared."""
    original = files[0].with_name("MR_small.dcm")
    if len(files) > 1 or not files[0].name.startswith("MR_") or files[0] == original:
        return ""
    try:
        one, other = (_image(path) for path in (files[0], original))
    except ReadError:
        return ""
    return (
        ", pixels equal MR_small.dcm" if np.array_equal(one, other) else ", pixels DIFFER from MR_small.dcm"
    )


def _image(path: Path) -> np.ndarray:
    header = read_header(path)
    return next(iter(stored_images(header, PixelFormat.of(header), Counter()))).copy()


def _special(name: str) -> str:
    return next((text for part, text in SPECIAL.items() if part in name + "/"), "")


def _shortened(text: str) -> str:
    text = re.sub(r"\b[\d.]{20,}\b", "…", text)
    text = re.sub(r"(src/pydicom/data/test_files|tests/data|In)/", "", text)
    return text if len(text) <= 180 else text[:177] + "..."


if __name__ == "__main__":
    sys.exit(main())
