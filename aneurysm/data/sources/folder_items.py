"""Which files below a folder are scans, which are masks, and what their names say."""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aneurysm.data.dicom.series import find_series
from aneurysm.data.errors import ReadError
from aneurysm.data.formats.metaimage import SUFFIXES as META_SUFFIXES
from aneurysm.data.formats.nifti import SUFFIXES as NIFTI_SUFFIXES
from aneurysm.data.formats.nifti import series_name
from aneurysm.data.labels import MODALITIES

log = logging.getLogger(__name__)

VOLUME_SUFFIXES = (*NIFTI_SUFFIXES, *META_SUFFIXES)
VESSEL_SUFFIXES = ("_vessel", "_vessels", "_cowseg")
LESION_SUFFIXES = ("_aneurysm", "_aneurysms", "_lesion", "_lesions")
_NO_DICOM = (".csv", ".tsv", ".json", ".txt", ".md", ".raw", ".zraw", ".gz", ".xlsx", ".pdf", ".png", ".jpg")
_SPELLED = {
    "TOF": "MRA", "ANGIO": "MRA", "CT": "CTA", "T1W": "T1", "T2W": "T2", **{m: m for m in MODALITIES},
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One scan as it was found."""

    uid: str
    path: Path  # the volume, or the folder of the first DICOM file
    files: tuple[Path, ...]  # of a DICOM series; () for a volume


def find_items(root: Path, masks: set[Path]) -> dict[str, Item]:
    """Uid -> scan, for every volume and every DICOM series below a folder.

    Args:
        masks: volumes that are no scans, beside those that are called so.

    Raises:
        ReadError: nothing here is a scan, or two files would have one uid.
    """
    found = [p for p in sorted(root.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    volumes = [p for p in found if p.name.lower().endswith(VOLUME_SUFFIXES) and not _is_second_half(p)]
    scans = [p for p in volumes if p not in masks and not _is_mask(p)]
    count = Counter(series_name(path) for path in scans)
    items: dict[str, Item] = {}
    for path in scans:
        uid = series_name(path)
        if count[uid] > 1:
            uid = "_".join(path.relative_to(root).with_name(uid).parts)
        if uid in items:
            raise ReadError(
                f"{path} and {items[uid].path} have one name; rename one of them, or remove a copy."
            )
        items[uid] = Item(uid, path, ())
    series: Mapping[str, list[Path]] = {}
    if any(p not in volumes and p.suffix.lower() not in (*_NO_DICOM, ".img") for p in found):
        try:
            series = find_series(root)
        except ReadError:
            if not items:
                raise
    for uid, files in series.items():
        items[uid] = Item(uid, files[0].parent, tuple(files))
    if not items:
        raise ReadError(f"{root} holds no NIfTI, NRRD or MetaImage file and no DICOM series.")
    used = {mask_beside(item, s) for item in items.values() for s in (VESSEL_SUFFIXES, LESION_SUFFIXES)}
    stray = [p for p in volumes if _is_mask(p) and p not in used | masks]
    if stray:
        log.warning("%s: %d masks have no scan beside them, first %s; not used", root, len(stray), stray[0])
    return items


def mask_beside(item: Item, suffixes: tuple[str, ...]) -> Path | None:
    """The mask of a scan with one of the suffixes, None when there is none."""
    if item.files:
        places = [(item.path, item.uid), (item.path, item.path.name), (item.path.parent, item.path.name)]
    else:
        places = [(item.path.parent, series_name(item.path))]
    for folder, name in places:
        for suffix in suffixes:
            for ending in VOLUME_SUFFIXES:
                if (path := folder / f"{name}{suffix}{ending}").is_file():
                    return path
    return None


def modality_in(name: str) -> str | None:
    """The modality that a name spells out ('head_cta', 'sub-1_T2w'), when it is exactly one."""
    found = {_SPELLED[word] for word in re.split(r"[-_.\s]+", name.upper()) if word in _SPELLED}
    return found.pop() if len(found) == 1 else None


def _is_mask(path: Path) -> bool:
    return series_name(path).lower().endswith((*VESSEL_SUFFIXES, *LESION_SUFFIXES))


def _is_second_half(path: Path) -> bool:
    """The voxels of a .hdr/.img pair: the header stands for both."""
    return path.suffix.lower() == ".img" and path.with_suffix(".hdr").is_file()
