import numpy as np
import pytest
from synthetic_trees import SACS, TREE, canonical, cube, draw

from aneurysm.vessels.features import EDGE_FEATURES, NODE_FEATURES, sample_at_nodes, with_features
from aneurysm.vessels.graph import JUNCTION, build_graph


@pytest.fixture(scope="module")
def healthy():
    grid = cube()
    return build_graph(draw(grid, TREE), grid)


@pytest.mark.parametrize("name", SACS)
def test_a_sac_stands_out_in_several_features(name: str):
    grid = cube()
    sac = SACS[name]
    graph = build_graph(draw(grid, [*TREE, sac]), grid)
    near = np.linalg.norm(graph.position - np.array(sac[0]), axis=1) < sac[2] + 3
    winners = [
        feature
        for i, feature in enumerate(NODE_FEATURES)
        if graph.node_features[near, i].max() > 1.15 * max(graph.node_features[~near, i].max(), 0.05)
    ]
    assert "bulge_volume" in winners
    assert len(winners) >= 3


def test_healthy_trees_show_no_bulge_and_no_fat_tip(healthy):
    column = dict(zip(NODE_FEATURES, healthy.node_features.T, strict=True))
    assert column["tip_fatness"].max() < 0.25
    assert healthy.bulge_mm3.max() < 15
    assert column["radius_ratio"].max() < 0.3
    assert np.abs(column["volume_ratio_6mm"]).max() < 0.8


def test_features_are_of_order_one(healthy):
    assert healthy.node_features.shape == (len(healthy), len(NODE_FEATURES))
    assert healthy.edge_features.shape == (len(healthy.edges), len(EDGE_FEATURES))
    assert np.abs(healthy.node_features).max() <= 4 and np.abs(healthy.edge_features).max() <= 4


def test_murray_vanishes_where_the_law_holds():
    grid = cube(96, 0.6)
    wide = 3.0
    thin = wide / 2 ** (1 / 3)
    fork = [((28, 28, 5), (28, 28, 28), wide, wide)]
    fork += [((28, 28, 28), (28, 28 + side, 48), thin, thin) for side in (-17, 17)]
    graph = build_graph(draw(grid, fork), grid)
    murray = graph.node_features[graph.kind == JUNCTION, NODE_FEATURES.index("murray")]
    assert np.abs(murray).max() < 0.3


def test_sampling_against_a_slow_ball():
    grid = canonical((40, 44, 36), (1.0, 0.8, 0.9))
    graph = build_graph(draw(grid, [((16, 17, 5), (16, 17, 35), 2.0, 2.0)]), grid)
    volume = np.random.default_rng(0).random(grid.shape).astype(np.float32)
    mean, top = sample_at_nodes(graph, volume, grid, radius_mm=3.0)
    centres = grid.to_mm(np.moveaxis(np.indices(grid.shape), 0, -1))
    for node in range(len(graph)):
        home = grid.to_mm(np.rint(grid.to_index(graph.position[node])))
        found = volume[np.linalg.norm(centres - home, axis=-1) <= 3.0 + 1e-6]
        assert mean[node] == pytest.approx(found.mean(), rel=1e-4)
        assert top[node] == pytest.approx(found.max())


def test_volumes_become_columns(healthy):
    grid = cube()
    volume = np.full(grid.shape, 0.25, np.float32)
    richer = with_features(healthy, {"vessel": volume, "aneurysm": 2 * volume}, grid)
    assert richer.node_names[-4:] == ("vessel_mean", "vessel_max", "aneurysm_mean", "aneurysm_max")
    np.testing.assert_allclose(
        richer.node_features[:, -4:], [[0.25, 0.25, 0.5, 0.5]] * len(healthy), rtol=1e-5
    )
    with pytest.raises(ValueError, match="already"):
        with_features(richer, {"vessel": volume}, grid)
    with pytest.raises(ValueError, match="NaN"):
        with_features(healthy, {"vessel": np.full(grid.shape, np.nan)}, grid)
    empty = build_graph(np.zeros(grid.shape, bool), grid)
    assert with_features(empty, {"vessel": volume}, grid).node_features.shape == (0, len(NODE_FEATURES) + 2)
