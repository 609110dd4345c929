"""Where patches are cut: shares hold, thin vessels get their due, draws can be repeated."""

import numpy as np
import pytest

from aneurysm.data.preparation.prepared import PreparedCase, save_prepared
from aneurysm.data.scan import Grid, Lesion
from aneurysm.stages import stored
from aneurysm.stages.sampling import Sampling, bright_voxels, local_radius, thin_shares

SHAPE = (40, 48, 56)
SPACING = (0.5, 0.5, 0.5)


def discs(radius: float, centre: tuple[float, float]) -> np.ndarray:
    h, w = np.mgrid[: SHAPE[1], : SHAPE[2]]
    return np.broadcast_to((h - centre[0]) ** 2 + (w - centre[1]) ** 2 <= radius**2, SHAPE)


WIDE, THIN = discs(6, (12, 14)), discs(1, (30, 40))


def case_of(vessels: bool = True, sac: bool = True, modality: str = "CTA") -> PreparedCase:
    affine = np.diag([*SPACING, 1.0])
    grid = Grid(SHAPE, affine)
    rng = np.random.default_rng(0)
    lumen = WIDE | THIN
    bone = discs(3, (40, 8))
    image = rng.normal(0, 0.2, SHAPE).astype(np.float32) + 3 * lumen + 4 * bone
    image = (image if modality != "T2" else -image).astype(np.float32)
    mask = np.zeros(SHAPE, np.uint8)
    mask[10:14, 20:24, 20:24] = 1
    unknown = np.full(13, np.nan, np.float32)
    lesions = (Lesion(grid.to_mm([12, 22, 22]), 1.0),) if sac else ()
    return PreparedCase(
        "s", "p", modality, image, grid, lumen.astype(np.uint8) if vessels else None,
        mask if sac and vessels else None, lesions, 50.0, "F", sac, unknown, grid, -4.0,
    )  # fmt: skip


@pytest.fixture
def save(tmp_path):
    made = []

    def one(**settings):
        path = tmp_path / f"{len(made)}.blosc2"
        made.append(path)
        save_prepared(case_of(**settings), path)
        return path

    return one


def places(sampling: Sampling, path, count: int = 600, whole: bool = True) -> np.ndarray:
    case = stored.case_at(path, whole)
    return np.array([sampling.centre(case, path, np.random.default_rng((0, i))) for i in range(count)])


def share(places: np.ndarray, mask: np.ndarray) -> float:
    return float(mask[tuple(places.T)].mean())


def test_radii_are_those_of_the_tubes():
    lumen = WIDE | THIN
    radius = np.zeros(SHAPE)
    radius.ravel()[np.flatnonzero(lumen)] = local_radius(lumen, np.array(SPACING))
    assert np.median(radius[WIDE]) == pytest.approx(6 * 0.5, abs=0.5)
    assert np.median(radius[THIN]) == pytest.approx(1 * 0.5, abs=0.3)
    assert radius[WIDE].min() > 2 * radius[THIN].max()


def test_thin_draws_a_millimetre_of_thin_vessel_as_often_as_one_of_wide(save):
    path = save(sac=False)
    alike, thin = places(Sampling(vessel=1.0), path), places(Sampling(vessel=0.0, thin=1.0), path)
    assert share(alike, THIN) < 0.08 < 0.3 < share(thin, THIN) < 0.8
    assert share(alike, WIDE | THIN) == share(thin, WIDE | THIN) == 1
    assert np.ptp(thin[:, 0]) > 30  # all along the vessel


def test_shares_hold(save):
    path = save()
    sac = case_of().aneurysm > 0
    found = places(Sampling(vessel=0.2, thin=0.2, sac=0.3, bright=0.2), path, 1500)
    lumen = WIDE | THIN
    assert share(found, sac) == pytest.approx(0.3, abs=0.05)
    assert share(found, lumen & ~sac) == pytest.approx(0.4, abs=0.06)
    bone = discs(3, (40, 8))
    assert share(found, bone) == pytest.approx(0.2, abs=0.05)
    anywhere = places(Sampling(vessel=0.0), path, 1500)
    assert share(anywhere, lumen) == pytest.approx(lumen.mean(), abs=0.03)


def test_what_a_scan_does_not_have_falls_back(save):
    no_sac = places(Sampling(vessel=0.0, sac=1.0), save(sac=False))
    assert share(no_sac, WIDE | THIN) == 1
    unknown = save(vessels=False)
    for sampling in (Sampling(0, 1.0), Sampling(0, 0, 0, 1.0), Sampling(1.0)):
        assert share(places(sampling, unknown), WIDE) < 0.5
    ball = places(Sampling(vessel=0.0, sac=1.0), unknown)  # only the point of the lesion is known
    assert np.abs(ball - [12, 22, 22]).max() <= 3
    assert bright_voxels(unknown) is None and len(thin_shares(unknown)) == 0


@pytest.mark.parametrize("modality", ["CTA", "T2"])
def test_bright_voxels_are_bright_and_no_vessels(save, modality):
    path = save(modality=modality)
    voxels = bright_voxels(path)
    case = stored.remembered(path)
    seen = -case.image if modality == "T2" else case.image
    lumen = WIDE | THIN | (case.aneurysm > 0)
    assert len(voxels) and not lumen.ravel()[voxels].any()
    assert (seen.ravel()[voxels] >= np.median(seen[lumen])).all() and (np.diff(voxels) > 0).all()


def test_draws_are_the_same_from_file_and_in_another_process(save):
    path = save()
    sampling = Sampling(vessel=0.2, thin=0.3, sac=0.2, bright=0.2)
    one = places(sampling, path, 60)
    thin_shares.cache_clear()
    bright_voxels.cache_clear()
    np.testing.assert_array_equal(one, places(sampling, path, 60, whole=False))
    sampling.look_up([path])
    assert thin_shares.cache_info().currsize == bright_voxels.cache_info().currsize == 1


def test_impossible_shares_are_refused():
    for shares in ({"vessel": 0.9, "thin": 0.2}, {"bright": -0.1}):
        with pytest.raises(ValueError, match="do not exceed 1 together"):
            Sampling(**shares)
