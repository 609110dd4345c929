"""The command: what it takes for what, its exit codes, and cases that break or kill their worker."""

import json
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from aneurysm.check.__main__ import main
from aneurysm.check.case import Outcome, check_case
from aneurysm.check.items import Item
from aneurysm.check.layout import find_layout
from aneurysm.check.runner import check_data
from aneurysm.data.errors import UserError


def volume_file(path: Path, volume: np.ndarray, spacing: float = 1.0, unit: str = "mm") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(volume, np.diag([spacing, spacing, spacing, 1.0]))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, path)
    return path


def noise(seed: int = 0, shape: tuple[int, int, int] = (40, 40, 40)) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, 100.0, shape).astype(np.float32)


def codes(folder: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for finding in json.loads((folder / "check.json").read_text())["findings"]:
        found.setdefault(finding["series_uid"], set()).add(finding["code"])
    return found


def test_kinds_are_recognised(phantoms: Path, tmp_path: Path) -> None:
    assert find_layout(phantoms).kind == "rsna"
    assert find_layout(phantoms.parent).root == phantoms  # one folder too high
    layout = find_layout(phantoms / "series")
    assert (layout.kind, len(layout.items)) == ("dicom", 4)
    assert find_layout(phantoms / "segmentations").kind == "volumes"
    volume_file(tmp_path / "bids/sub-01/anat/sub-01_angio.nii.gz", noise())
    assert find_layout(tmp_path / "bids").kind == "bids"
    assert find_layout(tmp_path / "bids", "volumes").kind == "volumes"
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "readme.txt").write_text("hello")
    with pytest.raises(UserError, match=r"no DICOM files.*1 x \.txt"):
        find_layout(tmp_path / "none")


def test_one_series_in_two_folders_is_one_case_and_a_copy_is_two(phantoms: Path, tmp_path: Path) -> None:
    first = sorted((phantoms / "series").iterdir())[0]
    files = sorted(first.iterdir())
    for i, path in enumerate(files):
        (tmp_path / "parts" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "parts" / str(i % 2) / path.name)
    (item,) = find_layout(tmp_path / "parts").items
    assert len(item.files) == len(files)
    assert main([str(tmp_path / "parts"), "--jobs", "1", "--out", str(tmp_path / "a")]) == 0
    assert codes(tmp_path / "a") == {}
    shutil.copytree(first, tmp_path / "copies" / "a")
    shutil.copytree(first, tmp_path / "copies" / "b")
    assert main([str(tmp_path / "copies"), "--jobs", "1", "--out", str(tmp_path / "b")]) == 0
    assert codes(tmp_path / "b") == {first.name: {"same-series-twice"}}


def test_exit_codes(phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(phantoms), "--limit", "2", "--jobs", "1"]) == 0
    assert "2 of 4 case(s)" in capsys.readouterr().out
    assert main([str(tmp_path / "absent")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    for wrong in (["--jobs", "0"], ["--folds", "absent.csv"], ["--kind", "pet"]):
        with pytest.raises(SystemExit, match="2"):
            main([str(phantoms), *wrong])
    broken = shutil.copytree(phantoms, tmp_path / "broken")
    (broken / "train.csv").unlink()
    assert main([str(broken), "--jobs", "1", "--out", str(tmp_path / "out")]) == 1
    assert "table-missing" in codes(tmp_path / "out")[""]


def test_folds_are_checked(phantoms: Path, tmp_path: Path) -> None:
    patients = sorted({item.row["SeriesInstanceUID"] for item in find_layout(phantoms).items if item.row})
    assert len(patients) == 4
    folds = tmp_path / "folds.csv"
    folds.write_text("patient_id,fold\nphantom-3-00000,0\nphantom-3-00000,2\nphantom-3-00001,2\n")
    assert main([str(phantoms), "--folds", str(folds), "--jobs", "1", "--out", str(tmp_path)]) == 1
    found = codes(tmp_path)
    assert found.pop("") == {"bad-folds"}  # 0 and 2, but no 1
    assert sorted(len(c) for c in found.values()) == [1, 1, 1]
    assert set().union(*found.values()) == {"patient-in-two-folds", "patient-without-fold"}
    folds.write_text("who,fold\na,0\n")
    assert main([str(phantoms), "--folds", str(folds), "--jobs", "1", "--limit", "1"]) == 1


def test_bids(tmp_path: Path) -> None:
    root = tmp_path / "bids"
    root.mkdir()
    (root / "participants.tsv").write_text(
        "participant_id\tage\tsex\tgroup\nsub-01\t230\tF\tcontrol\nsub-02\tn/a\tn/a\tpatient\n"
    )
    volume_file(root / "sub-01/anat/sub-01_angio.nii.gz", noise(1))
    volume_file(root / "sub-02/anat/sub-02_angio.nii.gz", noise(2))
    mask = np.zeros((40, 40, 40), np.uint8)
    mask[10:14, 10:14, 10:14] = 1
    volume_file(root / "derivatives/masks/sub-01/anat/sub-01_desc-Lesion_1_mask.nii.gz", mask)
    volume_file(root / "derivatives/masks/sub-02/anat/sub-02_desc-Lesion_1_mask.nii.gz", mask[:30])
    (root / "sub-03/anat").mkdir(parents=True)
    (root / "sub-03/anat/sub-03_angio.nii.gz").symlink_to("../../.git/annex/objects/absent")
    assert main([str(root), "--jobs", "1", "--out", str(tmp_path / "out")]) == 1
    assert codes(tmp_path / "out") == {
        "sub-01_angio": {"impossible-age", "mask-in-negative"},
        "sub-02_angio": {"mask-shape"},
        "sub-03_angio": {"missing-file"},
    }


def test_volumes(tmp_path: Path) -> None:
    root = tmp_path / "volumes"
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[5:20, 5:20, 5:20] = 3
    volume_file(root / "a_tof.nii.gz", noise(1))
    volume_file(root / "copy_of_a.nii.gz", noise(1))
    volume_file(root / "b_cta.nii.gz", noise(2) + 1500)  # no soft tissue at its values
    volume_file(root / "metres.nii.gz", noise(3), spacing=0.001)
    volume_file(root / "empty.nii.gz", np.zeros((40, 40, 40), np.int16))
    broken = noise(4)
    broken[3, 4, 5] = np.nan
    volume_file(root / "broken.nii.gz", broken)
    volume_file(root / "labels.nii.gz", labels)
    path = volume_file(root / "cut.nii.gz", noise(5))
    path.write_bytes(path.read_bytes()[:1000])
    assert main([str(root), "--jobs", "1", "--out", str(tmp_path / "out")]) == 1
    assert codes(tmp_path / "out") == {
        "a_tof": {"duplicate-images"},
        "copy_of_a": {"duplicate-images"},
        "b_cta": {"not-hounsfield"},
        "metres": {"implausible-spacing"},
        "empty": {"constant-image"},
        "broken": {"nan-voxels"},
        "labels": {"looks-like-labels"},
        "cut": {"unreadable"},
    }


def test_what_the_reader_of_volumes_repairs_or_refuses(tmp_path: Path) -> None:
    root = tmp_path / "volumes"
    volume_file(root / "in_metres.nii.gz", noise(1), spacing=0.001, unit="meter")
    volume_file(root / "without_unit.nii.gz", noise(2), unit="unknown")
    volume_file(root / "series_of_two.nii.gz", np.stack([noise(3), noise(4)], axis=-1))
    image = nibabel.Nifti1Image(noise(5), None)
    image.header.set_xyzt_units("mm")
    image.header["sform_code"] = image.header["qform_code"] = 0
    nibabel.save(image, root / "nowhere.nii.gz")
    image = nibabel.Nifti1Image(noise(6), np.diag([1.0, 1, 1, 1]))
    image.header.set_xyzt_units("mm")
    image.set_sform(np.diag([1.0, 1, 1, 1]), code=1)
    image.set_qform(np.diag([-1.0, 1, 1, 1]), code=1)
    nibabel.save(image, root / "mirrored.nii.gz")
    sheared = np.eye(4)
    sheared[0, 1] = 3
    image = nibabel.Nifti1Image(noise(7), sheared)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, root / "sheared.nii.gz")
    assert main([str(root), "--jobs", "1", "--out", str(tmp_path / "out")]) == 1
    assert codes(tmp_path / "out") == {
        "in_metres": {"reader-notes"},
        "without_unit": {"reader-notes"},
        "series_of_two": {"not-one-volume"},
        "nowhere": {"no-orientation"},
        "mirrored": {"two-orientations"},
        "sheared": {"bad-geometry"},
    }


def test_people_are_read_as_the_source_reads_them(tmp_path: Path) -> None:
    root = tmp_path / "bids"
    root.mkdir()
    rows = "sub-01\t90+\tfemale\tn/a\n02\t?\tx\tHealthy\nsub-03\t0\tn/a\tn/a\n"
    (root / "participants.tsv").write_text(f"Participant_ID\tAge\tGender\tGroup\n{rows}")
    mask = np.zeros((40, 40, 40), np.uint8)
    mask[10:14, 10:14, 10:14] = 1
    for i in (1, 2, 3):
        volume_file(root / f"sub-0{i}/anat/sub-0{i}_angio.nii.gz", noise(i))
    volume_file(root / "derivatives/masks/sub-02/anat/sub-02_desc-Lesion_1_mask.nii.gz", mask)
    assert main([str(root), "--jobs", "1", "--out", str(tmp_path / "out")]) == 0
    found = codes(tmp_path / "out")
    assert found == {"sub-02_angio": {"impossible-age", "unknown-sex", "mask-in-negative"}}


def test_tables_are_as_lenient_and_as_strict_as_the_reader(phantoms: Path, tmp_path: Path) -> None:
    root = shutil.copytree(phantoms, tmp_path / "spelled")
    path = root / "train.csv"
    lines = path.read_text().splitlines()
    spelled = [line.replace("CTA", " cta").replace("MRI T1post", "mri t1 post") for line in lines]
    path.write_text("\n".join([spelled[0].replace(",", " , "), *spelled[1:]]))
    assert main([str(root), "--jobs", "1", "--out", str(tmp_path / "a")]) == 0
    assert codes(tmp_path / "a") == {}
    path.write_bytes(
        "\n".join([lines[0] + ",Ort", *(line + ",Köln" for line in lines[1:])]).encode("latin-1")
    )
    assert main([str(root), "--jobs", "1", "--out", str(tmp_path / "b")]) == 1
    assert codes(tmp_path / "b") == {"": {"bad-table"}}


def deadly(item: Item) -> Outcome:
    """Kills its process on one file, raises on another, checks the rest."""
    if item.series_uid == "b":
        os._exit(9)
    if item.series_uid == "c":
        raise KeyError("what nobody foresaw")
    return check_case(item)


def test_a_dying_worker_and_a_failing_check_name_their_case(tmp_path: Path) -> None:
    for i, name in enumerate("abcd"):
        volume_file(tmp_path / f"{name}.nii.gz", noise(i, (20, 20, 20)))
    result = check_data(find_layout(tmp_path), jobs=2, work=deadly)
    found = {finding.series_uid: finding.code for finding in result.findings}
    assert found == {"b": "worker-died", "c": "check-failed"}
    assert [case.series_uid for case in result.cases] == list("abcd")
    assert {case.series_uid for case in result.cases if case.shape} == set("ad")
