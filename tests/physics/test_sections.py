import numpy as np
import pytest

from aneurysm.physics.lumen import wall_function
from aneurysm.physics.reference_vessels import tube_with_sac
from aneurysm.physics.sections import cross_sections, cut_across, resample_path, star_quadrature


def cut(tube, sections: int = 6, points: int = 24):
    path = resample_path(tube.path, tube.tangent, tube.radius, step_mm=0.5)
    assert path is not None
    lumen = wall_function(tube.prob, tube.spacing, 1.2, path.position)
    assert lumen is not None
    return cross_sections(lumen, path, sections, points)


@pytest.mark.parametrize("axis", [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.5, -0.3)])
def test_parabolic_profile_carries_its_flux_through_every_section(tube, axis):
    vessel = tube(shape=(37, 37, 37), axis=axis)
    sections = cut(vessel)
    axis = vessel.tangent[0]
    area = sections.weight_mm2.sum(1)
    assert area == pytest.approx(np.pi * 16, rel=0.06)
    off = sections.points - (sections.points @ axis)[..., None] * axis
    r2 = (off**2).sum(-1) / (area[:, None] / np.pi)
    flux = (sections.weight_mm2 * 2 * (1 - r2)).sum(1)
    assert flux == pytest.approx(area, rel=0.02)  # mean speed 1
    np.testing.assert_allclose(sections.tangent, np.tile(axis, (6, 1)), atol=1e-12)


def test_centreline_off_the_axis_changes_little(tube):
    straight, shifted = (cut(tube(offset=offset)).weight_mm2.sum(1) for offset in (0.0, 1.2))
    assert shifted == pytest.approx(straight, rel=0.02)


def test_cuts_through_the_mouth_of_a_sac_are_avoided(tube):
    sections = cut(tube(shape=(40, 29, 47), sac=None))
    with_sac = cut(tube(shape=(40, 47, 29), sac=(1.3, 2.04)))
    for cuts, gap in ((sections, 0.0), (with_sac, 2.5)):
        assert (np.abs(cuts.points[..., 0].mean(1)) > gap).all()


def test_tangents_follow_the_order_of_the_path_whatever_their_sign_and_length(tube):
    vessel = tube()
    tangent = vessel.tangent * np.where(np.arange(len(vessel.path)) % 2, -3.0, 0.5)[:, None]
    path = resample_path(vessel.path, tangent, vessel.radius, step_mm=0.5)
    assert path is not None
    np.testing.assert_allclose(path.tangent, np.tile([1.0, 0.0, 0.0], (len(path.tangent), 1)), atol=1e-12)


def test_points_beyond_the_ends_are_not_beside_the_path(tube):
    vessel = tube()
    path = resample_path(vessel.path, vessel.tangent, vessel.radius, step_mm=0.5)
    assert path is not None
    end = vessel.path[-1, 0]
    points = np.array([[end - 0.6, 2.0, 0.0], [end + 0.6, 2.0, 0.0], [vessel.path[0, 0] - 0.6, 0.0, 0.0]])
    np.testing.assert_array_equal(path.between_ends(points), [True, False, False])


def test_stars_integrate_a_parabola_exactly():
    centre, side = np.zeros((1, 3)), np.array([[0.0, 0.0, 2.0]])
    angle = 2 * np.pi * np.arange(8) / 8
    rays = np.stack([0 * angle, np.cos(angle), np.sin(angle)], axis=1)[None]
    points, area = star_quadrature(centre + side, rays, np.full((1, 8), 1.5))
    r2 = ((points - side) ** 2).sum(-1)
    assert area.sum() == pytest.approx(np.pi * 1.5**2, rel=1e-12)
    assert (area * (1.5**2 - r2)).sum() == pytest.approx(np.pi / 2 * 1.5**4, rel=1e-12)
    np.testing.assert_allclose(points[..., 0], 0)


def test_a_cut_across_an_open_mouth_is_not_closed():
    wall = tube_with_sac(half_length=6.0)
    at = np.array([[-4.0, 0.3, 0.2], [0.0, 0.0, 0.0], [4.0, 0.0, -0.3]])
    centre, rays, distance, closed = cut_across(wall, at, np.tile([1.0, 0.0, 0.0], (3, 1)), np.ones(3), 16)
    np.testing.assert_array_equal(closed, [True, False, True])
    # Off the axis by a third of the radius: centring leaves a tenth of that.
    assert np.abs(centre[[0, 2], 1:]).max() < 0.04 and distance[[0, 2]] == pytest.approx(1, abs=0.05)
    np.testing.assert_allclose(rays @ [1.0, 0.0, 0.0], 0, atol=1e-12)


def test_a_path_can_be_turned_round_and_cut(tube):
    vessel = tube(radius=3.0)
    path = resample_path(vessel.path, vessel.tangent, np.linspace(3, 2, len(vessel.path)), step_mm=0.5)
    assert path is not None
    back = path.reversed()
    assert back.arc_mm[0] == 0 and (np.diff(back.arc_mm) > 0).all() and back.radius_mm[0] == 2
    np.testing.assert_array_equal(back.position[::-1], path.position)
    np.testing.assert_allclose(np.gradient(back.position[:, 0]), 0.5 * back.tangent[:, 0], rtol=0.05)
    part = path.stretch(10, 21)
    assert part.arc_mm[0] == 0 and part.arc_mm[-1] == pytest.approx(path.arc_mm[20] - path.arc_mm[10])
    np.testing.assert_array_equal(part.position, path.position[10:21])
    assert len(part.tangent) == len(part.radius_mm) == 11


def test_a_path_in_one_place_is_no_path():
    assert resample_path(np.zeros((4, 3)), np.ones((4, 3)), np.ones(4), 0.5) is None


@pytest.mark.parametrize("points", [25, 9])
def test_points_per_section_make_whole_rays(tube, points):
    with pytest.raises(ValueError, match="multiple of 3"):
        cut(tube(), points=points)
