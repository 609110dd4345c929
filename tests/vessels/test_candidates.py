import numpy as np
import pytest
from synthetic_trees import SACS, TREE, cube, draw

from aneurysm.data.scan import Lesion
from aneurysm.vessels.candidates import (
    CANDIDATE_FEATURES,
    Candidate,
    candidate_graph_features,
    propose,
)
from aneurysm.vessels.features import NODE_FEATURES
from aneurysm.vessels.graph import build_graph
from aneurysm.vessels.node_labels import label_nodes
from aneurysm.vessels.peaks import evidence_peaks

GRID = cube()


def ball(centre: np.ndarray, radius: float) -> np.ndarray:
    return draw(GRID, [(centre, centre, radius, radius)])


def bulge_score(graph) -> np.ndarray:
    return np.clip(graph.node_features[:, NODE_FEATURES.index("bulge_volume")] / 5, 0, 1)


@pytest.mark.parametrize("name", SACS)
def test_geometry_alone_puts_the_first_candidate_on_the_sac(name: str):
    sac = SACS[name]
    graph = build_graph(draw(GRID, [*TREE, sac]), GRID)
    found = propose(graph, bulge_score(graph))
    assert np.linalg.norm(found[0].centre_mm - sac[0]) < 3.0
    centres = np.array([c.centre_mm for c in found])
    gaps = np.linalg.norm(centres[:, None] - centres[None], axis=-1)[np.triu_indices(len(found), 1)]
    assert len(found) <= 8 and gaps.min() >= 5.0
    scores = [c.score for c in found]
    assert scores == sorted(scores, reverse=True)


def test_evidence_pulls_the_centre_off_the_vessel():
    graph = build_graph(draw(GRID, TREE), GRID)
    centre = np.array([36.0, 40.0, 18.0])
    score = np.exp(-np.linalg.norm(graph.position - [36, 36, 18], axis=1))
    found = propose(graph, score, 0.9 * ball(centre, 1.6), GRID)
    assert np.linalg.norm(found[0].centre_mm - centre) < 0.6
    assert np.linalg.norm(graph.position[found[0].node] - centre) < 6


def test_evidence_far_from_any_vessel_becomes_a_candidate():
    graph = build_graph(draw(GRID, TREE), GRID)
    lost = np.array([60.0, 12.0, 12.0])
    found = propose(graph, np.full(len(graph), 0.05), 0.8 * ball(lost, 2.0), GRID)
    assert np.linalg.norm(found[0].centre_mm - lost) < 0.6
    assert found[0].score == pytest.approx(0.08, rel=1e-5) and found[0].node >= 0


def test_specks_of_evidence_do_not_crowd_out_the_nodes():
    graph = build_graph(draw(GRID, TREE), GRID)
    scores = np.full(len(graph), 0.01)
    scores[len(graph) // 2] = 0.2
    specks = sum(ball(np.array([60.0, 6.0 + 8 * i, 8.0]), 1.5) for i in range(6))
    found = propose(graph, scores, 0.9 * specks, GRID, max_candidates=4)
    assert found[0].score == pytest.approx(0.2)
    far = [np.linalg.norm(graph.position - c.centre_mm, axis=1).min() > 8 for c in found]
    assert sum(far) == 2
    none = propose(graph, scores, 0.9 * specks, GRID, max_candidates=4, max_orphans=0)
    assert all(np.linalg.norm(graph.position - c.centre_mm, axis=1).min() < 8 for c in none)


def test_an_empty_graph_falls_back_on_the_evidence():
    graph = build_graph(np.zeros(GRID.shape, bool), GRID)
    assert propose(graph, np.zeros(0)) == []
    evidence = 0.6 * ball(np.array([20.0, 20, 20]), 2) + 0.9 * ball(np.array([50.0, 50, 50]), 2)
    found = propose(graph, np.zeros(0), evidence, GRID)
    assert [round(c.score, 2) for c in found] == [0.9, 0.6]
    assert [c.node for c in found] == [-1, -1]
    features = candidate_graph_features(graph, found[0])
    assert features.shape == (len(CANDIDATE_FEATURES),) and features[-1] == 0


def test_peaks_are_separate_and_sorted():
    evidence = 0.5 * ball(np.array([20.0, 20, 20]), 2) + 0.7 * ball(np.array([30.0, 20, 20]), 2)
    centres, heights = evidence_peaks(evidence, GRID, 0.3, 5.0)
    np.testing.assert_allclose(centres, [[30, 20, 20], [20, 20, 20]], atol=0.5)
    np.testing.assert_allclose(heights, [0.7, 0.5], rtol=1e-5)
    assert len(evidence_peaks(0 * evidence, GRID, 0.3, 5.0)[0]) == 0


def test_every_sac_has_a_positive_node_and_far_nodes_are_healthy():
    sac = SACS["sidewall"]
    graph = build_graph(draw(GRID, [*TREE, sac]), GRID)
    mask = (ball(np.array(sac[0]), sac[2]) & ~draw(GRID, TREE)).astype(np.uint8)
    gap = np.linalg.norm(graph.position - np.array(sac[0]), axis=1)
    for target in (
        label_nodes(graph, aneurysm=mask, grid=GRID),
        label_nodes(graph, [Lesion(np.array(sac[0]), radius_mm=sac[2])]),
        label_nodes(graph, [Lesion(np.array(sac[0]))]),
    ):
        assert target[np.argmin(gap)] == 1
        assert np.all(target[gap > 12] == 0)
        assert np.isnan(target).any()
        assert 1 <= np.nansum(target) <= 10
    assert np.all(label_nodes(graph) == 0)
    far = Lesion(np.array([0.0, 0, 0]), radius_mm=2.0)  # a sac that the vessel mask missed
    assert np.all(label_nodes(graph, [far]) == 0)


def test_candidate_features_are_those_of_its_node():
    sac = SACS["sidewall"]
    graph = build_graph(draw(GRID, [*TREE, sac]), GRID)
    candidate = propose(graph, bulge_score(graph))[0]
    features = candidate_graph_features(graph, candidate)
    np.testing.assert_array_equal(features[: len(NODE_FEATURES)], graph.node_features[candidate.node])
    named = dict(zip(CANDIDATE_FEATURES, features, strict=True))
    assert named["node_score"] == pytest.approx(candidate.score) and named["on_graph"] == 1
    assert named["bulge_volume_within_5mm"] >= named["bulge_volume"]
    assert np.isfinite(features).all()


def test_bad_scores_and_missing_grids_are_refused():
    graph = build_graph(draw(GRID, TREE), GRID)
    with pytest.raises(ValueError, match="finite score per node"):
        propose(graph, np.zeros(3))
    with pytest.raises(ValueError, match="finite score per node"):
        propose(graph, np.full(len(graph), np.nan))
    with pytest.raises(ValueError, match="without its grid"):
        propose(graph, np.zeros(len(graph)), np.zeros(GRID.shape))
    with pytest.raises(ValueError, match="finite centre"):
        Candidate(np.array([np.nan, 0, 0]), 0.5, 0, 1.0)
