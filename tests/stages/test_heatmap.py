"""The heat map's target on prepared cases, and its channel in patches and volumes."""

import dataclasses

import numpy as np
import pytest
import torch

from aneurysm.data.preparation.prepared import PreparedCase, open_prepared, save_prepared
from aneurysm.data.scan import Grid, Lesion
from aneurysm.nets.unet import UNet3D
from aneurysm.stages.heatmap import heatmap_patch
from aneurysm.stages.sampling import Sampling
from aneurysm.stages.smart_net import SegmenterData, channels, segment
from aneurysm.stages.stored import write_probabilities
from aneurysm.stages.volumes import View


def case(lesions: tuple[Lesion, ...], present: bool | None, uid: str = "1.2") -> PreparedCase:
    shape, affine = (24, 20, 22), np.eye(4)
    affine[:3, :3] = [[0, 0, 0.5], [0, 0.75, 0], [1.0, 0, 0]]
    grid = Grid(shape, affine)
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return PreparedCase(
        uid, uid, "CTA", image, grid, None, None, lesions, None, None, present,
        np.full(13, np.nan, np.float32), grid, float(image.min()),
    )  # fmt: skip


def test_bells_are_round_in_mm_and_join_by_their_maximum():
    one, other = np.array([5.0, 6.0, 10.0]), np.array([5.0, 6.0, 16.0])  # x, y, z
    scan = case((Lesion(one), Lesion(other, 3.0)), True)
    target = heatmap_patch(scan, np.array([2, 0, 0]), 20, sigma_mm=2.0)
    assert target is not None and target.dtype == np.float32 and target.shape == (20, 20, 20)
    voxels = np.argwhere(np.ones(target.shape)) + np.array([2, 0, 0])
    gap = [np.linalg.norm(scan.grid.to_mm(voxels) - c, axis=1) for c in (one, other)]
    expected = np.exp(-0.5 * (np.minimum(*gap) / 2.0) ** 2)
    np.testing.assert_allclose(target.ravel(), expected, atol=1e-6)
    assert target.max() == pytest.approx(1.0)


def test_healthy_scans_are_empty_and_unknown_ones_unknown():
    start = np.zeros(3, int)
    empty = heatmap_patch(case((), False), start, 8, 2.0)
    assert empty is not None and not empty.any()
    assert heatmap_patch(case((), True), start, 8, 2.0) is None  # an aneurysm, but nobody knows where
    assert heatmap_patch(case((), None), start, 8, 2.0) is None


def test_points_alone_make_patches_with_a_soft_channel(tmp_path):
    centre = np.array([5.0, 7.0, 12.0])
    paths, upstream = [], {}
    for uid, one in (("1.1", case((Lesion(centre),), True, "1.1")), ("1.2", case((), None, "1.2"))):
        path = tmp_path / f"{uid}.blosc2"
        save_prepared(dataclasses.replace(one), path)
        paths.append(path)
        upstream[uid] = tmp_path / f"{uid}-lumen.blosc2"
        write_probabilities(upstream[uid], {"vessel": np.zeros(one.grid.shape, np.float32)})
    on_sacs = Sampling(vessel=0.0, sac=1.0)
    settings = {"patch": 16, "batch": 2, "steps": 4, "sampling": on_sacs, "seed": 0, "upstream": upstream}
    data = SegmenterData(paths, paths, heatmap_sigma_mm=1.5, **settings)
    peaks = []
    for inputs, target, known in data.train_dataloader():
        assert inputs.shape[1] == 2 and target.shape[1] == 3
        for one, flags in zip(target, known.tolist(), strict=True):
            assert not flags[0]  # no vessel mask
            if flags[2]:  # the scan with a point: its patches are centred near it, after all augmentation
                peaks.append(float(one[2].max()))
                assert 0 < float(one[2].mean()) < 0.2 and flags[1]
            else:
                assert not one[2].any()
    assert peaks and min(peaks) > 0.8
    plain = SegmenterData(paths, paths, **settings)
    assert next(iter(plain.val_dataloader()))[1].shape[1] == 2
    assert open_prepared(paths[0]).lesions


def test_the_volume_of_the_head_has_a_name():
    scan = case((), False)
    net = UNet3D(in_channels=2, out_channels=3, widths=[4, 8])
    torch.manual_seed(0)
    found = segment(net, scan, np.zeros(scan.grid.shape, np.float32), View(16, 0.0), channels("gaussian"))
    assert list(found) == ["vessel", "aneurysm", "heatmap"]
    assert all(v.shape == scan.grid.shape and v.min() >= 0 and v.max() <= 1 for v in found.values())
