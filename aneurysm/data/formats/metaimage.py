"""MetaImage and NRRD volumes (.mha, .mhd, .nrrd, .nhdr), as 3D Slicer and data sets such as TopCoW make them.

ITK reads the voxels. What ITK passes over in silence is taken from the header itself: a unit other than mm,
and axes that nobody named.
"""

import re
from pathlib import Path

import numpy as np

from aneurysm.data.errors import ReadError
from aneurysm.data.formats.stored import Stored, stored_volume
from aneurysm.data.scan import Scan

SUFFIXES = (".mha", ".mhd", ".nrrd", ".nhdr")

_MM_PER_UNIT = {"mm": 1.0, "um": 1e-3, "μm": 1e-3, "µm": 1e-3, "micron": 1e-3, "cm": 10.0, "m": 1000.0}
# Patient axes in words or letters; anything else (scanner-xyz, 3D-right-handed) does not say where left is.
_ANATOMICAL = re.compile(r"(left|right)-(anterior|posterior)-superior|[lr][ap]s", re.IGNORECASE)
_HEADER_BYTES = 64 * 1024


def read_metaimage(path: Path, modality: str, patient_id: str | None = None) -> Scan:
    """Read a 3D volume as a canonical scan; the series uid is the file name without its suffix.

    `Scan.source` has the file's axes (i, j, k), so masks written for it overlay on the input.

    Args:
        modality: CTA, MRA, T1 or T2 (the file does not say).
        patient_id: default: the series uid.

    Raises:
        ReadError: missing or unreadable file, not one 3D volume, or NaN voxels.
    """
    return load_metaimage(path).scan(path.stem, modality, patient_id)


def load_metaimage(path: Path) -> Stored:
    """The voxels of a file and their grid; ITK's left-posterior-superior axes become RAS.

    Raises:
        ReadError: as `read_metaimage`.
    """
    # A large library that only these formats need.
    import SimpleITK as sitk

    if not path.is_file():
        raise ReadError(f"{path}: no such file. Check the path.")
    header = _header(path)
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        if path.suffix.lower() in (".mha", ".mhd"):
            reason = "its voxels are cut off or missing, or the header is broken"  # ITK's own reason misleads
        raise ReadError(f"{path}: not a readable image ({reason}). Copy or convert it again.") from error
    size = image.GetSize()
    if image.GetNumberOfComponentsPerPixel() != 1 or any(n != 1 for n in size[3:]) or len(size) < 3:
        raise ReadError(
            f"{path}: {len(size)} dimensions with {image.GetNumberOfComponentsPerPixel()} values "
            "per voxel; one 3D volume is expected. Save the volume of interest on its own."
        )
    axes = len(size)
    volume = sitk.GetArrayFromImage(image).transpose()[(..., *[0] * (axes - 3))]  # (i, j, k)
    direction = np.array(image.GetDirection()).reshape(axes, axes)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(image.GetSpacing())[:3]
    affine[:3, 3] = image.GetOrigin()[:3]
    affine[:2] *= -1  # LPS to RAS
    factor, notes = (_nrrd if path.suffix.lower() in (".nrrd", ".nhdr") else _meta)(header, path)
    affine[:3] *= factor
    return stored_volume(path, volume, affine, notes)


def _header(path: Path) -> dict[str, str]:
    """The fields of a MetaImage or NRRD header, keys in lower case."""
    with path.open("rb") as file:
        text = file.read(_HEADER_BYTES).decode("latin-1").replace("\r\n", "\n")
    if text.startswith("NRRD"):
        text = text.partition("\n\n")[0]
    fields = {}
    for line in text.splitlines():
        match = re.match(r"\s*([A-Za-z][A-Za-z0-9_ ]*?)\s*(?::=?|=)\s*(.*)", line)
        if match:
            fields.setdefault(match[1].lower(), match[2].strip())
            if match[1].lower() == "elementdatafile":
                break  # voxels follow
    return fields


def _nrrd(header: dict[str, str], path: Path) -> tuple[float, list[str]]:
    """mm per unit, and notes, of a NRRD header."""
    notes = []
    space = header.get("space", "")
    if "space directions" not in header:
        notes.append("no orientation in the file: left and right are a guess")
    elif not _ANATOMICAL.fullmatch(space):
        named = f"space {space!r}" if space else "no space field"
        notes.append(f"{named}: the axes were taken as left-posterior-superior, left and right are a guess")
    if "space directions" not in header and "spacings" not in header:
        notes.append("no voxel size in the file; taken as 1 mm")
    units = set(re.findall(r'"([^"]+)"', header.get("space units", header.get("units", ""))))
    if unknown := units - set(_MM_PER_UNIT):
        raise ReadError(
            f"{path}: voxel sizes in {', '.join(sorted(unknown))}; mm, um, cm or m are expected. "
            "Correct the field 'space units'."
        )
    if len({_MM_PER_UNIT[u] for u in units}) > 1:
        raise ReadError(
            f"{path}: axes with different units {sorted(units)}. Correct the field 'space units'."
        )
    factor = _MM_PER_UNIT[units.pop()] if units else 1.0
    if factor != 1.0:
        notes.append(f"affine in units of {factor:g} mm, turned to mm")
    return factor, notes


def _meta(header: dict[str, str], path: Path) -> tuple[float, list[str]]:
    """mm per unit, and notes, of a MetaImage header."""
    notes = []
    if not {"transformmatrix", "orientation", "rotation"} & set(header):
        notes.append("no orientation in the file: left and right are a guess")
    if not {"elementspacing", "elementsize"} & set(header):
        notes.append("no voxel size in the file; taken as 1 mm")
    if (unit := header.get("distanceunits", "mm").lower()) not in _MM_PER_UNIT:
        raise ReadError(f"{path}: DistanceUnits {unit!r}; mm, um, cm or m are expected. Correct the header.")
    factor = _MM_PER_UNIT[unit]
    if factor != 1.0:
        notes.append(f"affine in {unit}, turned to mm")
    return factor, notes
