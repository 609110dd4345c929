"""Trees of tiny images with the very file names of OpenNeuro ds003949 and ds005096."""

import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from aneurysm.data.sources.bids import BidsSource
from aneurysm.data.sources.bids_people import Participants

AFFINE = np.diag([-0.4, -0.4, 0.7, 1.0])
IMAGE = np.random.default_rng(0).integers(0, 500, (6, 7, 5)).astype(np.int16)


def write(path: Path, array: np.ndarray = IMAGE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, AFFINE), path)


def one_voxel(number: int) -> np.ndarray:
    """A lesion of one voxel, at another place for every number."""
    mask = np.zeros(IMAGE.shape, np.uint8)
    mask.flat[number % mask.size] = 1
    return mask


def session_of(name: str) -> tuple[str, str]:
    return re.search(r"(sub-\d+)_(ses-\d+)", name).groups()


def test_every_image_and_lesion_of_ds003949_is_assigned(shared_data, tmp_path):
    meta = shared_data / "openneuro_meta/ds003949"
    names = (meta / "file_list_angio_lesion.txt").read_text().split()
    masks = [n for n in names if n.startswith("derivatives") and n.endswith(".nii.gz")]
    for number, name in enumerate(masks):
        write(tmp_path / name, one_voxel(number))
    for name in names:
        if not name.startswith("derivatives"):
            write(tmp_path / name)
        elif name.endswith(".json"):
            (tmp_path / name).write_text("{}")
    # Beside the masks lie skull-stripped images, corrected images and an atlas of vessel probabilities.
    for name in [n for n in names if n.endswith("_angio.nii.gz")][:40]:
        anat = Path(name).parent
        stem = Path(name).name.removesuffix("_angio.nii.gz")
        write(tmp_path / "derivatives/manual_masks" / anat / f"{stem}_desc-brain_mask_angio.nii.gz")
        write(tmp_path / "derivatives/N4_bias_field_corrected" / anat / f"{stem}_desc-lesionfree_mask.nii.gz")
        atlas = tmp_path / "derivatives/registrations/vesselMNI_2_angioTOF" / anat
        write(atlas / f"{stem}_desc-vesselMNI_mask.nii.gz", IMAGE / 1000)
        sidecar = meta / "sidecars" / f"{stem}_angio.json"
        if sidecar.is_file():
            shutil.copy(sidecar, tmp_path / anat)
    shutil.copy(meta / "participants.tsv", tmp_path)
    shutil.copy(meta / "participants.json", tmp_path)

    source = BidsSource(tmp_path)
    index = source.index().set_index("series_uid")
    expected: dict[tuple[str, str], list[int]] = {}
    for number, name in enumerate(masks):
        expected.setdefault(session_of(name), []).append(number)
    groups = pd.read_csv(meta / "participants.tsv", sep="\t", dtype=str)
    group = {(r.participant_id, f"ses-{r.exam_date}"): r.group for r in groups.itertuples()}
    assert len(index) == 296 and index["patient_id"].nunique() == 284 and len(expected) == 167
    assert (index["modality"] == "MRA").all() and not index["has_vessel_mask"].any()
    for uid, row in index.iterrows():
        session = session_of(uid)
        count = len(expected.get(session, []))
        assert row["has_aneurysm_mask"] == (count > 0), uid
        assert row["present"] == (group[session] == "patient"), uid
        assert row["patient_id"] == session[0] and (tmp_path / row["path"]).is_file()
        if count or row["present"] == 0:
            assert row["lesions"] == count
    # One patient's session has no mask although participants.tsv calls it a patient's.
    odd = index[index["note"] != ""]
    assert odd.index.tolist() == ["sub-482_ses-20140210_angio"] and np.isnan(odd["lesions"].iloc[0])
    for uid in [u for u in index.index if len(expected.get(session_of(u), [])) > 1][:6]:
        case = source.case(uid)
        marked = {
            tuple(np.rint(case.scan.source.to_index(one.centre_mm)).astype(int)) for one in case.lesions
        }
        assert marked == {
            tuple(int(i) for i in np.argwhere(one_voxel(number))[0]) for number in expected[session_of(uid)]
        }


def test_every_session_of_ds005096_is_assigned(shared_data, tmp_path):
    """Masks lie in folders named in words, some were drawn on CT, some sessions have two angiographies."""
    meta = shared_data / "openneuro_meta/ds005096"
    lines = (meta / "aneurysm_tables.csv").read_text().splitlines()[1:]  # rows have 8 or 19 cells
    table = pd.DataFrame([line.split(",")[:3] for line in lines], columns=["subject", "session", "Segment"])
    table = table[table["session"].str.startswith("ses-")]  # three rows name a subject instead
    images = {p.stem for p in (meta / "sidecars").glob("*.json")}
    have = {session_of(name) for name in images}
    wanted = sorted(set(zip(table["subject"], table["session"], strict=True)))
    images |= {f"{sub}_{ses}_acq-tra_angio" for sub, ses in wanted if (sub, ses) not in have}
    for name in sorted(images):
        sub, ses = session_of(name)
        write(tmp_path / sub / ses / "anat" / f"{name}.nii.gz")
        if (meta / "sidecars" / f"{name}.json").is_file():
            shutil.copy(meta / "sidecars" / f"{name}.json", tmp_path / sub / ses / "anat")
    lesions: dict[tuple[str, str], int] = {}
    for (sub, ses), rows in table.groupby(["subject", "session"]):
        folder = tmp_path / "derivatives" / sub / ses / "anat"
        for segment in sorted(set(rows["Segment"])):
            parent = "arent" in segment
            place = "Nifti with Parent Artery" if parent else "Nifti Aneurysm Only"
            number = lesions.get((sub, ses), 0)
            write(folder / place / f"{segment}.nii", one_voxel(number + (50 if parent else 0)))
            lesions[sub, ses] = number + (not parent)
        write(folder / "Mask" / f"{sub}_{ses}_aneurysm_mask.nii")
        write(folder / "Slicer" / "Segmentation-label.nii")
        (folder / "3D Model").mkdir()
        (folder / "3D Model/Aneurysm Only.stl").touch()
    drawn_on_ct = tmp_path / "derivatives/sub-003/ses-20171220/ct/Nifti Aneurysm Only/Aneurysm.nii"
    write(drawn_on_ct, one_voxel(1))
    for name in ("participants.tsv", "participants.json"):
        shutil.copy(meta / name, tmp_path)

    source = BidsSource(tmp_path)
    index = source.index().set_index("series_uid")
    assert set(index.index) == images and index["patient_id"].nunique() == len({i[:7] for i in images})
    for uid, row in index.iterrows():
        count = lesions.get(session_of(uid), 0)
        assert row["has_aneurysm_mask"] == (count > 0), uid
        assert row["present"] == 1 if count else np.isnan(row["present"]), uid
        assert np.isnan(row["age"]) and row["sex"] == "" and not row["has_vessel_mask"]
    uid = next(u for u in index.index if lesions.get(session_of(u), 0) == 2)
    case = source.case(uid)
    assert len(case.lesions) == 2 and case.vessel is None and case.present is True


def test_two_angiographies_of_a_session_share_or_name_their_mask(tmp_path):
    for acq in ("tra", "highres"):
        write(tmp_path / f"sub-1/ses-1/anat/sub-1_ses-1_acq-{acq}_angio.nii.gz")
    write(
        tmp_path / "derivatives/m/sub-1/ses-1/anat/sub-1_ses-1_acq-tra_desc-Lesion_1_mask.nii.gz",
        one_voxel(3),
    )
    index = BidsSource(tmp_path).index().set_index("series_uid")
    assert index["has_aneurysm_mask"].to_dict() == {
        "sub-1_ses-1_acq-highres_angio": False, "sub-1_ses-1_acq-tra_angio": True,
    }  # fmt: skip
    assert (index["present"] == 1).all()
    write(tmp_path / "derivatives/m/sub-1/ses-1/anat/sub-1_ses-1_desc-Lesion_2_mask.nii.gz", one_voxel(9))
    source = BidsSource(tmp_path)
    assert source.index()["lesions"].tolist() == [1, 2]


MONTHS_AND_CODES = {"age": {"Units": "months"}, "sex": {"Levels": {"1": "Male", "2": "Female"}}}
DESCRIBED_CODES = {"sex": {"Levels": {"1": {"Description": "male"}}}}


@pytest.mark.parametrize(
    ("header", "row", "described", "age", "sex"),
    [
        ("participant_id\tage\tsex", "sub-1\t45\tF", None, 45, "F"),
        ("participant_id\tage\tsex", "sub-1\tn/a\tn/a", None, None, ""),
        ("participant_id\tage\tsex", "1\t89+\tmale", None, 89, "M"),
        ("participant_id\tage\tgender", "sub-1\t45 years\tFemale", None, 45, "F"),
        ("participant_id\tAge\tSex", "sub-1\t045Y\tO", None, 45, ""),
        ("participant_id\tage\tsex", "sub-1\t540\t2", MONTHS_AND_CODES, 45, "F"),
        ("participant_id\tage\tsex", "sub-1\t45\t1", DESCRIBED_CODES, 45, "M"),
        ("participant_id\tage\tsex", "sub-1\t45\t1", None, 45, ""),
        ("participant_id", "sub-1", None, None, ""),
        ("participant_id\tage\tsex", "sub-2\t45\tF", None, None, ""),
    ],
)  # fmt: skip
def test_participants(tmp_path, header, row, described, age, sex):
    (tmp_path / "participants.tsv").write_text(f"{header}\n{row}\n", encoding="utf-8-sig")
    if described is not None:
        (tmp_path / "participants.json").write_text(json.dumps(described))
    person = Participants(tmp_path).person("sub-1", "ses-1")
    assert person.sex == sex and (np.isnan(person.age) if age is None else person.age == age)


def test_sessions_sidecars_and_missing_tables(tmp_path, caplog):
    write(tmp_path / "sub-1/ses-2/anat/sub-1_ses-2_angio.nii.gz")
    write(tmp_path / "sub-1/ses-1/anat/sub-1_ses-1_angio.nii.gz")
    (tmp_path / "sub-1/ses-2/anat/sub-1_ses-2_angio.json").write_text(
        '{"PatientAge": "047Y", "PatientSex": "F", "Modality": "CT"}'
    )
    (tmp_path / "sub-1/ses-1/anat/sub-1_ses-1_angio.json").write_text("{broken")
    index = BidsSource(tmp_path).index().set_index("series_uid")
    assert "participants.tsv is missing" in caplog.text and "not readable as JSON" in caplog.text
    assert index.loc["sub-1_ses-2_angio", ["age", "sex", "modality"]].tolist() == [47, "F", "CTA"]
    assert np.isnan(index.loc["sub-1_ses-1_angio", "age"])
    (tmp_path / "participants.tsv").write_text("participant_id\tage\tsite\nsub-1\t40\tA\n")
    (tmp_path / "sub-1/sub-1_sessions.tsv").write_text("session_id\tage\nses-1\t41\nses-2\tn/a\n")
    index = BidsSource(tmp_path).index().set_index("series_uid")
    assert index.loc["sub-1_ses-1_angio", "age"] == 41 and index.loc["sub-1_ses-2_angio", "age"] == 40
    assert set(index["site"]) == {"A"}


def test_links_without_content_are_left_out(tmp_path, caplog):
    write(tmp_path / "sub-1/anat/sub-1_angio.nii.gz")
    (tmp_path / "sub-2/anat").mkdir(parents=True)
    (tmp_path / "sub-2/anat/sub-2_angio.nii.gz").symlink_to(tmp_path / ".git/annex/objects/gone")
    assert BidsSource(tmp_path).index()["series_uid"].tolist() == ["sub-1_angio"]
    assert "only the link is here, first sub-2_angio" in caplog.text
