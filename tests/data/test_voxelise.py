import sys

import numpy as np
import pytest
from vessel_meshes import tube

from aneurysm.data.scan import Grid
from aneurysm.data.voxelise import VoxelisationError, faults, partial_volume, subdivided, voxelise

pytest.importorskip("vtk", reason="needs aneurysm[mesh]")


def grid(size: int, spacing: float, centre: tuple[float, float, float] = (0, 0, 0)) -> Grid:
    affine = np.zeros((4, 4))
    affine[[0, 1, 2], [2, 1, 0]] = spacing
    affine[:3, 3], affine[3, 3] = np.array(centre) - (size - 1) / 2 * spacing, 1
    return Grid((size,) * 3, affine)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("radius", [1.2, 2.5])
def test_open_tube_has_the_volume_of_a_cylinder(axis: int, radius: float) -> None:
    vertices, faces = tube(radius, 24.0)
    vertices = np.roll(vertices, axis + 1, axis=1)  # along x, y, z
    where = grid(48, 0.6, (0.13, -0.2, 0.07))
    volume = partial_volume(voxelise(vertices, faces, where, 3), 3).sum() * where.voxel_mm3
    assert volume == pytest.approx(np.pi * radius**2 * 24, rel=0.05)


def test_position_is_right_to_a_fraction_of_a_voxel() -> None:
    vertices, faces = tube(3.0, 10.0)
    offset = np.array([4.3, -2.1, 1.7])
    where = grid(40, 0.7)
    share = partial_volume(voxelise(vertices + offset, faces, where, 3), 3)
    index = np.argwhere(share > 0)
    centre = where.to_mm((index * share[share > 0][:, None]).sum(0) / share.sum())
    np.testing.assert_allclose(centre, offset, atol=0.1)


def test_mesh_that_leaves_the_grid_is_cut() -> None:
    vertices, faces = tube(2.0, 60.0)
    where = grid(24, 0.5)
    share = partial_volume(voxelise(vertices, faces, where), 2)
    assert share.sum() * where.voxel_mm3 == pytest.approx(np.pi * 4 * 12, rel=0.05)


def test_nothing_crosses_the_grid() -> None:
    vertices, faces = tube(2.0, 20.0)
    assert not voxelise(vertices + 200, faces, grid(16, 0.5)).any()


def test_partial_volume_is_the_block_mean() -> None:
    inside = np.random.default_rng(0).random((6, 9, 12)) > 0.4
    slow = np.empty((2, 3, 4))
    for i, j, k in np.ndindex(*slow.shape):
        slow[i, j, k] = inside[3 * i : 3 * i + 3, 3 * j : 3 * j + 3, 3 * k : 3 * k + 3].mean()
    np.testing.assert_allclose(partial_volume(inside, 3), slow, rtol=1e-6)


def test_subdivided_voxels_fill_the_voxel() -> None:
    coarse = grid(5, 0.6, (1, 2, 3))
    fine = subdivided(coarse, 3)
    np.testing.assert_allclose(fine.to_mm(np.array([1, 1, 1])), coarse.to_mm(np.array([0, 0, 0])))
    np.testing.assert_allclose(fine.centre_mm, coarse.centre_mm)
    turned = coarse.affine.copy()
    turned[:3, :3] = coarse.affine[:3, :3] @ np.array([[1, 0, 0], [0, 0.8, 0.6], [0, -0.6, 0.8]])
    with pytest.raises(ValueError, match="axis-aligned"):
        subdivided(Grid((5, 5, 5), turned), 2)


def test_floods_and_streaks_are_seen() -> None:
    vertices, _ = tube(2.0, 20.0)
    where = grid(48, 0.6)
    position = where.to_mm(np.stack(np.meshgrid(*map(np.arange, where.shape), indexing="ij"), -1))
    good = (np.hypot(position[..., 0], position[..., 1]) < 2) & (abs(position[..., 2]) < 10)
    missed, leaked = faults(good, where, vertices)
    assert missed == 0 and not leaked.any()
    streak = good.copy()
    streak[24, 24, :] = True
    assert faults(streak, where, vertices)[1].sum() > 20
    assert faults(np.zeros_like(good), where, vertices)[0] == 1


def test_a_sheet_is_no_vessel() -> None:
    """A surface without an inside must not pass as a thin vessel."""
    flat = np.array([[-5, -5, 0.01], [5, -5, 0.01], [0, 5, 0.01], [-5, 5, 0.01]], float)
    with pytest.raises(VoxelisationError, match="no lumen beside"):
        voxelise(flat, np.array([[0, 1, 2], [0, 2, 3]]), grid(24, 0.6))


def test_missing_vtk_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vtk", None)
    with pytest.raises(ImportError, match=r"pip install 'aneurysm\[mesh\]'"):
        voxelise(*tube(2.0, 20.0), grid(16, 0.6))
