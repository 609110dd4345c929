"""A graph attention network learns sacs on a dozen trees and finds them on trees it has not seen."""

import numpy as np
import pytest
import torch
from synthetic_trees import cube, draw, random_tree

from aneurysm.data.scan import Lesion
from aneurysm.nets.vessel_gat import VesselGat
from aneurysm.vessels.candidates import propose
from aneurysm.vessels.features import EDGE_FEATURES, NODE_FEATURES
from aneurysm.vessels.graph import VesselGraph, build_graph
from aneurysm.vessels.node_labels import label_nodes

GRID = cube(80, 0.9)
Example = tuple[VesselGraph, np.ndarray, np.ndarray]  # graph, target of its nodes, sac centre


def examples(count: int, seed: int) -> list[Example]:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        tree, centre, radius = random_tree(rng, sac=i % 4 != 3)
        graph = build_graph(draw(GRID, tree), GRID)
        lesions = [Lesion(centre, radius)] if radius else []
        found.append((graph, label_nodes(graph, lesions), centre))
    return found


def tensors(graph: VesselGraph) -> tuple[torch.Tensor, ...]:
    index, attr = graph.to_edge_index()
    batch = torch.zeros(len(graph), dtype=torch.long)
    return torch.tensor(graph.node_features), torch.tensor(index), torch.tensor(attr), batch


@pytest.fixture(autouse=True)
def one_thread():
    """Graphs this small gain nothing from threads, and threads that wait for each other lose a lot."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_sacs_on_unseen_trees_are_found():
    torch.manual_seed(0)
    train, held_out = examples(12, seed=1), examples(8, seed=2)
    parts = [tensors(graph) for graph, _, _ in train]
    starts = np.cumsum([0] + [len(graph) for graph, _, _ in train])[:-1]
    x = torch.cat([p[0] for p in parts])
    index = torch.cat([p[1] + int(start) for p, start in zip(parts, starts, strict=True)], dim=1)
    attr = torch.cat([p[2] for p in parts])
    batch = torch.cat([p[3] + i for i, p in enumerate(parts)])
    target = torch.tensor(np.concatenate([y for _, y, _ in train]))
    known = ~torch.isnan(target)

    net = VesselGat(len(NODE_FEATURES), len(EDGE_FEATURES), hidden=16, layers=2, heads=2)
    net.calibrate(x, attr)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            net(x, index, attr, batch)[known], target[known], pos_weight=torch.tensor(4.0)
        )
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]

    net.eval()
    gaps = []
    for graph, _, centre in held_out:
        if np.isnan(centre).any():
            continue
        with torch.no_grad():
            score = torch.sigmoid(net(*tensors(graph))).numpy()
        best = propose(graph, score, max_candidates=2)
        gaps.append(min(np.linalg.norm(c.centre_mm - centre) for c in best))
    assert len(gaps) == 6
    assert sum(gap <= 5 for gap in gaps) >= 5
