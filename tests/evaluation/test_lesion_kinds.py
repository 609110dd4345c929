"""Sacs from the true masks, and where they sit, on trees whose kinds are known."""

import numpy as np
import pandas as pd
import pytest

from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.data.scan import Grid, Lesion
from aneurysm.evaluation.candidates import candidate_recall
from aneurysm.evaluation.lesion_kinds import BIFURCATION, SIDE_WALL, UNKNOWN, lesion_facts

SHAPE, SPACING = (84, 84, 84), 0.75
AFFINE = np.array([[0, 0, SPACING, 0], [0, SPACING, 0, 0], [SPACING, 0, 0, 0], [0, 0, 0, 1.0]])
GRID = Grid(SHAPE, AFFINE)
POINTS = GRID.to_mm(np.argwhere(np.ones(SHAPE)))
# A parent that splits in two: ends (x, y, z) and radius in mm.
TREE = [
    ((31, 31, 5), (31, 31, 28), 2.4),
    ((31, 31, 28), (31, 12, 52), 1.8),
    ((31, 31, 28), (31, 50, 52), 1.7),
]
SPLIT, WALL = np.array([31, 31, 33.0]), np.array([31, 35.4, 14.0])


def capsule(first, last, radius: float) -> np.ndarray:
    a, b = np.array(first, float), np.array(last, float)
    along = np.clip((POINTS - a) @ (b - a) / max(float((b - a) @ (b - a)), 1e-9), 0, 1)
    return (np.linalg.norm(POINTS - a - along[:, None] * (b - a), axis=1) < radius).reshape(SHAPE)


def scan(*sacs: tuple[np.ndarray, float], vessel: bool = True, masks: bool = True) -> PreparedCase:
    tree = np.any([capsule(*part) for part in TREE], axis=0)
    aneurysm = np.zeros(SHAPE, np.uint8)
    for k, (centre, radius) in enumerate(sacs, 1):
        aneurysm[capsule(centre, centre, radius) & ~tree] = k
    lesions = tuple(Lesion(centre, radius) for centre, radius in sacs)
    image = np.zeros(SHAPE, np.float32)
    return PreparedCase(
        "1", "1", "CTA", image, GRID, tree.astype(np.uint8) if vessel else None, aneurysm if masks else None,
        lesions, None, None, True, np.full(13, np.nan, np.float32), GRID, 0.0,
    )  # fmt: skip


def test_kinds_of_sacs_whose_place_is_known():
    both = lesion_facts(scan((SPLIT, 3.0), (WALL, 2.5)))
    assert [fact.kind for fact in both] == [BIFURCATION, SIDE_WALL]
    swapped = lesion_facts(scan((WALL, 2.5), (SPLIT, 3.0)))  # whatever their numbers
    assert [fact.kind for fact in swapped] == [SIDE_WALL, BIFURCATION]
    distal = lesion_facts(scan((np.array([34.5, 19, 43.0]), 2.0)))
    assert distal[0].kind == SIDE_WALL


def test_what_masks_do_not_tell_is_unknown():
    assert [f.kind for f in lesion_facts(scan((WALL, 2.5), vessel=False))] == [UNKNOWN]
    points = lesion_facts(scan((WALL, 2.5), masks=False))
    assert points[0].sac is None and points[0].kind == UNKNOWN
    adrift = lesion_facts(scan((np.array([10.0, 10, 40]), 2.0)))
    assert adrift[0].sac is not None and adrift[0].kind == UNKNOWN


def test_a_sac_holds_its_own_voxels_only():
    wall = lesion_facts(scan((SPLIT, 3.0), (WALL, 2.5)))[1]
    assert wall.sac is not None
    inside = wall.sac.holds(np.stack([WALL, SPLIT, WALL + np.array([0, 0, 9.0]), [-50.0, 0, 0]]))
    assert inside.tolist() == [True, False, False, False]


def test_inside_a_long_sac_is_a_hit_beyond_five_millimetres():
    tip = np.array([31.0, 31, 70])
    case = scan((SPLIT, 3.0))
    long = np.zeros(SHAPE, np.uint8)
    long[capsule((50, 50, 20), (50, 50, 40), 1.5)] = 1
    case.aneurysm[:] = long  # type: ignore[index]
    lesion = Lesion(np.array([50.0, 50, 30]), 2.0)
    case = PreparedCase(**{**vars(case), "lesions": (lesion,)})
    facts = {"1": lesion_facts(case)}
    rows = pd.DataFrame({"series_uid": "1", "x_mm": [tip[0], 50.0], "y_mm": [tip[1], 50.0]})
    rows = rows.assign(z_mm=[tip[2], 38.0], score=[0.9, 0.5])  # 8 mm from the centre, inside
    assert candidate_recall(rows, {"1": [lesion]}, ["1"], facts=facts).rank.tolist() == [2]
    assert np.isinf(candidate_recall(rows, {"1": [lesion]}, ["1"]).rank[0])
    with pytest.raises(ValueError, match="Give one per lesion"):
        candidate_recall(rows, {"1": [lesion, lesion]}, ["1"], facts=facts)
