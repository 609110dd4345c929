"""Node scores and heat-map peaks on one scale, and the places they speak of."""

import numpy as np
import pytest
from scipy.special import expit, logit
from synthetic_trees import SACS, TREE, cube, draw

from aneurysm.data.scan import Lesion
from aneurysm.stages.smart_net import GraphSettings, candidates
from aneurysm.vessels.candidates import choose, propose
from aneurysm.vessels.fusion import FLOOR, Fusion
from aneurysm.vessels.geometric_score import geometric_score
from aneurysm.vessels.graph import build_graph
from aneurysm.vessels.peaks import NO_PEAKS, Peaks
from aneurysm.vessels.places import find_places

GRID = cube()
LOST = np.array([60.0, 12.0, 12.0])  # no vessel near


def ball(centre, radius: float) -> np.ndarray:
    return draw(GRID, [(centre, centre, radius, radius)])


@pytest.fixture(scope="module")
def tree():
    return build_graph(draw(GRID, TREE), GRID)


def test_fit_finds_the_odds_that_made_the_data():
    rng = np.random.default_rng(0)
    score, height = rng.uniform(0.02, 0.98, 20000), rng.uniform(0.05, 0.95, 20000)
    bare = rng.random(20000) < 0.3
    odds = -1.0 + 0.7 * np.where(bare, 0, logit(score)) + 0.4 * logit(height) - 0.8 * bare
    hit = (rng.random(20000) < expit(odds)).astype(float)
    hit[::50] = np.nan
    fusion = Fusion.fit(np.where(bare, np.nan, score), height, hit)
    assert fusion is not None
    np.testing.assert_allclose(fusion.values(), (-1.0, 0.7, 0.4, -0.8), atol=0.08)
    found = fusion(np.array([0.5, np.nan]), np.array([0.5, 0.5]))
    np.testing.assert_allclose(found, expit([-1.0, -1.8]), atol=0.03)  # calibrated
    assert Fusion.from_figures(fusion.figures()) == fusion
    assert Fusion.from_figures({"candidate_recall": 1.0}) is None


def test_a_score_that_misleads_gets_no_weight_and_one_class_no_fit():
    score = np.linspace(0.1, 0.9, 50)
    fusion = Fusion.fit(score, np.full(50, FLOOR), (score < 0.5).astype(float))
    assert fusion is not None and fusion.node == 0
    assert Fusion.fit(score, np.full(50, FLOOR), np.zeros(50)) is None
    assert Fusion.mean([None, None]) is None
    mean = Fusion.mean([None, Fusion(0, 1, 1, 0), Fusion(2, 3, 1, 0)])
    assert mean == Fusion(1, 2, 1, 0)


def test_sources_give_nodes_peaks_or_both(tree):
    evidence = 0.8 * ball(LOST, 2.0)
    score = np.full(len(tree), 0.05)
    alone = propose(tree, score, evidence, GRID, source="heatmap")
    assert [c.source for c in alone] == ["heatmap"] and np.linalg.norm(alone[0].centre_mm - LOST) < 0.6
    assert alone[0].score == pytest.approx(0.8, rel=1e-5)
    without = propose(tree, score, evidence, GRID, source="graph")
    assert all(c.source == "graph" and np.linalg.norm(c.centre_mm - LOST) > 8 for c in without)
    both = {c.source for c in propose(tree, score, evidence, GRID, source="union")}
    assert both == {"graph", "heatmap"}
    with pytest.raises(ValueError, match="graph, heatmap or union"):
        propose(tree, score, evidence, GRID, source="everything")


def test_a_fitted_scale_decides_between_a_node_and_a_peak(tree):
    peaks = Peaks(LOST[None], np.array([0.9]))
    score = np.full(len(tree), 0.01)
    score[len(tree) // 2] = 0.6
    places = find_places(tree, score, peaks)
    trusting, doubting = Fusion(0.0, 1.0, 1.0, 0.0), Fusion(0.0, 1.0, 1.0, -9.0)
    assert choose(tree, places, trusting, 3, 5.0)[0].source == "heatmap"
    best = choose(tree, places, doubting, 3, 5.0)
    assert best[0].source == "graph" and best[0].score > best[1].score
    few = choose(tree, places, trusting, 8, 5.0, min_score=0.5)
    assert len(few) == 1 and few[0].score >= 0.5


def test_a_peak_beside_a_vessel_marks_its_nodes(tree):
    beside = Peaks(np.array([[36.0, 40.0, 18.0]]), np.array([0.7]))
    places = find_places(tree, np.full(len(tree), 0.1), beside)
    assert len(places.height) == len(tree)  # it is no place of its own
    marked = places.height > FLOOR
    assert marked.any() and not marked.all()
    np.testing.assert_allclose(places.centre_mm[marked], np.repeat(beside.centre_mm, marked.sum(), 0))


def test_hits_are_certain_near_and_unclear_a_little_farther(tree):
    places = find_places(tree, np.zeros(len(tree)), NO_PEAKS, "graph")
    lesion = Lesion(np.array([36.0, 36.0, 20.0]), 2.0)
    gap = np.linalg.norm(places.centre_mm - lesion.centre_mm, axis=1)
    hit = places.hits((lesion,), 5.0)
    assert (
        (hit[gap <= 5] == 1).all()
        and np.isnan(hit[(gap > 5) & (gap <= 8)]).all()
        and (hit[gap > 8] == 0).all()
    )


@pytest.mark.parametrize("name", SACS)
def test_geometry_alone_ranks_the_sac_first(name: str):
    graph = build_graph(draw(GRID, [*TREE, SACS[name]]), GRID)
    score = geometric_score(graph)
    assert score.min() >= 0 and score.max() <= 1
    best = choose(graph, find_places(graph, score, NO_PEAKS, "graph"), None, 1, 5.0)[0]
    assert np.linalg.norm(best.centre_mm - SACS[name][0]) < 3.0


def test_peaks_are_kept_whole(tmp_path):
    peaks = Peaks(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), np.array([0.9, 0.2]))
    peaks.save(tmp_path / "p.safetensors")
    again = Peaks.load(tmp_path / "p.safetensors")
    np.testing.assert_array_equal(again.centre_mm, peaks.centre_mm)
    np.testing.assert_array_equal(again.height, peaks.height)
    assert len(again.above(0.5)) == 1
    NO_PEAKS.save(tmp_path / "none.safetensors")
    assert len(Peaks.load(tmp_path / "none.safetensors")) == 0


def test_the_region_is_the_nearest_named_artery():
    arteries = np.zeros(GRID.shape, np.uint8)
    arteries[draw(GRID, TREE[:1])] = 2  # Basilar Tip
    arteries[draw(GRID, TREE[1:2])] = 14  # without a name
    settings = GraphSettings(2.0, 8, 5.0, source="heatmap")
    peaks = Peaks(np.array([[36.0, 41.0, 15.0], LOST]), np.array([0.9, 0.8]))
    graph = build_graph(np.zeros(GRID.shape, bool), GRID)
    found = candidates(graph, np.zeros(0, np.float32), peaks, GRID, settings, arteries=arteries)
    assert [c.region for c in found] == ["Basilar Tip", ""]
    assert [c.region for c in candidates(graph, np.zeros(0, np.float32), peaks, GRID, settings)] == ["", ""]
