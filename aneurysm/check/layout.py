"""What kind of data set lies under a folder, and which cases it holds."""

import csv
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from aneurysm.check.findings import Collector
from aneurysm.check.items import (
    LESION_NAME,
    MASK_NAME,
    VESSEL_NAME,
    VOLUME_SUFFIXES,
    Item,
    modality_in,
    stem,
)
from aneurysm.check.tables import RsnaTables, read_rsna_tables
from aneurysm.data.dicom.headers import read_header
from aneurysm.data.errors import ReadError, UserError
from aneurysm.data.sources.bids_people import Participants, Person, read_sidecar

_NOT_IMAGES: Final = (
    ".json", ".csv", ".tsv", ".txt", ".md", ".html", ".py", ".npz", ".parquet", ".zip", ".png",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A data set: its kind, its cases, and what was found before any image was opened."""

    root: Path
    kind: str
    items: tuple[Item, ...]
    before: tuple[Collector, ...] = field(default=())  # findings of tables and folders


def find_layout(root: Path, kind: str | None = None) -> Layout:
    """List the cases under a folder.

    Args:
        kind: rsna (train.csv, series/), bids (sub-*/), dicom (any folders of DICOM files), volumes (NIfTI,
            NRRD, MHA); detected when None.

    Raises:
        UserError: the folder is missing, or nothing in it can be checked.
    """
    root = Path(root)
    if not root.exists():
        raise UserError(f"{root}: no such file or folder. Check the path.")
    if kind is None:
        root, kind = _detect(root)
    layout = {"rsna": _rsna, "bids": _bids, "dicom": _dicom, "volumes": _volumes}[kind](root)
    if not layout.items and not layout.before:
        raise UserError(f"{root}: nothing to check as {kind}. {_contents(root)} Use --kind to force another.")
    return layout


def _detect(root: Path) -> tuple[Path, str]:
    if (root / "train.csv").is_file() or (root / "series").is_dir():
        return root, "rsna"
    if root.is_dir():
        # The phantom writer and unpacked archives put the data set one folder deeper.
        inner = [path.parent for path in root.glob("*/train.csv")]
        if len(inner) == 1:
            return inner[0], "rsna"
        if any(root.glob("sub-*/anat")) or any(root.glob("sub-*/ses-*/anat")):
            return root, "bids"
    kinds = Counter("volumes" if _is_volume(path) else "dicom" for path in _walk(root) if _may_be_image(path))
    if not kinds:
        raise UserError(
            f"{root}: no RSNA layout (train.csv, series/), no BIDS layout (sub-*/anat), no DICOM files, "
            f"no NIfTI, NRRD or MHA volumes. {_contents(root)}"
        )
    return root, kinds.most_common(1)[0][0]


def _walk(root: Path) -> Iterator[Path]:
    """All files, sorted, without hidden ones."""
    if not root.is_dir():
        yield root
        return
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder) / name for name in sorted(files) if not name.startswith("."))


def _is_volume(path: Path) -> bool:
    return path.name.lower().endswith(VOLUME_SUFFIXES)


def _may_be_image(path: Path) -> bool:
    """A volume, or a file with the DICOM marker at byte 128 or the name of one."""
    if _is_volume(path) or path.suffix.lower() == ".dcm":
        return True
    if path.suffix.lower() in _NOT_IMAGES or path.name == "DICOMDIR":
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _contents(root: Path) -> str:
    endings = Counter("".join(path.suffixes[-2:]) or "no suffix" for path in _walk(root))
    return "Found: " + (", ".join(f"{n} x {name}" for name, n in endings.most_common(5)) or "no files") + "."


def _rsna(root: Path) -> Layout:
    tables: RsnaTables = read_rsna_tables(root)
    folders = {p.name: p for p in sorted((root / "series").glob("*")) if p.is_dir()}
    masks = _rsna_masks(root / "segmentations")
    before = list(tables.findings)
    items = []
    for uid in sorted({*folders, *tables.rows}):
        if uid not in folders:
            _one(
                before,
                uid,
                "row-without-folder",
                f"train.csv lists it, but {root / 'series' / uid} does not exist.",
            )
            continue
        if uid not in tables.rows and tables.rows:
            _one(before, uid, "folder-without-row", f"{folders[uid]} has no row in train.csv.")
        items.append(
            Item(
                "rsna",
                uid,
                tuple(_walk(folders[uid])),
                tables.modality(uid),
                tables.rows.get(uid),
                tuple(tables.points.get(uid, ())),
                tuple(masks.get((uid, "cowseg"), ())),
                tuple(masks.get((uid, "aneurysm"), ())),
            )
        )
    known = {*folders, *tables.rows}
    for uid, count in Counter(
        {uid: len(rows) for uid, rows in tables.points.items() if uid not in known}
    ).items():
        text = f"{count} row(s) of train_localizers.csv; neither train.csv nor series/ has the series."
        _one(before, uid, "localizer-unknown-series", text)
    for (uid, _), paths in sorted(masks.items()):
        if uid not in known:
            _one(before, uid, "mask-without-series", f"{paths[0]} belongs to no series.")
    return Layout(root, "rsna", tuple(items), tuple(before))


def _one(before: list[Collector], uid: str, code: str, message: str) -> None:
    before.append(Collector(uid))
    before[-1].add(code, message)


def _rsna_masks(folder: Path) -> dict[tuple[str, str], list[Path]]:
    masks: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path in sorted([*folder.glob("*.nii*"), *folder.glob("*/*.nii*")]):
        uid, _, kind = stem(path).rpartition("_")
        if kind in ("cowseg", "aneurysm"):
            masks[uid, kind].append(path)
    return masks


def _dicom(root: Path) -> Layout:
    """One item per series, wherever its files lie; copies of a series in another folder are items too."""
    series: dict[str, dict[Path, dict[Path, str]]] = defaultdict(lambda: defaultdict(dict))
    broken: dict[Path, list[Path]] = defaultdict(list)
    for path in _walk(root):
        named = path.suffix.lower() == ".dcm"
        if not named and (_is_volume(path) or not _may_be_image(path)):
            continue
        try:
            head = read_header(path)
            uid, sop = head.text("SeriesInstanceUID"), head.text("SOPInstanceUID") or str(path)
        except ReadError:  # named in the check of its folder
            uid = sop = ""
        if uid:
            series[uid][path.parent][path] = sop
        else:
            broken[path.parent].append(path)
    items = []
    for uid, folders in series.items():
        images = [sop for files in folders.values() for sop in files.values()]
        # Parts of one series lie in several folders; folders that share images are copies.
        apart = len(set(images)) < len(images)
        parts = (
            list(folders.values())
            if apart
            else [{p: s for part in folders.values() for p, s in part.items()}]
        )
        for part in parts:
            beside = {path.parent for path in part}
            bad = [path for folder in beside for path in broken.pop(folder, ())]
            items.append(Item("dicom", uid, (*part, *bad)))
    items += [Item("dicom", folder.name, tuple(files)) for folder, files in broken.items()]
    return Layout(root, "dicom", tuple(sorted(items, key=lambda item: item.files[0])))


def _bids(root: Path) -> Layout:
    before: list[Collector] = []
    people = None
    if (root / "participants.tsv").is_file():
        try:
            people = Participants(root)
        except ReadError as error:
            _one(before, "", "column-missing", str(error))
    raw = _raw_people(root) if people else {}
    drawn: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path in sorted((root / "derivatives").rglob("sub-*.nii*")):
        if re.search("mask|seg|label", stem(path), re.I):
            drawn[_entity(path, "sub"), _entity(path, "ses")].append(path)
    items = []
    for path in sorted([*root.glob("sub-*/anat/*.nii*"), *root.glob("sub-*/ses-*/anat/*.nii*")]):
        subject, modality = _entity(path, "sub"), modality_in("_" + stem(path).rpartition("_")[2])
        if modality is None:
            continue
        masks = drawn.get((subject, _entity(path, "ses")), []) if modality == "MRA" else []
        lesions = tuple(p for p in masks if LESION_NAME.search(stem(p)))
        vessels = tuple(p for p in masks if VESSEL_NAME.search(stem(p)) and p not in lesions)
        cells = raw.get(subject, {})
        person = people.person(subject, _entity(path, "ses"), read_sidecar(path)) if people else Person()
        # What the source understands counts; what it does not is shown as it is written.
        row = {
            "PatientAge": _first(cells, "age", "age_at_scan", "age_years")
            if math.isnan(person.age)
            else f"{person.age:g}",
            "PatientSex": person.sex or _first(cells, "sex", "gender"),
            "group": cells.get("group", "") if person.diseased == 0 else "",
        }
        items.append(
            Item(
                "bids",
                stem(path),
                (path,),
                modality,
                row,
                (),
                vessels,
                lesions,
                patient_id=subject,
                sex=person.sex,
            )
        )
    return Layout(root, "bids", tuple(items), tuple(before))


def _first(cells: dict[str, str], *columns: str) -> str:
    return next((cells[column] for column in columns if cells.get(column)), "")


def _raw_people(root: Path) -> dict[str, dict[str, str]]:
    """Subject -> its first row of participants.tsv, as written."""
    people: dict[str, dict[str, str]] = {}
    with (root / "participants.tsv").open(newline="", encoding="utf-8-sig") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            cells = {str(key).strip().lower(): str(cell or "").strip() for key, cell in row.items()}
            name = cells.get("participant_id", "")
            people.setdefault(name if name.startswith("sub-") else f"sub-{name}", cells)
    return people


def _entity(path: Path, key: str) -> str:
    return next((part for part in stem(path).split("_") if part.startswith(f"{key}-")), "")


def _volumes(root: Path) -> Layout:
    """Images with their masks: a mask is named after its image (`<image>_seg`, `<image>_vessel_mask`)."""
    paths = [path for path in _walk(root) if _is_volume(path)]
    named = {path for path in paths if MASK_NAME.search(stem(path))}
    images = [path for path in paths if path not in named]
    masks: dict[Path, list[Path]] = defaultdict(list)
    for mask in sorted(named):
        own = [image for image in images if stem(mask).startswith(stem(image))]
        near = [image for image in own if image.parent == mask.parent] or own
        if near:
            masks[max(near, key=lambda image: len(stem(image)))].append(mask)
        else:
            images.append(mask)  # without an image it is checked for itself
    doubled = {name for name, n in Counter(stem(path) for path in images).items() if n > 1}
    items = []
    for path in sorted(images):
        lesions = tuple(p for p in masks[path] if LESION_NAME.search(stem(p)))
        vessels = tuple(p for p in masks[path] if p not in lesions)
        name = str(path.relative_to(root)) if stem(path) in doubled and path != root else stem(path)
        items.append(
            Item("volumes", name, (path,), modality_in(stem(path)), None, (), vessels, lesions, name)
        )
    return Layout(root, "volumes", tuple(items))
