# ruff: noqa: E501 (a catalogue reads better with one sentence per line)
"""Every problem that the checks know: its code, how bad it is, its name and what to do about it.

fatal    the case cannot be read, or it makes results wrong or stops every command (leakage, broken tables)
error    the case can be read, but a label, mask, unit or geometry is wrong: training would learn it
warning  suspicious, perhaps right: look at it
note     the reader handles it, or it is harmless; said so that nothing happens in silence
"""

from dataclasses import dataclass
from typing import Final

FATAL, ERROR, WARNING, NOTE = SEVERITIES = ("fatal", "error", "warning", "note")


@dataclass(frozen=True)
class Problem:
    """An entry of the catalogue."""

    severity: str
    title: str
    advice: str


_EXPORT = "Export the complete series again from the PACS, or leave it out."
_DROP_ROW = "Correct or remove the row."
_REDRAW = "Convert or draw the mask again on this series; until then leave the mask out."
_POINT = "Correct the row of train_localizers.csv, or remove it."

PROBLEMS: Final[dict[str, Problem]] = {
    # Files and headers
    "missing-file": Problem(
        FATAL,
        "File is a link without content",
        "Download the content (datalad get, git annex get), or remove the link.",
    ),
    "empty-series": Problem(
        FATAL, "Folder without an image", "Copy the series again, or remove the folder and its row."
    ),
    "unreadable-file": Problem(FATAL, "File cannot be opened", "Copy or export the file again."),
    "truncated-file": Problem(
        FATAL, "File is cut off", "Copy or export the file again; the transfer was interrupted."
    ),
    "unreadable": Problem(FATAL, "Case cannot be read", _EXPORT),
    "check-failed": Problem(
        FATAL, "The check itself failed", "Report this with the message; the other cases are not affected."
    ),
    "worker-died": Problem(
        FATAL,
        "The process died on this case",
        "Most often memory ran out: check it alone with --jobs 1 on a larger machine.",
    ),
    "not-one-volume": Problem(
        FATAL,
        "The file is not one 3D volume of grey values",
        "Save the volume of interest as a 3D file of its own, with its grey values.",
    ),
    "missing-geometry": Problem(FATAL, "Geometry tags are missing", _EXPORT),
    "bad-geometry": Problem(FATAL, "Geometry tags are contradictory", _EXPORT),
    "missing-tags": Problem(
        WARNING,
        "Identifying tags are missing",
        "Without PatientID a patient's series can be dealt into several folds. Anonymise with a pseudonym, not with nothing.",
    ),
    "foreign-files": Problem(
        ERROR,
        "Files of another series in the folder",
        "Move them to a folder of their own; series are told apart by SeriesInstanceUID.",
    ),
    "wrong-folder": Problem(
        FATAL,
        "Folder holds another series",
        "Rename the folder after its SeriesInstanceUID, or copy the right series.",
    ),
    "stray-file": Problem(NOTE, "Files that are no DICOM images", "Nothing to do; they are passed over."),
    # Geometry
    "mixed-geometry": Problem(
        WARNING,
        "Slices of another size or orientation",
        "Scouts or projections were exported with the volume. The majority is used; remove the others if it is the wrong one.",
    ),
    "no-majority": Problem(
        FATAL, "Two stacks in one series", "Split the series by orientation or matrix size."
    ),
    "one-position": Problem(
        FATAL,
        "All slices at one place",
        "Export the series with one image per position; a time series is not a volume.",
    ),
    "conflicting-slices": Problem(
        FATAL,
        "Different images at one place",
        "Two phases or echoes share the series: export one series per phase.",
    ),
    "duplicate-slices": Problem(
        WARNING, "The same slice twice", "Nothing to do; one copy is used. Remove the other to save space."
    ),
    "missing-slices": Problem(FATAL, "Slices are missing", _EXPORT),
    "mixed-gaps": Problem(
        FATAL, "Parts with different slice distances", "Reconstruct the series with one slice distance."
    ),
    "uneven-gaps": Problem(
        NOTE, "Slice distances vary slightly", "Nothing to do; the volume is interpolated to even distances."
    ),
    "shifted-slices": Problem(
        FATAL, "Slices shifted in their plane", "Reconstruct the series as one straight stack."
    ),
    "gantry-tilt": Problem(
        NOTE, "Tilted gantry", "Nothing to do; the volume is resampled onto perpendicular axes."
    ),
    "too-few-slices": Problem(
        FATAL, "Too few slices for a volume", "This is a localiser or a fragment: leave it out."
    ),
    "thin-slab": Problem(WARNING, "Very small field of view", "Check that the whole series was exported."),
    "implausible-spacing": Problem(
        ERROR,
        "Voxel size cannot be right for a head scan",
        "Correct PixelSpacing or the affine (a wrong unit?), or export the series again.",
    ),
    "implausible-size": Problem(
        ERROR,
        "Field of view cannot be right for a head scan",
        "Correct the spacing (a wrong unit?), or export the series again.",
    ),
    "spacing-tag": Problem(
        NOTE,
        "SpacingBetweenSlices contradicts the positions",
        "Nothing to do here (positions are used); other tools may believe the tag.",
    ),
    "instance-order": Problem(
        NOTE,
        "InstanceNumber is not the order in space",
        "Nothing to do here (positions are used); do not sort by InstanceNumber elsewhere.",
    ),
    "no-orientation": Problem(
        WARNING,
        "The file does not say where left and right are",
        "Convert it again from DICOM, or set the orientation if it is known.",
    ),
    "two-orientations": Problem(
        WARNING,
        "The file says twice where left and right are, and differently",
        "The sform is used. Look at it in a viewer; convert it again from DICOM, or remove the wrong one.",
    ),
    "unlikely-orientation": Problem(
        WARNING,
        "Left and right may be another axis",
        "The head is more symmetric along another axis than from left to right. Look at it in a viewer; correct the orientation or leave it out.",
    ),
    # Intensities and units
    "not-hounsfield": Problem(
        ERROR,
        "CT is not in Hounsfield units",
        "Check RescaleSlope and RescaleIntercept, or convert again without windowing.",
    ),
    "ct-without-air": Problem(
        WARNING,
        "CT whose air was cut off",
        "A window was applied, or the background was erased: convert again with all values.",
    ),
    "negative-mr": Problem(
        WARNING,
        "MR with many negative values",
        "Check the rescale tags or the conversion; a normalised image is not a raw one.",
    ),
    "varying-rescale": Problem(
        NOTE,
        "Rescale differs from slice to slice",
        "Nothing to do here (it is applied per slice); other tools may not.",
    ),
    "constant-image": Problem(FATAL, "The image is empty", _EXPORT),
    "blank-slices": Problem(
        WARNING, "Blank slices inside the volume", "Check the export; slices may have been lost or masked."
    ),
    "nan-voxels": Problem(FATAL, "Voxels are NaN or infinite", "Replace them, or convert the image again."),
    "clipped": Problem(
        WARNING,
        "Bright values are cut off",
        "Export without windowing or saturation; vessels and bone have become equal.",
    ),
    "looks-like-labels": Problem(
        NOTE, "A label map, not an image", "Name it *_seg or *_mask beside its image if it belongs to one."
    ),
    "reader-notes": Problem(
        NOTE,
        "What the reader did",
        "Nothing to do; check that you agree with what was dropped, repaired or guessed.",
    ),
    # Tables
    "table-missing": Problem(
        FATAL, "train.csv is missing", "Give the folder that holds train.csv and series/."
    ),
    "column-missing": Problem(
        FATAL, "A column is missing", "Restore the column; names must be spelled as in the challenge."
    ),
    "localizers-missing": Problem(
        WARNING,
        "train_localizers.csv is missing",
        "Copy it beside train.csv; without it no aneurysm has a place.",
    ),
    "row-without-folder": Problem(WARNING, "Row without images", "Copy the series, or remove the row."),
    "folder-without-row": Problem(
        WARNING, "Images without a row", "Add a row to train.csv, or remove the folder; it is not used."
    ),
    "bad-table": Problem(FATAL, "A table is not text in UTF-8", "Save it again as CSV in UTF-8."),
    "duplicate-row": Problem(FATAL, "Series is listed twice", "Keep one of the rows."),
    "unknown-modality": Problem(FATAL, "Unknown modality", "Write CTA, MRA, MRI T2 or MRI T1post."),
    "modality-mismatch": Problem(
        ERROR,
        "Modality contradicts the DICOM header",
        "Correct the table, or check that the folder holds the right series.",
    ),
    "bad-label": Problem(FATAL, "A label is neither 0 nor 1", "Write 0, 1 or nothing (unknown)."),
    "impossible-age": Problem(ERROR, "Impossible age", "Correct it, or leave it empty."),
    "age-contradiction": Problem(
        WARNING, "Age differs between table and header", "Check that the row belongs to this series."
    ),
    "unknown-sex": Problem(WARNING, "Unknown sex", "Write Male, Female or nothing."),
    "sex-contradiction": Problem(
        ERROR,
        "One patient, two sexes",
        "Two patients share an identifier, or a row is wrong: correct it before making folds.",
    ),
    "present-without-location": Problem(
        ERROR, "Positive without a location", "Set the location, or leave the location cells empty (unknown)."
    ),
    "location-without-present": Problem(
        ERROR, "Location without 'Aneurysm Present'", "Set 'Aneurysm Present' to 1, or clear the location."
    ),
    # Localizers
    "positive-without-localizer": Problem(
        WARNING,
        "Positive without a localizer",
        "Add its point if it is known; until then the case has no place to learn from.",
    ),
    "localizer-in-negative": Problem(
        ERROR, "Localizer in a negative series", "Correct 'Aneurysm Present' or remove the point."
    ),
    "localizer-not-in-labels": Problem(
        ERROR,
        "Localizer's location is labelled 0",
        "Correct the row of train.csv or the location of the point.",
    ),
    "location-without-localizer": Problem(
        WARNING, "A positive location has no localizer", "Add its point, or correct the location column."
    ),
    "localizer-unknown-series": Problem(ERROR, "Localizer of an unknown series", _POINT),
    "localizer-unknown-image": Problem(ERROR, "Localizer on an image that is not in the series", _POINT),
    "localizer-no-frame": Problem(
        ERROR,
        "Multi-frame localizer without a valid frame",
        "Add the 0-based frame 'f', or remove the point.",
    ),
    "localizer-outside": Problem(ERROR, "Localizer outside its image", _POINT),
    "localizer-unparsable": Problem(
        ERROR,
        "Coordinates cannot be read",
        "Write them as {'x': 258.4, 'y': 261.4}, with 'f' in multi-frame series.",
    ),
    "localizer-unknown-location": Problem(
        ERROR, "Unknown location name", "Write one of the 13 names of the columns of train.csv."
    ),
    "localizer-two-locations": Problem(
        WARNING,
        "One point, two locations",
        "Keep the right location, unless it marks two aneurysms that touch.",
    ),
    "duplicate-localizer": Problem(WARNING, "Localizer is listed twice", "Keep one of the rows."),
    "localizer-in-air": Problem(
        ERROR,
        "Localizer in air",
        "The point is not on a vessel: check the image it names, and x and y (column and row).",
    ),
    "localizer-wrong-side": Problem(
        ERROR,
        "Left and right are swapped",
        "Look at the point in a viewer and correct its location and the row of train.csv.",
    ),
    "localizer-far-from-aneurysm": Problem(
        ERROR,
        "Localizer far from the aneurysm mask",
        "Check point and mask; one of them belongs to another place.",
    ),
    "localizer-far-from-vessel": Problem(
        WARNING,
        "Localizer far from the named artery",
        "Check the location name, the point and the vessel mask.",
    ),
    # Masks
    "mask-unreadable": Problem(ERROR, "Mask cannot be used", _REDRAW),
    "mask-without-series": Problem(WARNING, "Mask without a series", "Copy the series, or remove the mask."),
    "mask-shape": Problem(ERROR, "Mask has another matrix than its image", _REDRAW),
    "mask-affine": Problem(ERROR, "Mask lies elsewhere than its image", _REDRAW),
    "mask-empty": Problem(ERROR, "Mask is empty", _REDRAW),
    "mask-values": Problem(
        ERROR,
        "Mask has unknown label values",
        "Renumber the labels; RSNA vessels are 1 to 13 (14 for vessels without a name).",
    ),
    "mask-in-air": Problem(ERROR, "Mask lies in air", _REDRAW),
    "mask-misplaced": Problem(ERROR, "Vessel mask does not lie on vessels", _REDRAW),
    "mask-wrong-side": Problem(
        ERROR,
        "Left and right labels of the mask are swapped",
        "Swap the labels, or check the mask's orientation.",
    ),
    "mask-in-negative": Problem(
        ERROR, "Aneurysm mask in a negative case", "Correct the label or remove the mask."
    ),
    # Across cases
    "duplicate-images": Problem(
        ERROR,
        "The same images under two names",
        "Keep one of them. Under two patients they would leak from training into validation.",
    ),
    "duplicate-across-folds": Problem(
        FATAL,
        "The same images in two folds",
        "Keep one of them, or give both one patient identifier and make the folds again.",
    ),
    "same-series-twice": Problem(ERROR, "One series UID in two folders", "Keep one of the folders."),
    "one-patient": Problem(
        WARNING,
        "One patient identifier for most series",
        "The anonymisation wrote the same PatientID everywhere: patients cannot be told apart, and folds would leak or be empty. Restore pseudonyms.",
    ),
    "study-of-two-patients": Problem(
        WARNING, "One study, two patients", "Check the patient identifiers: both may be the same person."
    ),
    "patient-in-two-folds": Problem(
        FATAL,
        "Patient in several folds",
        "Keep one fold per patient, or delete the fold file so that it is made again.",
    ),
    "patient-without-fold": Problem(
        FATAL,
        "Patient without a fold",
        "Make the folds again for the data as they are now, under a new experiment name.",
    ),
    "bad-folds": Problem(
        FATAL,
        "The fold file cannot be used",
        "Give a .csv or .parquet with the columns patient_id and fold (0, 1, ...).",
    ),
}
