"""Patches are the same from memory, from the file and from the whole volume; data sets choose."""

import dataclasses

import numpy as np
import pytest
import torch

from aneurysm.data.errors import ReadError
from aneurysm.data.preparation.chunked import open_arrays
from aneurysm.data.preparation.memory import Remembered
from aneurysm.data.preparation.prepared import PreparedCase, save_prepared
from aneurysm.data.scan import Grid, Lesion
from aneurysm.stages import stored
from aneurysm.stages.patches import (
    aneurysm_patch,
    aneurysm_voxels,
    network_patch,
    probability_patch,
    vessel_patch,
    vessel_voxels,
)
from aneurysm.stages.pretrain import CropDataset
from aneurysm.stages.sampling import Sampling
from aneurysm.stages.segmentation import PatchDataset, SegmentationData
from aneurysm.stages.volumes import aneurysm_target, network_image, vessel_target

SHAPE, SIZE = (70, 50, 101), 24


def case_of(modality: str = "CTA", labels: str = "masks", uid: str = "s") -> PreparedCase:
    """labels: masks | points | negative | unknown."""
    rng = np.random.default_rng(len(modality) + len(labels))
    grid = Grid(SHAPE, np.array([[0, 0, 0.7, 3], [0, 0.7, 0, -9], [0.8, 0, 0, 1], [0, 0, 0, 1.0]]))
    image = rng.normal(0, 1, SHAPE).clip(-4, 8).astype(np.float32)
    vessel = (rng.random(SHAPE) < 0.02).astype(np.uint8) * np.uint8(5) if labels == "masks" else None
    aneurysm = (rng.random(SHAPE) < 0.005).astype(np.uint8) if labels == "masks" else None
    # One of them at the border, where its sphere is cut.
    lesions = (Lesion(grid.to_mm([1, 2, 3])), Lesion(grid.to_mm([40, 20, 60.3]), 4.0))
    lesions = lesions if labels in ("masks", "points") else ()
    present = {"negative": False, "unknown": None}.get(labels, True)
    unknown = np.full(13, np.nan, np.float32)
    return PreparedCase(
        uid, "p", modality, image, grid, vessel, aneurysm, lesions, 50.0, "F", present, unknown, grid, -4.0
    )


def padded(volume: np.ndarray, start: np.ndarray, fill: float) -> np.ndarray:
    wide = np.pad(volume, 60, constant_values=fill)
    return wide[tuple(slice(s + 60, s + 60 + SIZE) for s in start)]


@pytest.mark.parametrize("modality", ["CTA", "T2"])
@pytest.mark.parametrize("labels", ["masks", "points", "negative", "unknown"])
def test_patches_are_parts_of_the_whole_volume(tmp_path, modality, labels):
    path = tmp_path / "case.blosc2"
    save_prepared(case_of(modality, labels), path)
    whole = stored.remembered(path)
    image, vessel, sac = network_image(whole), vessel_target(whole), aneurysm_target(whole)
    for case in (whole, stored.opened(path)):
        for start in ([10, 5, 7], [-9, 40, 90], [-20, -20, -20], [69, 49, 100], [200, 0, 0]):
            start = np.array(start)
            expected = padded(image, start, float(image.min())) if start.max() < 150 else np.full(
                (SIZE,) * 3, image.min()
            )  # fmt: skip
            np.testing.assert_array_equal(network_patch(case, start, SIZE), expected)
            if start.max() > 150:
                continue
            for found, target in ((vessel_patch, vessel), (aneurysm_patch, sac)):
                patch = found(case, start, SIZE)
                assert (patch is None) == (target is None)
                if target is not None:
                    np.testing.assert_array_equal(patch, padded(target, start, 0))
        for voxels, target in ((vessel_voxels(case), vessel), (aneurysm_voxels(case), sac)):
            assert (voxels is None) == (target is None)
            if target is not None:
                flat = np.flatnonzero(target)
                assert len(voxels) == len(flat)
                for k in range(0, len(flat), max(len(flat) // 7, 1)):
                    assert int(voxels[k]) == flat[k]


def test_probabilities_by_patches(tmp_path):
    path, rng = tmp_path / "products" / "s.blosc2", np.random.default_rng(0)
    volumes = {"vessel": rng.random(SHAPE).astype(np.float32), "aneurysm": np.zeros(SHAPE, np.float32)}
    stored.write_probabilities(path, volumes)
    read = stored.read_probabilities(path)
    assert set(read) == set(volumes) and np.abs(read["vessel"] - volumes["vessel"]).max() <= 0.5 / 255 + 1e-6
    for start in (np.array([10, 5, 7]), np.array([-9, 40, 90])):
        patches = [
            probability_patch(stored.probabilities_at(path, whole), "vessel", start, SIZE)
            for whole in (True, False)
        ]
        np.testing.assert_array_equal(patches[0], patches[1])
        np.testing.assert_array_equal(patches[0], padded(read["vessel"], start, 0))
    with pytest.raises(ReadError, match="force=true"):
        stored.opened_probabilities(tmp_path / "missing.blosc2")


@pytest.fixture
def paths(tmp_path):
    made = {}
    for i, (modality, labels) in enumerate([("CTA", "masks"), ("T2", "masks"), ("MRA", "points")]):
        path = tmp_path / f"{i}.blosc2"
        save_prepared(case_of(modality, labels, uid=f"s{i}"), path)
        stored.write_probabilities(tmp_path / f"p{i}.blosc2", {"vessel": np.full(SHAPE, i / 5, np.float32)})
        made[f"s{i}"] = path
    return made


def test_training_data_do_not_depend_on_where_they_are_read(tmp_path, paths, monkeypatch):
    upstream = {uid: tmp_path / f"p{uid[1:]}.blosc2" for uid in paths}
    need = sum(stored.opened(p).nbytes + 4 * int(np.prod(SHAPE)) for p in paths.values())
    batches = []
    for limit, whole in ((need, True), (need - 1, False)):
        memory = Remembered(stored._bytes, limit)
        monkeypatch.setattr(stored, "_memory", memory)
        data = SegmentationData(
            list(paths.values()), [], ("vessel", "aneurysm"), patch=16, batch=2, steps=4,
            sampling=Sampling(vessel=0.2, thin=0.2, sac=0.3, bright=0.2), seed=3, upstream=upstream,
        )  # fmt: skip
        assert data.whole == whole
        patches = PatchDataset(data, data.train_groups, 8, (3, 0), augment=True)
        crops = CropDataset(list(paths.values()), 4, 16, (3, 0), augment=True, whole=whole)
        batches.append([t for i in range(8) for t in patches[i]] + [crops[i] for i in range(4)])
        # From files nothing whole is ever held.
        assert len(memory) == (6 if whole else 0)
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one, other)


def test_more_processes_need_more_memory(paths, monkeypatch):
    need = sum(stored.opened(p).nbytes for p in paths.values())
    monkeypatch.setattr(stored, "_memory", Remembered(stored._bytes, 2 * need))
    files = list(paths.values())
    assert stored.fit_in_memory(files, processes=2) and not stored.fit_in_memory(files, processes=3)


def test_only_so_many_bytes_are_remembered(paths, monkeypatch):
    one = stored.opened(paths["s0"]).nbytes
    monkeypatch.setattr(stored, "_memory", Remembered(stored._bytes, 2 * one))
    first = stored.remembered(paths["s0"])
    assert stored.remembered(paths["s0"]) is first
    for uid in ("s1", "s2", "s1"):
        stored.remembered(paths[uid])
    assert len(stored._memory) == 2 and stored.remembered(paths["s0"]) is not first
    stored.limit_memory(1e-9)
    stored.remembered(paths["s0"])
    assert len(stored._memory) == 1  # what is being worked with stays


def test_a_patch_reads_a_small_part_of_the_file(tmp_path, monkeypatch):
    path = tmp_path / "case.blosc2"
    save_prepared(case_of(), path)
    read = []
    original = type(open_arrays(path)).read

    def counted(self, name, window=None):
        out = original(self, name, window)
        read.append(out.size)
        return out

    monkeypatch.setattr(type(open_arrays(path)), "read", counted)
    case = stored.opened(path)
    network_patch(case, np.array([5, 5, 5]), SIZE)
    vessel_patch(case, np.array([5, 5, 5]), SIZE)
    assert int(vessel_voxels(case)[17]) > 0
    assert read == [SIZE**3, SIZE**3, SIZE**3, 1]


def test_damaged_files(tmp_path):
    path = tmp_path / "case.blosc2"
    save_prepared(case_of(), path)
    content = path.read_bytes()
    for damage, message in (
        (content[:-1], "not a prepared case"),
        (content[:20], "not a prepared case"),
        (b"safetensors" + content, "not a prepared case"),
        (b"", "not a prepared case"),
        (content.replace(b'"format": 3', b'"format": 2'), "prepared format 2"),
    ):
        other = tmp_path / f"{len(damage)}-{message[:3]}.blosc2"
        other.write_bytes(damage)
        with pytest.raises(ReadError, match=message):
            stored.open_prepared(other)


def test_equal_cases_give_equal_bytes_and_bounded_errors(tmp_path):
    case = case_of()
    wide = dataclasses.replace(case, image=case.image * 50)
    for number, (one, bound) in enumerate(
        ((case, 2**-11), (wide, (wide.image.max() - wide.image.min()) / 65534))
    ):
        files = [tmp_path / f"{number}{copy}.blosc2" for copy in "ab"]
        for file in files:
            save_prepared(one, file)
        assert files[0].read_bytes() == files[1].read_bytes()
        again = stored.open_prepared(files[0])
        rounding = 4 * np.finfo(np.float32).eps * np.abs(one.image).max()
        assert np.abs(again.load().image - one.image).max() <= bound + rounding
        assert again.image_range == (again.load().image.min(), again.load().image.max())
        assert again.load().image.min() == one.image.min()
