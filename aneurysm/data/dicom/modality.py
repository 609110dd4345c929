"""Which of CTA, MRA, T1, T2 a DICOM series is, and who the patient is, from its header."""

import re

from aneurysm.data.dicom.headers import Header
from aneurysm.data.errors import ReadError

_TEXT_TAGS = ("SeriesDescription", "ProtocolName", "SequenceName", "PulseSequenceName")
_ANGIOGRAPHY = re.compile(r"tof|angio|mra\b|\bmra|3dpc|fi3d.*(ve|tof)")
_T2 = re.compile(r"t2|flair|cube|\bspace\b|haste|fiesta|ciss")
# In RSNA 2025 most MRA have slices of 0.5 to 1 mm and T2 is the most frequent of the other MR.
_THIN_MM = 1.5
_T1 = re.compile(r"t1|mprage|tfl3d|bravo|fspgr|\bgd\b|\+c\b|post|gado|contrast|km\b")


def modality_of(header: Header, series: str, slice_mm: float | None = None) -> tuple[str, str | None]:
    """The modality of a series, and a note when it was guessed.

    A CT is taken to be a CTA. For MR the names that technicians gave decide, then the contrast agent,
    then echo and repetition time. Anonymised headers keep none of these: then thin slices are an MRA.

    Args:
        slice_mm: distance between slices in mm; from the header's tags when None.

    Raises:
        ReadError: neither CT nor MR.
    """
    kind = header.text("Modality").upper()
    if kind == "CT":
        return "CTA", None
    if kind != "MR":
        raise ReadError(
            f"Series {series}: DICOM modality {kind or 'missing'}, expected CT or MR. "
            "Leave it out, or give the modality (CTA, MRA, T1, T2) yourself."
        )
    text = " ".join(str(header.get(tag, "")) for tag in _TEXT_TAGS).lower().replace("_", " ")
    for name, pattern in (("MRA", _ANGIOGRAPHY), ("T2", _T2), ("T1", _T1)):
        if found := pattern.search(text):
            return name, f"modality {name} was guessed from {found.group()!r} in the series' names"
    if str(header.get("AngioFlag", "")).upper() == "Y":
        return "MRA", "modality MRA was guessed from AngioFlag"
    if header.get("ContrastBolusAgent"):
        return "T1", "modality T1 was guessed from the contrast agent"
    echo = _milliseconds(header, "EchoTime", "MREchoSequence", "EffectiveEchoTime")
    repetition = _milliseconds(
        header, "RepetitionTime", "MRTimingAndRelatedParametersSequence", "RepetitionTime"
    )
    if echo is not None and echo >= 60:
        return "T2", f"modality T2 was guessed from EchoTime {echo:g} ms"
    sequence = str(header.get("ScanningSequence", ""))
    if echo is not None and repetition is not None:
        # Time of flight is a gradient echo with a short TR and without an inversion pulse.
        if "GR" in sequence and "IR" not in sequence and 15 <= repetition <= 60 and echo <= 10:
            return "MRA", f"modality MRA was guessed from TR {repetition:g} ms, TE {echo:g} ms, gradient echo"
        return "T1", f"modality T1 was guessed from TR {repetition:g} ms, TE {echo:g} ms"
    if slice_mm is None:
        slice_mm = header.number("SpacingBetweenSlices") or header.number("SliceThickness") or 0.0
    name = "MRA" if slice_mm <= _THIN_MM else "T2"
    return name, (
        f"modality {name} was guessed from the slice distance of {slice_mm:.2g} mm alone; "
        "give it yourself where you know it"
    )


def _milliseconds(header: Header, keyword: str, sequence: str, enhanced_keyword: str) -> float | None:
    """A time of a single-frame header, or of the first frame of an enhanced multi-frame one."""
    values = [header.get(keyword)]
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in (header.get(groups) or [])[:1]:
            values += [item.get(enhanced_keyword) for item in (group.get(sequence) or [])[:1]]
    for value in values:
        try:
            return float(value)
        except (TypeError, ValueError):
            continue
    return None


def age_of(header: Header) -> float | None:
    """Age in years from an age string such as '065Y', '018M'; None when absent, unreadable or '000Y'."""
    match = re.fullmatch(r"\s*(\d+)\s*([YMWD]?)\s*", str(header.get("PatientAge", "")).upper())
    if not match:
        return None
    per_year = {"Y": 1.0, "": 1.0, "M": 12.0, "W": 52.18, "D": 365.25}
    # Anonymisers write 0 for "removed".
    return int(match[1]) / per_year[match[2]] or None


def sex_of(header: Header) -> str | None:
    """'M', 'F', or None."""
    sex = str(header.get("PatientSex", "")).strip().upper()[:1]
    return sex if sex in ("M", "F") else None
